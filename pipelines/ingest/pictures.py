"""Photos: PNG, JPEG, TIFF, BMP, WebP and GIF, recognised by content, to 8/16-bit grey or 8-bit sRGB arrays.

Pillow decodes a picture once; from there it goes strip by strip into the array, which lies in a temporary file where it
is large. The most memory is Pillow's own: a byte a pixel for grey, two for 16 bit, four for colour.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import struct
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from pipelines.ingest.files import FileRef
from pipelines.ingest.refusals import Refusal
from pipelines.study import Geometry, ImageStudy, SourceFile, content_key

MAX_PIXELS: Final = 500_000_000  # of one picture; a scan of 20,000 x 20,000 has 400 million
MAX_FRAME_PIXELS: Final = 64_000_000  # of a WebP or GIF, of whose canvas the decoders keep several copies
MAX_PAGES: Final = 2_000
MAX_FILM_PIXELS: Final = 8_000_000_000  # of all frames of an animation: each is made from the ones before
PIXELS_A_JPEG_BYTE: Final = 8 * 64  # at most: a block of 8 x 8 takes a bit or more (ITU-T T.81, F.1.2 and G.1.2)
MAX_PNG_CHUNKS: Final = 2_000_000  # that are walked through to see whether the last one is there
MIN_SIDE: Final = 16  # a side shorter than this shows nothing that could be assessed
FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
IN_MEMORY_BYTES: Final = 256 << 20  # of pixels; what is larger is kept in a temporary file
PIXELS_A_BYTE: Final = (
    8 * 3000
)  # of PNG and TIFF: LZW makes 2,730 bytes of one, deflate 1,032; a pixel has a bit or more
STRIP_PIXELS: Final = 1 << 22  # that are converted at once
MM_PER_INCH: Final = 25.4
SCREEN_DPI: Final = (72, 96)  # what programs write when they know nothing
PLAUSIBLE_DPI: Final = (2.5, 2_500_000)  # 10 mm to 10 nm a pixel

# Pillow's own limit is lower and at first only warns. `_check_size` takes its place: nothing is decoded before it.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")  # what it finds odd in a damaged file

_DAMAGED: Final = (SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error)  # its words for a bad file
TURNED: Final = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns
# EXIF orientation (tag 0x0112) -> how the stored array is turned upright.
_UPRIGHT: Final[dict[int, Callable[[np.ndarray], np.ndarray]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def count_pages(ref: FileRef) -> tuple[int, str]:
    """How many pictures the file holds, from its header alone, and what they are called. Raises Refusal.

    Pages of a TIFF and frames of an animation count; the previews that phones append to a JPEG do not.
    """
    with ref.open() as stream, _open(stream) as image:
        pages = 1 if image.format in ("JPEG", "MPO") else _n_frames(image)
        moving = image.format != "TIFF"
        pixels = pages * image.width * image.height
    if pages > MAX_PAGES:
        raise Refusal("too-large", f"The file has {pages:,} pages; the limit is {MAX_PAGES:,}.")
    if moving and pages > 1 and pixels > MAX_FILM_PIXELS:
        limit = f"the limit is {MAX_FILM_PIXELS // 1_000_000:,} megapixels"
        raise Refusal("too-large", f"The {pages:,} frames have {pixels // 1_000_000:,} megapixels in all; {limit}.")
    return pages, "frame" if moving else "page"


def load_picture(ref: FileRef, page: int | None, name: str) -> ImageStudy:
    """Decode one picture. Raises Refusal."""
    with _at_page(ref, page) as image:
        media_type = Image.MIME.get(image.format or "", "application/octet-stream")
        picture = decode(image)
    source = SourceFile(path=ref.name, sha256=ref.sha256(), media_type=media_type, page=page)
    return picture_study(content_key((source,)), name, picture, source)


@dataclass(frozen=True, slots=True)
class Decoded:
    """`[H, W]` uint8/uint16 grey or `[H, W, 3]` uint8 sRGB, upright, to be read only; flags as in `ImageStudy`."""

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    flags: tuple[str, ...]


def picture_study(key: str, name: str, picture: Decoded, source: SourceFile) -> ImageStudy:
    """The study of one decoded picture."""
    return ImageStudy(
        key=key,
        name=name,
        units="display",
        pixels=picture.pixels[np.newaxis],
        sources=(source,),
        geometry=Geometry(spacing_mm=picture.spacing_mm),
        quality_flags=picture.flags,
    )


def decode(image: Image.Image) -> Decoded:
    """An opened picture as an array: turned as its EXIF tag asks, its colours brought to sRGB, white where transparent.

    Grey values are kept as they are, whatever profile names their tone curve. Raises Refusal.
    """
    flags: set[str] = set()
    try:
        _check_size(image)
        if ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I"):
            flags.add("reduced-to-8-bit")
        # Without the tag, so that `load` does not turn a TIFF itself, for which it would hold it twice.
        orientation = image.getexif().pop(ExifTags.Base.Orientation, 1)
        image.load()
        image.getexif()[ExifTags.Base.Orientation] = orientation  # of the frames to come, too
        pixels = _to_array(image, flags)
        if orientation in _UPRIGHT:
            pixels = _UPRIGHT[orientation](pixels)
        spacing = _spacing(image, swapped=orientation in TURNED)
    except (OSError, EOFError) as error:  # Pillow says "image file is truncated" and the like
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise Refusal("truncated", "The image data ends too early.") from error
        raise Refusal("damaged-image", "The image data is damaged.") from error
    except _DAMAGED as error:
        raise Refusal("damaged-image", "The image data is damaged.") from error
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise Refusal("too-small", f"The image is {width:,} x {height:,} pixels; each side must have {MIN_SIDE}.")
    if all((strip == pixels.flat[0]).all() for strip in _strips(pixels)):
        raise Refusal("blank-image", "All pixels of the image have the same value.")
    return Decoded(pixels, spacing, tuple(sorted(flags)))


# Files


@contextlib.contextmanager
def _whole(ref: FileRef) -> Iterator[BinaryIO]:
    """The file, or the unpacked member of an archive, in which seeking would unpack it anew each time.

    Raises Refusal where its end is missing.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(ref.open())
        if ref.member is not None:
            unpacked = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=64 << 20))
            shutil.copyfileobj(stream, unpacked, 1 << 20)
            stream = cast(BinaryIO, unpacked)
        if _is_cut_short(stream):
            raise Refusal("truncated", "The file ends too early.")
        stream.seek(0)
        yield stream


_film = contextlib.ExitStack()  # the multi-page file that was read last, kept open
_film_image: tuple[object, Image.Image] | None = None
_film_lock = threading.Lock()


@contextlib.contextmanager
def _at_page(ref: FileRef, page: int | None) -> Iterator[Image.Image]:
    """The opened file, at that page. Frames build on the ones before: the file stays open for the next."""
    if page is None:
        with _whole(ref) as stream, _open(stream) as image:
            yield image
        return
    global _film_image
    with _film_lock:
        key = (ref, ref.state())
        try:
            if _film_image is None or _film_image[0] != key:
                _film.close()
                image = _film.enter_context(_open(_film.enter_context(_whole(ref))))
                _film_image = key, image
            image = _film_image[1]
            try:
                image.seek(page)
            except (OSError, EOFError, *_DAMAGED) as error:
                raise Refusal("truncated", "The file ends before that page.") from error
            yield image
            if page + 1 == _n_frames(image):
                _film_image = None
                _film.close()
        except BaseException:
            _film_image = None
            _film.close()
            raise


def _open(stream: BinaryIO) -> Image.Image:
    """Pillow's image with its header read. Raises Refusal for what can be told to be wrong without decoding."""
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        if _declares_no_pixels(stream.read(32)):
            raise Refusal("no-pixels", "The image is 0 pixels wide or high.") from error
        raise Refusal("damaged-image", "The header is damaged, or of a kind that is not read.") from error
    except (OSError, *_DAMAGED) as error:
        if _is_cut_short(stream):
            raise Refusal("truncated", "The file ends too early.") from error
        raise Refusal("damaged-image", "The header is damaged.") from error
    _check_size(image)
    if stream.seek(0, io.SEEK_END) * _pixels_a_byte(image) < image.width * image.height:
        raise Refusal("truncated", "The file is too small for the pixels that its header declares.")
    return image


def _pixels_a_byte(image: Image.Image) -> float:
    """How many pixels a byte of the file can hold at most."""
    if image.format in ("JPEG", "MPO"):
        return PIXELS_A_JPEG_BYTE
    if image.format in ("PNG", "TIFF") and not str(image.info.get("compression")).startswith("group"):
        return PIXELS_A_BYTE
    return math.inf  # fax codes hold any number of white rows, WebP any area of one colour


def _is_cut_short(stream: BinaryIO) -> bool:
    """Whether the container itself says that bytes are missing, which Pillow overlooks."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] == b"RIFF":
        return size < 8 + struct.unpack("<I", head[4:8])[0]
    if not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    at = 8  # the chunks must go on until IEND (PNG specification, section 5.6)
    for _ in range(MAX_PNG_CHUNKS):
        if at + 12 > size:
            return True
        stream.seek(at)
        length, kind = struct.unpack(">I4s", stream.read(8))
        if kind == b"IEND" or not kind.isalpha():  # whole, or damaged rather than short
            return False
        at += 12 + length
    return False


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    most = MAX_FRAME_PIXELS if image.format in ("WEBP", "GIF") else MAX_PIXELS
    if width * height > most:
        size = f"{width:,} x {height:,} pixels ({width * height / 1e6:,.0f} megapixels)"
        raise Refusal("too-large", f"The image is {size}; the limit is {most // 1_000_000} megapixels.")


def _declares_no_pixels(head: bytes) -> bool:
    for magic, layout, offset in ((b"\x89PNG", ">II", 16), (b"GIF8", "<HH", 6), (b"BM", "<ii", 18)):
        if head.startswith(magic) and len(head) >= offset + struct.calcsize(layout):
            return 0 in struct.unpack_from(layout, head, offset)
    return False


def _n_frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except (OSError, EOFError, *_DAMAGED) as error:
        raise Refusal("damaged-image", "The list of pages is damaged.") from error


def _spacing(image: Image.Image, *, swapped: bool) -> tuple[float, float] | None:
    """Millimetres between rows and between columns by the resolution tag (PNG pHYs, JFIF density, TIFF resolution).

    None where it is no scale: a screen's default, implausible, or written by a camera, which cannot know.
    """
    dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None
    across, down = map(float, dpi)
    if not all(PLAUSIBLE_DPI[0] <= value <= PLAUSIBLE_DPI[1] for value in (across, down)):
        return None
    if any(abs(value - screen) < 0.1 for value in (across, down) for screen in SCREEN_DPI):
        return None
    exposed = image.getexif().get_ifd(ExifTags.IFD.Exif)
    if any(tag in exposed for tag in (ExifTags.Base.ExposureTime, ExifTags.Base.FNumber, ExifTags.Base.FocalLength)):
        return None
    if swapped:
        across, down = down, across
    return MM_PER_INCH / down, MM_PER_INCH / across


# Pixels


def _to_array(image: Image.Image, flags: set[str]) -> np.ndarray:
    """`[H, W]` uint8/uint16 or `[H, W, 3]` uint8, as stored."""
    height, width = image.height, image.width
    if image.mode.startswith("I"):
        return _gather((_deep(strip) for strip in _cut(image)), (height, width), np.uint16)
    if image.mode == "F":
        raise Refusal("unsupported-pixel-format", "The image has floating-point pixels.")
    if image.mode in ("1", "L", "LA", "La"):
        grey = (np.asarray(_opaque(strip, flags).convert("L")) for strip in _cut(image))
        return _gather(grey, (height, width), np.uint8)
    to_srgb = _to_srgb(image, flags)
    colour = (np.asarray(to_srgb(_opaque(strip, flags))) for strip in _cut(image))
    pixels = _gather(colour, (height, width, 3), np.uint8)
    if all(map(_is_grey, _strips(pixels))):  # in the clothes of colour
        return _gather((strip[..., 0] for strip in _strips(pixels)), (height, width), np.uint8)
    return pixels


def _is_grey(pixels: np.ndarray) -> bool:
    red, green, blue = np.moveaxis(pixels, -1, 0)  # a channel after the other: numpy is slow on rows of three
    return np.array_equal(red, green) and np.array_equal(red, blue)


def _rows(width: int) -> int:
    return max(1, STRIP_PIXELS // max(width, 1))


def _cut(image: Image.Image) -> Iterator[Image.Image]:
    for top in range(0, image.height, step := _rows(image.width)):
        yield image.crop((0, top, image.width, min(top + step, image.height)))


def _strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(0, len(pixels), step := _rows(pixels.shape[1])):
        yield pixels[top : top + step]


def _gather(strips: Iterable[np.ndarray], shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """The strips as one array; a large one is mapped from a temporary file, which the system can drop from memory."""
    if np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize <= IN_MEMORY_BYTES:
        parts = [strip.astype(dtype, copy=False) for strip in strips]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)
    with tempfile.TemporaryFile() as file:
        for strip in strips:
            file.write(np.ascontiguousarray(strip, dtype).data)
        file.flush()
        return np.memmap(file, dtype, "r", shape=shape)


def _deep(strip: Image.Image) -> np.ndarray:
    pixels = np.asarray(strip)
    if strip.mode == "I" and (pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max):
        raise Refusal("unsupported-pixel-format", "The image has 32 bits a pixel.")
    return pixels.astype(np.uint16)


def _opaque(strip: Image.Image, flags: set[str]) -> Image.Image:
    """The strip on white, where it is transparent."""
    if not strip.has_transparency_data:
        return strip
    rgba = strip.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    flags.add("transparency-on-white")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _to_srgb(image: Image.Image, flags: set[str]) -> Callable[[Image.Image], Image.Image]:
    """What brings a strip of a colour picture to sRGB: by its ICC profile where it has one."""
    mode = "CMYK" if image.mode == "CMYK" else "RGB"

    def plainly(strip: Image.Image) -> Image.Image:
        return strip if strip.mode == "RGB" else strip.convert("RGB")

    if image.mode == "LAB":
        raise Refusal("unsupported-pixel-format", "The image has CIELAB pixels.")
    if not (embedded := image.info.get("icc_profile")):
        if mode == "CMYK":
            flags.add("colours-approximate")
        return plainly
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return plainly
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, *_DAMAGED):  # damaged, or of another colour space than the pixels
        flags.add("colours-approximate")
        return plainly
    return lambda strip: cast(Image.Image, ImageCms.applyTransform(strip.convert(mode), transform))
