"""When the runs of a schedule are due, and which of them start: pure functions over a clock.

Times are seconds since the epoch. Cron lines go by cronsim, which has the rules of Debian's cron for the nights when
clocks change. Prefect's own schedule classes do not serve: their daily intervals are off by an hour once clocks have
changed, and what they give for such a night depends on when they are asked.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from datetime import time as time_of_day
from typing import Final, Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

Overlap = Literal["skip", "queue", "cancel"]
CatchUp = Literal["once", "all", "none"]
OVERLAPS: Final = ("skip", "queue", "cancel")
CATCH_UPS: Final = ("once", "all", "none")
MISSED_AFTER_S: Final = 60.0  # a run that nobody started for so long was missed: nothing was up to start it
FIRST_PAUSE_S: Final = 60.0  # before a run that failed is tried again; doubles with each further failure
MOST_PAUSE_S: Final = 1800.0
_DAY_S: Final = 86400
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": _DAY_S}
_CRON_HELP: Final = (
    'give five fields (minute, hour, day, month, weekday), such as "0 22 * * *" for 22:00 each day or "30 1 * * 1-5"'
)


class ScheduleError(ValueError):
    """A schedule that cannot be. The message says what would be right."""

    code = "schedule"


@dataclass(frozen=True, slots=True)
class Window:
    """The hours of a day in which runs may work, in the schedule's time zone; may go past midnight."""

    begin: time_of_day
    end: time_of_day

    @classmethod
    def parse(cls, text: str) -> Window:
        """`22:00-06:00`. Raises ScheduleError."""
        begin, dash, end = text.partition("-")
        try:
            window = cls(time_of_day.fromisoformat(begin.strip()), time_of_day.fromisoformat(end.strip()))
        except ValueError:
            dash = ""
        if not dash or window.begin == window.end:
            raise ScheduleError(f"{text!r} is no window: give two times of the day, such as 22:00-06:00.") from None
        return window

    def is_open(self, now: float, zone: str) -> bool:
        clock = datetime.fromtimestamp(now, ZoneInfo(zone)).time()
        if self.begin < self.end:
            return self.begin <= clock < self.end
        return clock >= self.begin or clock < self.end

    def opening(self, now: float, zone: str) -> float:
        """When it is open next: now, if it is."""
        if self.is_open(now, zone):
            return now
        local = datetime.fromtimestamp(now, ZoneInfo(zone))
        day = local.date() if local.time() < self.begin else local.date() + timedelta(days=1)
        return datetime.combine(day, self.begin, ZoneInfo(zone)).timestamp()

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True, slots=True)
class Timing:
    """When a schedule is due, and by which rules its runs start. One of `cron` and `every_s` is given."""

    zone: str
    anchor: float  # intervals count from then
    cron: str | None = None
    every_s: float | None = None
    window: Window | None = None
    overlap: Overlap = "skip"  # of a run that is due while the former is at work: skip it, queue it, cancel the former
    catch_up: CatchUp = "once"  # of runs that were due while nothing was up to start them

    def __post_init__(self) -> None:
        """Raises ScheduleError."""
        if (self.cron is None) == (self.every_s is None):
            raise ScheduleError(f"A schedule is a cron line or an interval: {_CRON_HELP}, or --every 2h.")
        if self.overlap not in OVERLAPS:
            raise ScheduleError(f"There is no overlap policy {self.overlap!r}: choose one of {', '.join(OVERLAPS)}.")
        if self.catch_up not in CATCH_UPS:
            raise ScheduleError(f"There is no catch-up {self.catch_up!r}: choose one of {', '.join(CATCH_UPS)}.")
        try:
            ZoneInfo(self.zone)
        except (ValueError, OSError, KeyError):
            raise ScheduleError(
                f"There is no time zone {self.zone!r}: give a name of the IANA data base, such as Europe/Berlin or UTC."
            ) from None
        if self.every_s is not None and not 60 <= self.every_s <= 366 * _DAY_S:
            raise ScheduleError("An interval is a minute to a year: give one like 15m, 2h or 1d.")
        next_due(self, self.anchor)  # raises where there is none

    @property
    def words(self) -> str:
        """Such as `0 22 * * *` or `every 2h`."""
        if self.cron is not None:
            return self.cron
        assert self.every_s is not None
        unit = next(unit for unit, seconds in reversed(_UNITS.items()) if self.every_s % seconds == 0)
        return f"every {self.every_s / _UNITS[unit]:g}{unit}"


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a schedule is: all that was due until `settled` has been decided; `waiting` are runs still to start."""

    settled: float
    waiting: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now."""

    standing: Standing
    start: float | None = None  # the run that was due then
    stop: bool = False  # the run that is at work: its turn is over
    skipped: tuple[tuple[float, str], ...] = ()  # when they were due, and why they never start


def parse_interval(text: str) -> float:
    """Seconds of `15m`, `2h`, `1d`. Raises ScheduleError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not found:
        raise ScheduleError(f"{text!r} is no interval: give a number and s, m, h or d, such as 15m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


def machine_zone() -> str:
    """The name of this machine's time zone; UTC where it has none by name."""
    place = os.environ.get("TZ", "").lstrip(":") or os.path.realpath("/etc/localtime").rpartition("/zoneinfo/")[2]
    try:
        return ZoneInfo(place).key
    except (ValueError, OSError, KeyError):
        return "UTC"


def due(timing: Timing, after: float, until: float) -> list[float]:
    """The times after `after` and up to `until` at which a run is due, by the clocks of the schedule's zone."""
    return list(itertools.takewhile(lambda time: time <= until, _dates(timing, after)))


def next_due(timing: Timing, after: float) -> float:
    """The first time after `after`. Raises ScheduleError where there is none."""
    for time in _dates(timing, after):
        return time
    raise ScheduleError(f"{timing.cron!r} names a day that never comes: {_CRON_HELP}.")


def step(timing: Timing, standing: Standing, now: float, *, busy: bool) -> Step:
    """What to do now about the runs that have come due. `busy`: a run of this schedule is at work."""
    if standing.settled > now + _DAY_S:  # the clock was wrong then, and nothing would be due until it shows that again
        standing = replace(standing, settled=now, waiting=tuple(min(time, now) for time in standing.waiting))
    times = due(timing, standing.settled, now)
    missed = [time for time in times if now - time > MISSED_AFTER_S]
    fresh = times[len(missed) :]
    waiting, skipped, stop = list(standing.waiting), [], False
    if timing.catch_up == "none":
        skipped += [(time, "missed") for time in missed]
    elif timing.catch_up == "all":
        waiting += missed
    elif missed:
        kept = [] if fresh else missed[-1:]
        skipped += [(time, "missed: the next run makes up for it") for time in missed[: len(missed) - len(kept)]]
        waiting += kept
    if busy and timing.overlap == "skip":
        skipped += [(time, "overlap: the former run was at work") for time in fresh]
    elif busy and timing.overlap == "cancel" and fresh:
        skipped += [(time, "overlap: a newer run takes its place") for time in (*waiting, *fresh[:-1])]
        waiting, stop = fresh[-1:], True
    else:
        waiting += fresh
    is_open = timing.window is None or timing.window.is_open(now, timing.zone)
    if not is_open or (timing.catch_up != "all" and timing.overlap != "queue"):
        # All runs of a schedule are over the same inputs: the last one does the work of those before it.
        skipped += [(time, "folded into the next run") for time in waiting[:-1]]
        waiting = waiting[-1:]
    start = waiting.pop(0) if waiting and is_open and not busy else None
    return Step(
        Standing(max(now, standing.settled), tuple(waiting)), start, stop or (busy and not is_open), tuple(skipped)
    )


def again(standing: Standing, time: float) -> Standing:
    """The run that was due at `time` did not end its work: it goes on as soon as it may."""
    return replace(standing, waiting=(time, *standing.waiting))


def pause_after(failures: int) -> float:
    """Seconds from the end of a run until it is tried again, after so many failures in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30), MOST_PAUSE_S)


def _dates(timing: Timing, after: float) -> Iterator[float]:
    """The due times after `after`, in their order. Raises ScheduleError."""
    zone = ZoneInfo(timing.zone)
    if timing.cron is not None:
        try:
            if len(timing.cron.split()) != 5:  # six would begin with seconds
                raise CronSimError
            dates = CronSim(timing.cron, datetime.fromtimestamp(after, zone))
            # In an hour that comes twice it can go back to the first.
            yield from (moment for date in dates if (moment := date.timestamp()) > after)
        except CronSimError:
            raise ScheduleError(f"{timing.cron!r} is no cron line: {_CRON_HELP}.") from None
        return
    assert timing.every_s is not None
    if timing.every_s % _DAY_S:
        yield from (timing.anchor + k * timing.every_s for k in itertools.count(_turns(timing, after)))
    first = datetime.fromtimestamp(timing.anchor, zone).replace(tzinfo=None)
    for k in itertools.count(_turns(timing, after) - 1):  # days keep their hour, however long they are
        moment = (first + k * timedelta(seconds=timing.every_s)).replace(tzinfo=zone).timestamp()
        if moment > after:
            yield moment


def _turns(timing: Timing, after: float) -> int:
    """The number of the first turn after `after`, where all turns are equally long."""
    assert timing.every_s is not None
    return int((after - timing.anchor) // timing.every_s) + 1
