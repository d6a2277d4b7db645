"""The one-off run: what it leaves on disk for good and bad input, a failing model, an interruption, a second run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.desk import Desk
from pipelines.reading import Reading
from pipelines.run import Job, Progress, Session, UsageError, execute
from pipelines.run_folder import IndexEntry, OutputError, RunFolder
from pipelines.study import ImageStudy, Rejection
from tests.tiny_reader import CURSED, TinyReader

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> TinyReader:
    reader = TinyReader()
    reader.install(monkeypatch)
    return reader


def picture(path: Path, seed: int = 0, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 200, (40, 60), np.uint8)
    pixels[0, 0] = first
    Image.fromarray(pixels).save(path)
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_becomes_reports_an_index_and_a_list_of_refused_inputs(tmp_path: Path, reader: TinyReader) -> None:
    for name in ("a.png", "deep/b.png"):
        picture(tmp_path / "in" / name, seed=len(name))
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:200])
    out = tmp_path / "out"
    seen: list[Progress] = []

    summary = execute(Job((tmp_path / "in",), out), seen.append)

    assert len(summary.reported) == 2
    assert not summary.complete
    entries = lines(out / "index.jsonl")
    assert [Path(entry["inputs"][0]["path"]).name for entry in entries] == ["a.png", "b.png"]
    for entry in entries:
        assert entry["status"] == "done"
        assert entry["findings"] == 1
        assert set(entry["formats"]) == {"json", "html"}
        for file in entry["formats"].values():
            assert (out / file).stat().st_size > 100
        assert json.loads((out / entry["id"] / "report.json").read_text())["id"] == entry["id"]
    [refused] = lines(out / "rejected.jsonl")
    assert refused["path"].endswith("broken.png")
    assert refused["code"]
    assert refused["reason"]
    assert refused["remedy"]
    assert summary.index.read_text().count("broken.png") >= 1
    assert seen[-1].stage == "report"
    assert seen[-1].done == seen[-1].total


def test_a_second_run_reads_nothing_again(tmp_path: Path, reader: TinyReader) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "empty.png").touch()
    job = Job((tmp_path / "in",), tmp_path / "out")
    first = execute(job)
    before = (tmp_path / "out" / "index.jsonl").read_bytes()

    second = execute(job)

    assert reader.read_names == ["a.png"]
    assert not second.reported
    assert second.already_reported == first.reported
    assert second.rejected == first.rejected
    assert (tmp_path / "out" / "index.jsonl").read_bytes() == before
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 1


def test_a_report_is_made_again_when_a_file_is_missing_or_a_format_model_or_kind_is_new(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")
    job = Job((tmp_path / "a.png",), tmp_path / "out", formats=("json",))
    [entry] = execute(job).reported
    assert len(execute(Job(job.inputs, job.out, formats=("json", "html"))).reported) == 1
    (job.out / entry.formats["json"]).unlink()
    assert len(execute(job).reported) == 1
    assert len(lines(job.out / "index.jsonl")) == 1
    assert len(execute(Job(job.inputs, job.out, kind="defect")).reported) == 1
    TinyReader("2").install(monkeypatch)
    assert len(execute(job).reported) == 1
    assert len({line["id"] for line in lines(job.out / "index.jsonl")}) == 3


def test_a_run_is_complete_only_with_all_formats_asked_for_whoever_wrote_them(
    tmp_path: Path, reader: TinyReader
) -> None:
    for name in ("a.png", "b.png"):  # the same content
        picture(tmp_path / "in" / name)
    job = Job((tmp_path / "in",), tmp_path / "out", formats=("json", "sr"))  # no DICOM object can be made of it
    assert not execute(job).complete
    assert not execute(job).complete
    again = execute(replace(job, formats=("json",)))
    assert len(again.already_reported) == 2 and again.complete
    further = execute(replace(job, formats=("json", "html")))
    assert further.reported[0].errors.keys() == {"sr"} and further.complete  # nobody asks for that now


def test_the_device_waits_until_the_last_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyReader(seconds=0.2).install(monkeypatch)
    real = Desk.report

    def slow(*arguments: Any) -> Any:
        time.sleep(0.6)
        return real(*arguments)

    monkeypatch.setattr(Desk, "report", slow)
    summary = execute(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))
    assert summary.device_wait is not None and 0.5 < summary.device_wait < 1
    assert execute(Job((tmp_path / "a.png",), tmp_path / "out")).device_wait is None  # nothing was read


def test_the_same_content_twice_is_reported_once(tmp_path: Path, reader: TinyReader) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / "in" / name)
    summary = execute(Job((tmp_path / "in",), tmp_path / "out"))
    assert len(summary.reported) == 1
    assert len(summary.already_reported) == 2


def test_a_failing_model_costs_that_input_only_and_quotes_nothing_of_it(tmp_path: Path, reader: TinyReader) -> None:
    picture(tmp_path / "in" / "a.png", seed=1)
    picture(tmp_path / "in" / "b-Jane-Doe.png", seed=2, first=CURSED)
    picture(tmp_path / "in" / "c.png", seed=3)

    summary = execute(Job((tmp_path / "in",), tmp_path / "out"))

    assert len(summary.reported) == 2
    [refused] = summary.rejected
    assert refused.code == "model-failed"
    assert "RuntimeError" in refused.reason
    assert "tiny_reader.py" in refused.reason
    assert "Jane" not in refused.reason


def test_an_input_that_is_mended_leaves_the_list_of_refused_ones(tmp_path: Path, reader: TinyReader) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    (tmp_path / "other.png").touch()
    out = tmp_path / "out"
    execute(Job((tmp_path / "other.png",), out))
    execute(Job((tmp_path / "in",), out))
    assert len(lines(out / "rejected.jsonl")) == 2
    picture(tmp_path / "in" / "a.png")

    assert execute(Job((tmp_path / "in",), out)).complete
    assert [Path(line["path"]).name for line in lines(out / "rejected.jsonl")] == ["other.png"]


def test_golden_samples_are_compared_with_and_not_reported(tmp_path: Path, reader: TinyReader) -> None:
    for name, seed in (("a.png", 1), ("b.png", 2)):
        picture(tmp_path / "in" / name, seed)
        picture(tmp_path / "in" / "golden" / name, seed + 10)
    single = tmp_path / "in" / "golden" / "a.png"

    by_name = execute(Job((tmp_path / "in",), tmp_path / "out", reference=tmp_path / "in" / "golden"))
    for entry in by_name.reported:
        report = json.loads((tmp_path / "out" / entry.formats["json"]).read_text())
        assert Path(report["source"]["reference"]["name"]).name == Path(entry.inputs[0]["path"]).name
    assert len(by_name.reported) == 2

    one_for_all = execute(Job((tmp_path / "in",), tmp_path / "out2", reference=single))
    names = [Path(entry.inputs[0]["path"]).relative_to(tmp_path).as_posix() for entry in one_for_all.reported]
    assert names == ["in/a.png", "in/b.png", "in/golden/b.png"]


def test_what_a_run_wrote_is_no_input_of_the_next(tmp_path: Path, reader: TinyReader) -> None:
    picture(tmp_path / "a.png")
    job = Job((tmp_path,), tmp_path / "out")
    execute(job)
    assert execute(job).already_reported
    assert len(lines(job.out / "index.jsonl")) == 1
    assert not lines(job.out / "rejected.jsonl")


def test_inputs_may_lie_in_the_output_folder(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "deep" / "b.png", 2)
    (tmp_path / "empty.png").touch()
    monkeypatch.chdir(tmp_path)
    first = execute(Job((Path("a.png"),), Path()))
    assert [entry.inputs[0]["path"] for entry in first.reported] == ["a.png"]
    for _ in range(2):
        everything = execute(Job((Path(),), Path()))
        assert len(everything.reported) + len(everything.already_reported) == 2
        assert [r.path for r in everything.rejected] == ["empty.png"]
        assert everything.passed_over == 0


def doubled_series(folder: Path) -> Path:
    """The sample series with another instance at the place of a slice: the study leaves that one out."""
    shutil.copytree(EXAMPLES / "ct" / "phantom-series", folder)
    other = pydicom.dcmread(folder / "IM0005.dcm")
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    other.save_as(folder / "IM0005b.dcm")
    return folder


def test_a_byte_identical_copy_of_a_slice_is_passed_over(tmp_path: Path, reader: TinyReader) -> None:
    shutil.copytree(EXAMPLES / "ct" / "phantom-series", tmp_path / "in")
    once = execute(Job((tmp_path / "in",), tmp_path / "once"))
    shutil.copy(tmp_path / "in" / "IM0005.dcm", tmp_path / "in" / "IM0005b.dcm")
    twice = execute(Job((tmp_path / "in",), tmp_path / "twice"))
    assert twice.complete
    assert twice.passed_over == 1
    assert [entry.id for entry in twice.reported] == [entry.id for entry in once.reported]


def test_refused_slices_stay_on_record_whatever_the_folder_is_called(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled_series(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    [missing] = execute(Job((Path("in"),), out)).rejected
    assert missing.path == "in/IM0005b.dcm"
    for spelling in (tmp_path / "in", Path("in"), Path("in")):
        again = execute(Job((spelling,), out))
        assert again.already_reported
        assert [r.path for r in again.rejected] == [str(spelling / "IM0005b.dcm")]
        assert [line["path"] for line in lines(out / "rejected.jsonl")] == [str(spelling / "IM0005b.dcm")]


def test_refused_slices_come_back_after_a_run_that_stopped_before_them(tmp_path: Path, reader: TinyReader) -> None:
    job = Job((doubled_series(tmp_path / "in"),), tmp_path / "out")
    first = execute(job)
    with Session(job) as session:
        session.discover()
    assert execute(job).rejected == first.rejected
    assert len(lines(job.out / "rejected.jsonl")) == 1


def test_formats_that_are_there_stay_in_the_index(tmp_path: Path, reader: TinyReader) -> None:
    picture(tmp_path / "a.png")
    jobs = [Job((tmp_path / "a.png",), tmp_path / "out", formats=(name,)) for name in ("json", "html")]
    assert [len(execute(job).reported) for job in jobs] == [1, 1]
    assert [len(execute(job).reported) for job in jobs] == [0, 0]
    [line] = lines(tmp_path / "out" / "index.jsonl")
    assert set(line["formats"]) == {"json", "html"}


def test_a_path_out_of_reach_costs_that_path_only(tmp_path: Path, reader: TinyReader) -> None:
    picture(tmp_path / "a.png")
    too_long = tmp_path / ("x" * 300)  # the system refuses to look, as it does in a folder without access rights
    summary = execute(Job((too_long, tmp_path / "gone.png", tmp_path / "a.png"), tmp_path / "out"))
    assert len(summary.reported) == 1
    assert [r.code for r in summary.rejected] == ["unreadable", "not-found"]
    with pytest.raises(UsageError, match="cannot be reached"):
        execute(Job((too_long,), tmp_path / "out"))
    with pytest.raises(UsageError, match="cannot be reached"):
        execute(Job((tmp_path / "a.png",), tmp_path / "out", reference=too_long))


def test_a_broken_golden_sample_costs_only_the_pictures_that_need_it(tmp_path: Path, reader: TinyReader) -> None:
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        picture(tmp_path / "in" / name, seed)
    picture(tmp_path / "golden" / "a.png", 10)
    (tmp_path / "golden" / "b.png").write_bytes(b"no picture")
    job = Job((tmp_path / "in",), tmp_path / "out", reference=tmp_path / "golden")
    summary = execute(job)
    assert len(summary.reported) == 2
    assert [(Path(r.path).name, r.code) for r in summary.rejected] == [("b.png", "golden-sample-unreadable")]
    assert summary.without_golden_sample == 1
    (tmp_path / "golden" / "a.png").unlink()
    with pytest.raises(UsageError, match=r"b\.png cannot be used"):
        execute(job)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"inputs": ()}, "at least one"),
        ({"inputs": (Path("/nowhere/x.png"),)}, "/nowhere/x.png"),
        ({"formats": ("jsno",)}, "jsno"),
        ({"formats": ()}, "json"),
        ({"kind": "mri"}, "mri"),
        ({"reference": Path("/nowhere")}, "/nowhere"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_written(
    tmp_path: Path, reader: TinyReader, change: dict, word: str
) -> None:
    job = {"inputs": (picture(tmp_path / "a.png"),), "out": tmp_path / "out"} | change
    with pytest.raises(UsageError, match=word):
        execute(Job(**job))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_has_one_run_at_a_time(tmp_path: Path, reader: TinyReader) -> None:
    with RunFolder(tmp_path / "out"), pytest.raises(OutputError, match="Another run"):
        execute(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--out"):
        execute(Job((tmp_path / "a.png",), tmp_path / "file"))


def test_the_folder_is_not_let_go_while_a_thread_writes_into_it(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tuple(picture(tmp_path / f"{seed}.png", seed) for seed in range(3)), tmp_path / "out")
    at_work, go_on, locked = threading.Event(), threading.Event(), []

    def read(study: ImageStudy, **options: object) -> Reading:
        at_work.set()
        assert go_on.wait(60)
        return TinyReader().read(study)

    def look() -> None:
        with pytest.raises(OutputError, match="Another run"):
            RunFolder(job.out)
        locked.append(True)
        go_on.set()

    monkeypatch.setattr(reader, "read", read)
    with Session(job) as session:
        worker = threading.Thread(target=session.process, args=(session.discover(),))
        worker.start()
        assert at_work.wait(60)
        threading.Timer(0.2, look).start()
    assert locked
    worker.join()
    assert len(lines(job.out / "index.jsonl")) == 1  # the unit that it was at


def test_the_summary_keeps_the_order_of_the_inputs_whatever_is_processed_first(
    tmp_path: Path, reader: TinyReader
) -> None:
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", seed=number)
    with Session(Job((tmp_path / "in",), tmp_path / "out")) as session:
        units = session.discover()
        session.process(units[2:], place=2)
        halfway = session.finish()
        session.process(units[:2], place=0)
        summary = session.finish()
    assert (halfway.left, halfway.complete) == (2, False)
    assert (summary.left, summary.complete) == (0, True)
    assert [Path(entry.inputs[0]["path"]).stem for entry in summary.reported] == ["0", "1", "2", "3"]


def test_inputs_larger_than_what_may_be_open_at_a_time_are_all_reported(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.MOST_OPEN", 1)
    for number in range(5):
        picture(tmp_path / "in" / f"{number}.png", seed=number % 4)  # one twice
    summary = execute(Job((tmp_path / "in",), tmp_path / "out"))
    assert (len(summary.reported), len(summary.already_reported)) == (4, 1)


DIES_OF_SOME = """
import os, sys
from pathlib import Path
import pytest
from pipelines.run import Job, execute
from tests.tiny_reader import TinyReader

class Deadly(TinyReader):
    def read(self, study, **options):
        if study.pixels[0].flat[0] == 13:
            os._exit(9)
        return super().read(study, **options)

Deadly().install(pytest.MonkeyPatch())
execute(Job((Path(sys.argv[1]),), Path(sys.argv[2])))
"""


def test_an_input_that_ends_the_process_costs_the_others_nothing_and_is_given_up(
    tmp_path: Path, reader: TinyReader
) -> None:
    for number in range(8):
        picture(tmp_path / "in" / f"{number}.png", seed=number, first=13 if number == 3 else 0)
    out = tmp_path / "out"

    def run() -> tuple[int, int]:
        ended = subprocess.run(
            [sys.executable, "-c", DIES_OF_SOME, tmp_path / "in", out], cwd=EXAMPLES.parent, check=False, timeout=60
        )
        return ended.returncode, len(lines(out / "index.jsonl"))

    code, reported = run()
    assert (code, reported < 7) == (9, True)
    assert [run() for _ in range(3)] == [(9, 7), (9, 7), (0, 7)]  # by then it is refused
    [refused] = lines(out / "rejected.jsonl")
    assert (refused["code"], Path(refused["path"]).name) == ("process-died", "3.png")
    assert run() == (0, 7)  # and is so without another try
    picture(tmp_path / "in" / "3.png", seed=3)
    summary = execute(Job((tmp_path / "in",), out))
    assert (len(summary.reported), len(summary.already_reported), summary.complete) == (1, 7, True)
    (out / ".under-way").unlink()
    assert not execute(Job((tmp_path / "in",), out)).rejected
    assert not (out / ".under-way").exists()


def test_a_full_disk_stops_the_run_with_a_sentence(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.desk.write_report", full)
    with pytest.raises(OutputError, match="No space left on device"):
        execute(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))


def of_index(descriptor: int) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith("/index.jsonl")


def test_reports_do_not_wait_for_each_other_until_a_slow_disk_has_their_lines(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, fsync = threading.Barrier(2, timeout=20), os.fsync

    def slow(descriptor: int) -> None:
        if of_index(descriptor):
            together.wait()  # fails if one begins when the other is done
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    for seed in range(2):
        picture(tmp_path / "in" / f"{seed}.png", seed)
    with Session(Job((tmp_path / "in",), tmp_path / "out")) as session, ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(session.conclude, map(session.prepare, session.discover())))
    assert [type(each) for each in outcomes] == [IndexEntry, IndexEntry]


def test_a_report_is_told_when_its_line_is_on_the_disk(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    told: list[bool] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        if of_index(descriptor):
            synced.update(each["id"] for each in lines(tmp_path / "out" / "index.jsonl"))

    monkeypatch.setattr(os, "fsync", note)
    for seed in range(3):
        picture(tmp_path / "in" / f"{seed}.png", seed)
    job = Job((tmp_path / "in",), tmp_path / "out")
    with Session(job, told=lambda outcome: told.append(isinstance(outcome, IndexEntry) and outcome.id in synced)) as s:
        s.process(s.discover())
    assert told == [True] * 3


def test_a_disk_that_fails_to_keep_a_line_stops_the_run(
    tmp_path: Path, reader: TinyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if of_index(descriptor):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot be written .Input/output error"):
        execute(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))


ENTRY = IndexEntry("0" * 16, "1" * 64, "ct", "CT · a\u2028b", ({"path": "a", "sha256": "2" * 64},), 0, (), None, None, {}, "m 1", 1.0)  # fmt: skip  # noqa: E501


@given(cut=st.integers(1, 400), garbage=st.binary(max_size=20))
def test_a_torn_last_line_is_repaired_and_the_lines_before_it_stay(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bytes
) -> None:
    out = tmp_path_factory.mktemp("out")
    with RunFolder(out) as folder:
        folder.add(ENTRY)
        folder.reject(Rejection("b\udcff.png", "empty-file", "It is empty.", "Copy it again."))
    whole = (out / "index.jsonl").read_bytes()
    (out / "index.jsonl").write_bytes(whole + whole.replace(b"0" * 16, b"f" * 16)[: min(cut, len(whole) - 2)] + garbage)

    with RunFolder(out) as folder:
        assert tuple(folder.entries) == (ENTRY,)
        assert folder.rejections[0].path == "b\udcff.png"
        folder.add(ENTRY)
    assert (out / "index.jsonl").read_bytes() == whole


def test_a_folder_of_many_reports_keeps_none_of_them_in_memory(tmp_path: Path) -> None:
    count = 2000
    lines = (replace(ENTRY, id=f"{n:016x}", request=f"{n:064x}", subject=f"{n:x}") for n in range(count))
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in lines))
    tracemalloc.start()
    try:
        with RunFolder(tmp_path) as folder:
            everything = folder.entries
            assert folder.known(f"{1234:064x}") == everything[1234] and everything[1234].id == f"{1234:016x}"
            assert len(everything) == count and tracemalloc.get_traced_memory()[0] / count < 100  # bytes
    finally:
        tracemalloc.stop()


def test_what_a_summary_says_stays_whatever_becomes_of_the_index(tmp_path: Path, reader: TinyReader) -> None:
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", seed=ord(name))
    job = Job((tmp_path / "in",), tmp_path / "out", formats=("json",))
    summary = execute(job)
    execute(replace(job, formats=("json", "html")))  # the lines are written anew
    (tmp_path / "out" / "index.jsonl").unlink()
    assert [tuple(entry.formats) for entry in summary.reported] == [("json",)] * 3
    assert [Path(entry.inputs[0]["path"]).name for entry in summary.reported[1:]] == ["b.png", "c.png"]


SLOW_RUN = """
import signal, sys, time
from pathlib import Path
import pipelines.run
from tests.tiny_reader import TinyReader

class Slow(TinyReader):
    def read(self, study, **options):
        time.sleep(0.1 if len(self.read_names) < 4 else 3)  # so that it is not done before the blow
        return super().read(study, **options)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background ignores it
reader = Slow()
pipelines.run.find = lambda model: reader.stored
pipelines.run.load_reader = lambda model, device: reader
pipelines.run.execute(pipelines.run.Job((Path(sys.argv[1]),), Path(sys.argv[2])))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_whole_files_and_the_next_run_finishes(
    tmp_path: Path, reader: TinyReader, blow: signal.Signals
) -> None:
    for number in range(12):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(tmp_path / "in"), str(out)],
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
    )
    index = out / "index.jsonl"
    while not index.exists() or len(index.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(blow)
    process.wait()

    for file in out.glob("*/report.json"):
        json.loads(file.read_text())
    done = len(lines(index))
    assert 3 <= done < 12
    summary = execute(Job((tmp_path / "in",), out))
    assert len(summary.already_reported) == done
    assert len(lines(index)) == len(summary.reported) + done == 12
    assert not list(out.rglob("*.tmp"))


MISSING = """
import sys
sys.modules["pypdfium2"] = None  # as if it were not installed
from scanscribe.cli import main
main()
"""


def test_a_package_that_is_missing_is_no_fault_of_the_input(tmp_path: Path) -> None:
    words = ("report", str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out"), "--json")
    done = subprocess.run([sys.executable, "-c", MISSING, *words], capture_output=True, text=True, cwd=EXAMPLES.parent)
    told = json.loads(done.stdout)["error"]
    assert (done.returncode, told["code"]) == (2, "environment")
    assert told["message"].startswith("The package pypdfium2 is not installed: run `make setup`")
    assert not (tmp_path / "out" / "index.jsonl").exists()
