"""The pictures of a report page with their evidence boxes and their words, for HTML and PDF alike.

Boxes are in the image's own pixels, counted from the corner of the part that is shown: shrinking a picture never moves
a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reports.images import Box, EncodedPicture, Picture, ReportImages, around, encode_picture
from reports.schema import Evidence, Finding, Report
from reports.texts import visible, words

Tag = tuple[float, float, bool]  # left and top in percent of the figure, and whether it hangs below
TAG_WIDTH, TAG_HEIGHT = 6.0, 6.0  # in percent of a figure, roughly: how large it is depends on the screen


@dataclass(frozen=True, slots=True)
class Mark:
    """One evidence box on one figure, in the figure's pixels; a corner of its tag in percent of the figure."""

    finding_id: str
    weak: bool
    x: float
    y: float
    width: float
    height: float
    tag_left: float
    tag_top: float
    tag_below: bool  # the tag hangs below that corner, instead of standing on it


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with the boxes that lie on it."""

    picture: EncodedPicture
    marks: tuple[Mark, ...]
    alt: str
    caption: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the shown part in the image's pixels."""
        x0, y0, x1, y1 = self.picture.box
        return x1 - x0, y1 - y0


def figures(report: Report, images: ReportImages, *, longest_side: int) -> list[Figure]:
    """Each slice that there is a picture of, with the boxes on it, then the golden sample."""
    say = words(report.language)
    slices = report.technique.slice_count or 1
    drawn = []
    for index, picture in sorted(images.slices.items()):
        on_slice = [(f, e) for f in report.findings for e in f.evidence if e.slice_index == index]
        name = say.sentence("slice-of", slice=index + 1, slices=slices) if slices > 1 else say.heading("image")
        ids = say.list(dict.fromkeys(visible(finding.id) for finding, _ in on_slice))
        alt = say.sentence("alt-marked" if ids else "alt-unmarked", name=name, ids=ids)
        caption = " · ".join(filter(None, (name, visible(picture.shown_as))))
        drawn.append(_figure(picture, on_slice, alt, caption, longest_side=longest_side))
    if images.reference:
        name = say.heading("golden-sample")
        alt = say.sentence("alt-unmarked", name=name)
        drawn.append(_figure(images.reference, [], alt, name, longest_side=longest_side))
    return drawn


def close_ups(report: Report, images: ReportImages, *, longest_side: int) -> dict[str, Figure | None]:
    """The neighbourhood of each finding's first evidence that there is a picture of, by the finding's id."""
    say = words(report.language)
    found: dict[str, Figure | None] = {}
    for finding in report.findings:
        shown = ((e, images.details.get(finding.id) or images.slices.get(e.slice_index)) for e in finding.evidence)
        evidence, picture = next(((e, p) for e, p in shown if p), (None, None))
        name = visible(finding.id)
        found[name] = None
        if evidence and picture:
            alt = say.sentence("alt-close-up", id=name)
            box = around(evidence.bbox, picture)
            found[name] = _figure(picture, [(finding, evidence)], alt, longest_side=longest_side, box=box)
    return found


def _figure(
    picture: Picture,
    findings: Sequence[tuple[Finding, Evidence]],
    alt: str,
    caption: str = "",
    *,
    longest_side: int,
    box: Box | None = None,
) -> Figure:
    encoded = encode_picture(picture, longest_side=longest_side, box=box)
    return Figure(encoded, tuple(_marks(findings, encoded.box)), alt, caption)


def _marks(findings: Sequence[tuple[Finding, Evidence]], shown: Box) -> Iterator[Mark]:
    width, height = shown[2] - shown[0], shown[3] - shown[1]
    taken: list[Tag] = []
    for finding, evidence in findings:
        x0, x1 = sorted(min(max(x - shown[0], 0), width) for x in (evidence.bbox[0], evidence.bbox[2]))
        y0, y1 = sorted(min(max(y - shown[1], 0), height) for y in (evidence.bbox[1], evidence.bbox[3]))
        tag = _tag(100 * x0 / width, 100 * y0 / height, 100 * x1 / width, 100 * y1 / height, taken)
        taken.append(tag)
        left, top, below = tag
        yield Mark(
            finding_id=visible(finding.id),
            weak=evidence.localisation == "weak",
            x=x0,
            y=y0,
            width=x1 - x0,
            height=y1 - y0,
            tag_left=left,
            tag_top=top,
            tag_below=below,
        )


def _tag(x0: float, y0: float, x1: float, y1: float, taken: Sequence[Tag]) -> Tag:
    """Where the tag of a box goes: at that of its corners where it covers the least of the tags before it."""
    x0, x1 = min(x0, 100 - TAG_WIDTH), min(x1, 100 - TAG_WIDTH)
    corners = [(x0, y0, False), (x0, y1, True), (x1, y0, False), (x1, y1, True), (x0, y0, True)]
    inside = [tag for tag in corners if (tag[1] <= 100 - TAG_HEIGHT if tag[2] else tag[1] >= TAG_HEIGHT)]

    return min(inside or corners[-1:], key=lambda tag: sum(_overlap(tag, other) for other in taken))


def _overlap(one: Tag, other: Tag) -> float:
    """The area that two tags share, in percent of the width by percent of the height."""
    tops = (top if below else top - TAG_HEIGHT for _, top, below in (one, other))
    return max(TAG_WIDTH - abs(one[0] - other[0]), 0) * max(TAG_HEIGHT - abs(next(tops) - next(tops)), 0)
