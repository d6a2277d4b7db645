"""Files appear whole or not at all; formats are registered; the published schema is up to date."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from report_strategies import images_for, plain_report, reports

from reports.bundle import Bundle, BundleError, load_bundle
from reports.dicom_source import DicomSource, Instance
from reports.files import atomic_write
from reports.formats import Format, UnknownFormatError, formats
from reports.schema import SCHEMA_PATH, Report, json_schema
from reports.writing import FormatError, write_formats, write_report


def test_published_schema_is_up_to_date() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == json_schema(), "run: python -m reports.schema"


def test_atomic_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_leaves_the_old_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_written_file_has_the_rights_of_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(report=reports())
def test_json_file_reads_back_as_the_same_report(tmp_path: Path, report: Report) -> None:
    written = write_report(tmp_path / report.id, Bundle(report, images_for(report)), ["json"])
    assert Report.model_validate_json(written["json"].read_bytes()) == report
    assert json.loads(written["json"].read_bytes())["status"] == "preliminary"
    with Image.open(tmp_path / report.id / "thumb.jpg") as thumbnail:
        assert max(thumbnail.size) == 256


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    report = plain_report()
    with pytest.raises(UnknownFormatError, match="known formats are json, html"):
        write_report(tmp_path / "r", Bundle(report), ["json", "papyrus"])
    assert not (tmp_path / "r").exists()


def test_one_failing_format_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Format("broken", "fails", "report.broken", "reports.writing:no_such_function")
    monkeypatch.setattr("reports.writing.formats", lambda: formats() | {"broken": broken})
    monkeypatch.setattr("reports.writing.check_formats", lambda names: None)
    with pytest.raises(FormatError) as caught:
        write_report(tmp_path, Bundle(plain_report()), ["broken", "json", "html"])
    assert set(caught.value.written) == {"json", "html"}
    assert "no_such_function" in caught.value.errors["broken"]
    assert all(path.exists() for path in caught.value.written.values())


def quoting(bundle: Bundle) -> bytes:
    raise ValueError("invalid value: DOE^JANE")


def test_a_failing_format_quotes_nothing_of_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Format("broken", "fails", "report.broken", "tests.test_reports_writing:quoting")
    monkeypatch.setattr("reports.writing.formats", lambda: {"broken": broken})
    monkeypatch.setattr("reports.writing.check_formats", lambda names: None)
    with pytest.raises(FormatError) as caught:
        write_report(tmp_path, Bundle(plain_report()), ["broken"])
    assert caught.value.errors["broken"].startswith("ValueError in test_reports_writing.py, line ")


def test_the_leftover_of_a_killed_run_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".report.json.1-aa.tmp").write_bytes(b"half")
    write_report(tmp_path, Bundle(plain_report()), ["json"])
    (tmp_path / ".2-bb.tmp").mkdir()  # of a killed export
    write_formats(tmp_path, Bundle(plain_report()), ["md"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "report.json", "report.md"]


def test_no_file_of_a_report_appears_before_all_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []
    fsync, move = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def replace(source: Path, target: Path) -> None:
        move(source, target)
        done.append(("move", target))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_report(tmp_path, Bundle(plain_report(), images_for(plain_report())), ["json", "html"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.json", "report.html", "thumb.jpg", "pictures.json"} < {path.name for path in files}
    what = [kind for kind, _ in done]
    assert what == ["sync"] * len(files) + ["move"] * len(files) + ["sync"] * 2
    assert {path.name for _, path in done[: len(files)]} == {path.name for path in files}
    assert {path for _, path in done[-2:]} == {tmp_path, tmp_path / "parts"}


def test_a_full_disk_leaves_nothing_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, Bundle(plain_report(), images_for(plain_report())))
    assert not list(tmp_path.iterdir())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(report=reports())
def test_a_report_folder_reads_back_as_it_was_written(tmp_path: Path, report: Report) -> None:
    mask = np.zeros((2, 5, 7), bool)
    mask[1, 2:4, 3:] = True
    source = DicomSource({"0020000D": {"vr": "UI", "Value": ["1.2"]}}, (Instance("1.2.3", "1.2.840.1", 4),))
    bundle = Bundle(report, images_for(report), source, {"lung-left": mask})
    write_report(tmp_path / report.id, bundle, ["json"])
    again = load_bundle(tmp_path / report.id)
    assert (again.report, again.dicom) == (report, source)
    assert np.array_equal(again.segments["lung-left"], mask)
    assert again.images.slices.keys() == bundle.images.slices.keys()
    for index, picture in bundle.images.slices.items():
        assert np.array_equal(again.images.slices[index].pixels, picture.pixels)
        assert again.images.slices[index].shown_as == picture.shown_as


def test_a_folder_without_a_readable_report_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no report\.json"):
        load_bundle(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(BundleError, match="no report of this version"):
        load_bundle(tmp_path)
    write_report(tmp_path, Bundle(plain_report(), images_for(plain_report())), ["json"])
    (tmp_path / "parts" / "slice-0001.png").write_bytes(b"torn")
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(tmp_path)
