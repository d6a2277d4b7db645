"""`scanscribe schedule`: batches by the clock. `serve` runs them; the others say what there is to run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanscribe.commands.ledger import URL_VARIABLE
from scanscribe.options import (
    Inputs,
    Json,
    LaneOfWorkers,
    LogJson,
    MetricsPort,
    NotifyUrl,
    Out,
    flag,
    takes_settings,
)

if TYPE_CHECKING:
    from flows.schedules.files import Schedule
    from scanscribe.settings import Settings

Name = Annotated[str, typer.Argument(help="The schedule's name.", show_default=False)]

app = typer.Typer(help="Batches by the clock: cron lines, intervals, off-peak hours.", no_args_is_help=True)


@app.command(
    "create",
    epilog='Example: [cyan]scanscribe schedule create nightly archive/ --out reports --cron "0 22 * * *" '
    "--window 22:00-06:00[/]",
)
@takes_settings
def create_schedule(
    name: Name,
    inputs: Inputs,
    out: Out,
    cron: Annotated[
        str | None, typer.Option(help='Minute, hour, day, month, weekday: "30 1 * * 1-5".', show_default=False)
    ] = None,
    every: Annotated[str | None, typer.Option(help="Interval: 15m, 2h, 1d.", show_default=False)] = None,
    time_zone: Annotated[
        str | None, typer.Option(help="Whose clocks count, such as Europe/Berlin. (default the machine's)")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Hours in which work may go on, such as 22:00-06:00; what is left goes on the next time."),
    ] = None,
    overlap: Annotated[
        str, typer.Option(help="A run is due while the former is at work: skip it, queue it, or cancel the former.")
    ] = "skip",
    catch_up: Annotated[str, typer.Option(help="Runs were due while nothing ran them: once, all or none.")] = "once",
    workers: LaneOfWorkers = None,
    replace: Annotated[bool, flag("--replace", "Change a schedule that is there.")] = False,
    *,
    chosen: Settings,
    as_json: Json = False,
) -> None:
    """Let a batch run by the clock."""
    from flows.schedules.files import create
    from flows.schedules.timing import Timing, Window, machine_zone, parse_interval
    from pipelines.run import Job

    timing = Timing(
        time_zone or machine_zone(),
        time.time(),
        cron,
        parse_interval(every) if every else None,
        Window.parse(window) if window else None,
        overlap,  # type: ignore[arg-type]  # checked there
        catch_up,  # type: ignore[arg-type]
    )
    job = Job(tuple(inputs), out, **dict(chosen))
    schedule = create(name, job, timing, workers, replacing=replace)
    _tell(schedule, as_json)
    _warn_without_server()


@app.command("list", epilog="Example: [cyan]scanscribe schedule list[/]")
def list_schedules(as_json: Json = False) -> None:
    """List the schedules: when each runs next, and what came of its last run."""
    from flows.seeing.status import look_at_schedules
    from scanscribe.commands.status import schedule_table
    from scanscribe.console import output

    damaged: list[str] = []
    found = look_at_schedules(damaged=damaged)
    if as_json:
        from dataclasses import asdict

        _print({"schedules": [asdict(each) for each in found]})
    elif found:
        output().print(schedule_table(found, time.time()))
    elif not damaged:
        print("There is no schedule: `scanscribe schedule create --help` shows how to make one.")
    for words in damaged:
        print(f"scanscribe: {words}", file=sys.stderr)
    if found:
        _warn_without_server()


@app.command("pause", epilog="Example: [cyan]scanscribe schedule pause nightly[/]")
def pause_schedule(name: Name, as_json: Json = False) -> None:
    """Start no run of it until it is resumed. A run that is at work goes on."""
    from flows.schedules.files import pause

    _tell(pause(name, paused=True), as_json)


@app.command("resume", epilog="Example: [cyan]scanscribe schedule resume nightly[/]")
def resume_schedule(name: Name, as_json: Json = False) -> None:
    """Let it run again. What was due while it was paused is not made up for."""
    from flows.schedules.files import pause

    _tell(pause(name, paused=False), as_json)


@app.command("delete", epilog="Example: [cyan]scanscribe schedule delete nightly[/]")
def delete_schedule(name: Name, as_json: Json = False) -> None:
    """Take a schedule away. Its reports stay."""
    from flows.schedules.files import delete

    delete(name)
    if as_json:
        _print({"deleted": name})
    else:
        print(f"{name} is deleted.")


@app.command("run", epilog="Example: [cyan]scanscribe schedule run nightly[/]")
def run_schedule(name: Name, as_json: Json = False) -> None:
    """Run a schedule's batch now, here, whatever its hours."""
    from flows.jobs import Crewing, run_batch
    from flows.schedules.files import load
    from scanscribe.cli import run_job

    schedule = load(name)
    crewing = Crewing(schedule.lane, os.environ.get(URL_VARIABLE)) if schedule.lane else None
    run_job(lambda job, listener: run_batch(job, listener, crewing), schedule.job, "Starting", as_json)


@app.command("serve", epilog="Example: [cyan]scanscribe schedule serve[/]")
def serve_schedules(
    log_json: LogJson = False,
    metrics: MetricsPort = None,
    notify: NotifyUrl = None,
) -> None:
    """Run what is due, until SIGTERM or Ctrl-C, which end runs after the item at hand; they go on at the next start."""
    from flows.schedules.scheduler import Scheduler
    from flows.seeing.seeing import seeing
    from pipelines.store import home

    warnings.simplefilter("ignore")
    with seeing("schedule", log_json=log_json, port=metrics, notify=notify, disks={"state": home()}) as seen:
        scheduler = Scheduler(seen.log, notify=notify)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: scheduler.stop())
        scheduler.run()


def _tell(schedule: Schedule, as_json: bool) -> None:
    from flows.schedules.files import next_run
    from scanscribe.commands.status import local_time

    due = next_run(schedule)
    if as_json:
        _print({"name": schedule.name, "when": schedule.timing.words, "paused": schedule.paused, "next": due})
    elif due is None:
        print(f"{schedule.name} is paused.")
    else:
        print(f"{schedule.name}: {schedule.timing.words}, next {local_time(due, schedule.timing.zone)}.")


def _warn_without_server() -> None:
    from flows.seeing.services import services

    if all(each.name != "schedule" for each in services()):
        print("scanscribe: nothing runs the schedules: start `scanscribe schedule serve`.", file=sys.stderr)


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
