"""The pixels of one DICOM file: stored values frame by frame, and their way to Hounsfield units."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import get_j2k_parameters

from pipelines.ingest.codecs import NATIVE, decode
from pipelines.ingest.decoders import Frame, codec_of
from pipelines.ingest.dicom import Header, Layout, Rescale, parse
from pipelines.ingest.refusals import Refusal

AIR_HU: Final = -1024
COARSE_HU_STEP: Final = 4  # HU between neighbouring stored values: above it, tissue contrast is quantised away
PADDING_SHARE: Final = 0.01  # of the pixels: so many of one value below air are no noise
TISSUE_HU: Final = (-900, 2000)  # padding that maps to a value in between hides tissue
LOSSY_SMEAR_HU: Final = 100
METAL_HU: Final = 16_000  # dense metal on extended scales stays below
JPEG_2000: Final = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.20")
FLOAT_PIXEL_DATA: Final = (0x0008, 0x0009)
_UNDEFINED: Final = 0xFFFFFFFF
_INT16: Final = np.iinfo(np.int16)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file's frames as they are stored. `frame(i)` gives `[H, W]` integers; raises Refusal."""

    sha256: str
    frame: Callable[[int], np.ndarray]
    flags: frozenset[str]


def read_stored(header: Header, *, frames: int) -> Stored:
    """Read a file's bytes and find its frames, which are decoded one by one as they are asked for.

    `frames`: how many are decoded in all, in this file and others.  Raises Refusal and OSError.
    """
    layout = header.layout
    assert layout is not None  # files with a fault get no further
    data = header.ref.read()
    digest = hashlib.sha256(data).hexdigest()
    value, encapsulated = _pixel_value(data, layout)
    size = layout.rows * layout.columns * layout.bits_allocated // 8
    if not encapsulated and (layout.syntax in NATIVE or len(value) in (size * layout.frames, size * layout.frames + 1)):
        if len(value) < size * layout.frames:
            raise Refusal("truncated", "The pixel data ends too early.")
        flags = {"excess-pixel-data"} if len(value) > size * layout.frames + 1 else set()
        order = NATIVE.get(layout.syntax, "<")
        kind = f"{order}{'i' if layout.signed else 'u'}{layout.bits_allocated // 8}"

        def native(index: int) -> np.ndarray:
            flat = np.frombuffer(value, kind, layout.rows * layout.columns, index * size)
            return flat.reshape(layout.rows, layout.columns)

        return Stored(digest, native, frozenset(flags))
    if not encapsulated or layout.syntax in NATIVE:
        raise Refusal("damaged-image", "The pixel data is not encoded as the file's transfer syntax says.")
    streams = _streams(value, layout.frames)

    def compressed(index: int) -> np.ndarray:
        frame = Frame(
            layout.syntax,
            layout.rows,
            layout.columns,
            layout.bits_allocated,
            layout.bits_stored,
            layout.signed,
            codec_of(layout.syntax, layout.bits_stored),
            streams[index],
        )
        return decode(frame, frames=frames)

    return Stored(digest, compressed, _stream_flags(streams[0], layout))


def _pixel_value(data: bytes, layout: Layout) -> tuple[memoryview, bool]:
    """The value of the Pixel Data element, and whether it is encapsulated (PS3.5 A.4)."""
    if layout.offset is None:
        pixels = parse(io.BytesIO(data), stop_before_pixels=False).get("PixelData")
        if not isinstance(pixels, bytes) or not pixels:
            raise Refusal("truncated", "The pixel data is missing.")
        return memoryview(pixels), False
    at = layout.offset
    order: Literal["big", "little"] = "big" if NATIVE.get(layout.syntax) == ">" else "little"
    group, element = (int.from_bytes(data[at + k : at + k + 2], order) for k in (0, 2))
    if group == 0x7FE0 and element in FLOAT_PIXEL_DATA:
        raise Refusal("unsupported-pixel-format", "Its pixels are floating-point numbers, which CT images never are.")
    if (group, element) != (0x7FE0, 0x0010) or len(data) < at + 8:
        raise Refusal("truncated", "The pixel data is missing.")
    explicit = data[at + 4 : at + 6] in (b"OW", b"OB", b"UN")
    start = at + (12 if explicit else 8)
    length = int.from_bytes(data[start - 4 : start], order)
    value = memoryview(data)[start:]
    if length == _UNDEFINED:
        return value, True
    if length == 0:
        raise Refusal("truncated", "The pixel data is missing.")
    return value[:length], False


def _streams(value: memoryview, frames: int) -> list[bytes]:
    """The compressed frames; fragments are joined, with an offset table or without."""
    _check_fragments(value)
    try:
        streams = list(generate_frames(io.BytesIO(value), number_of_frames=frames))
    except Exception as error:  # pydicom meets broken fragments with errors of many types
        raise Refusal("damaged-image", "The fragments of the pixel data are damaged.") from error
    if len(streams) < frames:
        raise Refusal("truncated", f"The pixel data holds {len(streams):,} of {frames:,} frames.")
    return streams


def _stream_flags(stream: bytes, layout: Layout) -> frozenset[str]:
    """JPEG 2000 says by itself whether its values are signed. Where the header says otherwise, the header is right:
    its bits were compressed as if they were of the other kind."""
    declared = get_j2k_parameters(stream).get("is_signed") if layout.syntax.startswith(JPEG_2000) else None
    return frozenset() if declared in (None, layout.signed) else frozenset({"signedness-mismatch"})


def _check_fragments(value: memoryview) -> None:
    """Raise Refusal where a fragment reaches beyond the file: what follows would be decoded as if it were whole."""
    at = 0
    while at + 8 <= len(value):
        tag, length = bytes(value[at : at + 4]), int.from_bytes(value[at + 4 : at + 8], "little")
        if tag == b"\xfe\xff\xdd\xe0":
            return
        if tag != b"\xfe\xff\x00\xe0":
            raise Refusal("damaged-image", "The fragments of the pixel data are damaged.")
        at += 8 + length
    if at > len(value):
        raise Refusal("truncated", "The compressed pixel data ends too early.")


class Overflow(Exception):  # noqa: N818 - tells that integers do not hold the values, which is no error
    """The Hounsfield units of a slice do not fit into 16-bit integers."""


def fits_int16(rescale: Rescale) -> bool:
    """Whether the rescale gives whole numbers; if they are too large for int16 shows in the pixels."""
    return rescale.slope.is_integer() and rescale.intercept.is_integer() and abs(rescale.slope) <= _INT16.max


def to_hu(stored: np.ndarray, layout: Layout, rescale: Rescale, out: np.ndarray) -> frozenset[str]:
    """Write the Hounsfield units of `stored` `[H, W]` into `out` (int16 or float32), padding as -1024 HU; gives flags.

    Padding is what the header declares (PS3.3 C.7.5.1.1.2), or one value below -1024 HU that fills a part of the image.
    Photometric MONOCHROME1 changes the display, not the HU.  Raises Overflow where int16 is too small.
    """
    as_stored = stored
    stored, ends, dirty = _used_bits(stored, layout)
    flags: set[str] = {"unused-bits-masked"} if dirty else set()
    padding = _declared_padding(stored, layout)
    if dirty and padding is not None:  # padding may be declared beyond the bits that are used
        padding |= _declared_padding(as_stored, layout)
    if rescale.table is not None:
        first, values = rescale.table
        table = np.array(values)
        _check_fits(_ends(table), out)
        out[...] = table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)]
        low, high = float(out.min()), float(out.max())
    else:
        low, high = sorted(end * rescale.slope + rescale.intercept for end in ends)
        _check_fits((low, high), out)
        if out.dtype == np.int16:  # modulo 2^16 all the way, which is exact because the result fits
            slope, intercept = _modulo(rescale.slope), _modulo(rescale.intercept)
            if slope == 1:
                np.add(_as_int16(stored), intercept, out=out)
            else:
                np.multiply(_as_int16(stored), slope, out=out)
                out += intercept
        else:
            out[...] = stored.astype(np.float64) * rescale.slope + rescale.intercept
        if abs(rescale.slope) > COARSE_HU_STEP:
            flags.add("coarse-hu")
    if padding is not None and padding.any():
        hidden = out[padding]
        if ((hidden > TISSUE_HU[0]) & (hidden < TISSUE_HU[1])).any():
            flags.add("padding-looks-like-tissue")
    if low < AIR_HU and (filler := _filler(out, lossy=layout.lossy)) is not None:
        padding = filler if padding is None else padding | filler
    if padding is not None:
        out[padding] = AIR_HU
        if padding.mean() > 0.001:
            flags.add("padding-masked")
    if high > METAL_HU and (out > METAL_HU).mean() > 0.005:
        flags.add("implausible-hu")
    return frozenset(flags)


def _check_fits(ends: tuple[float, float], out: np.ndarray) -> None:
    if out.dtype == np.int16 and not (_INT16.min <= ends[0] and ends[1] <= _INT16.max):
        raise Overflow


def _filler(hu: np.ndarray, *, lossy: bool) -> np.ndarray | None:
    """Where a value below air fills what was not scanned, though the header does not declare it as padding."""
    below = hu[hu < AIR_HU]
    if below.size < PADDING_SHARE * hu.size:
        return None
    value = np.median(below)
    # Noise is spread; a filling is one value, unless lossy compression has smeared it.
    spread = LOSSY_SMEAR_HU if lossy and value < AIR_HU - 2 * LOSSY_SMEAR_HU else 0
    if (np.abs(below - value) <= spread).mean() < 0.5:
        return None
    filler = hu < AIR_HU - spread if spread else hu == value
    return filler if filler.mean() > PADDING_SHARE else None


def _modulo(number: float) -> np.ndarray:
    return np.array(int(number) & 0xFFFF, np.uint16).view(np.int16)


def _as_int16(stored: np.ndarray) -> np.ndarray:
    same_bits = stored.dtype in (np.uint16, np.int16) and stored.dtype.isnative
    return stored.view(np.int16) if same_bits else stored.astype(np.int16)


def _used_bits(stored: np.ndarray, layout: Layout) -> tuple[np.ndarray, tuple[int, int], bool]:
    """The values in their Bits Stored below High Bit, the lowest and the highest of them, and whether other bits (old
    overlays, dirt) were taken off."""
    bits, ends = 8 * stored.dtype.itemsize, _ends(stored)
    unused_below = layout.high_bit + 1 - layout.bits_stored if layout.syntax in NATIVE else 0
    if bits <= layout.bits_stored:
        return stored, ends, False
    top = 1 << layout.bits_stored
    lowest, highest = (-top // 2, top // 2 - 1) if layout.signed else (0, top - 1)
    if not unused_below and lowest <= ends[0] and ends[1] <= highest:
        return stored, ends, False
    values = stored.astype(stored.dtype.newbyteorder("="))
    unused_above = bits - layout.bits_stored - unused_below
    used = (values << unused_above) >> (unused_above + unused_below)
    return used, _ends(used), not unused_below


def _ends(values: np.ndarray) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def _declared_padding(stored: np.ndarray, layout: Layout) -> np.ndarray | None:
    if layout.padding is None:
        return None
    first, last = layout.padding
    return stored == first if first == last else (stored >= math.floor(first)) & (stored <= math.ceil(last))
