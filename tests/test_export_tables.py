"""CSV, Parquet and COCO over a run, read back by the tools that people use: harmful text, empty runs, a full disk."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from datetime import UTC
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from report_strategies import AWKWARD, plain_report, reports

from benchmarks.exports import draw_report, write_reports
from reports.formats import RunReports, formats
from reports.schema import Evidence, Finding, Measurement, Report
from reports.tables import TABLES, cell
from reports.texts import visible
from reports.writing import FormatError, write_run_formats

ROOT = Path(__file__).parents[1]

FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def write_run(folder: Path, *written: Report) -> RunReports:
    for report in written:
        (folder / report.id).mkdir(parents=True, exist_ok=True)
        (folder / report.id / "report.json").write_text(report.model_dump_json())
    return RunReports(folder, tuple(report.id for report in written))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def found(**changes: object) -> Finding:
    values = {
        "id": "F1",
        "type": "crack",
        "description": "A crack.",
        "confidence": 0.75,
        "severity": "critical",
        "evidence": (Evidence(input_index=0, slice_index=0, bbox=(1.5, 2, 9, 12), localisation="box"),),
        "measurements": (Measurement(name="length", value=1.25, unit="mm", method="m"),),
    }
    return Finding.model_validate(values | changes)


def test_a_row_a_finding_and_a_row_an_image(tmp_path: Path) -> None:
    report = plain_report(findings=(found(), found(id="F2", evidence=(), measurements=())), disposition="reject")
    other = plain_report(id="1" * 16, version=2, supersedes="f" * 16)
    files = write_run_formats(write_run(tmp_path, report, other), ["csv"])
    assert files["csv"] == tmp_path / "findings.csv"
    first, second = rows(tmp_path / "findings.csv")
    assert (first["finding"], first["type"], first["severity"], first["disposition"]) == (
        "F1",
        "crack",
        "critical",
        "reject",
    )
    assert (first["x0_px"], first["y1_px"], first["slice"], first["long_side_mm"]) == ("1.5", "12.0", "1", "1.25")
    assert (second["boxes"], second["x0_px"], second["slice"]) == ("0", "", "")
    images = rows(tmp_path / "images.csv")
    assert [(i["report"], i["findings"], i["disposition"], i["version"], i["supersedes"]) for i in images] == [
        ("0" * 16, "2", "reject", "1", ""),
        ("1" * 16, "0", "", "2", "f" * 16),
    ]
    [measured] = rows(tmp_path / "measurements.csv")
    assert (measured["finding"], measured["name"], measured["value"], measured["unit"]) == (
        "F1",
        "length",
        "1.25",
        "mm",
    )


def test_csv_is_what_excel_and_rfc_4180_want(tmp_path: Path) -> None:
    report = plain_report(title='检验, "a"', impression="two\nlines")
    write_run_formats(write_run(tmp_path, report), ["csv"])
    data = (tmp_path / "images.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    assert data.count(b"\r\n") == 2 == data.count(b"\n")
    assert '"检验, ""a"""'.encode() in data


@given(
    st.text() | st.sampled_from(AWKWARD) | st.sampled_from(FORMULA).flatmap(lambda c: st.text().map(lambda t: c + t))
)
def test_no_cell_is_a_formula_and_every_text_can_be_had_back(text: str) -> None:
    written = io.StringIO()
    csv.writer(written).writerow([cell(text), 1.5])
    [[read, _]] = csv.reader(io.StringIO(written.getvalue(), newline=""), strict=True)
    assert not read.lstrip().startswith((*FORMULA, "\t", "\r"))
    assert read == read.splitlines()[0] if read else True
    assert (read[1:] if read.lstrip("' ").startswith(FORMULA) else read) == visible(text)


@pytest.mark.parametrize("payload", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "'=1", "＝1"])
def test_formulas_in_file_names_are_neutralised(tmp_path: Path, payload: str) -> None:
    report = plain_report(findings=(found(type=payload, description=payload),))
    source = report.source.model_copy(
        update={"lot": payload, "inputs": (report.source.inputs[0].model_copy(update={"name": payload}),)}
    )
    write_run_formats(write_run(tmp_path, report.model_copy(update={"source": source})), ["csv"])
    for name in ("images.csv", "findings.csv"):
        for row in rows(tmp_path / name):
            for key in ("image", "lot", "type", "description"):
                assert row.get(key, "'").startswith("'"), (name, key)


def test_negative_numbers_stay_numbers() -> None:
    assert cell(-1.5) == -1.5


def test_parquet_columns_are_typed(tmp_path: Path) -> None:
    report = plain_report(findings=(found(),), disposition="reject")
    write_run_formats(write_run(tmp_path, report), ["parquet"])
    images, findings = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("images", "findings"))
    assert images.schema.field("created").type == pa.timestamp("us", "UTC")
    assert images.schema.field("version").type == pa.int32()
    assert findings.schema.field("confidence").type == pa.float64()
    assert images.column("created")[0].as_py() == report.created.astimezone(UTC)
    assert findings.to_pylist()[0] | {"x0_px": 1.5, "severity": "critical"} == findings.to_pylist()[0]
    assert findings.column("description")[0].as_py() == "A crack."


def test_an_empty_run_has_headings_and_types(tmp_path: Path) -> None:
    write_run_formats(RunReports(tmp_path, ()), ["csv", "parquet", "coco"])
    assert rows(tmp_path / "findings.csv") == []
    assert pq.read_table(tmp_path / "images.parquet").num_rows == 0
    assert json.loads((tmp_path / "instances.json").read_text())["annotations"] == []


def test_coco_loads_in_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = (
        Evidence(input_index=0, slice_index=0, bbox=(1, 2, 11, 5), localisation="box"),
        Evidence(input_index=0, slice_index=0, bbox=(30, 20, 20, 10), localisation="weak"),
    )
    report = plain_report(findings=(found(evidence=two), found(id="F2", evidence=())), disposition="hold")
    clean = plain_report(id="1" * 16)
    write_run_formats(write_run(tmp_path, report, clean), ["coco"])
    coco = COCO(str(tmp_path / "instances.json"))
    assert len(coco.getImgIds()) == 2
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert (first["bbox"], first["area"], first["score"], first["finding"]) == ([1.0, 2.0, 10.0, 3.0], 30.0, 0.75, "F1")
    assert second["bbox"] == [20.0, 10.0, 10.0, 10.0]
    assert coco.loadCats([first["category_id"]])[0]["name"] == "crack"
    assert coco.annToMask(first).sum() == 30
    [image] = coco.loadImgs([1])
    assert (image["file_name"], image["disposition"], image["width"]) == ("a.png", "hold", 60)
    assert [each["finding"] for each in image["without_box"]] == ["F2"]
    assert coco.getAnnIds(imgIds=[2]) == []


def test_a_damaged_report_costs_the_format_and_says_which(tmp_path: Path) -> None:
    run = write_run(tmp_path, plain_report())
    write_run_formats(run, ["csv"])
    before = (tmp_path / "images.csv").read_bytes()
    (tmp_path / ("0" * 16) / "report.json").write_text("{")
    with pytest.raises(FormatError, match=r"0000/report\.json is no report"):
        write_run_formats(run, ["csv"])
    assert (tmp_path / "images.csv").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [each.name for each in formats().values() if each.scope == "run"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    run = write_run(tmp_path, plain_report(disposition="accept"))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_run_formats(run, [name])
    assert [each.name for each in tmp_path.iterdir()] == ["0" * 16]


ON_A_SMALL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from reports.formats import RunReports
from reports.writing import write_run_formats
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # it stands in for the end of a disk
folder = Path(sys.argv[1])
try:
    write_run_formats(RunReports(folder, tuple(os.listdir(folder))), ["coco"])
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_fills_up_while_a_table_is_written_leaves_nothing(tmp_path: Path) -> None:
    write_reports(tmp_path, 30)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", ON_A_SMALL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert sorted(tmp_path.iterdir()) == before


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(report=reports())
def test_any_report_can_be_written(tmp_path: Path, report: Report) -> None:
    run = write_run(tmp_path, report)
    write_run_formats(run, ["csv", "parquet", "coco"])
    for table in TABLES:
        assert len(rows(tmp_path / f"{table.name}.csv")) == pq.read_table(tmp_path / f"{table.name}.parquet").num_rows


def test_generated_lots_read_as_reports() -> None:
    assert draw_report(3) == Report.model_validate_json(draw_report(3).model_dump_json())
