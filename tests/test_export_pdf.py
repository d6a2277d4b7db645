"""The PDF is what it claims to be, says what the report says in any script, and is the same each time."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as raw
import pytest
from fontTools.ttLib import TTFont
from hypothesis import Phase, given, settings
from report_strategies import AWKWARD, images_for, plain_report, reports

from reports.bundle import Bundle, save_parts
from reports.files import atomic_write
from reports.images import BOX_COLOUR, Picture, ReportImages
from reports.page import page_of
from reports.pdf import FONTS, LONGEST_SIDE, render
from reports.schema import Evidence, Finding, Measurement, Report, Source, SourceInput
from reports.taxonomy import CT_TYPES, DEFECT_TYPES
from reports.texts import CATALOGUE, worded
from reports.writing import render_json

GREEN = (20, 120, 60)


def opened(pdf: bytes) -> pdfium.PdfDocument:
    return pdfium.PdfDocument(io.BytesIO(pdf))


def text_of(pdf: bytes) -> str:
    """All text of all pages, without white space: lines break where the paper ends."""
    said = "".join(page.get_textpage().get_text_bounded() for page in opened(pdf))
    return re.sub(r"[\s\u200b\ufffe\x02-]+", "", said)


def squeezed(text: str) -> str:
    return re.sub(r"[\s-]+", "", text)


def test_a_name_without_a_space_does_not_run_into_its_value() -> None:
    finding = Finding(
        id="F1",
        type="scratches",
        description="",
        evidence=(Evidence(input_index=0, slice_index=0, bbox=(1, 1, 5, 5), localisation="box"),),
        measurements=(Measurement(name="W" * 30, value=1.25, unit="mm", method="m"),),
        confidence=0.9,
    )
    report = plain_report(findings=(finding,))
    found = []
    for page in opened(render(Bundle(report, images_for(report)))):
        text = page.get_textpage()
        boxes = [(text.get_text_range(n, 1), text.get_charbox(n)) for n in range(text.count_chars())]
        said = "".join(letter for letter, _ in boxes)
        if "WW" in said:
            value = boxes[said.index("1.25")][1]
            found += [box[2] < value[0] for letter, box in boxes if letter == "W" and abs(box[1] - value[1]) < 1]
    assert found and all(found)


# Not shrunk: each step sets pages.
@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(report=reports())
def test_any_report_becomes_a_pdf_that_states_its_findings(report: Report) -> None:
    pdf = render(Bundle(report, images_for(report)))
    text = text_of(pdf)
    page = page_of(report)
    assert report.id in text
    for fact in page.identity:
        assert squeezed(fact.title) in text
    if report.disposition:
        assert squeezed(page.disposition_title) in text
    for finding in page.findings:
        title = squeezed(finding.title) if finding.type in CT_TYPES + DEFECT_TYPES else ""
        assert squeezed(finding.id) + title in text
        assert squeezed(finding.severity_title if report.kind == "defect" else "") in text
        assert finding.sure in text
        for measured in finding.measurements:
            assert squeezed(measured.text) in text


def with_finding(**changes: object) -> Bundle:
    evidence = Evidence(input_index=0, slice_index=0, bbox=(150, 100, 450, 300), localisation="box")
    finding = Finding(id="F1", type="crack", description="A crack.", evidence=(evidence,), confidence=0.5)
    picture = Picture(np.full((400, 600, 3), GREEN, np.uint8), "plain")
    return Bundle(plain_report(findings=(finding,), **changes), ReportImages({0: picture}))


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_it_claims_pdf_a_and_pdf_ua_and_is_tagged(language: str) -> None:
    pdf = render(with_finding(language=language))
    xmp = re.search(rb"<x:xmpmeta.*?</x:xmpmeta>", pdf, re.DOTALL)
    assert xmp is not None
    for claim in (b"pdfaid:part>2<", b"pdfaid:conformance>A<", b"pdfuaid:part>1<"):
        assert claim in xmp.group()
    document = opened(pdf)
    assert raw.FPDFCatalog_IsTagged(document)
    described = document.get_metadata_dict()
    assert (described["Title"], described["CreationDate"]) == ("A picture", "D:20260102030405Z")
    size = raw.FPDFCatalog_GetLanguage(document, None, 0)
    buffer = (raw.FPDF_WCHAR * (size // 2))()
    raw.FPDFCatalog_GetLanguage(document, buffer, size)
    assert "".join(map(chr, buffer)).rstrip("\0") == language


def test_all_fonts_are_in_the_file(tmp_path: Path) -> None:
    if shutil.which("pdffonts") is None:
        pytest.skip("no pdffonts to list the fonts with; install the package poppler-utils")
    path = tmp_path / "report.pdf"
    path.write_bytes(render(with_finding(title="裂纹 crack", language="zh-CN")))
    listed = subprocess.run(["pdffonts", str(path)], capture_output=True, check=True, text=True).stdout.splitlines()[2:]
    assert len(listed) >= 3
    for line in listed:
        embedded, subset, unicode = line.split()[-5:-2]
        assert (embedded, subset, unicode) == ("yes", "yes", "yes"), line
        assert "NotoSans" in line


def test_the_same_report_is_the_same_file_in_any_process(tmp_path: Path) -> None:
    bundle = with_finding(title="裂纹")
    save_parts(tmp_path, bundle)
    atomic_write(tmp_path / "report.json", render_json(bundle))
    first = render(bundle)
    assert render(bundle) == first
    again = (
        "import sys, pathlib; from reports.bundle import load_bundle; from reports.pdf import render;"
        "sys.stdout.buffer.write(render(load_bundle(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", again, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1]).stdout == first
    assert render(with_finding(title="裂缝")) != first


@pytest.mark.parametrize(
    ("title", "language", "wanted"),
    [
        ("Größe α Жук ≤ 5 µm", "en", "GrößeαЖук≤5µm"),
        ("胸部 CT：右肺结节（3 毫米）", "zh-CN", "胸部CT：右肺结节（3毫米）"),
        ('#panic("x") $x^2$ *b* @here', "en", '#panic("x")$x^2$*b*@here'),
        ("فحص 😀 \ue000", "en", "□□□□□"),
    ],
)
def test_text_of_any_script_can_be_set(title: str, language: str, wanted: str) -> None:
    assert wanted in text_of(render(with_finding(title=title, language=language)))


@pytest.mark.parametrize("awkward", AWKWARD)
def test_nothing_runs_off_the_paper(awkward: str) -> None:
    """The margin right of the text stays white, whatever stands in names and descriptions."""
    source = Source(inputs=(SourceInput(name=awkward, sha256="a" * 64, media_type="image/png"),), lot=awkward)
    bundle = with_finding(title=awkward, impression=awkward, source=source)
    finding = bundle.report.findings[0].model_copy(update={"description": awkward})
    pdf = render(Bundle(bundle.report.model_copy(update={"findings": (finding,)}), bundle.images))
    for page in opened(pdf):
        grey = np.asarray(page.render(scale=1).to_pil().convert("L"))
        assert grey[:, -40:].min() > 250


def test_hashes_and_identifiers_are_copied_whole() -> None:
    uid = "1.2.826.0.1.3680043.8.498.92964635008453263329159346242144643776"
    digest = "0123456789abcdef" * 4
    source = Source(
        inputs=(SourceInput(name="scan.dcm", sha256=digest, media_type="application/dicom"),), study_uid=uid
    )
    document = opened(render(Bundle(plain_report(source=source))))
    text = "".join(page.get_textpage().get_text_bounded() for page in document)
    for whole in (uid, digest, "b" * 64, "c" * 64):
        assert whole in text


def test_one_that_is_at_work_does_not_give_its_file_to_another() -> None:
    bundles = [with_finding(title=f"Picture {n}") for n in range(6)]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(render, bundles))
    for bundle, pdf in zip(bundles, made, strict=True):
        assert squeezed(bundle.report.title) in text_of(pdf)


def test_the_box_is_drawn_where_the_finding_is() -> None:
    """A 600 x 400 picture with a box from (150, 100) to (450, 300): its amber corners lie at a quarter of the sides."""
    page = opened(render(with_finding()))[0]
    pixels = np.asarray(page.render(scale=3).to_pil().convert("RGB")).astype(int)
    green = np.nonzero(np.abs(pixels - GREEN).sum(-1) < 6)
    top, left, right = green[0].min(), green[1].min(), green[1].max()
    picture = pixels[top : top + (right - left) * 400 // 600, left:right]
    rows, columns = np.nonzero(np.abs(picture - BOX_COLOUR).sum(-1) < 60)
    tall, wide = picture.shape[:2]
    assert columns.min() / wide == pytest.approx(0.25, abs=0.01)
    assert columns.max() / wide == pytest.approx(0.75, abs=0.01)
    assert rows.max() / tall == pytest.approx(0.75, abs=0.01)


def test_big_pictures_are_made_smaller() -> None:
    picture = Picture(np.random.default_rng(1).integers(0, 255, (3000, 4000), np.uint8))
    assert LONGEST_SIDE < 4000
    assert len(render(Bundle(plain_report(), ReportImages({0: picture})))) < 1_500_000


def test_a_later_version_says_what_it_replaces() -> None:
    report = worded(plain_report(version=2, supersedes="f" * 16), "zh-CN")
    assert "取代报告" + "f" * 16 in text_of(render(Bundle(report)))


@pytest.mark.parametrize("weight", ["Regular", "Bold"])
def test_the_fonts_have_every_character_of_the_catalogue(weight: str) -> None:
    faces = [TTFont(path) for path in FONTS.glob(f"*-{weight}.*")]
    have = set().union(*(face.getBestCmap() for face in faces))
    lack = {c for path in CATALOGUE.glob("*.toml") for c in path.read_text("utf-8") if ord(c) not in have and c != "\n"}
    assert not lack, "run: python -m reports.fonts.make_fonts"
