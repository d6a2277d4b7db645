"""Decoding and writing in processes of their own, around a reader in this one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines.desk import IMPORTED_LATE, Desk, Desks, Opened, Version, _open, _Seat
from pipelines.ingest import Unit, plan
from pipelines.reading import FindingReading, Reading
from pipelines.run import Job, Session, execute
from pipelines.run_folder import OutputError
from pipelines.sight import Sight
from pipelines.study import Rejection
from tests.test_run import lines, picture
from tests.tiny_reader import TinyReader


class FrameReader(TinyReader):
    """Reads what it is shown: the pixels lie elsewhere."""

    def read_many(self, sights: Sequence[Sight]) -> list[Reading | Exception]:
        assert all(each.source is None for each in sights)
        found = FindingReading("scratches", (1.0, 1.0, 2.0, 2.0), 0, 0.9, True, "box")
        return [Reading("defect", 1.0, "steel", {}, (found,), "One scratch.") for _ in sights]


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and four cores."""
    FrameReader().install(monkeypatch)
    monkeypatch.setattr("pipelines.run.may_be_gpu", lambda device: True)
    monkeypatch.setattr("pipelines.run.desks_for", lambda work: 2)


def test_what_desks_import_late_is_there() -> None:
    for name in IMPORTED_LATE:
        import_module(name)


@pytest.mark.usefixtures("spread")
def test_every_unit_gets_its_report_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number % 28)  # two twice
    (tmp_path / "in" / "07.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    summary = execute(Job((tmp_path / "in",), tmp_path / "out"))
    assert [entry.inputs[0]["path"][-6:] for entry in summary.reported] == [f"{n:02}.png" for n in range(28) if n != 7]
    assert [entry.inputs[0]["path"][-6:] for entry in summary.already_reported] == ["00.png", "01.png"]
    assert len(summary.rejected) == 1
    index = lines(tmp_path / "out" / "index.jsonl")
    assert len({line["id"] for line in index}) == len(index) == 27
    assert all((tmp_path / "out" / line["formats"]["html"]).is_file() for line in index)
    assert 0 <= (summary.device_wait or 0) <= 1


def test_a_process_that_is_killed_costs_no_report(tmp_path: Path) -> None:
    job = Job((picture(tmp_path / "a.png"),), tmp_path / "out")
    [unit] = plan(job.inputs).units
    reader, own = FrameReader(), Desk(job)
    desks = Desks(job, 1, own)
    try:
        opened = desks.open(unit, None, "0" * 64)
        assert isinstance(opened, Opened) and opened.sight.source is None
        [process] = desks._seats[0].pool._processes.values()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        [reading] = reader.read_many([opened.sight])
        assert isinstance(reading, Reading)
        entry = desks.report(opened, reading, reader.info, Version("f" * 16), 0.1)
        assert (tmp_path / "out" / ("f" * 16) / "report.json").is_file()
        assert getattr(entry, "id", None) == "f" * 16
        again = desks.open(unit, None, "0" * 64)
        assert isinstance(again, Opened)
        for version in "1", "2":  # the desk has let go of it after the first: it is decoded once more
            desks.report(again, reading, reader.info, Version(version * 16), 0.1)
            assert (tmp_path / "out" / (version * 16) / "report.json").is_file()
    finally:
        desks.close()


class Deadly:
    """In place of a unit: it ends the process that it is sent to."""

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return os._exit, (9,)


def test_a_unit_is_not_refused_for_a_neighbour_that_ends_the_process_of_its_desk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job((tmp_path / "in",), tmp_path / "out")
    deadly, innocent = plan([picture(tmp_path / "in" / f"{number}.png", seed=number) for number in range(2)]).units
    TinyReader().install(monkeypatch)
    desks = Desks(job, 1, Desk(job))
    ask = desks._ask

    def ask_beside_a_deadly_one(seat: _Seat, what: Callable[..., Any], unit: object, *parts: object) -> Any:
        if seat in desks._seats:
            seat.pool.submit(_open, cast(Unit, Deadly()), None, "f" * 64)
        return ask(seat, what, Deadly() if unit is deadly else unit, *parts)

    monkeypatch.setattr(desks, "_ask", ask_beside_a_deadly_one)
    try:
        refused, opened = (desks.open(unit, None, "0" * 64) for unit in (deadly, innocent))
    finally:
        desks.close()
    assert isinstance(refused, Rejection) and refused.code == "process-died"
    assert isinstance(opened, Opened)
    assert desks._seats[0].waiting == 0  # else it would be passed over from now on


@pytest.mark.usefixtures("spread")
def test_one_slow_desk_does_not_keep_the_others_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk stands still once units lie on it: but for those, all are reported before it goes on."""
    count, most_lying = 40, 10
    for number in range(count):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number)
    job = Job((tmp_path / "in",), tmp_path / "out")
    reported, stopped, read_many = threading.Semaphore(0), threading.Event(), FrameReader.read_many

    def read_and_stop_one(self: FrameReader, sights: Sequence[Sight]) -> list[Reading | Exception]:
        if not stopped.is_set():
            time.sleep(2)  # meanwhile all that may lie open is opened
            os.kill(slow, signal.SIGSTOP)
            stopped.set()
        return read_many(self, sights)

    monkeypatch.setattr(FrameReader, "read_many", read_and_stop_one)
    with Session(job) as session:
        units = session.discover()
        session._get_ready(units)
        assert isinstance(session._desk, Desks)
        slow = session._desk._seats[0].pool.submit(os.getpid).result()
        at_work = threading.Thread(target=session.process, args=(units, lambda unit, outcome: reported.release()))
        at_work.start()
        try:
            assert all(reported.acquire(timeout=30) for _ in range(count - most_lying))
        finally:
            os.kill(slow, signal.SIGCONT)
        at_work.join()
        assert len(session.finish().reported) == count


@pytest.mark.usefixtures("spread")
def test_desks_that_cannot_be_made_end_the_run_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Desks) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Desks, "_pool", fail)
    picture(tmp_path / "in" / "0.png")
    with pytest.raises(OutputError, match="cannot be started"):
        execute(Job((tmp_path / "in",), tmp_path / "out"))


@pytest.mark.usefixtures("spread")
def test_a_stopped_session_leaves_no_process(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number)
    with Session(Job((tmp_path / "in",), tmp_path / "out")) as session:
        units = session.discover()
        session.process(units[:3], lambda unit, outcome: session.stop())
        desks = session._desk
        assert isinstance(desks, Desks)
        processes = [each for seat in desks._seats for each in (seat.pool._processes or {}).values()]
    assert not any(each.is_alive() for each in processes)
