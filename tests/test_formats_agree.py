"""Every format states the same findings, measurements and disposition: each is read back and compared."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pypdfium2
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from report_strategies import images_for, plain_report, reports
from test_reports_html import Page

from reports.bundle import Bundle
from reports.formats import RunReports, formats
from reports.page import page_of
from reports.schema import Report
from reports.texts import visible
from tests.ct_bundles import ct_bundle

Measured = tuple[tuple[str, float, str], ...]  # name, value, unit


@dataclass(frozen=True)
class Said:
    """What a format says of a finding."""

    type: str
    severity: str | None
    confidence: float
    measurements: Measured


@dataclass(frozen=True)
class Statement:
    """What a format says of a report."""

    findings: dict[str, Said]
    disposition: str | None
    measurements: Measured


def stated(report: Report) -> Statement:
    """What every format has to say. User text is compared as it may be shown."""

    def measured(measurements: tuple) -> Measured:
        return tuple((visible(m.name), m.value, m.unit) for m in measurements)

    return Statement(
        {f.id: Said(visible(f.type), f.severity, f.confidence, measured(f.measurements)) for f in report.findings},
        report.disposition,
        measured(report.measurements),
    )


# How each format is read


def from_json(data: bytes) -> Statement:
    return stated(Report.model_validate_json(data))


def from_html(data: bytes) -> Statement:
    page, findings = Page(data), {}
    rows: list[tuple[str, dict]] = [each for each in page.elements if each[0] in ("tr", "data", "section")]
    owner, measured = None, {None: []}
    for tag, attributes in rows:
        if tag == "section":
            owner = None
        elif "data-type" in attributes:
            owner = attributes["id"]
            findings[owner], measured[owner] = attributes, []
        elif tag == "data":
            measured[owner].append((attributes["data-name"], float(attributes["value"]), attributes["data-unit"]))
    return Statement(
        {
            name: Said(a["data-type"], a["data-severity"] or None, float(a["data-confidence"]), tuple(measured[name]))
            for name, a in findings.items()
        },
        next((a["data-disposition"] for a in page.all("p") if "data-disposition" in a), None),
        tuple(measured[None]),
    )


def from_tables(images: list[dict], findings: list[dict], measurements: list[dict]) -> Statement:
    def owned(finding: str | None) -> Measured:
        return tuple(
            (visible(m["name"] or ""), float(m["value"]), m["unit"])
            for m in measurements
            if (m["finding"] or None) == finding
        )

    return Statement(
        {
            f["finding"]: Said(
                visible(f["type"] or ""), f["severity"] or None, float(f["confidence"]), owned(f["finding"])
            )
            for f in findings
        },
        images[0]["disposition"] or None,
        owned(None),
    )


def from_csv(folder: Path) -> Statement:
    def text(value: str) -> str:
        return (
            value[1:]
            if value.lstrip("' ").startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) and value[0] == "'"
            else value
        )

    tables = []
    for name in ("images", "findings", "measurements"):
        with (folder / f"{name}.csv").open(encoding="utf-8-sig", newline="") as file:
            tables.append([{key: text(value) for key, value in row.items()} for row in csv.DictReader(file)])
    return from_tables(*tables)


def from_parquet(folder: Path) -> Statement:
    return from_tables(
        *(pq.read_table(folder / f"{n}.parquet").to_pylist() for n in ("images", "findings", "measurements"))
    )


def from_coco(folder: Path) -> Statement:
    told = json.loads((folder / "instances.json").read_text("utf-8"))
    names = {each["id"]: each["name"] for each in told["categories"]}
    findings = [each | {"type": names[each["category_id"]]} for each in told["annotations"]]
    findings += [each for each in told["images"][0]["without_box"]]

    def measured(owner: dict) -> Measured:
        return tuple((visible(m["name"]), m["value"], m["unit"]) for m in owner["measurements"])

    return Statement(
        {f["finding"]: Said(visible(f["type"]), f["severity"], f["score"], measured(f)) for f in findings},
        told["images"][0]["disposition"],
        measured(told["images"][0]),
    )


def from_fhir(data: bytes) -> Statement:
    resources = [entry["resource"] for entry in json.loads(data)["entry"]]
    report = next(each for each in resources if each["resourceType"] == "DiagnosticReport")
    observations = [each for each in resources if each["resourceType"] == "Observation"]

    def own(concept: dict) -> str:
        return next((c["code"] for c in concept.get("coding", ()) if c["system"].startswith("urn:uuid:")), "")

    def measured(observation: dict) -> Measured:
        return tuple(
            (own(c["code"]), c["valueQuantity"]["value"], c["valueQuantity"].get("code", ""))
            for c in observation.get("component", ())
            if "valueQuantity" in c and not any(k["code"] == "111012" for k in c["code"].get("coding", ()))
        )

    findings, whole = {}, ()
    for each in observations:
        if "identifier" not in each:
            whole = measured(each)
            continue
        sure = next(c for c in each["component"] if c["code"].get("coding", [{}])[0].get("code") == "111012")
        severities = [own(c["valueCodeableConcept"]) for c in each["component"] if "valueCodeableConcept" in c]
        severity = next((s for s in severities if s in ("critical", "major", "minor")), None)
        findings[each["identifier"][0]["value"]] = Said(
            own(each["valueCodeableConcept"]), severity, sure["valueQuantity"]["value"] / 100, measured(each)
        )
    disposition = own(report["conclusionCode"][0]) if "conclusionCode" in report else None
    return Statement(findings, disposition, whole)


def items(dataset: Dataset) -> Iterator[Dataset]:
    for item in dataset.get("ContentSequence", ()):
        yield item
        yield from items(item)


def code_of(item: Dataset) -> str:
    return _value(item.ConceptNameCodeSequence[0]) if "ConceptNameCodeSequence" in item else ""


def value_of(item: Dataset) -> str:
    return _value(item.ConceptCodeSequence[0])


def _value(code: Dataset) -> str:
    return str(code.get("CodeValue") or code.LongCodeValue)


def from_sr(data: bytes) -> Statement:
    """TID 1500: a group for each box; what is measured stands in the first group of a finding."""
    root = dcmread(io.BytesIO(data))
    findings: dict[str, Said] = {}
    whole: Measured = ()
    for group in (item for item in items(root) if code_of(item) == "125007"):
        parts = list(items(group))
        name = next(str(part.TextValue) for part in parts if code_of(part) == "112039").partition("/")[2]
        numbers = [
            (part, float(part.MeasuredValueSequence[0].NumericValue), part.MeasuredValueSequence[0])
            for part in parts
            if part.ValueType == "NUM"
        ]
        measured = tuple(
            ("", value, str(quantity.MeasurementUnitsCodeSequence[0].CodeValue))
            for part, value, quantity in numbers
            if code_of(part) not in ("111012", "111011")
        )
        kind = next((value_of(part) for part in parts if code_of(part) == "finding-type"), None)
        if name == "study":
            whole = measured
        elif kind is not None and name not in findings:
            severity = next((value_of(part) for part in parts if code_of(part) == "246112005"), None)
            sure = next(value for part, value, _ in numbers if code_of(part) == "111012") / 100
            findings[name] = Said(kind, severity, sure, measured)
    disposition = next((str(item.TextValue) for item in items(root) if code_of(item) == "disposition"), None)
    return Statement(findings, disposition, whole)


READERS: dict[str, Callable[[bytes], Statement]] = {
    "json": from_json,
    "html": from_html,
    "fhir": from_fhir,
    "fhir-r5": from_fhir,
    "sr": from_sr,
}
OVER_A_RUN: dict[str, Callable[[Path], Statement]] = {"csv": from_csv, "parquet": from_parquet, "coco": from_coco}


def pdf_text(data: bytes) -> str:
    return "".join(page.get_textpage().get_text_bounded() for page in pypdfium2.PdfDocument(data))


def sr_text(data: bytes) -> str:
    return "\n".join(str(item.TextValue) for item in items(dcmread(io.BytesIO(data))) if "TextValue" in item)


# Formats in prose only: their text, which must hold every finding, value and the disposition in words.
PROSE: dict[str, Callable[[bytes], str]] = {
    "txt": bytes.decode,
    "md": lambda data: re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", data.decode()),
    "pdf": pdf_text,
    "dicom-pdf": lambda data: pdf_text(dcmread(io.BytesIO(data)).EncapsulatedDocument),
    "sr-text": sr_text,
}
PICTURES = {"sc", "seg"}  # of a few findings, drawn: they state no text
LOTS = {"lot"}  # sums over reports: tests/test_lot.py


def squeezed(text: str) -> str:
    """Without white space, hyphens, and marks of direction and of line breaks: lines end where the paper does."""
    return re.sub(r"[\s\u2066-\u2069\u200b\u00ad\ufffe\x02-]+", "", text)


def agrees(said: Statement, meant: Statement, *, rounded: bool = False, named: bool = True) -> None:
    """`rounded`: per cent in 4 decimals, numbers in the 16 characters of a DS; not `named`: measurements are coded."""
    assert said.disposition == meant.disposition
    assert sorted(said.findings) == sorted(meant.findings)
    pairs = [(said.measurements, meant.measurements)]
    for name, yours in meant.findings.items():
        mine = said.findings[name]
        assert (mine.type, mine.severity) == (yours.type, yours.severity)
        assert math.isclose(mine.confidence, yours.confidence, abs_tol=1e-6 if rounded else 0, rel_tol=0)
        pairs.append((mine.measurements, yours.measurements))
    for mine, yours in pairs:
        assert [unit for _, _, unit in mine] == [unit for _, _, unit in yours]
        assert not named or [name for name, *_ in mine] == [name for name, *_ in yours]
        for (_, value, _), (_, wanted, _) in zip(mine, yours, strict=True):
            assert math.isclose(value, wanted, rel_tol=1e-7 if rounded else 0)


def states(text: str, report: Report, *, title: bool = True) -> None:
    text, page = squeezed(text), page_of(report)
    if report.disposition:
        assert squeezed(page.disposition_title) in text
    for finding in page.findings:
        assert squeezed(finding.id) in text
        assert not title or squeezed(finding.title) in text
        for measured in finding.measurements:
            assert squeezed(measured.text) in text
    for measured in page.measurements:
        assert squeezed(measured.text) in text


def over_a_run(report: Report, folder: Path) -> None:
    (folder / report.id).mkdir(exist_ok=True)
    (folder / report.id / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    for name, read in OVER_A_RUN.items():
        formats()[name].write(RunReports(folder, (report.id,)), folder)
        agrees(read(folder), stated(report))


def every_format(bundle: Bundle, folder: Path, names: set[str]) -> None:
    over_a_run(bundle.report, folder)
    for name in sorted(names):
        data = next(iter(formats()[name].render(bundle).values()))
        if name in PROSE:
            states(PROSE[name](data), bundle.report, title=name not in ("pdf", "dicom-pdf"))
        else:
            coded = name == "sr"
            agrees(READERS[name](data), stated(bundle.report), rounded=name.startswith(("sr", "fhir")), named=not coded)


slow = settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_every_format_is_compared() -> None:
    known = {*READERS, *OVER_A_RUN, *PROSE, *PICTURES, *LOTS}
    assert {name for name, each in formats().items() if each.renderer.startswith("reports.")} == known


@slow
@given(report=reports())
def test_inspection_reports_say_the_same_in_every_format(tmp_path: Path, report: Report) -> None:
    report = report.model_copy(update={"kind": "defect"})
    every_format(Bundle(report, images_for(report)), tmp_path, {"json", "html", "md", "txt", "pdf"})


@pytest.fixture(scope="module")
def phantom() -> Bundle:
    return ct_bundle()


@settings(slow, max_examples=8)
@given(data=st.data())
def test_ct_reports_say_the_same_in_every_format(phantom: Bundle, tmp_path: Path, data: st.DataObject) -> None:
    drawn, real = data.draw(reports()), phantom.report
    measured = [m.value for owner in (drawn, *drawn.findings) for m in owner.measurements]
    assume(all(abs(value) < 1e300 for value in measured))  # 16 characters of a DS round the largest up to infinity
    places = [evidence for finding in real.findings for evidence in finding.evidence]
    short = re.compile(r"[ -~]{1,60}")  # a term of the model's own; SR holds others by a hash
    report = drawn.model_copy(
        update={
            "kind": "ct",
            "source": real.source,
            "technique": real.technique,
            "segments": (),
            "findings": tuple(
                f.model_copy(
                    update={
                        "type": f.type if short.fullmatch(visible(f.type)) and visible(f.type) == f.type else "nodule",
                        "evidence": tuple(places[: len(f.evidence)]),
                    }
                )
                for f in drawn.findings
            ),
        }
    )
    every_format(replace(phantom, report=report, segments={}), tmp_path, {*READERS, *PROSE})


def test_empty_reports_say_the_same_in_every_format(phantom: Bundle, tmp_path: Path) -> None:
    every_format(Bundle(plain_report()), tmp_path, {"json", "html", "md", "txt", "pdf"})
    empty = phantom.report.model_copy(update={"findings": (), "measurements": (), "segments": ()})
    every_format(replace(phantom, report=empty, segments={}), tmp_path, {*READERS, *PROSE})


def test_every_format_names_version_and_former_report(phantom: Bundle, tmp_path: Path) -> None:
    changes = {"version": 2, "supersedes": "f" * 16, "superseded_by": "e" * 16}
    bundle = replace(phantom, report=phantom.report.model_copy(update=changes))
    (tmp_path / bundle.report.id).mkdir()
    (tmp_path / bundle.report.id / "report.json").write_text(bundle.report.model_dump_json())
    for name, each in formats().items():
        if each.scope == "report":
            (data, *_) = each.render(bundle).values()
            text = PROSE[name](data) if name in PROSE else data.decode("latin-1")
            if name not in PICTURES:
                assert "f" * 16 in squeezed(text), name
            if name in ("html", "md", "txt", "pdf", "fhir", "fhir-r5"):  # what is sent as DICOM never changes
                assert "e" * 16 in squeezed(text), name
        elif name not in LOTS:
            each.write(RunReports(tmp_path, (bundle.report.id,)), tmp_path)
    assert "f" * 16 in (tmp_path / "images.csv").read_text("utf-8-sig")
    assert pq.read_table(tmp_path / "images.parquet").column("supersedes")[0].as_py() == "f" * 16
    assert '"version": 2' in (tmp_path / "instances.json").read_text()
