"""Schedules: a file each in the state folder says what is run and when; another, how far it is.

The first is written by commands, the second by the process that runs the schedules (`flows.schedules.scheduler`):
neither waits for the other. Prefect has a deployment for each, for its page; what it does not know are paths.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from flows.jobs import Lane, as_plain, from_plain
from flows.machine.server import state_folder
from flows.schedules.timing import ScheduleError, Standing, Timing, Window, next_due, pause_after
from pipelines.run import Job, check_job
from reports.files import atomic_write

_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
STANDING: Final = ".standing"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A job that is run again and again."""

    name: str
    job: Job
    timing: Timing
    lane: Lane | None = None  # of the workers that read; None: the run reads itself
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Last:
    """What came of the last run."""

    due: float
    ended: float
    result: str  # done, stopped, failed
    words: str = ""  # counts, or what was wrong
    failures: int = 0  # in a row of the runs for that due time, with this one
    deaths: int = 0  # of these, those whose process was killed
    failing: str = ""  # with which code runs fail, until one works again
    repeats: int = 0  # how many in a row failed so before this one


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a schedule is. `running`: the run that is at work was due then; `flow_run` is its id in Prefect."""

    standing: Standing
    running: float | None = None
    flow_run: str | None = None
    owner: str | None = None  # the process that runs it
    last: Last | None = None

    @property
    def held_until(self) -> float:
        """When the run that goes first may be tried again, if it has failed; 0 if it may start."""
        if self.last is None or not self.last.failures or self.standing.waiting[:1] != (self.last.due,):
            return 0.0
        return self.last.ended + pause_after(self.last.failures)


def create(name: str, job: Job, timing: Timing, lane: Lane | None = None, *, replacing: bool = False) -> Schedule:
    """Keep a new schedule. Raises ScheduleError, and what `check_job` raises."""
    if not _NAME.fullmatch(name) or name.endswith(STANDING):
        raise ScheduleError(f"{name!r} is no name: give letters, digits, '-', '_' and '.', up to 64 of them.")
    if _file(name).exists() and not replacing:
        raise ScheduleError(f"There is a schedule {name} already: give another name, or --replace.")
    check_job(job)
    schedule = Schedule(name, job, timing, lane)
    _keep(schedule)
    return schedule


def load(name: str) -> Schedule:
    """Raises ScheduleError."""
    _check_is_there(name)
    try:
        plain = json.loads(_file(name).read_text("utf-8"))
        timing, window = plain["timing"], plain["timing"]["window"]
        return Schedule(
            name,
            from_plain(plain["job"]),
            Timing(**timing | {"window": Window.parse(window) if window else None}),
            plain["lane"],
            plain["paused"],
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # whatever somebody wrote into it
        raise ScheduleError(f"{_file(name)} is damaged: delete the schedule and create it again.") from None


def schedules(damaged: list[str] | None = None) -> Iterator[Schedule]:
    """All schedules, by name. One whose file is damaged is left out: what to do about it is added to `damaged`."""
    for path in sorted(_folder().glob("*.json")):
        if not path.stem.endswith(STANDING):
            try:
                yield load(path.stem)
            except ScheduleError as error:
                if damaged is not None:
                    damaged.append(str(error))


def pause(name: str, *, paused: bool) -> Schedule:
    """Pause or resume. What would have been due meanwhile is not made up for.  Raises ScheduleError."""
    schedule = replace(load(name), paused=paused)
    _keep(schedule)
    return schedule


def delete(name: str) -> None:
    """Reports stay; a run at work ends by itself. Raises ScheduleError."""
    _check_is_there(name)  # one whose file is damaged can be deleted, too
    _file(name).unlink(missing_ok=True)
    _file(name + STANDING).unlink(missing_ok=True)


def progress(schedule: Schedule) -> Progress:
    """How far it is; a new one begins where it was made."""
    try:
        plain = json.loads(_file(schedule.name + STANDING).read_text("utf-8"))
        standing = Standing(plain["settled"], tuple(plain["waiting"]))
        last = Last(**plain["last"]) if plain["last"] else None
        return Progress(standing, plain["running"], plain["flow_run"], plain["owner"], last)
    except (OSError, ValueError, KeyError, TypeError):
        return Progress(Standing(schedule.timing.anchor))


def keep_progress(name: str, how_far: Progress) -> None:
    """Raises OSError."""
    plain = asdict(how_far)
    atomic_write(_file(name + STANDING), json.dumps(plain.pop("standing") | plain))


def next_run(schedule: Schedule, now: float | None = None) -> float | None:
    """When the next run starts at the earliest; None while it is paused."""
    if schedule.paused:
        return None
    now = time.time() if now is None else now
    how_far, following = progress(schedule), next_due(schedule.timing, now)
    waiting, timing = how_far.standing.waiting, schedule.timing
    at = min(max(waiting[0], how_far.held_until), following) if waiting else following
    return timing.window.opening(max(at, now), timing.zone) if timing.window else at


def _keep(schedule: Schedule) -> None:
    window = schedule.timing.window
    plain: dict[str, Any] = {
        "job": as_plain(schedule.job),
        "timing": asdict(schedule.timing) | {"window": str(window) if window else None},
        "lane": schedule.lane,
        "paused": schedule.paused,
    }
    atomic_write(_file(schedule.name), json.dumps(plain, indent=1))


def _check_is_there(name: str) -> None:
    if not _NAME.fullmatch(name) or name.endswith(STANDING) or not _file(name).exists():
        known = ", ".join(each.name for each in schedules()) or "none yet"
        raise ScheduleError(f"There is no schedule {name}. Those that there are: {known}.")


def _folder() -> Path:
    folder = state_folder() / "schedules"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"
