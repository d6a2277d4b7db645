"""The pictures that renderers need beside the report, and the three things they do with them: shrink, cut out, encode.

Boxes, widths and heights are always in the image's own pixels, so that evidence needs no conversion. A `Picture` is the
whole image pixel for pixel; of an image that is too large to keep, it is a reduced overview, or one part at full size.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels; x1, y1 exclusive

PNG_UP_TO_PIXELS: Final = 800_000  # above, lossless pictures make the page too heavy to mail
THUMBNAIL_SIDE: Final = 256
BOX_COLOUR: Final = (255, 176, 0)  # amber: seen on black, on white and by colour-blind readers


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as a person sees it."""

    pixels: np.ndarray  # uint8 [H, W] grey or [H, W, 3] RGB
    shown_as: str = ""  # how values became grey, e.g. "soft tissue window, 40 ± 200 HU"
    pixel_aspect: float = 1.0  # a pixel's height over its width; not 1 for some reformatted CT
    part: Box | None = None  # what it shows, in the image's pixels; None: the whole image, pixel for pixel

    def __post_init__(self) -> None:
        grey_or_rgb = self.pixels.ndim == 2 or (self.pixels.ndim == 3 and self.pixels.shape[2] == 3)
        if self.pixels.dtype != np.uint8 or not grey_or_rgb:
            raise ValueError(f"a picture is uint8 [H, W] or [H, W, 3], not {self.pixels.dtype} {self.pixels.shape}")

    @property
    def shows(self) -> Box:
        """The part of the image that it shows, in the image's pixels."""
        return self.part or (0, 0, self.pixels.shape[1], self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Of the part that it shows, in the image's pixels."""
        return round(self.shows[2] - self.shows[0])

    @property
    def height(self) -> int:
        return round(self.shows[3] - self.shows[1])

    def cut(self, box: Box) -> np.ndarray:
        """The pixels inside `box`, a box in the image's pixels; at least one."""
        height, width = self.pixels.shape[:2]
        sx, sy = width / self.width, height / self.height
        left, top = self.shows[:2]
        x0, y0 = min(int((box[0] - left) * sx), width - 1), min(int((box[1] - top) * sy), height - 1)
        x1, y1 = max(int(np.ceil((box[2] - left) * sx)), x0 + 1), max(int(np.ceil((box[3] - top) * sy)), y0 + 1)
        return self.pixels[y0:y1, x0:x1]


@dataclass(frozen=True, slots=True)
class ReportImages:
    """The pictures of one report: every slice that carries evidence, and at least one slice."""

    slices: Mapping[int, Picture] = field(default_factory=dict)  # by slice index
    reference: Picture | None = None  # the golden sample
    details: Mapping[str, Picture] = field(default_factory=dict)  # by finding id, where `slices` are only overviews


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture ready for an `<img>`: where it lies in the original's pixels, and its data."""

    data: bytes
    media_type: str
    box: Box  # the part of the original that it shows
    display_ratio: float  # width over height on screen

    @property
    def data_uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def encode_picture(picture: Picture, *, longest_side: int, box: Box | None = None) -> EncodedPicture:
    """A picture, or the part inside `box`, as PNG or JPEG with at most `longest_side` pixels a side."""
    x0, y0, x1, y1 = whole_pixels(box or picture.shows, picture)
    image = Image.fromarray(np.ascontiguousarray(picture.cut((x0, y0, x1, y1))))
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    small = image.width * image.height <= PNG_UP_TO_PIXELS
    return EncodedPicture(
        data=encoded_png(image) if small else _jpeg(image, quality=92),
        media_type="image/png" if small else "image/jpeg",
        box=(x0, y0, x1, y1),
        display_ratio=(x1 - x0) / ((y1 - y0) * picture.pixel_aspect),
    )


def encoded_png(image: Image.Image) -> bytes:
    """Lossless, in a tenth of the time that the highest effort takes and as small but for a few percent (measured).

    Of repetitions only runs are looked for, zlib's strategy for pictures whose rows were filtered.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def whole_pixels(box: Box, picture: Picture) -> tuple[int, int, int, int]:
    """`box` grown to whole pixels and kept inside the picture; at least one pixel whatever the box."""
    left, top, right, bottom = map(round, picture.shows)
    x0 = min(int(min(max(box[0], left), right)), right - 1)
    y0 = min(int(min(max(box[1], top), bottom)), bottom - 1)
    x1 = min(max(int(np.ceil(min(max(box[2], left), right))), x0 + 1), right)
    y1 = min(max(int(np.ceil(min(max(box[3], top), bottom))), y0 + 1), bottom)
    return x0, y0, x1, y1


def around(box: Box, picture: Picture) -> Box:
    """The neighbourhood in which a person looks at `box`: a square 2.5 times its longer side, inside the picture."""
    x0, y0, x1, y1 = whole_pixels(box, picture)
    side = min(max(2.5 * max(x1 - x0, y1 - y0), 40.0), picture.width, picture.height)
    left = min(max((x0 + x1 - side) / 2, picture.shows[0]), picture.shows[2] - side)
    top = min(max((y0 + y1 - side) / 2, picture.shows[1]), picture.shows[3] - side)
    return left, top, left + side, top + side


def thumbnail(picture: Picture, boxes: Sequence[Box]) -> bytes:
    """A small JPEG of the picture with its boxes drawn on it."""
    scale = THUMBNAIL_SIDE / max(picture.width, picture.height * picture.pixel_aspect)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * picture.pixel_aspect * scale)))
    image = Image.fromarray(picture.pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGB")
    draw = ImageDraw.Draw(image)
    for box in boxes:
        x0, y0, x1, y1 = whole_pixels(box, picture)
        sx, sy = size[0] / picture.width, size[1] / picture.height
        left, top = (x0 - picture.shows[0]) * sx, (y0 - picture.shows[1]) * sy
        corners = (left, top, max(left + (x1 - x0) * sx - 1, left), max(top + (y1 - y0) * sy - 1, top))
        draw.rectangle(corners, outline=BOX_COLOUR, width=2)
    return _jpeg(image, quality=82)
