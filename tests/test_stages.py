"""What several threads bring goes through the same stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.desk import Opened
from pipelines.ingest import FileRef, Unit
from pipelines.sight import Sight
from pipelines.stages import Stages, Width

MIB = 1 << 20


def unit(name: str) -> Unit:
    return Unit(name, "picture", (FileRef(f"/{name}.png"),))


def opened(of: Unit, size: int = MIB) -> Opened:
    return Opened(of, None, of.name, 0, Sight("auto", (1, 1)), of.name, of.name, None, (), 0.0, size)


class Run:
    """Stages with doubles around them, that count."""

    def __init__(self, width: Width, size: int = MIB) -> None:
        self.size, self.open_now, self.open_at_most = size, 0, 0
        self.lock = threading.Lock()
        self.read: list[list[str]] = []
        self.written: list[str] = []
        self.dropped: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.reading = threading.Event()
        self.stopped = threading.Event()
        self.stages = Stages(self._read, self._drop, self.stopped)
        self.stages.widen(width)

    def bring(self, *names: str) -> None:
        self.stages.run(enumerate(map(unit, names)), self._open, self._write)

    def _open(self, place: int, of: Unit) -> Opened | None:
        if of.name.startswith("known"):
            return None
        if of.name.startswith("broken"):
            raise OSError(of.name)
        with self.lock:
            self.open_now += 1
            self.open_at_most = max(self.open_at_most, self.open_now)
        time.sleep(0.005)  # long enough for all to be open at a time that may be
        return opened(of, self.size)

    def _read(self, units: Sequence[Opened]) -> list[str]:
        self.reading.set()
        assert self.go_on.wait(30)
        self.read.append([each.request for each in units])
        return [f"{each.request} read" for each in units]

    def _write(self, place: int, one: Opened, outcome: str) -> None:
        assert outcome == f"{one.request} read"
        with self.lock:
            self.open_now -= 1
            self.written.append(one.request)

    def _drop(self, one: Opened) -> None:
        with self.lock:
            self.open_now -= 1
            self.dropped.append(one.request)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


WIDE = Width(under_way=16, openers=8, together=64, writers=8)


def names(what: str, count: int) -> list[str]:
    return [f"{what} {n}" for n in range(count)]


def test_what_several_threads_bring_is_read_together(threads: ThreadPoolExecutor) -> None:
    run = Run(WIDE)
    run.go_on.clear()
    first = threads.submit(run.bring, "first")
    assert run.reading.wait(30)
    others = [threads.submit(run.bring, f"of thread {n}") for n in range(3)]
    deadline = time.monotonic() + 30
    while len(run.stages._ready) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.go_on.set()
    for each in (first, *others):
        each.result(30)
    assert run.read[0] == ["first"]
    assert sorted(run.read[1]) == names("of thread", 3)
    assert len(run.written) == 4
    run.stages.close()


def test_the_number_of_units_under_way_holds_for_all_threads(threads: ThreadPoolExecutor) -> None:
    run = Run(Width(under_way=3, openers=8, together=64, writers=8))
    for each in [threads.submit(run.bring, *names(f"of {n}", 8)) for n in range(4)]:
        each.result(30)
    assert len(set(run.written)) == 32
    assert run.open_at_most <= 3
    run.stages.close()


@pytest.mark.parametrize(("size", "at_most"), [(40 * MIB, 2), (10 * MIB, 8), (500 * MIB, 2)])
def test_bytes_are_reckoned_with_before_a_unit_is_open(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, size: int, at_most: int
) -> None:
    monkeypatch.setattr("pipelines.stages.MOST_OPEN", 80 * MIB)  # two photos of the usual size, until one is open
    run = Run(WIDE, size)
    for each in [threads.submit(run.bring, *names(f"of {n}", 8)) for n in range(4)]:
        each.result(30)
    assert len(set(run.written)) == 32
    assert run.open_at_most <= at_most
    run.stages.close()


def test_what_one_thread_brings_in_vain_costs_the_others_nothing(threads: ThreadPoolExecutor) -> None:
    run = Run(WIDE)
    good = threads.submit(run.bring, *names("good", 20), *names("known", 5))
    bad = threads.submit(run.bring, "fine", "broken", *names("late", 20))
    good.result(30)
    with pytest.raises(OSError, match="broken"):
        bad.result(30)
    assert set(names("good", 20)) <= set(run.written)
    assert run.open_now == 0
    run.bring("afterwards")
    assert run.written[-1] == "afterwards"
    run.stages.close()


@pytest.mark.parametrize("where", ["_open", "_read", "_write", "_drop", "openers", "reader", "writers", "too few"])
def test_whatever_breaks_is_raised_and_nothing_stays_under_way(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(where)

    if where.startswith("_"):
        monkeypatch.setattr(Run, where, fail)
    if where == "too few":
        monkeypatch.setattr(Run, "_read", lambda run, units: [])
    run = Run(WIDE)
    if where.endswith("ers") or where == "reader":
        monkeypatch.setattr(getattr(run.stages, f"_{where}"), "submit", fail)
    if where == "_drop":
        run.go_on.clear()
        first = threads.submit(run.bring, "first")
        assert run.reading.wait(30)
        at_work = threads.submit(run.bring, *names("more", 4))
        deadline = time.monotonic() + 30
        while not run.stages._ready and time.monotonic() < deadline:
            time.sleep(0.01)
        run.stopped.set()
        run.go_on.set()
        first.result(30)
    else:
        at_work = threads.submit(run.bring, *names("unit", 5))
    with pytest.raises(ValueError if where == "too few" else OSError):
        at_work.result(30)
    assert (run.stages._under_way, run.stages._bytes) == (0, 0)
    run.stages.close()


def test_what_is_open_counts_as_it_is_and_how_much_goes_on_can_change_meanwhile(threads: ThreadPoolExecutor) -> None:
    run = Run(Width(under_way=2, openers=1, together=1, writers=1), size=3 * MIB)
    run.go_on.clear()
    at_work = threads.submit(run.bring, *names("unit", 40))
    assert run.reading.wait(30)
    deadline = time.monotonic() + 30
    while run.open_now < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert (run.stages._under_way, run.stages._bytes) == (2, 6 * MIB)
    pools = run.stages._openers
    run.stages.widen(WIDE)
    wide = run.stages._openers
    run.stages.widen(WIDE)
    assert pools is not wide is run.stages._openers
    run.go_on.set()
    at_work.result(30)
    assert len(run.written) == 40
    assert run.open_at_most > 2
    run.stages.close()


def test_when_stopped_nothing_more_is_read_and_all_is_let_go(threads: ThreadPoolExecutor) -> None:
    run = Run(WIDE)
    run.go_on.clear()
    at_work = threads.submit(run.bring, *names("unit", 40))
    assert run.reading.wait(30)
    run.stopped.set()
    run.go_on.set()
    at_work.result(30)
    [read] = run.read  # what was being read is written
    assert sorted(run.written) == sorted(read)
    assert run.open_now == 0
    run.stages.close()
