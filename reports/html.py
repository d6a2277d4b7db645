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

from reports import taxonomy
from reports.bundle import Bundle
from reports.flags import explain
from reports.images import Box, EncodedPicture, Picture, ReportImages, around, encode_picture
from reports.schema import Evidence, Finding, Report

LONGEST_SIDE: Final = 1600  # of an embedded picture
CROP_SIDE: Final = 360

UNITS: Final = {"{pixel}": "px", "[hnsf'U]": "HU", "mm2": "mm²", "1": ""}
KINDS: Final = {"ct": "CT report", "defect": "Inspection report"}
FIELD_TITLES: Final = {
    "region": "Body region",
    "plane": "Plane",
    "contrast": "Contrast medium",
    "laterality": "Side",
    "covid19": "COVID-19 pattern",
}
FIELD_VALUES: Final = {
    ("covid19", "true"): "suggested",
    ("covid19", "false"): "not suggested",
    ("contrast", "iv"): "intravenous",
    ("contrast", "iv-and-oral"): "intravenous and oral",
}
READ_FROM: Final = {"model": "read by the model", "header": "from the file's header", "geometry": "from the geometry"}


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
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            kind=KINDS[report.kind],
            figures=list(_figures(report, images)),
            crops={finding.id: _crop(finding, images) for finding in report.findings},
            methods=_methods(report),
        )
    )
    return text.encode("utf-8", "replace")


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
    env.filters |= {
        "explain": explain,
        "number": number,
        "unit": lambda unit: UNITS.get(unit, unit),
        "words": taxonomy.title,
        "capital": lambda text: text[:1].upper() + text[1:],
        "field_title": lambda name: FIELD_TITLES.get(name, taxonomy.title(name)),
        "field_value": lambda value, name: FIELD_VALUES.get((name, value), taxonomy.title(value)),
        "read_from": lambda source: READ_FROM[source],
        "line_title": lambda name: taxonomy.line(name).title if name in taxonomy.LINES else name,
    }
    return env


def number(value: float) -> str:
    """A measured value with three significant digits, or all digits before the point; a real minus sign."""
    size = abs(value)
    if value == int(value) or size >= 99.95:
        text = f"{value:,.0f}" if size < 1e12 else f"{value:.3g}"
    elif size >= 0.01:
        text = f"{value:.{1 if size >= 9.995 else 2}f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−")


def _figures(report: Report, images: ReportImages) -> Iterator[Figure]:
    for index, picture in sorted(images.slices.items()):
        on_slice = [(f, e) for f in report.findings for e in f.evidence if e.slice_index == index]
        name = f"Slice {index + 1} of {report.technique.slice_count}" if _is_volume(report) else "Image"
        ids = ", ".join(dict.fromkeys(f.id for f, _ in on_slice))
        yield _figure(
            picture,
            on_slice,
            longest_side=LONGEST_SIDE,
            alt=f"{name}, {'with boxes around ' + ids if ids else 'no finding marked'}",
            caption=" · ".join(filter(None, (name, picture.shown_as))),
        )
    if images.reference:
        yield _figure(
            images.reference, [], longest_side=LONGEST_SIDE, alt="The golden sample, unmarked", caption="Golden sample"
        )


def _crop(finding: Finding, images: ReportImages) -> Figure | None:
    """The neighbourhood of the finding's first evidence that there is a picture of."""
    for evidence in finding.evidence:
        if picture := images.details.get(finding.id) or images.slices.get(evidence.slice_index):
            return _figure(
                picture,
                [(finding, evidence)],
                longest_side=CROP_SIDE,
                box=around(evidence.bbox, picture),
                alt=f"Close-up of {finding.id}",
            )
    return None


def _figure(
    picture: Picture,
    findings: list[tuple[Finding, Evidence]],
    *,
    longest_side: int,
    alt: str,
    caption: str = "",
    box: Box | None = None,
) -> Figure:
    encoded = encode_picture(picture, longest_side=longest_side, box=box)
    marks = tuple(_mark(finding, evidence, encoded.box) for finding, evidence in findings)
    return Figure(encoded, marks, alt, caption)


def _mark(finding: Finding, evidence: Evidence, shown: Box) -> Mark:
    width, height = shown[2] - shown[0], shown[3] - shown[1]
    x0, x1 = sorted(min(max(x - shown[0], 0), width) for x in (evidence.bbox[0], evidence.bbox[2]))
    y0, y1 = sorted(min(max(y - shown[1], 0), height) for y in (evidence.bbox[1], evidence.bbox[3]))
    return Mark(
        finding_id=finding.id,
        weak=evidence.localisation == "weak",
        x=x0,
        y=y0,
        width=x1 - x0,
        height=y1 - y0,
        tag_left=min(100 * x0 / width, 94),
        tag_top=100 * y0 / height,
        tag_below=y0 < 0.06 * height,
    )


def _methods(report: Report) -> list[tuple[str, str]]:
    """How each kind of measurement was made, once: (name, method)."""
    all_measurements = [m for finding in report.findings for m in finding.measurements] + list(report.measurements)
    return list(dict.fromkeys((m.name, m.method) for m in all_measurements))


def _is_volume(report: Report) -> bool:
    return (report.technique.slice_count or 1) > 1
