"""When schedules are due: simulated clocks over daylight-saving changes, downtime, overlap and windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.schedules.files import Last, Progress
from flows.schedules.timing import (
    ScheduleError,
    Standing,
    Timing,
    Window,
    again,
    due,
    next_due,
    parse_interval,
    pause_after,
    step,
)

MINUTE, HOUR, DAY = 60, 3600, 86400


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def timing(cron: str | None = "0 22 * * *", zone: str = "Europe/Berlin", **rest: object) -> Timing:
    return Timing(zone, at("2026-01-01T00:00+00:00"), cron, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cron", "zone", "first", "last", "expected"),
    [
        # 02:30 does not come on the day when clocks go forward: that day's run still does, once.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00+01:00", "2026-03-31T00:00+02:00",
         ["2026-03-28T02:30+01:00", "2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        # It comes twice on the day when they go back: one run.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00+02:00", "2026-10-27T00:00+01:00",
         ["2026-10-24T02:30+02:00", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("0 22 * * *", "America/New_York", "2026-10-31T00:00-04:00", "2026-11-02T23:00-05:00",
         ["2026-10-31T22:00-04:00", "2026-11-01T22:00-05:00", "2026-11-02T22:00-05:00"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00+00:00", "2029-01-01T00:00+00:00", ["2028-02-29T00:00+00:00"]),
        ("0 9 * * 1-5", "Asia/Kolkata", "2026-11-27T00:00+05:30", "2026-12-01T00:00+05:30",
         ["2026-11-27T09:00+05:30", "2026-11-30T09:00+05:30"]),
    ],
)  # fmt: skip
def test_cron_lines_go_by_the_clocks_of_their_zone(
    cron: str, zone: str, first: str, last: str, expected: list[str]
) -> None:
    assert due(timing(cron, zone), at(first), at(last)) == list(map(at, expected))


def test_days_keep_their_hour_and_hours_their_length_over_a_change_of_clocks() -> None:
    daily = Timing("Europe/Berlin", at("2026-03-01T09:00+01:00"), every_s=DAY)
    found = due(daily, at("2026-03-28T00:00+01:00"), at("2026-03-31T00:00+02:00"))
    assert found == list(map(at, ("2026-03-28T09:00+01:00", "2026-03-29T09:00+02:00", "2026-03-30T09:00+02:00")))
    assert due(daily, at("2026-07-01T00:00+02:00"), at("2026-07-01T23:00+02:00")) == [at("2026-07-01T09:00+02:00")]
    hourly = Timing("Europe/Berlin", at("2026-03-01T09:00+01:00"), every_s=HOUR)
    found = due(hourly, at("2026-03-28T00:00+01:00"), at("2026-03-31T00:00+02:00"))
    assert {b - a for a, b in itertools.pairwise(found)} == {HOUR}


@pytest.mark.parametrize(
    ("cron", "first", "last"),
    [
        ("30 2 * * *", "2026-10-24T12:00+02:00", "2026-10-27T12:00+01:00"),
        ("*/20 * * * *", "2026-03-28T12:00+01:00", "2026-03-29T12:00+02:00"),
        ("*/20 * * * *", "2026-10-24T12:00+02:00", "2026-10-25T12:00+01:00"),
    ],
)
@pytest.mark.parametrize("cut", [61, 601, 3599.5])
def test_asking_in_small_steps_gives_each_time_once(cron: str, first: str, last: str, cut: float) -> None:
    found, now = [], at(first)
    while now < at(last):
        found += due(timing(cron), now, min(now + cut, at(last)))
        now = min(now + cut, at(last))
    assert found == due(timing(cron), at(first), at(last)) == sorted(set(found))


def test_in_the_hour_that_comes_twice_short_schedules_go_on() -> None:
    found = due(timing("*/20 * * * *"), at("2026-10-24T20:00+02:00"), at("2026-10-25T12:00+01:00"))
    assert {b - a for a, b in itertools.pairwise(found)} == {20 * MINUTE}


def test_two_days_of_minutes_are_all_found() -> None:
    found = due(timing("* * * * *", "UTC"), at("2026-01-01T00:00+00:00"), at("2026-01-03T00:00+00:00"))
    assert len(found) == 2 * 24 * 60


class Simulation:
    """A schedule server whose clock jumps; runs take a given time."""

    def __init__(self, each: Timing, start: str, takes: float) -> None:
        self.timing, self.takes = each, takes
        self.now = at(start)
        self.standing = Standing(self.now)
        self.at_work: tuple[float, float] | None = None  # due, ends
        self.began: list[tuple[str, str]] = []  # due, began
        self.skipped: list[tuple[str, str]] = []
        self.stopped: list[str] = []

    def text(self, moment: float) -> str:
        from zoneinfo import ZoneInfo

        return datetime.fromtimestamp(moment, ZoneInfo(self.timing.zone)).strftime("%d %H:%M")

    def until(self, end: str, tick: float = 30) -> Simulation:
        while self.now < at(end):
            self.now += tick
            if self.at_work and self.now >= self.at_work[1]:
                self.at_work = None
            done = step(self.timing, self.standing, self.now, busy=self.at_work is not None)
            self.standing = done.standing
            self.skipped += [(self.text(time), why.partition(":")[0]) for time, why in done.skipped]
            if done.stop and self.at_work:
                self.stopped.append(self.text(self.now))
                if self.timing.window and not self.timing.window.is_open(self.now, self.timing.zone):
                    self.standing = again(self.standing, self.at_work[0])
                self.at_work = None
            if done.start is not None:
                assert self.at_work is None, "two runs of one schedule at a time"
                self.began.append((self.text(done.start), self.text(self.now)))
                self.at_work = done.start, self.now + self.takes
        return self

    def down(self, until: str) -> Simulation:
        self.now = at(until)
        self.at_work = None
        return self


@pytest.mark.parametrize(
    ("overlap", "began", "skipped"),
    [
        ("skip", ["10:00", "12:00", "14:00"], ["11:00", "13:00"]),
        ("queue", ["10:00", "11:00", "12:00"], []),
        ("cancel", ["10:00", "11:00", "12:00", "13:00", "14:00"], []),
    ],
)
def test_overlapping_runs_go_by_the_policy(overlap: str, began: list[str], skipped: list[str]) -> None:
    each = timing("0 * * * *", "UTC", overlap=overlap)
    simulation = Simulation(each, "2026-05-01T09:30+00:00", takes=100 * MINUTE).until("2026-05-01T14:30+00:00")
    assert [due[3:] for due, _ in simulation.began] == began
    assert [due[3:] for due, _ in simulation.skipped] == skipped
    assert len(simulation.stopped) == (4 if overlap == "cancel" else 0)


@pytest.mark.parametrize(
    ("catch_up", "began"),
    [
        ("once", [("02 22:00", "04 08:00"), ("04 22:00", "04 22:00")]),
        (
            "all",
            [("01 22:00", "04 08:00"), ("02 22:00", "04 08:10"), ("03 22:00", "04 08:20"), ("04 22:00", "04 22:00")],
        ),
        ("none", [("04 22:00", "04 22:00")]),
    ],
)
def test_downtime_is_made_up_for_by_the_policy(catch_up: str, began: list[tuple[str, str]]) -> None:
    each = timing(zone="UTC", catch_up=catch_up)
    simulation = Simulation(each, "2026-05-01T12:00+00:00", takes=10 * MINUTE)
    simulation.down("2026-05-04T07:59:30+00:00").until("2026-05-05T12:00+00:00")
    expected = [("03 22:00", when) if due == "02 22:00" and catch_up == "once" else (due, when) for due, when in began]
    assert simulation.began == expected


def test_a_clock_that_was_a_year_ahead_stops_nothing() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
    daily = Timing("UTC", now, cron="0 22 * * *")
    ahead = step(daily, Standing(now), now + 365 * 86400, busy=True).standing
    standing = step(daily, ahead, now, busy=False).standing
    assert step(daily, standing, now + 36000, busy=False).start == now + 36000
    made_ahead = Timing("UTC", now + 365 * DAY, every_s=float(DAY))
    standing = step(made_ahead, Standing(made_ahead.anchor), now, busy=False).standing
    assert step(made_ahead, standing, now + DAY, busy=False).start == now + DAY


def test_a_short_gap_is_no_downtime() -> None:
    simulation = Simulation(timing(zone="UTC", catch_up="none"), "2026-05-01T21:59:50+00:00", takes=MINUTE)
    simulation.down("2026-05-01T22:00:20+00:00").until("2026-05-01T22:10+00:00")
    assert [due for due, _ in simulation.began] == ["01 22:00"]


def test_outside_the_window_nothing_starts_and_work_goes_on_the_next_time() -> None:
    each = timing("0 */4 * * *", window=Window.parse("22:00-06:00"))
    simulation = Simulation(each, "2026-05-01T07:00+02:00", takes=14 * HOUR).until("2026-05-03T07:00+02:00")
    assert simulation.began == [("01 20:00", "01 22:00"), ("02 20:00", "02 22:00")]
    assert simulation.stopped == ["02 06:00", "03 06:00"]


def test_a_window_over_a_change_of_clocks_goes_by_the_wall_clock() -> None:
    window = Window.parse("01:30-03:30")
    spring = [at(f"2026-03-29T{text}") for text in ("01:29+01:00", "01:31+01:00", "03:01+02:00", "03:31+02:00")]
    assert [window.is_open(moment, "Europe/Berlin") for moment in spring] == [False, True, True, False]


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        ("22:00-06:00", "2026-05-01T09:16+02:00", "2026-05-01T22:00+02:00"),
        ("22:00-06:00", "2026-05-01T23:00+02:00", "2026-05-01T23:00+02:00"),
        ("09:00-17:00", "2026-05-01T17:00+02:00", "2026-05-02T09:00+02:00"),
        ("04:00-05:00", "2026-03-28T06:00+01:00", "2026-03-29T04:00+02:00"),  # clocks change in between
    ],
)
def test_a_window_says_when_it_opens_next(window: str, now: str, opens: str) -> None:
    assert Window.parse(window).opening(at(now), "Europe/Berlin") == at(opens)


@settings(max_examples=60, deadline=None)
@given(
    when=st.sampled_from((("*/30 * * * *", "2026-03-28T18:00+01:00"), ("*/30 * * * *", "2026-10-24T18:00+02:00"))),
    overlap=st.sampled_from(("skip", "queue", "cancel")),
    catch_up=st.sampled_from(("once", "all", "none")),
    window=st.sampled_from((None, "22:00-06:00", "09:00-17:00")),
    takes=st.sampled_from((5.0, 50.0, 200.0)),
    jumps=st.lists(st.sampled_from((20.0, 61.0, 600.0, 5 * HOUR, 30 * HOUR)), min_size=3, max_size=40),
)
def test_every_run_that_is_due_starts_once_or_is_said_to_be_skipped(
    when: tuple[str, str], overlap: str, catch_up: str, window: str | None, takes: float, jumps: list[float]
) -> None:
    each = timing(when[0], overlap=overlap, catch_up=catch_up, window=Window.parse(window) if window else None)
    begin = now = at(when[1])  # clocks change in the night
    standing, started, skipped, ends = Standing(now), [], [], 0.0
    for jump in jumps:
        now += jump
        done = step(each, standing, now, busy=now < ends)
        standing = done.standing
        skipped += [time for time, _ in done.skipped]
        if done.start is not None:
            assert each.window is None or each.window.is_open(now, each.zone)
            started.append(done.start)
            ends = now + takes * MINUTE
        elif done.stop:
            ends = now
    assert sorted([*started, *skipped, *standing.waiting]) == due(each, begin, now)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timing("61 * * * *"), "is no cron line: give five fields"),
        (lambda: timing("0 22 * *"), "is no cron line"),
        (lambda: timing("0 0 * * * *"), "is no cron line"),
        (lambda: timing("nightly"), "such as \"0 22 \\* \\* \\*\""),
        (lambda: timing("0 0 31 2 *"), "is no cron line"),
        (lambda: timing(zone="Europe/Atlantis"), "no time zone 'Europe/Atlantis'.*Europe/Berlin"),
        (lambda: timing(zone="../../etc/passwd"), "no time zone"),
        (lambda: timing(zone=""), "no time zone"),
        (lambda: timing(None), "a cron line or an interval"),
        (lambda: timing(None, every_s=5.0), "a minute to a year"),
        (lambda: timing(overlap="both"), "choose one of skip, queue, cancel"),
        (lambda: timing(catch_up="twice"), "choose one of once, all, none"),
        (lambda: Window.parse("22-25"), "is no window: give two times"),
        (lambda: Window.parse("22:00"), "is no window"),
        (lambda: Window.parse("06:00-06:00"), "is no window"),
        (lambda: parse_interval("often"), "such as 15m, 2h or 1d"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_what_would_be_right(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        make()


def test_intervals_are_read_and_said_in_the_same_words() -> None:
    for text in ("90s", "15m", "2h", "1d"):
        assert timing(None, every_s=parse_interval(text)).words == f"every {text}"
    assert next_due(timing("0 0 * * *", "UTC"), at("2026-05-01T12:00+00:00")) == at("2026-05-02T00:00+00:00")


def test_pauses_grow_to_half_an_hour_and_hold_only_the_run_that_failed() -> None:
    assert [pause_after(failures) for failures in (1, 2, 3, 6, 7, 20_000)] == [60, 120, 240, 1800, 1800, 1800]
    last = Last(due=100.0, ended=110.0, result="failed", words="usage", failures=2)
    assert Progress(Standing(200.0, (100.0,)), last=last).held_until == 230
    assert Progress(Standing(200.0, (200.0,)), last=last).held_until == 0  # a later due time took its place
    assert Progress(Standing(200.0, (100.0,)), last=replace(last, failures=0)).held_until == 0  # it was stopped
