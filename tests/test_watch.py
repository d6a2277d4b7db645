"""The watcher on real folders: slow copies, renames, slices out of order, lost folders, full disks, SIGKILL."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from watchfiles import watch as watch_files

from flows.ledger import Ledger
from flows.machine.space import Room
from flows.seeing.log import EventLog
from flows.settle import Patience, Settling, is_temporary_name
from flows.watch import Watcher, Watching
from pipelines.ingest import Unit
from pipelines.reading import Reading
from pipelines.run import Job, Prepared, Session, UsageError
from pipelines.run_folder import RunFolder
from pipelines.study import ImageStudy
from tests.phantom import phantom_slices
from tests.test_run import lines, picture
from tests.tiny_reader import CURSED, TinyReader

ROOT = Path(__file__).parents[1]
QUICK = Patience(interval=0.05, looks=2, quiet=0.4, cap=30, refuse_after=0.8)
NEVER = 600.0  # seconds: no machine is so busy that a test stands still for so long


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("SCANSCRIBE_") and name != "SCANSCRIBE_HOME"]:
        monkeypatch.delenv(name)
    TinyReader().install(monkeypatch)


class Running:
    """A watcher in a thread, and what it said."""

    def __init__(self, inbox: Path, out: Path, patience: Patience = QUICK, tries: int = 2, **how: Any) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        log = EventLog()
        log.__class__ = type(
            "Heard", (EventLog,), {"__call__": lambda _, event, **facts: self.said.append((event, facts))}
        )
        self.ledger = Ledger(out, tries=tries, back_off_s=0.1)
        self.watcher = Watcher(Job((inbox,), out), Watching(inbox, patience, **how), self.ledger, log)
        self.inbox, self.out = inbox, out
        self.thread = threading.Thread(target=self.watcher.run)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.said]

    def heard(self, event: str, count: int = 1) -> bool:
        return self.events.count(event) >= count


@contextlib.contextmanager
def watching(tmp_path: Path, patience: Patience = QUICK, out: str = "out", **how: Any) -> Iterator[Running]:
    (tmp_path / "in").mkdir(exist_ok=True)
    running = Running(tmp_path / "in", tmp_path / out, patience, **how)
    running.thread.start()
    try:
        until(lambda: running.heard("watching"))
        yield running
    finally:
        running.watcher.stop()
        running.thread.join(60)
        running.ledger.__exit__(None, None, None)
    assert not running.thread.is_alive()
    assert running.events[-1] == "stopped"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def reports(out: Path) -> list[dict[str, Any]]:
    """The reports of a folder; each of them whole."""
    if not (out / "index.jsonl").exists():
        return []
    found = list({line["id"]: line for line in lines(out / "index.jsonl")}.values())
    for line in found:
        assert json.loads((out / line["id"] / "report.json").read_text())["id"] == line["id"]
    return found


def names(out: Path) -> list[str]:
    return sorted(Path(line["inputs"][0]["path"]).name for line in reports(out))


def write(folder: Path, slices: list[Dataset], *numbers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        slices[number].save_as(folder / f"{number:03}.dcm", enforce_file_format=True)


@pytest.mark.parametrize("poll", [False, True], ids=["events", "polling"])
def test_each_way_of_dropping_makes_one_report(tmp_path: Path, poll: bool) -> None:
    away = tmp_path / "away"
    picture(away / "moved" / "deep" / "m.png", 1)
    picture(away / "renamed.png", 2)
    slow = picture(away / "slow.png", 3).read_bytes()
    picture(tmp_path / "in" / "there.png", 4)
    with watching(tmp_path, replace(QUICK, refuse_after=NEVER), poll=poll) as running:
        (away / "moved").rename(running.inbox / "moved")
        shutil.copy(away / "renamed.png", running.inbox / "renamed.png.part")
        with (running.inbox / "slow.png").open("wb", buffering=0) as file:
            for start in range(0, len(slow), 300):
                file.write(slow[start : start + 300])
                time.sleep(0.08)
        (running.inbox / "renamed.png.part").rename(running.inbox / "renamed.png")
        until(lambda: len(reports(running.out)) == 4)
        shutil.copy(running.inbox / "there.png", running.inbox / "again.png")
        until(lambda: running.heard("known"))
        (running.inbox / "there.png").unlink()
        (running.inbox / "slow.png").rename(running.inbox / "other-name.png")
        until(lambda: running.heard("known", 2))
        picture(running.inbox / "renamed.png", 5)
        until(lambda: len(reports(running.out)) == 5)
    assert names(running.out) == ["m.png", "renamed.png", "renamed.png", "slow.png", "there.png"]
    assert sorted(line["version"] for line in reports(running.out)) == [1, 1, 1, 1, 2]
    assert not (running.out / "rejected.jsonl").read_text()
    assert not (running.out / "quarantine").exists()
    assert "renamed" in (running.out / "index.html").read_text()


def test_a_restart_reads_nothing_again_and_finds_what_came_meanwhile(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 1)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
    picture(tmp_path / "in" / "b.png", 2)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
    assert [event for event in running.events if event in ("reported", "known")] == ["reported"]
    shutil.rmtree(running.out / reports(running.out)[0]["id"])
    with Ledger(running.out) as ledger:
        ledger.retry([row.request for row in ledger.rows()])
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported", 2))
    assert names(running.out) == ["a.png", "b.png"]


def test_a_lost_ledger_is_made_anew_from_the_reports(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 1)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
    shutil.rmtree(tmp_path / "home")
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        [row] = running.ledger.rows()
        assert (row.state, row.report) == ("done", reports(running.out)[0]["id"])
    assert len(reports(running.out)) == 1


def test_a_file_that_does_not_open_is_waited_for_then_put_into_quarantine(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", 1).read_bytes()
    with watching(tmp_path, replace(QUICK, refuse_after=NEVER)) as running:
        for name, part in (("stalled.png", 3), ("broken.png", 2)):
            (running.inbox / name).write_bytes(whole[: len(whole) // part])
        time.sleep(0.4)  # longer than its looks
        (running.inbox / "stalled.png").write_bytes(whole)
        until(lambda: running.heard("reported"))
        assert not running.heard("quarantined")
    with watching(tmp_path) as running:
        until(lambda: running.heard("quarantined"))
        [refused] = lines(running.out / "rejected.jsonl")
        assert (Path(refused["path"]).name, refused["code"]) == ("broken.png", "truncated")
        [row] = running.ledger.rows("quarantined")
        place = running.out / "quarantine" / row.request[:16]
        reason = json.loads((place / "reason.json").read_text())
        assert (reason["code"], reason["attempts"]) == ("truncated", 1)
        assert "end is missing" in reason["remedy"]
        assert (place / reason["files"][0]["copy"]).read_bytes() == (running.inbox / "broken.png").read_bytes()
        shutil.copy(running.inbox / "broken.png", running.inbox / "broken-again.png")
        until(lambda: running.heard("known"))
        (running.inbox / "broken.png").write_bytes(picture(tmp_path / "mended.png", 2).read_bytes())
        until(lambda: running.heard("reported"))
    assert names(running.out) == ["broken.png", "stalled.png"]
    assert [Path(line["path"]).name for line in lines(running.out / "rejected.jsonl")] == ["broken-again.png"]


def test_a_poisonous_input_gets_its_tries_and_the_others_their_reports(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a-cursed.png", 1, first=CURSED)
    picture(tmp_path / "in" / "b.png", 2)
    with watching(tmp_path) as running:
        until(lambda: running.heard("quarantined"))
        [row] = running.ledger.rows("quarantined")
        assert (row.code, row.attempts) == ("model-failed", 2)
        assert running.events.index("reported") < running.events.index("quarantined")
        assert running.ledger.retry([row.request]) == 1
    assert running.events.count("failed") == 1
    TinyReader.read, read = lambda self, study, **how: read(self, blessed(study), **how), TinyReader.read
    try:
        with watching(tmp_path) as running:
            until(lambda: running.heard("reported"))
    finally:
        TinyReader.read = read
    assert names(running.out) == ["a-cursed.png", "b.png"]
    assert not list((running.out / "quarantine").iterdir())
    assert not lines(running.out / "rejected.jsonl")


def blessed(study: Any) -> Any:
    pixels = study.pixels.copy()
    pixels[0, 0, 0] = 0
    return type(study)(**{name: getattr(study, name) for name in study.__dataclass_fields__} | {"pixels": pixels})


def test_what_no_drop_is_stays_alone(tmp_path: Path) -> None:
    secret = picture(tmp_path / "outside" / "secret.png", 1)
    inbox = tmp_path / "in"
    for name in (
        ".hidden.png",
        "a.png.part",
        "b.png.crdownload",
        "c.png~",
        "~$d.png",
        "#g.png#",
        "e.tmp",
        "up.partial/f.png",
    ):
        picture(inbox / name.removesuffix("/f.png") / "f.png" if "/" in name else inbox / "x.png", 2)
        if "/" not in name:
            (inbox / "x.png").rename(inbox / name)
    with watching(tmp_path, out="in/reports") as running:
        (inbox / "link.png").symlink_to(secret)
        (inbox / "linked").symlink_to(secret.parent)
        (inbox / "loop").symlink_to(inbox)
        picture(inbox / "#1234" / "mine.png", 3)
        until(lambda: running.heard("reported"))
        time.sleep(0.5)
        picture(inbox / "reports" / "not-mine.png", 4)
        picture(inbox / "last.png", 5)
        until(lambda: running.heard("reported", 2))
    assert names(running.out) == ["last.png", "mine.png"]
    assert not lines(running.out / "rejected.jsonl")


def test_reports_may_lie_among_the_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 1)
    with watching(tmp_path, out="in") as running:
        until(lambda: running.heard("reported"))
        time.sleep(0.5)
        picture(tmp_path / "in" / "b.png", 2)
        until(lambda: running.heard("reported", 2))
        time.sleep(0.3)
    assert names(running.out) == ["a.png", "b.png"]
    assert Counter(running.events)["quarantined"] == 0


def test_documents_go_with_their_pictures(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    picture(inbox / "a.png", 1)
    (inbox / "a.txt").write_text("Inspection of part A.")
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        picture(inbox / "b.png", 2)
        until(lambda: running.heard("reported", 2))
        (inbox / "b.txt").write_text("Inspection of part B.")
        until(lambda: running.heard("reported", 3))
    found = {
        (name, line["version"]): [
            text["text"] for text in json.loads((running.out / line["id"] / "report.json").read_text())["context"]
        ]
        for line in reports(running.out)
        for name in [Path(line["inputs"][0]["path"]).name]
    }
    assert found == {
        ("a.png", 1): ["Inspection of part A."],
        ("b.png", 1): [],
        ("b.png", 2): ["Inspection of part B."],
    }


def test_companions_of_images_are_passed_over(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    for name in ("README", "list.csv", "Thumbs.db", "notes.txt"):
        (inbox / name).write_text("Nothing to look at.")
    with watching(tmp_path) as running:
        until(lambda: not running.watcher.settling)
        time.sleep(0.5)
        picture(inbox / "a.png", 1)
        until(lambda: running.heard("reported"))
        time.sleep(0.5)
    assert not running.heard("quarantined") and not lines(running.out / "rejected.jsonl")
    [line] = reports(running.out)
    context = json.loads((running.out / line["id"] / "report.json").read_text())["context"]
    assert [note["name"].rpartition("/")[2] for note in context] == ["notes.txt"]


def test_a_document_that_never_stops_growing_holds_pictures_back_for_a_while_only(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    whole = picture(tmp_path / "whole.png", 1)
    with watching(tmp_path, replace(QUICK, refuse_after=1.0)) as running:
        end = time.monotonic() + 15
        for line in itertools.count():
            with (inbox / "machine.txt").open("a") as file:
                file.write(f"Line {line}.\n")
            if line == 10:
                shutil.copy(whole, inbox / "a.png")
            if running.heard("reported") or time.monotonic() > end:
                break
            time.sleep(0.02)
        assert running.heard("reported")


def test_a_medium_is_read_when_it_is_there_not_when_its_directory_is(tmp_path: Path) -> None:
    slices = phantom_slices()
    medium = FileSet()
    for each in slices:
        each.PatientID, each.StudyID, each.StudyDate, each.StudyTime, each.SeriesNumber = (
            "1",
            "1",
            "20260101",
            "1200",
            1,
        )
        medium.add(each)
    medium.write(tmp_path / "medium")
    inbox = tmp_path / "in"
    inbox.mkdir()
    files = sorted(path for path in (tmp_path / "medium").rglob("*") if path.is_file() and path.name != "DICOMDIR")
    with watching(tmp_path, replace(QUICK, quiet=1.0)) as running:
        for path in (tmp_path / "medium" / "DICOMDIR", *files):
            place = inbox / path.relative_to(tmp_path / "medium")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
            time.sleep(0.1)
        until(lambda: running.heard("reported"))
        time.sleep(0.5)
    [line] = reports(running.out)
    assert (len(line["inputs"]), line["version"]) == (len(slices), 1)
    assert not running.heard("quarantined") and not lines(running.out / "rejected.jsonl")


@pytest.mark.parametrize("copied", [False, True])
def test_content_keeps_its_report_when_another_takes_its_name(tmp_path: Path, copied: bool) -> None:
    first = picture(tmp_path / "in" / "a.png", 1)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        (shutil.copy if copied else shutil.move)(first, first.with_name("b.png"))
        until(lambda: running.heard("known"))
        picture(first, 2)
        until(lambda: running.heard("reported", 2))
    assert names(running.out) == ["a.png", "b.png"]
    assert [line["superseded_by"] for line in reports(running.out)] == [None, None]


def test_a_file_that_is_replaced_leaves_nothing_of_its_former_content(tmp_path: Path) -> None:
    """Neither the try that it waited for, nor its place in quarantine."""
    cursed = picture(tmp_path / "in" / "a.png", 1, first=CURSED)
    with watching(tmp_path, rescan_s=0.3) as running:
        until(lambda: running.heard("failed"))
        picture(cursed, 2)
        until(lambda: running.heard("reported"))
        until(lambda: not running.ledger.counts()["failed"])
        picture(cursed, 3, first=CURSED)
        until(lambda: running.heard("quarantined"))
        os.utime(cursed)  # the same content: it stays there
        until(lambda: running.heard("known"))
        assert running.ledger.counts()["quarantined"] == 1
        picture(cursed, 4)
        until(lambda: running.heard("reported", 2))
        until(lambda: running.heard("replaced"))
    assert not list((running.out / "quarantine").iterdir())


def test_an_output_folder_that_was_removed_is_filled_again(tmp_path: Path) -> None:
    for number in (1, 2):
        picture(tmp_path / "in" / f"{number}.png", number)
    with watching(tmp_path, rescan_s=0.3) as running:
        until(lambda: running.heard("reported", 2))
    shutil.rmtree(running.out)
    with watching(tmp_path, rescan_s=0.3) as running:
        until(lambda: running.heard("reported", 2))
        time.sleep(0.5)
    assert names(running.out) == ["1.png", "2.png"]
    assert running.events.count("reports-lost") == 1


def test_a_counted_study_is_taken_when_its_last_slice_comes(tmp_path: Path) -> None:
    slices = phantom_slices()
    for each in slices:
        each.ImagesInAcquisition = len(slices)
    order = list(range(len(slices)))
    random.Random(7).shuffle(order)
    with watching(tmp_path, Patience(interval=0.05, looks=2, quiet=NEVER, cap=NEVER, refuse_after=NEVER)) as running:
        for number in order[:-1]:
            write(running.inbox / f"part{number % 3}", slices, number)
            time.sleep(0.02)
        time.sleep(0.6)
        assert not running.heard("reported")
        write(running.inbox / "last", slices, order[-1])
        until(lambda: running.heard("reported"))
        [report] = reports(running.out)
        assert len(report["inputs"]) == len(slices)


def test_an_uncounted_study_is_taken_when_it_is_quiet_and_late_slices_make_version_2(tmp_path: Path) -> None:
    slices = phantom_slices()
    with watching(tmp_path, replace(QUICK, quiet=2.0)) as running:
        for number in range(1, len(slices)):
            write(running.inbox, slices, number)
            time.sleep(0.2)  # longer in all than the quiet time
        assert not running.heard("reported")
        until(lambda: running.heard("reported"))
        write(running.inbox / "late", slices, 0)
        until(lambda: running.heard("reported", 2))
        shutil.copytree(running.inbox / "late", running.inbox / "copy")
        until(lambda: running.heard("known"))
    first, second = reports(running.out)
    assert (len(first["inputs"]), len(second["inputs"])) == (len(slices) - 1, len(slices))
    assert (second["version"], second["supersedes"], first["superseded_by"]) == (2, first["id"], second["id"])


def zipped(path: Path, slices: list[Dataset], *numbers: int) -> None:
    """An archive of those slices, with a viewer's files before them, moved into place when it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as place:
        folder = Path(place) / "disc"
        write(folder, slices, *numbers)
        (folder / "AUTORUN.INF").write_text("[autorun]")
        made = shutil.make_archive(str(Path(place) / "made"), "zip", folder)
        path.parent.mkdir(exist_ok=True)
        os.rename(made, path)


def test_archives_and_files_that_each_hold_slices_of_a_study_make_versions_with_all_of_them(tmp_path: Path) -> None:
    slices = phantom_slices()
    third = len(slices) // 3
    zipped(tmp_path / "in" / "first.zip", slices, *range(third))
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        zipped(running.inbox / "moved" / "second.zip", slices, *range(third, 2 * third))
        until(lambda: running.heard("reported", 2))
        write(running.inbox / "loose", slices, *range(2 * third, len(slices)))
        until(lambda: running.heard("reported", 3))
    found = reports(running.out)
    assert [line["version"] for line in found] == [1, 2, 3]
    assert [len(line["inputs"]) for line in found] == [third, 2 * third, len(slices)]
    assert [bool(line["superseded_by"]) for line in found] == [True, True, False]


def test_an_archive_of_slices_is_complete_as_it_is(tmp_path: Path) -> None:
    slices = phantom_slices()
    zipped(tmp_path / "in" / "one.zip", slices, *range(len(slices) // 2))
    zipped(tmp_path / "in" / "other.zip", slices, *range(len(slices) // 2, len(slices)))
    with watching(tmp_path, replace(QUICK, quiet=NEVER, cap=NEVER)) as running:
        until(lambda: running.heard("reported"))
    [line] = reports(running.out)  # both were there when the first was looked at
    assert len(line["inputs"]) == len(slices)


def test_a_study_that_never_falls_quiet_is_taken_at_the_cap(tmp_path: Path) -> None:
    slices = phantom_slices()
    write(tmp_path / "in", slices, 0, 1, 2)
    with watching(tmp_path, Patience(interval=0.05, looks=2, quiet=NEVER, cap=0.5, refuse_after=1)) as running:
        until(lambda: running.heard("reported"))
        write(running.inbox, slices, 3)
        until(lambda: running.heard("reported", 2))
    assert [line["version"] for line in reports(running.out)] == [1, 2]


def test_another_file_of_the_same_name_size_and_time_is_reported(tmp_path: Path) -> None:
    def bitmap(path: Path, seed: int) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 200, (40, 60), np.uint8)
        Image.fromarray(pixels).save(path, "BMP")
        os.utime(path, (1.7e9, 1.7e9))
        return path

    (tmp_path / "in").mkdir()
    bitmap(tmp_path / "in" / "latest.bmp", 1)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        os.replace(bitmap(tmp_path / "next.bmp", 2), running.inbox / "latest.bmp")
        until(lambda: running.heard("reported", 2))
        os.chmod(running.inbox / "latest.bmp", 0o600)
        until(lambda: running.heard("known"))
    assert [line["version"] for line in reports(running.out)] == [1, 2]


def test_a_file_that_changes_between_its_hash_and_its_decoding_is_one_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, other = Session.prepare, picture(tmp_path / "other.png", 2)

    def replace_it_before(self: Session, unit: Unit) -> Prepared:
        if other.exists():
            os.replace(other, tmp_path / "in" / "one.png")
        return prepare(self, unit)

    monkeypatch.setattr(Session, "prepare", replace_it_before)
    picture(tmp_path / "in" / "one.png", 1)
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported"))
        time.sleep(1)
        [row] = running.ledger.rows()
    [line] = reports(running.out)
    assert (row.state, row.report, row.request) == ("done", line["id"], line["request"])
    assert running.events.count("reported") == 1


@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut-off"])
def test_a_file_that_is_spoilt_between_its_hash_and_its_decoding_is_one_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    prepare, spoilt = Session.prepare, tmp_path / "spoilt.png"
    one = picture(tmp_path / "in" / "one.png", 1)
    Image.new("L", (400, 2)).save(spoilt)
    if cut:
        spoilt.write_bytes(one.read_bytes()[:-200])

    def replace_it_before(self: Session, unit: Unit) -> Prepared:
        if spoilt.exists():
            os.replace(spoilt, one)
        return prepare(self, unit)

    monkeypatch.setattr(Session, "prepare", replace_it_before)
    with watching(tmp_path) as running:
        until(lambda: running.heard("quarantined"))
        time.sleep(1)
        [row] = running.ledger.rows()
    assert (row.state, row.code) == ("quarantined", "truncated" if cut else "too-small")
    assert running.events.count("quarantined") == 1


def test_a_clock_that_is_turned_back_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = 0.0
    clock = SimpleNamespace(time=lambda: time.time() + ahead, monotonic=time.monotonic)
    monkeypatch.setattr("flows.watch.time", clock)
    with watching(tmp_path, replace(QUICK, looks=20)) as running:
        picture(running.inbox / "first.png", 1)
        until(lambda: running.watcher.settling == 1)
        ahead = -3600.0
        picture(running.inbox / "second.png", 2)
        until(lambda: running.heard("reported", 2))


def test_a_lost_folder_is_waited_for(tmp_path: Path) -> None:
    with watching(tmp_path, rescan_s=600) as running:
        picture(running.inbox / "a.png", 1)
        until(lambda: running.heard("reported"))
        running.inbox.rename(tmp_path / "gone")
        until(lambda: running.heard("folder-lost"))
        picture(tmp_path / "gone" / "b.png", 2)
        time.sleep(0.3)
        (tmp_path / "gone").rename(running.inbox)
        until(lambda: running.heard("folder-lost-over") and running.heard("reported", 2))
    assert names(running.out) == ["a.png", "b.png"]
    assert not running.heard("known")


def test_a_folder_that_is_lost_before_late_news_of_a_file_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported, losing, ismount = threading.Event(), threading.Event(), os.path.ismount

    def late_news(root: Path, **how: Any) -> Iterator[set[tuple[int, str]]]:
        yield set()
        if reported.wait(10):
            reported.clear()
            losing.set()
            yield {(2, str(tmp_path / "in" / "a.png"))}

    def lose(path: Path) -> bool:  # the last that is asked before a look
        mounted = ismount(path)
        if losing.is_set() and path == tmp_path / "in":
            losing.clear()
            path.rename(tmp_path / "gone")
        return mounted

    monkeypatch.setattr("flows.watch.watch_files", late_news)
    picture(tmp_path / "in" / "a.png", 1)
    with watching(tmp_path, rescan_s=600) as running:
        until(lambda: running.heard("reported"))
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "ismount", lose)
            reported.set()
            until(lambda: running.heard("folder-lost"))
        picture(tmp_path / "gone" / "b.png", 2)
        (tmp_path / "gone").rename(running.inbox)
        until(lambda: running.heard("folder-lost-over") and running.heard("reported", 2))
    assert not running.heard("known")


def test_a_share_that_goes_away_in_the_middle_of_its_backlog_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, reader = tmp_path / "in", TinyReader()

    def read_and_lose(study: ImageStudy, **how: Any) -> Reading:
        if not (tmp_path / "lost").exists():
            (tmp_path / "lost").touch()
            inbox.rename(tmp_path / "gone")
        return TinyReader().read(study, **how)

    monkeypatch.setattr(reader, "read", read_and_lose)
    reader.install(monkeypatch)
    for number in range(6):
        picture(inbox / f"{number}.png", number)
    with watching(tmp_path) as running:
        until(lambda: running.heard("folder-lost"))
        time.sleep(0.3)
        (tmp_path / "gone").rename(inbox)
        until(lambda: running.heard("reported", 6))
    assert names(running.out) == [f"{number}.png" for number in range(6)]


def test_files_that_cannot_be_looked_at_do_not_keep_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Entry:
        """One of a folder that may be listed and not entered."""

        path = str(tmp_path / "in" / "closed" / "a.png")

        def is_dir(self, *, follow_symlinks: bool) -> bool:
            return False

        def is_file(self, *, follow_symlinks: bool) -> bool:
            return True

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            raise PermissionError(13, "Permission denied")

    scandir = os.scandir
    monkeypatch.setattr("flows.watch.os.scandir", lambda at: [Entry()] if str(at).endswith("closed") else scandir(at))
    picture(tmp_path / "in" / "closed" / "a.png", 1)
    picture(tmp_path / "in" / "open.png", 2)
    with watching(tmp_path, poll=True) as running:
        until(lambda: running.heard("reported") and running.heard("folders-unreadable"))
    assert names(running.out) == ["open.png"]
    assert not running.watcher.complete


def test_what_a_killed_watcher_had_claimed_and_is_gone_since_is_no_item_any_more(tmp_path: Path) -> None:
    gone = tmp_path / "in" / "gone.png"
    with Ledger(tmp_path / "out", lease_s=0.5) as killed:
        killed.add([("0" * 64, [str(gone)])])
        assert killed.claim()
        assert killed.forget(["0" * 64]) == 0  # it is being worked on
    with watching(tmp_path, poll=True) as running:
        until(lambda: running.heard("vanished"))
        assert running.ledger.rows() == []


def test_a_system_without_events_is_looked_at_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Iterator[set[tuple[int, str]]]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.watch.watch_files", refuses)
    monkeypatch.setattr("flows.watch.PAUSE_S", 0.1)
    with watching(tmp_path, rescan_s=NEVER) as running:
        until(lambda: running.heard("no-events"))
        for number in range(3):
            picture(running.inbox / f"{number}.png", number)
            until(lambda number=number: running.heard("reported", number + 1))  # type: ignore[misc]
    assert running.events.count("no-events") == 1


def test_what_comes_before_the_system_sends_events_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*where: Any, **how: Any) -> Iterator[set[tuple[Any, str]]]:
        until(lambda: (where[0] / "a.png").exists())  # as after a share was mounted again
        yield from watch_files(*where, **how)

    monkeypatch.setattr("flows.watch.watch_files", late)
    monkeypatch.setattr("flows.watch.PAUSE_S", 0.2)
    with watching(tmp_path, rescan_s=NEVER) as running:
        until(lambda: running.heard("watching"))
        time.sleep(0.3)  # the first full look is over
        picture(running.inbox / "a.png", 1)
        until(lambda: running.heard("reported"))


def test_a_disk_that_is_not_mounted_any_more_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = {str(tmp_path), "/"}
    monkeypatch.setattr("flows.machine.space.os.path.ismount", lambda place: str(place) in mounted)
    heard: list[str] = []
    room = Room({"reports": tmp_path / "out"}, 0, lambda event, **facts: heard.append(event))
    assert room()
    mounted.remove(str(tmp_path))
    assert not room() and not room()
    mounted.add(str(tmp_path))
    assert room()
    assert heard == ["disk-lost", "disk-lost-over"]


def test_a_full_disk_stops_the_work_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("flows.machine.space.shutil.disk_usage", lambda folder: usage._replace(free=free[0]))
    with watching(tmp_path, min_free=1000) as running:
        picture(running.inbox / "a.png", 1)
        until(lambda: running.heard("disk-low"))
        time.sleep(0.3)
        assert not running.out.exists()
        free[0] = 2000
        until(lambda: running.heard("disk-low-over") and running.heard("reported"))
    assert running.events.count("disk-low") == 1


def test_a_disk_that_fills_up_in_the_middle_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.desk

    full, write_report = threading.Event(), pipelines.desk.write_report

    def writes(*what: Any) -> Any:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return write_report(*what)

    full.set()
    monkeypatch.setattr("pipelines.desk.write_report", writes)
    monkeypatch.setattr("flows.watch.PAUSE_S", 0.1)
    with watching(tmp_path, tries=1) as running:
        picture(running.inbox / "a.png", 1)
        until(lambda: running.heard("broken"))
        time.sleep(0.5)
        assert running.ledger.counts()["done"] == 0
        full.clear()
        until(lambda: running.heard("reported") and running.heard("broken-over"))
        [row] = running.ledger.rows()
        assert (row.state, row.attempts) == ("done", 1)


def test_an_output_folder_in_use_is_waited_for_and_let_go_between_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.watch.PAUSE_S", 0.1)
    with watching(tmp_path) as running:
        with RunFolder(running.out):
            picture(running.inbox / "a.png", 1)
            until(lambda: running.heard("broken"))
        until(lambda: running.heard("reported") and running.heard("broken-over"))
        with RunFolder(running.out) as folder:
            assert len(folder.entries) == 1


def test_what_cannot_work_is_said_at_the_start(tmp_path: Path) -> None:
    with Ledger(tmp_path / "out") as ledger, pytest.raises(UsageError, match="There is no folder"):
        Watcher(Job((tmp_path,), tmp_path / "out"), Watching(tmp_path / "absent"), ledger, EventLog())
    assert is_temporary_name("x.PART") and not is_temporary_name("part.png")


def command(tmp_path: Path, *options: str) -> list[str]:
    base = [
        sys.executable,
        "-m",
        "tests.watcher_process",
        "watch",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    return [*base, "--interval", "0.05", "--looks", "2", "--quiet", "0.4", "--refuse-after", "0.8", *options]


def test_the_command_ends_at_once_or_on_a_signal_and_logs_no_names(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "Jane-Doe.png", 1)
    (tmp_path / "in" / "John-Roe.png").touch()
    time.sleep(0.8)  # else it could still be coming
    done = subprocess.run(command(tmp_path, "--once", "--log-json"), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert {each["event"] for each in said} == {"watching", "reported", "quarantined", "stopped"}
    assert {name: said[-1][name] for name in ("reported", "refused", "left")} == {
        "reported": 1,
        "refused": 1,
        "left": 0,
    }
    assert "Jane" not in done.stderr and "Roe" not in done.stderr and str(tmp_path) not in done.stderr

    (tmp_path / "in" / "coming.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    patient = command(tmp_path, "--once", "--refuse-after", "600")
    done = subprocess.run(patient, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "left=1" in done.stderr.split()
    (tmp_path / "in" / "coming.png").unlink()

    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr and " watching known=2" in process.stderr.readline()
    picture(tmp_path / "in" / "next.png", 2)
    until(lambda: len(reports(tmp_path / "out")) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert " stopped reported=1" in process.stderr.read()


def test_watching_once_says_where_a_format_is_lacking(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "one.png", 1)  # no DICOM object can be made of its report
    done = subprocess.run(command(tmp_path, "--once", "--formats", "json,sr"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert {"lacks=sr", "lacking=1"} <= set(done.stderr.split())


def killed_at_random(tmp_path: Path, pictures: int, studies: int, kills: int, seed: int) -> None:
    """Drops come in while the watcher is killed again and again; in the end each has its one current report."""
    chance = random.Random(seed)
    inbox = tmp_path / "in"
    inbox.mkdir()
    slices = phantom_slices()[:4]

    def drop() -> None:
        for number in range(pictures):
            data = picture(tmp_path / "made.png", seed=number, first=0).read_bytes()
            data = data[: len(data) // 2] if number % 10 == 9 else data  # broken ones, for the quarantine
            with (inbox / f"{number:04}.png").open("wb", buffering=0) as file:
                half = chance.randrange(len(data))
                file.write(data[:half])
                time.sleep(chance.random() * 0.05)
                file.write(data[half:])
            if number % 7 == 0:
                shutil.copy(inbox / f"{number:04}.png", inbox / f"copy-{number:04}.png")
        for number in range(studies):
            for k, each in enumerate(slices):
                each.StudyInstanceUID, each.SeriesInstanceUID = f"1.2.{number + 1}", f"1.2.{number + 1}.1"
                each.SOPInstanceUID = each.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}.1.{k + 1}"
                write(inbox / f"study{number}", slices, k)
                time.sleep(chance.random() * 0.02)

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command(tmp_path), cwd=ROOT, stderr=log)

    def began(pid: int) -> Callable[[], bool]:
        return lambda: f" pid={pid}\n" in (tmp_path / "log").read_text()

    dropping = threading.Thread(target=drop)
    dropping.start()
    process = start()
    try:
        for _ in range(kills):
            if chance.random() < 0.8:  # else it dies while it starts
                until(began(process.pid))
            time.sleep(chance.random() * 1.2)
            process.kill()
            process.wait()
            process = start()
        dropping.join()
        broken = len([n for n in range(pictures) if n % 10 == 9])

        def settled() -> bool:
            with Ledger(tmp_path / "out") as ledger:
                counts = ledger.counts()
            if counts["quarantined"] < broken or counts["waiting"] or counts["claimed"] or counts["failed"]:
                return False
            # On a busy machine a study may have fallen quiet in the middle: it then has a version 2.
            files = [len(line["inputs"]) for line in reports(tmp_path / "out") if line["superseded_by"] is None]
            return len(files) == pictures - broken + studies and files.count(len(slices)) == studies

        until(settled, 120)
    finally:
        process.terminate()
        process.wait()
    with Ledger(tmp_path / "out") as ledger:
        rows = ledger.rows()
    current = [line for line in reports(tmp_path / "out") if line["superseded_by"] is None]
    assert len(current) == pictures - broken + studies, f"seed {seed}"
    assert len({line["request"] for line in current}) == len(current)
    of_content = Counter(line["inputs"][0]["sha256"] for line in current)
    assert set(of_content.values()) == {1}
    done = {row.request: row.report for row in rows if row.state == "done"}
    assert all(done[line["request"]] == line["id"] for line in current)
    kept = [json.loads(each.read_text()) for each in (tmp_path / "out" / "quarantine").glob("*/reason.json")]
    assert sorted(each["item"] for each in kept) == sorted(row.request for row in rows if row.state == "quarantined")
    assert not list((tmp_path / "out").glob("*/.*.tmp"))


def test_a_watcher_that_is_killed_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    killed_at_random(tmp_path, pictures=30, studies=2, kills=3, seed=1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_the_same_for_longer(tmp_path: Path, seed: int) -> None:
    killed_at_random(tmp_path, pictures=300, studies=20, kills=25, seed=seed)


def test_what_unpacks_to_far_too_much_is_not_unpacked_by_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_ingest_dicom import deflated  # not for the processes that take `until` from here

    monkeypatch.setattr("pipelines.ingest.dicom.MAX_INFLATED_BYTES", 1 << 20)
    path = deflated(tmp_path / "bomb.dcm", bytes(128 << 20))
    settling = Settling(Patience(interval=0, looks=2))
    tracemalloc.start()
    try:
        for now in (1.0, 2.0):
            settling.look(str(path), path.stat().st_size, path.stat().st_mtime_ns, now, now)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert settling.ready(100.0) is not None  # for the plan to say what is wrong
