"""The HTML report and the index state what the report says, in valid safe HTML, with the boxes where they belong."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_strategies import AWKWARD, HEIGHT, WIDTH, images_for, plain_report, reports, texts

from reports.bundle import Bundle
from reports.figures import TAG_HEIGHT, TAG_WIDTH, figures
from reports.html import render
from reports.images import BOX_COLOUR, Picture, ReportImages
from reports.index_page import write_index
from reports.schema import Evidence, Finding, Report
from reports.texts import capital, number, visible, words

VOID = {"meta", "img", "input", "br", "rect", "link"}


class Page(HTMLParser):
    """A parsed page: its text, its elements, and whether every tag is closed in order."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html.decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def flat(text: str) -> str:
    """What a reader sees: runs of white space are one space."""
    return " ".join(text.split())


def assert_harmless(page: Page, scripts: int) -> None:
    assert page.open == []
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["script"] == scripts
    assert not {"iframe", "object", "embed", "base", "link"} & set(tags)
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)


@settings(max_examples=60, deadline=None)
@given(report=reports())
def test_html_states_every_finding_and_nothing_breaks_out(report: Report) -> None:
    language = report.language
    page = Page(render(Bundle(report, images_for(report))))
    text = flat(page.text)
    assert_harmless(page, scripts=0)
    assert all((attrs["src"] or "").startswith("data:image/") for attrs in page.all("img"))
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert [attrs["lang"] for attrs in page.all("html")] == [language]
    rows = [attrs for attrs in page.all("tr") if "data-type" in attrs]
    assert [row["data-type"] for row in rows] == [visible(finding.type) for finding in report.findings]
    assert [float(row["data-confidence"] or 0) for row in rows] == [f.confidence for f in report.findings]
    measured = Counter((a["data-name"], float(a["value"] or 0), a["data-unit"]) for a in page.all("data"))
    all_measurements = [m for finding in report.findings for m in finding.measurements] + list(report.measurements)
    assert measured == Counter((visible(m.name), m.value, visible(m.unit)) for m in all_measurements)
    assert [a["data-disposition"] for a in page.all("p") if "data-disposition" in a] == [
        report.disposition for _ in [1] if report.disposition
    ]
    for finding in report.findings:
        name = visible(words(language).term("type", finding.type))
        assert flat(finding.id + name[:1].upper() + name[1:]) in text
        assert visible(finding.description) in text
        for measurement in finding.measurements:
            assert f"{capital(visible(measurement.name))} {number(measurement.value)}" in text
    status = words(language).term("status", "preliminary")
    for said in (report.title, report.impression, report.disclaimer, report.model.weights_sha256, status):
        assert visible(said) in text
    for item in report.not_assessed:
        assert visible(item.reason) in text
    if report.supersedes:
        assert words(language).heading("supersedes") + report.supersedes in text
    for source in report.source.inputs:
        assert source.sha256 in text


def test_a_report_without_findings_never_says_normal() -> None:
    text = Page(render(Bundle(plain_report()))).text
    assert "No defect of the assessed types was found." in text
    assert "None reported. See what was not assessed" in text
    assert "normal" not in text.lower()


def with_box(*bbox: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Bundle:
    evidence = Evidence(input_index=0, slice_index=0, bbox=bbox, localisation="box")
    finding = Finding(id="F1", type="crack", description="A crack.", evidence=(evidence,), confidence=0.5)
    picture = Picture(np.full((size[1], size[0]), 90, np.uint8))
    return Bundle(plain_report(findings=(finding,)), ReportImages({0: picture}))


def test_boxes_keep_the_images_own_pixels_when_the_picture_is_shrunk() -> None:
    page = Page(render(with_box(1000, 500, 2000, 900, size=(4000, 2000))))
    assert page.all("svg")[0]["viewbox"] == "0 0 4000 2000"
    box = next(a for a in page.all("rect") if a.get("data-finding") == "F1")
    assert [float(box[k] or 0) for k in ("x", "y", "width", "height")] == [1000, 500, 1000, 400]
    embedded = base64.b64decode((page.all("img")[0]["src"] or "").split(",")[1])
    with Image.open(io.BytesIO(embedded)) as image:
        assert image.size == (1600, 800)


lines = st.fixed_dictionaries(
    {
        "id": st.text("0123456789abcdef", min_size=16, max_size=16),
        "status": st.just("done"),
        "kind": st.sampled_from(["ct", "defect"]),
        "title": texts,
        "inputs": st.lists(st.fixed_dictionaries({"path": texts, "sha256": texts}), min_size=1, max_size=2),
        "findings": st.integers(0, 5),
        "types": st.lists(st.sampled_from(["crack", "nodule", "pin-hole"]), max_size=2),
        "disposition": st.sampled_from([None, "accept", "hold"]),
        "confidence": st.none() | st.floats(0, 1),
        "formats": st.just({"json": "ab/report.json", "html": "ab/report.html"}),
        "errors": st.dictionaries(texts, texts, max_size=1),
        "model": texts,
        "seconds": st.floats(0, 9),
        "thumbnail": st.sampled_from(["ab/thumb.jpg", None, "javascript:alert(1)/a b?#.jpg"]),
    }
)
refusals = st.fixed_dictionaries({"path": texts, "code": texts, "reason": texts, "remedy": texts})


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(lines, max_size=3), rejected=st.lists(refusals, max_size=2))
def test_index_lists_every_report_and_refusal(
    tmp_path_factory: pytest.TempPathFactory, lines: list, rejected: list
) -> None:
    out = tmp_path_factory.mktemp("run")
    page = Page(write_index(out, lines, rejected).read_bytes())
    text = flat(page.text)
    assert_harmless(page, scripts=1)
    assert len([1 for attrs in page.all("li") if "data-kind" in attrs]) == len(lines)
    links = Counter(unquote(attrs["href"] or "") for attrs in page.all("a") if "href" in attrs)
    assert links["./ab/report.json"] == len(lines)
    for attrs in page.all("a") + page.all("img"):
        assert (attrs.get("href") or attrs.get("src") or "#")[:2] in ("./", "#r", "#")
    for line in lines:
        assert visible(line["title"]) in text
        assert visible(line["inputs"][0]["path"]) in text
    for refusal in rejected:
        assert all(visible(refusal[key]) in text for key in refusal)


def test_index_survives_names_that_are_no_text(tmp_path: Path) -> None:
    refusal = {"path": "caf\udce9.png", "code": "empty", "reason": "The file is empty.", "remedy": "Copy it again."}
    assert "caf" in Page(write_index(tmp_path, [], [refusal]).read_bytes()).text


def browse(page: Path, profile: Path, *arguments: str) -> bytes:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium to look at the page with; install the package chromium")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    command = [chromium, *switches, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=180).stdout


def test_a_browser_draws_the_box_where_the_finding_is(tmp_path: Path) -> None:
    """A 600 x 400 picture at (known) page coordinates: its amber pixels span the box, to the pixel."""
    box = (150, 100, 450, 300)
    bundle = with_box(*box, size=(600, 400))
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    # The page as a user gets it, with all but the big figure taken out of sight and that one put in the corner.
    isolate = (
        b"<style>.figures .stage{position:fixed;inset:0 auto auto 0;width:600px;z-index:9;border:0}.tag{display:none}"
    )
    page.write_bytes(render(bundle).replace(b"</head>", isolate + b"</style></head>"))
    browse(page, tmp_path / "profile", "--force-device-scale-factor=1", "--window-size=800,700", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)[:400, :600]
    rows, columns = np.nonzero(np.abs(pixels - BOX_COLOUR).sum(axis=-1) < 60)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert seen == pytest.approx(box, abs=2)


def test_a_browser_runs_the_index_filters(tmp_path: Path) -> None:
    record = {
        "id": "0" * 16,
        "kind": "ct",
        "title": AWKWARD[0],
        "inputs": [{"path": "a", "sha256": "b"}],
        "findings": 1,
        "types": ["nodule"],
        "disposition": None,
        "confidence": 0.5,
        "formats": {"json": "a/report.json"},
    }
    dom = browse(write_index(tmp_path, [record, record], []), tmp_path / "profile", "--dump-dom").decode()
    assert "2 of 2 reports shown" in Page(dom.encode()).text


def test_tags_of_boxes_that_share_a_corner_stand_apart() -> None:
    bundle = with_box(100, 100, 160, 150, size=(600, 400))
    [finding] = bundle.report.findings
    boxes = [(100, 100, 160, 150), (102, 104, 150, 140), (98, 98, 170, 200)]
    many = tuple(
        finding.model_copy(update={"id": f"F{n}", "evidence": (finding.evidence[0].model_copy(update={"bbox": box}),)})
        for n, box in enumerate(boxes)
    )
    [figure] = figures(plain_report(findings=many), bundle.images, longest_side=600)
    spots = [(m.tag_left, m.tag_top - (0 if m.tag_below else TAG_HEIGHT)) for m in figure.marks]
    for one, other in combinations(spots, 2):
        assert abs(one[0] - other[0]) >= TAG_WIDTH or abs(one[1] - other[1]) >= TAG_HEIGHT


def test_a_weak_box_and_a_tag_inside_keep_their_marks() -> None:
    bundle = with_box(10, 0, 30, 20)
    [finding] = bundle.report.findings
    weak = finding.evidence[0].model_copy(update={"localisation": "weak"})
    finding = finding.model_copy(update={"evidence": (weak,)})
    page = render(Bundle(plain_report(findings=(finding,)), bundle.images)).decode()
    assert 'class="box weak"' in page
    assert 'class="tag below"' in page
