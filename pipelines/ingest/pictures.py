"""Photos: PNG, JPEG, TIFF, BMP, WebP and GIF, recognised by content, to 8/16-bit grey or 8-bit RGB arrays."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from typing import BinaryIO, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.ingest.files import FileRef
from pipelines.ingest.refusals import Refusal
from pipelines.study import ImageStudy, SourceFile, content_key

MAX_PIXELS: Final = 400_000_000  # 20,000 x 20,000
MAX_PAGES: Final = 2_000
MIN_SIDE: Final = 16  # a side shorter than this shows nothing that could be assessed
FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")

# Pillow's own limit is lower and at first only warns. `_check_size` takes its place: nothing is decoded before it.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # what it finds odd in a damaged file


def count_pages(ref: FileRef) -> int:
    """How many pictures the file holds, from its header alone. Raises Refusal.

    Pages of a TIFF and frames of an animation count; the previews that phones append to a JPEG do not.
    """
    with ref.open() as stream, _open(stream) as image:
        pages = 1 if image.format in ("JPEG", "MPO") else _n_frames(image)
    if pages > MAX_PAGES:
        raise Refusal("too-large", f"The file has {pages:,} pages; the limit is {MAX_PAGES:,}.")
    return pages


def load_picture(ref: FileRef, page: int | None, name: str) -> ImageStudy:
    """Decode one picture: `[1, H, W]` uint8/uint16 grey, or `[1, H, W, 3]` uint8 RGB where there is colour.

    It is turned as its EXIF tag asks; what is transparent becomes white.  Raises Refusal.
    """
    data = ref.read()
    with _open(io.BytesIO(data)) as image:
        media_type = Image.MIME.get(image.format or "", "application/octet-stream")
        try:
            if page:
                image.seek(page)
            _check_size(*image.size)
            image.load()
            pixels = _to_array(ImageOps.exif_transpose(image))
        except (OSError, EOFError) as error:  # Pillow says "image file is truncated" and the like
            if isinstance(error, EOFError) or "truncated" in str(error):
                raise Refusal("truncated", "The image data ends too early.") from error
            raise Refusal("damaged-image", "The image data is damaged.") from error
        except (SyntaxError, ValueError, struct.error) as error:  # its plugins' other words for a damaged file
            raise Refusal("damaged-image", "The image data is damaged.") from error
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise Refusal("too-small", f"The image is {width:,} x {height:,} pixels; each side must have {MIN_SIDE}.")
    if (pixels == pixels.flat[0]).all():
        raise Refusal("blank-image", "All pixels of the image have the same value.")
    digest = hashlib.sha256(data).hexdigest()
    source = SourceFile(path=ref.name, sha256=digest, media_type=media_type, page=page)
    return ImageStudy(
        key=content_key((source,)), name=name, units="display", pixels=pixels[np.newaxis], sources=(source,)
    )


def _open(stream: BinaryIO) -> Image.Image:
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        if _declares_no_pixels(stream.read(32)):
            raise Refusal("no-pixels", "The image is 0 pixels wide or high.") from error
        raise Refusal("damaged-image", "The header is damaged, or of a kind that is not read.") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Refusal("damaged-image", "The header is damaged.") from error
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Refusal("too-large", f"The image is {width:,} x {height:,} pixels; the limit is {MAX_PIXELS:,} in all.")


def _declares_no_pixels(head: bytes) -> bool:
    for magic, layout, offset in ((b"\x89PNG", ">II", 16), (b"GIF8", "<HH", 6), (b"BM", "<ii", 18)):
        if head.startswith(magic) and len(head) >= offset + struct.calcsize(layout):
            return 0 in struct.unpack_from(layout, head, offset)
    return False


def _n_frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        raise Refusal("damaged-image", "The list of pages is damaged.") from error


def _to_array(image: Image.Image) -> np.ndarray:
    """`[H, W]` uint8/uint16 or `[H, W, 3]` uint8."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
            raise Refusal("unsupported-pixel-format", "The image has 32 bits a pixel.")
        return pixels.astype(np.uint16)
    if image.mode == "F":
        raise Refusal("unsupported-pixel-format", "The image has floating-point pixels.")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(image.convert("L" if grey else "RGB"))
    if not grey and (pixels[..., :1] == pixels[..., 1:]).all():  # grey in the clothes of colour
        return pixels[..., 0].copy()
    return pixels
