"""Key images: each slice that carries evidence, with the boxes and their findings drawn in, as secondary capture.

For viewers that know no structured reports.  The picture is redrawn for a screen (square pixels, 512 to 1024 a side);
what is drawn also stands as text in Image Comments.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Final

import numpy as np
from highdicom.sr import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from reports.bundle import Bundle
from reports.dicom.objects import Role, finish, new_object, superseding
from reports.dicom.source import SourceSeries, source_series
from reports.dicom.text import line, prose
from reports.formats import CannotCarryError
from reports.images import BOX_COLOUR, Picture
from reports.schema import Evidence, Finding, Report
from reports.texts import percent, words

ROLE: Final = Role("sc", "OT", 9004, "key images")
SOP_CLASS: Final = "1.2.840.10008.5.1.4.1.1.7"
FILENAME: Final = "key-image-{:03}.sc.dcm"
SHORTEST, LONGEST = 512, 1024  # of the picture's longer side on the screen
TEXT_SIZE: Final = 15
MARGIN: Final = 8
FOOTER_COLOUR: Final = (200, 200, 200)
COMMENTS_LENGTH: Final = 10240  # of LT

FIRST_OTHER: Final = 0x2190  # arrows, signs, CJK: the font for Latin, Greek and Cyrillic ends before

Mark = tuple[Finding, Evidence]
Box = tuple[float, float, float, float]


def render(bundle: Bundle) -> dict[str, bytes]:
    """The key images as DICOM files by name. Raises CannotCarryError."""
    report, source = bundle.report, source_series(bundle)
    marks = _marks(report, bundle.images.slices)
    if not marks:
        raise CannotCarryError("no finding has evidence on a picture, so there is nothing to draw")
    return {
        FILENAME.format(number): _key_image(report, source, number, index, bundle.images.slices[index], marks[index])
        for number, index in enumerate(sorted(marks), 1)
    }


def _marks(report: Report, pictures: Mapping[int, Picture]) -> dict[int, list[Mark]]:
    marks: dict[int, list[Mark]] = {}
    for finding in report.findings:
        for evidence in finding.evidence:
            if evidence.slice_index in pictures:
                marks.setdefault(evidence.slice_index, []).append((finding, evidence))
    return marks


def _key_image(
    report: Report, source: SourceSeries, number: int, index: int, picture: Picture, marks: list[Mark]
) -> bytes:
    image = new_object(report, source, ROLE, SOP_CLASS, number)
    made = source.local(report.created)
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.ConversionType = "WSD"
    image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture = f"{made:%Y%m%d}", f"{made:%H%M%S}"
    image.BurnedInAnnotation = "NO"  # findings are drawn in, nothing that names the patient
    image.PatientOrientation = _directions(source)
    image.Laterality = ""  # of a paired body part, which the report does not name
    image.DerivationDescription = prose(f"Evidence of report {report.id} drawn in. {superseding(report)}")
    image.ImageComments = "\n".join(_caption(report, mark) for mark in marks)[:COMMENTS_LENGTH]
    image.SourceImageSequence = [_reference(source, marks[0][1])]
    drawn = draw(report, index, picture, marks)
    image.Rows, image.Columns = drawn.shape[:2]
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    pixels = drawn.tobytes()
    image.PixelData = pixels + b"\0" * (len(pixels) % 2)
    return finish(image, report, source)


def _reference(source: SourceSeries, evidence: Evidence) -> Dataset:
    instance = source.slice_of(evidence)
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.sop_class_uid, instance.sop_instance_uid
    if instance.frames > 1:
        item.ReferencedFrameNumber = instance.frame
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
    return item


def _directions(source: SourceSeries) -> list[str]:
    """Where rows and columns run to (PS3.3 C.7.6.1.1.1), by the nearest axis of the patient; empty if unknown."""
    if source.orientation is None:
        return []
    cosines = source.orientation[:3], source.orientation[3:]
    return ["LPH"[axis] if each[axis] > 0 else "RAF"[axis] for each in cosines for axis in [int(np.abs(each).argmax())]]


def _tag(report: Report, mark: Mark) -> str:
    finding, _ = mark
    return line(f"{finding.id} {words(report.language).term('type', finding.type)}", 48)


def _caption(report: Report, mark: Mark) -> str:
    finding, _ = mark
    return prose(f"{_tag(report, mark)} ({percent(finding.confidence)}): {finding.description}")


def draw(report: Report, index: int, picture: Picture, marks: list[Mark]) -> np.ndarray:
    """The picture with its marks and a footer: uint8 `[H, W, 3]`."""
    height, width = picture.pixels.shape[0] * picture.pixel_aspect, picture.pixels.shape[1]
    scale = min(max(SHORTEST / max(height, width), 1), LONGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(picture.pixels).convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    row_height, width = round(1.5 * TEXT_SIZE), max(size[0], SHORTEST)
    rows = [row for text in _footer(report, index, picture) for row in _wrapped(text, width - 2 * MARGIN)]
    canvas = Image.new("RGB", (width, size[1] + row_height * len(rows) + row_height // 2))
    canvas.paste(image)
    pen = _Pen(canvas, size)
    left, top, right, bottom = picture.shows
    sx, sy = size[0] / (right - left), size[1] / (bottom - top)
    for mark in marks:
        x0, y0, x1, y1 = mark[1].bbox
        box = ((x0 - left) * sx, (y0 - top) * sy, (x1 - left) * sx, (y1 - top) * sy)
        pen.mark(box, _tag(report, mark), weak=mark[1].localisation == "weak")
    for number, text in enumerate(rows):
        pen.write((MARGIN, size[1] + row_height // 4 + number * row_height + TEXT_SIZE), text, FOOTER_COLOUR)
    return np.asarray(canvas)


def _footer(report: Report, index: int, picture: Picture) -> tuple[str, ...]:
    say = words(report.language)
    where = say.sentence("slice-of", slice=index + 1, slices=report.technique.slice_count or index + 1)
    former = say.sentence("superseded", id=report.supersedes) if report.supersedes else ""
    return (
        " · ".join(filter(None, (where, line(picture.shown_as)))),
        " · ".join(filter(None, (f"ScanScribe {report.id}", former))),
        line(report.disclaimer, 200),
    )


@cache
def _font(other: bool) -> ImageFont.FreeTypeFont:
    name = "NotoSansSC-Regular.otf" if other else "NotoSans-Regular.ttf"
    return ImageFont.truetype(io.BytesIO(files("reports").joinpath("fonts", name).read_bytes()), TEXT_SIZE)


class _Pen:
    """Draws boxes with tags that do not cover each other, inside the picture's part of a canvas."""

    def __init__(self, canvas: Image.Image, size: tuple[int, int]) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._width, self._height = size
        self._taken: list[Box] = []

    def mark(self, box: Box, tag: str, *, weak: bool) -> None:
        """A box, dashed where it is no detection, with its tag above it or where there is room."""
        x0, x1 = (min(max(x, 0), self._width - 1) for x in sorted((box[0], box[2])))
        y0, y1 = (min(max(y, 0), self._height - 1) for y in sorted((box[1], box[3])))
        if weak:
            self._dashes((x0, y0, x1, y1))
        else:
            self._draw.rectangle((x0, y0, x1, y1), outline=BOX_COLOUR, width=2)
        tag = _fitting(tag, self._width - 2 * MARGIN)
        width, height = _length(tag) + 6, TEXT_SIZE + 5
        left = max(min(x0, self._width - width), 0)
        free = (
            (left, top, left + width, top + height)
            for top in (y0 - height - 2, y1 + 3, y0 + 3, *range(0, self._height - height, height))
            if 0 <= top <= self._height - height
        )
        place = next((each for each in free if not self._is_taken(each)), (left, 0, left + width, height))
        self._taken.append(place)
        self._draw.rectangle(place, fill=(0, 0, 0))
        self.write((place[0] + 3, place[1] + TEXT_SIZE), tag, BOX_COLOUR)

    def write(self, start: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
        """Text from `start`, the left end of its base line."""
        x, y = start
        for run, font in _runs(text):
            self._draw.text((x, y), run, fill=colour, font=font, anchor="ls")
            x += font.getlength(run)

    def _is_taken(self, place: Box) -> bool:
        return any(
            place[0] < other[2] and other[0] < place[2] and place[1] < other[3] and other[1] < place[3]
            for other in self._taken
        )

    def _dashes(self, box: Box, dash: int = 6) -> None:
        x0, y0, x1, y1 = box
        for x in np.arange(x0, x1, 2 * dash):
            for y in (y0, y1):
                self._draw.line((x, y, min(x + dash, x1), y), fill=BOX_COLOUR, width=2)
        for y in np.arange(y0, y1, 2 * dash):
            for x in (x0, x1):
                self._draw.line((x, y, x, min(y + dash, y1)), fill=BOX_COLOUR, width=2)


def _wrapped(text: str, width: float) -> Iterator[str]:
    """The text in rows that fit, parted at spaces where it has any."""
    while _length(text) > width:
        end = next(end for end in range(len(text) - 1, 0, -1) if _length(text[:end]) <= width or end == 1)
        space = text.rfind(" ", 0, end + 1)
        yield text[: space if space > 0 else end]
        text = text[space + 1 if space > 0 else end :]
    yield text


def _fitting(text: str, width: float) -> str:
    """As much of the text as fits into a row."""
    row = next(_wrapped(text, width))
    return row if row == text else f"{row}…"


def _length(text: str) -> float:
    return sum(font.getlength(run) for run, font in _runs(text))


def _runs(text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """The text in pieces of one font each."""
    for other, run in groupby(text, key=lambda character: ord(character) >= FIRST_OTHER):
        yield "".join(run), _font(other)
