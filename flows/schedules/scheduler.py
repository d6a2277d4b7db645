"""Runs the schedules: looks each second what is due, and starts each run in a process of its own.

One process of this kind runs for a state folder. When it or a run of it dies, the next start finds there what was at
work, and lets it go on; when Prefect's server cannot be reached, what is due waits until it can.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

from flows.machine.owners import is_gone, process_name
from flows.machine.server import LocalServer, ServerError, import_prefect, state_folder
from flows.schedules.files import (
    Last,
    Progress,
    Schedule,
    ScheduleError,
    keep_progress,
    pause,
    progress,
    schedules,
)
from flows.schedules.timing import MOST_PAUSE_S, Standing, again, next_due, step
from flows.seeing.log import EventLog
from flows.seeing.notify import URL_VARIABLE
from pipelines.store import home

TICK_S: Final = 1.0
ASK_S: Final = 5.0  # between two looks at what people did on Prefect's page
MOST_DEATHS: Final = 5  # of the runs for one due time, before they are given up: their inputs may be what kills them
RUN: Final = (sys.executable, "-P", "-m", "flows.schedules.run")  # -P: what lies in the folder one is in is no module
SAID_S: Final = 10.0  # for the last words of a run that has ended; its children can hold its output open
FLOWS: Final = Path(__file__).parents[1]
END_S: Final = 90.0  # that runs have to end in when this process stops


@dataclass(slots=True)
class _Run:
    """A run that this process has started."""

    process: subprocess.Popen[str]
    due: float
    asked: bool  # by a person: windows and overlap are not looked at
    stopped: str = ""  # why, when it was
    said: str = ""  # at its end
    listening: threading.Thread | None = None  # to what it says


class Scheduler:
    """Runs all schedules of the state folder. `run` returns after `stop`; what is at work goes on at the next start."""

    def __init__(self, log: EventLog, *, notify: str | None = None, clock: Callable[[], float] = time.time) -> None:
        """`notify`: the URL that runs tell of critical findings."""
        self._log, self._notify, self._clock = log, notify, clock
        self._over = threading.Event()
        self._runs: dict[str, _Run] = {}
        self._put: dict[str, tuple[Schedule, UUID]] = {}  # what Prefect was told
        self._next_ask: dict[str, float] = {}
        self._trouble = ""

    def stop(self) -> None:
        """Let `run` return soon. Safe in a signal handler."""
        self._over.set()

    def run(self) -> None:
        """Raises ScheduleError where another process runs the schedules, ServerError where no server comes up."""
        with self._alone(), LocalServer() as self._server:
            url = self._server.url()
            import_prefect()
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}):
                self._log(
                    "scheduling", schedules=len(list(schedules())), page=url.removesuffix("/api"), pid=os.getpid()
                )
                while not self._over.wait(TICK_S):
                    self._turn()
                self._end()
        self._log("stopped")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (state_folder() / "scheduler.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ScheduleError(
                    f"Another process runs the schedules of {home()} already: leave the work to it, or end it first "
                    "(`scanscribe status` names it)."
                ) from None
            yield

    def _turn(self) -> None:
        """Look at each schedule once. What Prefect cannot be told now is told later; nothing is decided before."""
        import httpx
        from prefect.exceptions import ObjectNotFound

        damaged: list[str] = []
        troubles: list[tuple[str, str]] = []
        try:
            self._server.url()  # starts it again if it has died
            known = {schedule.name: schedule for schedule in schedules(damaged)}
            if self._put.keys() - known.keys() or not self._put:
                self._remove(set(known))
        except Exception as error:  # of the network; Prefect has many types for it
            known = {}
            troubles.append(_trouble(error, "The schedules cannot be looked at"))
        for schedule in known.values():
            try:
                self._look(schedule)
            except ObjectNotFound:  # people can delete deployments on Prefect's page
                self._put.pop(schedule.name, None)
                self._log("deployment-gone", schedule=schedule.name)
            except Exception as error:
                troubles.append(_trouble(error, f"The schedule {schedule.name} cannot be run"))
                if isinstance(error, (ServerError, httpx.TransportError)):
                    break  # it holds for all of them; else the others go on
        if troubles:
            self._say(*troubles[0])
        elif damaged:
            self._say(damaged[0], "schedule")
        elif self._trouble:
            self._log("broken-over")
            self._trouble = ""

    def _say(self, words: str, code: str) -> None:
        if words != self._trouble:
            self._log("broken", message=words, code=code)
        self._trouble = words

    def _remove(self, names: set[str]) -> None:
        from flows.schedules import deployments

        deployments.remove_others(names)
        self._put = {name: told for name, told in self._put.items() if name in names}

    def _look(self, schedule: Schedule) -> None:
        """Decide what is due of a schedule, and do it."""
        from flows.schedules import deployments

        name, now = schedule.name, self._clock()
        if self._put.get(name, (None,))[0] != schedule:
            self._put[name] = schedule, deployments.put(schedule, now)
        deployment = self._put[name][1]
        how_far = self._ended(schedule, progress(schedule))
        busy = how_far.running is not None
        if schedule.paused:
            keep_progress(name, replace(how_far, standing=Standing(now)))
        # The next due time does not wait for a run that has failed; a longer pause is that of a clock that was wrong.
        elif (
            busy
            or not 0 < how_far.held_until - now <= MOST_PAUSE_S
            or now >= next_due(schedule.timing, how_far.standing.settled)
        ):
            self._step(schedule, deployment, how_far, now, busy)
        if now < self._next_ask.get(name, 0.0):
            return
        self._next_ask[name] = now + ASK_S
        if deployments.is_paused(deployment) != schedule.paused:
            pause(name, paused=not schedule.paused)
        waiting = deployments.due(deployment, now)
        asked = [each for each in waiting if each.asked]
        if asked and not busy and progress(schedule).running is None:
            self._start(schedule, progress(schedule), asked[0].due, asked[0].id, asked=True)

    def _step(self, schedule: Schedule, deployment: UUID, how_far: Progress, now: float, busy: bool) -> None:
        from flows.schedules import deployments

        run = self._runs.get(schedule.name)
        done = step(schedule.timing, how_far.standing, now, busy=busy)
        if done.stop and run and not run.stopped and not run.asked:
            open_now = schedule.timing.window is None or schedule.timing.window.is_open(now, schedule.timing.zone)
            self._stop(schedule.name, run, "overlap" if open_now else "window")
        if not done.skipped and done.start is None:
            if (
                done.standing.waiting != how_far.standing.waiting
                or abs(done.standing.settled - how_far.standing.settled) > ASK_S
            ):
                keep_progress(schedule.name, replace(how_far, standing=done.standing))
            return
        waiting = deployments.due(deployment, now)
        for why in dict.fromkeys(why for _, why in done.skipped):
            self._log(
                "run-skipped",
                schedule=schedule.name,
                **_span([due for due, each in done.skipped if each == why]),
                reason=why,
            )
        kept = [due for due in (*done.standing.waiting, done.start) if due is not None]
        for each in waiting:
            if not each.asked and not any(abs(due - each.due) < 1 for due in kept):
                whys = [why for due, why in done.skipped if abs(due - each.due) < 1]
                deployments.cancel(each.id, f"Skipped: {whys[0] if whys else 'not due by the clock of its time zone'}.")
        how_far = replace(how_far, standing=done.standing)
        if done.start is not None:
            self._start(schedule, how_far, done.start, deployments.run_of(deployment, done.start, waiting))
        else:
            keep_progress(schedule.name, how_far)

    def _start(self, schedule: Schedule, how_far: Progress, due: float, flow_run: UUID, *, asked: bool = False) -> None:
        process = subprocess.Popen(
            [*RUN, schedule.name, str(flow_run)],
            stdin=subprocess.PIPE,  # the run ends when this closes, even if this process is killed
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "PREFECT_API_URL": self._server.url(),
                **({URL_VARIABLE: self._notify} if self._notify else {}),  # no argument: others would see its secrets
            },
            start_new_session=True,
        )
        owner = process_name(process.pid)
        try:
            keep_progress(schedule.name, replace(how_far, running=due, flow_run=str(flow_run), owner=owner))
        except OSError:  # what is not on record must not run
            process.kill()
            process.wait()
            raise
        run = self._runs[schedule.name] = _Run(process, due, asked)
        run.listening = threading.Thread(target=self._listen, args=(schedule.name, run), daemon=True)
        run.listening.start()
        self._log(
            "run-started", schedule=schedule.name, due=_text(due), run=str(flow_run), late=round(self._clock() - due, 1)
        )

    def _listen(self, name: str, run: _Run) -> None:
        """Log and count what a run says as it goes, and keep what it says at its end."""
        assert run.process.stdout is not None
        for line in run.process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut off, or is none of ours
                told = json.loads(line)
                if isinstance(told, dict) and "event" in told:
                    self._log(told.pop("event"), schedule=name, **told)
                elif isinstance(told, dict):
                    run.said = line

    def _stop(self, name: str, run: _Run, why: str) -> None:
        """Let a run end after the item that is at work."""
        run.stopped = why
        self._log("run-stopping", schedule=name, due=_text(run.due), reason=why)
        run.process.send_signal(signal.SIGTERM)

    def _ended(self, schedule: Schedule, how_far: Progress) -> Progress:
        """Take note of a run that has ended, of this process or of one before it."""
        from flows.schedules import deployments

        if how_far.running is None:
            return how_far
        name, run = schedule.name, self._runs.get(schedule.name)
        if run is None:
            if how_far.owner and not is_gone(how_far.owner):
                return how_far  # it is still ending
            result, facts, code = _result(-signal.SIGKILL, "")
        elif run.process.poll() is None:
            return how_far
        else:
            if run.listening is not None:
                run.listening.join(SAID_S)
            result, facts, code = _result(run.process.returncode, run.said)
        stopped = run.stopped if run else ""
        flow_run = UUID(how_far.flow_run) if how_far.flow_run else None
        due, now, last = how_far.running, self._clock(), how_far.last
        failures, deaths = (last.failures, last.deaths) if last and last.due == due else (0, 0)
        if run is not None:  # else it ended with the process that ran it, which is not its fault
            failures = failures + 1 if result in ("failed", "died") and not stopped else 0
            deaths += result == "died" and not stopped
        given_up = result == "died" and deaths >= MOST_DEATHS
        if result == "died" and flow_run:
            follows = "it is given up until the next due time" if given_up else "it goes on with a run of its own"
            deployments.crash(flow_run, f"Its process was killed; {follows}.")
        elif stopped and result != "done" and flow_run:
            reason = (
                "The window closed: it goes on when it opens."
                if stopped == "window"
                else "A newer run takes its place."
            )
            deployments.cancel(flow_run, f"Stopped: {reason}")
        elif result != "done" and flow_run:  # left as it is, Prefect would have it start again
            deployments.fail(flow_run, f"It did not end its work ({code}).")
        if stopped in ("window", "end"):
            goes_on = result != "done"
        else:
            goes_on = result in ("failed", "died") and not stopped and not given_up
        if goes_on:
            how_far = replace(how_far, standing=again(how_far.standing, due))
        said = "stopped" if stopped and result != "done" else result
        words = code or _counts(facts)
        failing, repeats = (how_far.last.failing, how_far.last.repeats) if how_far.last else ("", 0)
        wrong = (code or "process-died") if said in ("failed", "died") else ""
        over = result == "done" and failing != ""
        if wrong:
            failing, repeats = wrong, repeats + 1 if failing == wrong else 0
        elif result == "done":
            failing, repeats = "", 0
        last = Last(due, now, said, words, failures, deaths, failing, repeats)
        how_far = replace(how_far, running=None, flow_run=None, owner=None, last=last)
        keep_progress(name, how_far)
        self._runs.pop(name, None)  # only now: what went wrong before is done again
        if wrong:  # told once, until it is over or given up
            final = {"given_up": "true"} if given_up else {"repeats": repeats or None}
            self._log("run-failed", schedule=name, due=_text(due), code=wrong, **final)
        else:
            self._log(f"run-{said}", schedule=name, due=_text(due), code=code or None, **facts)
        if over:
            self._log("run-failed-over", schedule=name)
        return how_far

    def _end(self) -> None:
        """Stop what is at work; it goes on at the next start."""
        for name, run in self._runs.items():
            if not run.stopped:
                self._stop(name, run, "end")
        until = time.monotonic() + END_S
        known = {schedule.name: schedule for schedule in schedules()}
        for name, run in list(self._runs.items()):
            try:
                run.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
            if name in known:
                with contextlib.suppress(Exception):  # Prefect's server may be gone first
                    self._ended(known[name], progress(known[name]))


def _trouble(error: Exception, what: str) -> tuple[str, str]:
    """What is wrong, in words and as a code. Of an unexpected error it is the place: its words can name files."""
    import httpx

    kind = type(error).__name__
    if isinstance(error, (ServerError, ScheduleError)):
        return str(error), error.code
    if isinstance(error, httpx.HTTPStatusError):
        why = f"Prefect's server answers {error.response.status_code}"
        return f"{what} ({why}): trying again; see the server's log.", "prefect-server"
    if isinstance(error, httpx.TransportError):
        return f"Prefect's server does not answer ({kind}): waiting until it does.", "prefect-server"
    if isinstance(error, OSError):
        return f"{what} ({error.strerror or kind}): trying again.", "system"
    place = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(str(FLOWS))][-1]
    where = f"{kind} at {os.path.basename(place.filename)}:{place.lineno}"
    return f"{what} ({where}): this is a fault of the program, report it with this line. Trying again.", "fault"


def _result(code: int, said: str) -> tuple[str, dict[str, int], str]:
    """What came of a run: done, failed or died; its counts; the code of its failure."""
    try:
        told = json.loads(said.strip().rpartition("\n")[2])
    except ValueError:
        return ("died", {}, "") if code < 0 else ("failed", {}, "fault")
    if "code" in told:
        return ("interrupted" if told["code"] == "interrupted" else "failed"), {}, str(told["code"])
    return "done", {name: int(count) for name, count in told.items()}, ""


def _counts(facts: Mapping[str, int]) -> str:
    """`3 reported, 2 already there`; what is none of the reports is left out when there is none of it."""
    names = {"reported": "reported", "already": "already there", "refused": "refused"}
    return ", ".join(f"{count} {names[name]}" for name, count in facts.items() if count or name == "reported")


def _span(times: Sequence[float]) -> dict[str, str | int]:
    """When they were due: that of one, the first and last of many, which are one line for however long a downtime."""
    if len(times) == 1:
        return {"due": _text(times[0])}
    return {"count": len(times), "first": _text(min(times)), "last": _text(max(times))}


def _text(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
