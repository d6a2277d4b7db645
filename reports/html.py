"""The HTML report: one self-contained file (no script, no network) with the evidence boxes drawn over the images.

Boxes are drawn in the image's own pixels by an SVG whose view box is the shown part of the image, so that shrinking the
picture never moves a box.  All text goes through autoescape, and a content security policy forbids scripts anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports.bundle import Bundle
from reports.images import Box, EncodedPicture, Picture, ReportImages, around, encode_picture
from reports.page import FigureWords, close_up, figure_words, page_of
from reports.schema import Evidence, Finding, Report
from reports.texts import capital, visible, words

LONGEST_SIDE: Final = 1600  # of an embedded picture
CROP_SIDE: Final = 360


@dataclass(frozen=True, slots=True)
class Mark:
    """One evidence box on one figure, in the figure's pixels; its tag in percent of the figure."""

    finding_id: str
    weak: bool
    x: float
    y: float
    width: float
    height: float
    tag_left: float
    tag_top: float
    tag_below: bool  # the box touches the upper edge, so the tag goes inside


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with the boxes that lie on it."""

    picture: EncodedPicture
    marks: tuple[Mark, ...]
    alt: str
    caption: str = ""

    @property
    def view_box(self) -> str:
        x0, y0, x1, y1 = self.picture.box
        return f"0 0 {x1 - x0} {y1 - y0}"


def render(bundle: Bundle) -> bytes:
    """The report as one UTF-8 HTML file."""
    report, images = bundle.report, bundle.images
    said = figure_words(report, images)
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            page=page_of(report),
            figures=list(_figures(report, images, said)),
            crops={visible(finding.id): _crop(finding, images, said) for finding in report.findings},
        )
    )
    return text.encode("utf-8")


@cache
def environment() -> Environment:
    """The templates of reports and index pages, with the filters that they use."""
    env = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"capital": capital, "words": lambda term: words("en").term("type", term)}
    return env


def _figures(report: Report, images: ReportImages, said: FigureWords) -> Iterator[Figure]:
    for index, picture in sorted(images.slices.items()):
        on_slice = [(f, e) for f in report.findings for e in f.evidence if e.slice_index == index]
        yield _figure(picture, on_slice, said[index], longest_side=LONGEST_SIDE)
    if images.reference:
        yield _figure(images.reference, [], said["reference"], longest_side=LONGEST_SIDE)


def _crop(finding: Finding, images: ReportImages, said: FigureWords) -> Figure | None:
    if shown := close_up(finding, images):
        evidence, picture = shown
        box = around(evidence.bbox, picture)
        return _figure(picture, [(finding, evidence)], said[finding.id], longest_side=CROP_SIDE, box=box)
    return None


def _figure(
    picture: Picture,
    findings: list[tuple[Finding, Evidence]],
    said: tuple[str, str],
    *,
    longest_side: int,
    box: Box | None = None,
) -> Figure:
    encoded = encode_picture(picture, longest_side=longest_side, box=box)
    marks = tuple(_mark(finding, evidence, encoded.box) for finding, evidence in findings)
    return Figure(encoded, marks, *said)


def _mark(finding: Finding, evidence: Evidence, shown: Box) -> Mark:
    width, height = shown[2] - shown[0], shown[3] - shown[1]
    x0, x1 = sorted(min(max(x - shown[0], 0), width) for x in (evidence.bbox[0], evidence.bbox[2]))
    y0, y1 = sorted(min(max(y - shown[1], 0), height) for y in (evidence.bbox[1], evidence.bbox[3]))
    return Mark(
        finding_id=visible(finding.id),
        weak=evidence.localisation == "weak",
        x=x0,
        y=y0,
        width=x1 - x0,
        height=y1 - y0,
        tag_left=min(100 * x0 / width, 94),
        tag_top=100 * y0 / height,
        tag_below=y0 < 0.06 * height,
    )
