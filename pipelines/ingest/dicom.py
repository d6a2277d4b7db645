"""One DICOM file: is it a CT image with Hounsfield units, which series is it of, and its slices in HU.

Works on single-frame CT (PS3.3 A.3) and on Enhanced CT (A.38), whose attributes sit in functional groups, with or
without preamble, file meta information or SOP class.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final, cast

import numpy as np
import pydicom
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    UID_dictionary,
)

from pipelines.ingest.files import FileRef
from pipelines.ingest.header_json import header_json
from pipelines.ingest.jpeg_lossless import checked_stream
from pipelines.ingest.refusals import Refusal
from pipelines.study import SourceFile
from reports.dicom_source import Instance

# pydicom quotes the values that it finds odd. Patient data stays out of logs and off the terminal.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\.")

AIR_HU: Final = -1024
MAX_VOXELS: Final = 2_000_000_000  # of one file
MAX_FRAMES: Final = 50_000
MAX_INFLATED_BYTES: Final = 4 << 30
COARSE_HU_STEP: Final = 4  # HU between neighbouring stored values: above it, tissue contrast is quantised away
CT_SOP_CLASSES: Final = frozenset(
    (
        "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
    )
)
OTHER_MODALITIES: Final = (
    "CR",
    "DX",
    "MG",
    "MR",
    "NM",
    "PR",
    "PT",
    "RF",
    "RTDOSE",
    "RTSTRUCT",
    "SEG",
    "SR",
    "US",
    "XA",
)
# In order of preference. GDCM comes last: damaged streams can make it end the process.
CODECS: Final = ("pydicom", "pyjpegls", "pillow", "gdcm")
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"

Numbers = tuple[float, ...]
Position = tuple[float, float, float]
Direction = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Header:
    """What the header pass needs: files of one series with the same `stack` go on top of each other."""

    series: tuple[str, ...]
    stack: tuple[object, ...]
    series_number: str


@dataclass(frozen=True, slots=True)
class About:
    """What the header says of the whole series."""

    study_uid: str | None
    series_uid: str | None
    window: tuple[float, float] | None
    kernel: str | None
    contrast_agent: str | None
    body_part: str | None
    accession: str | None


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame in Hounsfield units. `order` is (acquisition, instance, frame) and serves where positions do not."""

    pixels: np.ndarray  # [H, W] int16, or float32 where the rescale is fractional
    source: SourceFile
    instance: Instance
    about: About
    position: Position | None  # LPS, mm
    orientation: Direction | None
    spacing: tuple[float, float] | None  # mm between rows, between columns
    thickness: float | None
    order: tuple[float, float, int]
    lossy: bool
    flags: frozenset[str]


def read_header(ref: FileRef) -> Header:
    """Check that the file is a CT image that can be read, and say which series it is of. Decodes nothing.

    Raises Refusal.
    """
    with ref.open() as stream:
        dataset = _parse(stream, stop_before_pixels=True)
    check(dataset)
    frame = _Macros(dataset, 0)
    uid = _text(dataset, "SeriesInstanceUID")
    series = (uid,) if uid else (ref.parent, _text(dataset, "StudyInstanceUID"), _text(dataset, "SeriesNumber"))
    orientation = _numbers(frame["PlaneOrientationSequence"], "ImageOrientationPatient", 6)
    spacing = _numbers(frame["PixelMeasuresSequence"], "PixelSpacing", 2)
    stack = (
        dataset.Rows,
        dataset.Columns,
        orientation and tuple(round(v, 2) + 0.0 for v in orientation),
        spacing and tuple(round(v, 3) for v in spacing),
    )
    return Header(series, stack, _text(dataset, "SeriesNumber"))


def read_header_json(ref: FileRef) -> dict[str, Any]:
    """The file's header as the DICOM JSON model, without pixels and bulk data. Raises Refusal."""
    with ref.open() as stream:
        return header_json(_parse(stream, stop_before_pixels=True))


def load_slices(ref: FileRef) -> list[Slice]:
    """All frames of one file in HU. Raises Refusal."""
    data = ref.read()
    dataset = _parse(io.BytesIO(data), stop_before_pixels=False)
    check(dataset)
    stored = _decode(dataset)
    digest = hashlib.sha256(data).hexdigest()
    about = _about(dataset)
    instance = _instance(dataset, len(stored))
    lossy = _text(dataset, "LossyImageCompression") == "01"
    # Frames have places of their own only where per-frame functional groups give them.
    placed = len(stored) == 1 or "PerFrameFunctionalGroupsSequence" in dataset
    slices = []
    for index, pixels in enumerate(stored):
        frame = _Macros(dataset, index)
        hu, flags = _to_hu(dataset, frame["PixelValueTransformationSequence"], pixels)
        measures = frame["PixelMeasuresSequence"]
        position = _numbers(frame["PlanePositionSequence"], "ImagePositionPatient", 3)
        orientation = _numbers(frame["PlaneOrientationSequence"], "ImageOrientationPatient", 6)
        slices.append(
            Slice(
                pixels=hu,
                source=SourceFile(
                    path=ref.name,
                    sha256=digest,
                    media_type="application/dicom",
                    page=index if len(stored) > 1 else None,
                    sop_instance_uid=instance.sop_instance_uid or None,
                ),
                instance=replace(
                    instance, frame=index + 1, position_mm=cast("Position | None", position if placed else None)
                ),
                about=about,
                position=cast("Position | None", position if placed else None),
                orientation=cast("Direction | None", orientation),
                spacing=cast("tuple[float, float] | None", _positive(_numbers(measures, "PixelSpacing", 2))),
                thickness=_first(_positive(_numbers(measures, "SliceThickness", 1))),
                order=(_number(dataset, "AcquisitionNumber"), _number(dataset, "InstanceNumber"), index),
                lossy=lossy,
                flags=flags | ({"lossy-compression"} if lossy else set()),
            )
        )
    return slices


def check(dataset: Dataset) -> None:
    """Raise Refusal unless the data set is a CT image with Hounsfield units in a form that can be decoded."""
    sop_class = _text(dataset, "SOPClassUID") or _text(dataset.file_meta, "MediaStorageSOPClassUID")
    modality = _text(dataset, "Modality")
    if not sop_class and not modality:
        raise Refusal("not-an-image", "It is neither a picture nor a DICOM image.")
    if sop_class.startswith(SECONDARY_CAPTURE):
        raise Refusal("not-ct-image", "It is a secondary capture (a screenshot), not a CT slice.")
    if "Rows" not in dataset or "Columns" not in dataset:
        what = UID(sop_class).name if sop_class in UID_dictionary else "DICOM object"
        raise Refusal("no-pixels", f"It is a {what}, which holds no image.")
    if modality != "CT" and (modality or sop_class not in CT_SOP_CLASSES):
        known = modality if modality in OTHER_MODALITIES else "another one"  # a value of any other kind is not quoted
        raise Refusal("not-ct", f"Its modality is {known}, not CT.")
    if sop_class and sop_class not in CT_SOP_CLASSES:
        raise Refusal("not-ct-image", "It is made from a CT study, but is not a CT image.")
    if "LOCALIZER" in (image_type := _text(dataset, "ImageType").upper().split("\\")):
        raise Refusal("localizer", "It is a localizer (scout), not a cross-section.")
    if _number(dataset, "SamplesPerPixel", 1) != 1:
        raise Refusal("not-ct-image", "It is a colour image.")
    voxels = _number(dataset, "Rows") * _number(dataset, "Columns") * frame_count(dataset)
    if voxels <= 0:
        raise Refusal("no-pixels", "The image is 0 pixels wide or high.")
    if voxels > MAX_VOXELS or frame_count(dataset) > MAX_FRAMES:
        limit = f"the limit is {MAX_VOXELS:,} pixels in {MAX_FRAMES:,} frames"
        raise Refusal("too-large", f"It declares {voxels:,.0f} pixels in {frame_count(dataset):,} frames; {limit}.")
    for index in range(frame_count(dataset)):
        _rescale(_Macros(dataset, index)["PixelValueTransformationSequence"], image_type)
    _check_syntax(dataset)


def frame_count(dataset: Dataset) -> int:
    """Number of frames; 1 where the header says nothing of use."""
    return max(int(_number(dataset, "NumberOfFrames", 1)), 1)


def _parse(stream: BinaryIO, *, stop_before_pixels: bool) -> Dataset:
    _check_deflated(stream)
    try:
        dataset = pydicom.dcmread(stream, force=True, stop_before_pixels=stop_before_pixels)
    except EOFError as error:
        raise Refusal("truncated", "The DICOM data ends too early.") from error
    except MemoryError:
        raise
    except Exception as error:  # pydicom meets damaged bytes with errors of many types
        raise Refusal("damaged-file", "The DICOM data set is damaged.") from error
    if not _text(dataset.file_meta, "TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _check_deflated(stream: BinaryIO) -> None:
    """A deflated data set is inflated in one go by pydicom; refuse one that would fill the memory."""
    head = stream.read(1024)
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in head:
        return
    if head[132:140] != b"\x02\0\0\0UL\4\0":
        raise Refusal("damaged-file", "The DICOM header lacks the length of its file meta information.")
    stream.seek(144 + int.from_bytes(head[140:144], "little"))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    while block := inflater.unconsumed_tail or stream.read(1 << 20):
        size += len(inflater.decompress(block, 1 << 24))
        if size > MAX_INFLATED_BYTES:
            raise Refusal("too-large", "The deflated data set unpacks to more than 4 GiB.")
        if inflater.eof:
            break
    stream.seek(0)


def _check_syntax(dataset: Dataset) -> None:
    syntax = UID(_text(dataset.file_meta, "TransferSyntaxUID"))
    title = syntax.name if syntax in UID_dictionary else "not a known one"
    # Codecs read .51 with 8 bits only, and find out late.
    if syntax == JPEGExtended12Bit and _number(dataset, "BitsStored") > 8:
        raise Refusal(
            "unsupported-transfer-syntax", f"The transfer syntax is {title} with 12 bits, which no codec here reads."
        )
    if _codec(syntax) is None:
        raise Refusal("unsupported-transfer-syntax", f"The transfer syntax is {title}, which no codec here reads.")


def _codec(syntax: UID) -> str | None:
    """The codec for a transfer syntax: "" for pixels that are not compressed, None where there is none."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return None
    if not syntax.is_compressed:
        return ""
    return next((codec for codec in CODECS if codec in decoder.available_plugins), None)


def _decode(dataset: Dataset) -> np.ndarray:
    """Stored values `[F, H, W]`."""
    if "PixelData" not in dataset or not dataset.PixelData:
        raise Refusal("truncated", "The pixel data is missing.")
    frames = frame_count(dataset)
    codec = _codec(dataset.file_meta.TransferSyntaxUID)
    if not codec:
        expected = frames * dataset.Rows * dataset.Columns * (_number(dataset, "BitsAllocated", 16) // 8)
        if len(dataset.PixelData) < expected:
            raise Refusal("truncated", "The pixel data ends too early.")
    try:
        if codec == "gdcm":
            size = dataset.Rows, dataset.Columns, dataset.BitsAllocated
            streams = generate_frames(dataset.PixelData, number_of_frames=frames)
            dataset.PixelData = encapsulate([checked_stream(stream, *size) for stream in streams])
        dataset.pixel_array_options(decoding_plugin=codec or "")
        return dataset.pixel_array.reshape(frames, dataset.Rows, dataset.Columns)
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # every codec has its own types of error
        raise Refusal("damaged-image", "The pixel data could not be decoded.") from error


def _rescale(item: Dataset, image_type: list[str]) -> tuple[float, float, frozenset[str]]:
    """(slope, intercept, flags) to HU (PS3.3 C.11.1 and C.7.6.16.2.9). Raises Refusal where the values are not HU."""
    slope, intercept = _numbers(item, "RescaleSlope", 1), _numbers(item, "RescaleIntercept", 1)
    if slope is None or intercept is None or slope[0] == 0:
        raise Refusal("no-hounsfield-units", "The header gives no rescale to Hounsfield units.")
    kind = _text(item, "RescaleType").upper()
    if kind in ("", "HU"):
        return slope[0], intercept[0], frozenset()
    # "US" (unspecified) is written by some archives on original slices; on a derived image it means some other map.
    if kind == "US" and image_type[0].strip() == "ORIGINAL":
        return slope[0], intercept[0], frozenset({"unspecified-rescale-type"})
    raise Refusal("no-hounsfield-units", "The pixel values are a derived map, not Hounsfield units.")


def _to_hu(dataset: Dataset, item: Dataset, stored: np.ndarray) -> tuple[np.ndarray, frozenset[str]]:
    """Hounsfield units `[H, W]` with padding set to air. Photometric MONOCHROME1 changes the display, not the HU.

    Declared padding (PS3.3 C.7.5.1.1.2) and everything below -1024 HU, which scanners write outside their field of
    view, become -1024 HU.
    """
    slope, intercept, flags = _rescale(item, _text(dataset, "ImageType").upper().split("\\"))
    hu = stored.astype(np.float64) * slope + intercept
    outside = hu < AIR_HU
    padding = _padding(dataset)
    if padding is not None:
        outside |= (stored >= padding[0]) & (stored <= padding[1])
    hu[outside] = AIR_HU
    if outside.mean() > 0.001:  # fewer are noise in air
        flags |= {"padding-masked"}
    if abs(slope) > COARSE_HU_STEP:
        flags |= {"coarse-hu"}
    limits = np.iinfo(np.int16)
    if slope.is_integer() and intercept.is_integer() and hu.max() <= limits.max:
        return hu.astype(np.int16), flags
    return hu.astype(np.float32), flags


def _padding(dataset: Dataset) -> tuple[float, float] | None:
    first = _numbers(dataset, "PixelPaddingValue", 1)
    if first is None:
        return None
    last = _numbers(dataset, "PixelPaddingRangeLimit", 1) or first
    # Implicit VR files give the value unsigned even where pixels are signed.
    signed = _number(dataset, "PixelRepresentation") == 1
    low, high = sorted(v - 65536 if signed and v > 32767 else v for v in (first[0], last[0]))
    return low, high


def _about(dataset: Dataset) -> About:
    frame = _Macros(dataset, 0)
    voi = frame["FrameVOILUTSequence"]
    centre, width = _numbers(voi, "WindowCenter"), _numbers(voi, "WindowWidth")
    window = (centre[0], width[0]) if centre and width and width[0] >= 1 else None
    agents = dataset.get("ContrastBolusAgentSequence")
    regions = frame["FrameAnatomySequence"].get("AnatomicRegionSequence")
    return About(
        study_uid=_text(dataset, "StudyInstanceUID") or None,
        series_uid=_text(dataset, "SeriesInstanceUID") or None,
        window=window,
        kernel=_text(frame["CTReconstructionSequence"], "ConvolutionKernel") or None,
        contrast_agent=_text(dataset, "ContrastBolusAgent")
        or (_text(agents[0], "CodeMeaning") if agents else "")
        or None,
        body_part=_text(dataset, "BodyPartExamined") or (_text(regions[0], "CodeMeaning") if regions else "") or None,
        accession=_text(dataset, "AccessionNumber") or None,
    )


def _instance(dataset: Dataset, frames: int) -> Instance:
    """The instance by its data set, or where that is silent by its file meta information."""
    number = _numbers(dataset, "InstanceNumber", 1)
    return Instance(
        sop_instance_uid=_text(dataset, "SOPInstanceUID") or _text(dataset.file_meta, "MediaStorageSOPInstanceUID"),
        sop_class_uid=_text(dataset, "SOPClassUID") or _text(dataset.file_meta, "MediaStorageSOPClassUID"),
        instance_number=int(number[0]) if number else None,
        frames=frames,
    )


class _Macros:
    """The functional group macros of one frame: `_Macros(ds, 3)["PlanePositionSequence"]` is the item that holds them.

    Per-frame groups win over shared ones (PS3.3 C.7.6.16.1); a single-frame file answers with the data set itself.
    """

    def __init__(self, dataset: Dataset, frame: int) -> None:
        self.dataset = dataset
        self.frame = frame

    def __getitem__(self, sequence: str) -> Dataset:
        for group in self._groups():
            items = group.get(sequence)
            if items:
                return items[0]
        return self.dataset

    def _groups(self) -> Iterator[Dataset]:
        per_frame = self.dataset.get("PerFrameFunctionalGroupsSequence") or ()
        if self.frame < len(per_frame):
            yield per_frame[self.frame]
        yield from self.dataset.get("SharedFunctionalGroupsSequence") or ()


def _text(item: Dataset, keyword: str) -> str:
    """The value as stripped text, values of a list joined by a backslash; "" when absent."""
    value = item.get(keyword)
    if value is None:
        return ""
    values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
    return "\\".join(str(v).strip().strip("\0") for v in values)


def _numbers(item: Dataset, keyword: str, count: int | None = None) -> Numbers | None:
    """The value as finite numbers, or None when it is absent, malformed or not of `count` numbers."""
    try:
        value = item.get(keyword)
        if value is None or value == "":
            return None
        values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        return None
    if (count is not None and len(numbers) != count) or not numbers or not all(map(math.isfinite, numbers)):
        return None
    return numbers


def _number(item: Dataset, keyword: str, default: float = 0) -> float:
    return (_numbers(item, keyword, 1) or (default,))[0]


def _positive(numbers: Numbers | None) -> Numbers | None:
    return numbers if numbers and min(numbers) > 0 else None


def _first(numbers: Numbers | None) -> float | None:
    return numbers[0] if numbers else None
