"""Decoding and writing in processes of their own, around a reader in this one."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.desk import Desk, Desks, Opened, Version
from pipelines.ingest import plan
from pipelines.reading import FindingReading, Reading
from pipelines.run import Job, Session, execute
from pipelines.sight import Sight
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
