"""One DICOM file's header: is it a CT image with Hounsfield units, which series is it of, and where its frames lie.

Works on single-frame CT (PS3.3 A.3) and on Enhanced and Legacy Converted Enhanced CT (A.38, A.70), whose attributes sit
in functional groups, with or without preamble, file meta information or SOP class.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, cast

import pydicom
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UID_dictionary,
)

from pipelines.ingest.codecs import LOSSY, reads
from pipelines.ingest.files import FileRef
from pipelines.ingest.header_json import header_json
from pipelines.ingest.kinds import CT_SOP_CLASSES, SECONDARY_CAPTURE, Kind, contrast_phase, foreign, kind_of
from pipelines.ingest.refusals import Refusal
from pipelines.ingest.scan import Plain, scan
from pipelines.ingest.values import Item, Macros, image_type, items, number, numbers, positive, text
from reports.dicom_source import Instance

# pydicom quotes the values that it finds odd. Patient data stays out of logs and off the terminal.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\.")

MAX_VOXELS: Final = 2_000_000_000  # of one file
MAX_FRAMES: Final = 50_000
MAX_FRAME_PIXELS: Final = 8192 * 8192  # no scanner comes near; bounds the memory that a damaged header can ask for
MAX_INFLATED_BYTES: Final = 512 << 20  # of a deflated data set
META_BYTES: Final = 1 << 16  # that a file's meta information, which names the transfer syntax, may have
HEAD_BYTES: Final = 1 << 16  # most headers end before
CACHED_HEADERS: Final = 20_000
MAPS: Final = re.compile(r"PERFUSION|\b(CBF|CBV|MTT|TTP|TMAX|PBV|RHO|ZEFF|Z_EFF)\b|IODINE|ELECTRON_DENSITY")
Position = tuple[float, float, float]
Direction = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the pixels are stored (PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    syntax: str
    lossy: bool
    offset: int | None  # of the Pixel Data element in the file; None where only the full parser finds it
    padding: tuple[float, float] | None  # first and last stored value that stands for no pixel (C.7.5.1.1.2)


@dataclass(frozen=True, slots=True)
class Rescale:
    """Stored values to Hounsfield units: a line, or a table (PS3.3 C.11.1)."""

    slope: float
    intercept: float
    table: tuple[int, tuple[int, ...]] | None = None  # first stored value mapped, then the values; ends are extended


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one frame lies, in patient coordinates (LPS, mm), and what its values mean."""

    position: Position | None
    orientation: Direction | None
    spacing: tuple[float, float] | None  # mm between rows, between columns
    thickness: float | None
    rescale: Rescale
    # What tells frames at one place apart: PHASES in their order.
    phases: tuple[str, ...]


# In order of meaning: the first that separates frames at the same place is taken.
PHASES: Final = (
    "acquisition number",
    "temporal position",
    "cardiac phase",
    "trigger time",
    "stack",
    "image type",
    "kernel",
    "tube voltage",
    "acquisition time",
    "content time",
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header pass keeps of one file: small, and all that ordering and decoding need."""

    ref: FileRef
    series: tuple[str, ...]  # files of one series have the same
    study_uid: str
    series_uid: str
    series_number: str
    frame_of_reference: str
    instance: Instance
    order: tuple[float, float]  # acquisition and instance number; serves where positions do not
    kind: Kind
    contrast: str  # a contrast phase in words, or ""
    fault: tuple[str, str] | None  # code and reason; else the file is a CT image that can be read
    layout: Layout | None  # None where there is a fault
    planes: tuple[Plane, ...]  # one a frame; empty where there is a fault
    flags: frozenset[str]

    @property
    def lossy(self) -> bool:
        return self.layout is not None and self.layout.lossy


@dataclass(frozen=True, slots=True)
class About:
    """What one header says of its whole series."""

    window: tuple[float, float] | None
    kernel: str | None
    contrast_agent: str | None
    body_part: str | None
    accession: str | None
    json: dict[str, Any]  # the DICOM JSON model


def read_header(ref: FileRef) -> Header:
    """Where the file belongs and whether it can be read as a CT image. Decodes nothing.

    A file that is no such image has a header with a `fault`. Raises Refusal for what is no DICOM image at all, and
    OSError.  A file that has not changed is read once.
    """
    return _read_header(ref, ref.state())


def forget_headers() -> None:
    """Read every file anew."""
    _read_header.cache_clear()


@functools.lru_cache(CACHED_HEADERS)
def _read_header(ref: FileRef, state: tuple[int, ...]) -> Header:
    with ref.open() as stream:
        if plain := scan(stream.read(HEAD_BYTES)):
            return _header(ref, *plain)
        stream.seek(0)
        dataset = parse(stream, stop_before_pixels=True)
        deflated = text(dataset.file_meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
        return _header(ref, dataset, None if deflated else stream.tell())


def read_about(ref: FileRef) -> About:
    """What the file's header says of its series. Raises Refusal."""
    with ref.open() as stream:
        dataset = parse(stream, stop_before_pixels=True)
    frame = Macros(dataset, 0)
    voi = frame["FrameVOILUTSequence"]
    centre, width = numbers(voi, "WindowCenter"), numbers(voi, "WindowWidth")
    agents = items(dataset, "ContrastBolusAgentSequence")
    regions = items(frame["FrameAnatomySequence"], "AnatomicRegionSequence")
    return About(
        window=(centre[0], width[0]) if centre and width and width[0] >= 1 else None,
        kernel=text(frame["CTReconstructionSequence"], "ConvolutionKernel") or None,
        contrast_agent=text(dataset, "ContrastBolusAgent") or _meaning(agents),
        body_part=text(dataset, "BodyPartExamined") or _meaning(regions),
        accession=text(dataset, "AccessionNumber") or None,
        json=header_json(dataset),
    )


def _meaning(codes: list[Dataset]) -> str | None:
    return (text(codes[0], "CodeMeaning") if codes else "") or None


def parse(stream: BinaryIO, *, stop_before_pixels: bool) -> Dataset:
    """The data set, its transfer syntax guessed where no file meta information names it. Raises Refusal."""
    check_deflated(stream)
    try:
        dataset = pydicom.dcmread(stream, force=True, stop_before_pixels=stop_before_pixels)
    except EOFError as error:
        raise Refusal("truncated", "The DICOM data ends too early.") from error
    except MemoryError:
        raise
    except Exception as error:  # pydicom meets damaged bytes with errors of many types
        raise Refusal("damaged-file", "The DICOM data set is damaged.") from error
    if not text(dataset.file_meta, "TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _header(ref: FileRef, dataset: Item, offset: int | None) -> Header:
    sop_class, sop_instance = _sop_uids(dataset)
    if not sop_class and not text(dataset, "Modality"):
        raise Refusal("not-an-image", "It is neither a picture nor a DICOM image.")
    study, series = text(dataset, "StudyInstanceUID"), text(dataset, "SeriesInstanceUID")
    numbered = numbers(dataset, "InstanceNumber", 1)
    other = foreign(dataset, sop_class)
    kind = kind_of(dataset, sop_class, other)
    layout: Layout | None = None
    planes: tuple[Plane, ...] = ()
    flags: frozenset[str] = frozenset()
    fault = None
    try:
        _check(dataset, sop_class, kind, other)
        layout = _layout(dataset, offset)
        planes, flags = _planes(dataset, layout.frames)
    except Refusal as refusal:
        layout, planes, fault = None, (), (refusal.code, refusal.reason)
    return Header(
        ref=ref,
        series=(study, series) if series else (study, ref.parent, text(dataset, "SeriesNumber")),
        study_uid=study,
        series_uid=series,
        series_number=text(dataset, "SeriesNumber"),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
        instance=Instance(
            sop_instance, sop_class, int(numbered[0]) if numbered else None, layout.frames if layout else 1
        ),
        order=(number(dataset, "AcquisitionNumber"), number(dataset, "InstanceNumber")),
        kind=kind,
        contrast=contrast_phase(dataset),
        fault=fault,
        layout=layout,
        planes=planes,
        flags=flags,
    )


def _sop_uids(dataset: Item) -> tuple[str, str]:
    """SOP class and instance, by the data set or where that is silent by the file meta information."""
    meta: Any = dataset.media_uids if isinstance(dataset, Plain) else dataset.file_meta
    found = (text(dataset, keyword) or text(meta, keyword) for keyword in ("SOPClassUID", "SOPInstanceUID"))
    return cast("tuple[str, str]", tuple(found))


def _check(dataset: Item, sop_class: str, kind: Kind, other: str) -> None:
    """Raise Refusal unless the data set is a CT image in a form that can be decoded."""
    if sop_class.startswith(SECONDARY_CAPTURE):
        raise Refusal("not-ct-image", "It is a secondary capture (a screenshot), not a CT slice.")
    if kind == "dose-report":
        raise Refusal("dose-report", "It is a dose report, which holds no image.")
    if "Rows" not in dataset or "Columns" not in dataset:
        what = UID(sop_class).name if sop_class in UID_dictionary else "DICOM object"
        raise Refusal("no-pixels", f"It is a {what}, which holds no image.")
    if other:
        raise Refusal("not-ct", other)
    if sop_class and sop_class not in CT_SOP_CLASSES:
        raise Refusal("not-ct-image", "It is made from a CT study, but is not a CT image.")
    if kind == "localizer":
        raise Refusal("localizer", "It is a localizer (scout), not a cross-section.")
    if number(dataset, "SamplesPerPixel", 1) != 1:
        raise Refusal("not-ct-image", "It is a colour image.")
    count = frame_count(dataset)
    voxels = number(dataset, "Rows") * number(dataset, "Columns") * count
    if voxels <= 0:
        raise Refusal("no-pixels", "The image is 0 pixels wide or high.")
    if voxels > MAX_VOXELS or count > MAX_FRAMES or voxels / count > MAX_FRAME_PIXELS:
        limit = f"the limit is {MAX_VOXELS:,} pixels in {MAX_FRAMES:,} frames of {MAX_FRAME_PIXELS:,}"
        raise Refusal("too-large", f"It declares {voxels:,.0f} pixels in {count:,} frames; {limit}.")


def _layout(dataset: Item, offset: int | None) -> Layout:
    allocated = int(number(dataset, "BitsAllocated", 16))
    stored = int(number(dataset, "BitsStored", allocated))
    high_bit = int(number(dataset, "HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or not stored - 1 <= high_bit < allocated:
        raise Refusal("unsupported-pixel-format", "Its pixels are packed in a way that no decoder reads.")
    syntax = dataset.syntax if isinstance(dataset, Plain) else text(dataset.file_meta, "TransferSyntaxUID")
    if not reads(syntax):
        title = UID(syntax).name if syntax in UID_dictionary else "not a known one"
        raise Refusal("unsupported-transfer-syntax", f"The transfer syntax is {title}, which no codec here reads.")
    signed = number(dataset, "PixelRepresentation") == 1
    return Layout(
        rows=int(number(dataset, "Rows")),
        columns=int(number(dataset, "Columns")),
        frames=frame_count(dataset),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        signed=signed,
        syntax=str(syntax),
        lossy=text(dataset, "LossyImageCompression") == "01" or syntax in LOSSY,
        offset=offset,
        padding=_padding(dataset, allocated, signed=signed),
    )


def frame_count(dataset: Item) -> int:
    """Number of frames; 1 where the header says nothing of use."""
    return max(int(number(dataset, "NumberOfFrames", 1)), 1)


def _padding(dataset: Item, bits: int, *, signed: bool) -> tuple[float, float] | None:
    first = numbers(dataset, "PixelPaddingValue", 1)
    if first is None:
        return None
    last = numbers(dataset, "PixelPaddingRangeLimit", 1) or first
    # The value's sign is often not that of the pixels: it is the bits that count.
    span = 1 << bits
    top = span // 2 if signed else span
    low, high = sorted((int(v) % span) - (span if int(v) % span >= top else 0) for v in (first[0], last[0]))
    return low, high


def _planes(dataset: Item, frames: int) -> tuple[tuple[Plane, ...], frozenset[str]]:
    # Frames have places of their own only where per-frame functional groups give them.
    placed = frames == 1 or "PerFrameFunctionalGroupsSequence" in dataset
    whole = image_type(dataset)
    planes: list[Plane] = []
    flags: set[str] = set()
    per_frame = len(items(dataset, "PerFrameFunctionalGroupsSequence"))
    for index in range(min(frames, per_frame + 1)):  # frames without groups of their own are all alike
        frame = Macros(dataset, index)
        measures = frame["PixelMeasuresSequence"]
        position = numbers(frame["PlanePositionSequence"], "ImagePositionPatient", 3)
        orientation = numbers(frame["PlaneOrientationSequence"], "ImageOrientationPatient", 6)
        rescale, flag = _rescale(frame["PixelValueTransformationSequence"], whole)
        flags |= flag
        planes.append(
            Plane(
                position=cast("Position | None", position if placed else None),
                orientation=cast("Direction | None", orientation),
                spacing=cast("tuple[float, float] | None", positive(numbers(measures, "PixelSpacing", 2))),
                thickness=(positive(numbers(measures, "SliceThickness", 1)) or (None,))[0],
                rescale=rescale,
                phases=_phases(dataset, frame, whole),
            )
        )
    return (*planes, *planes[-1:] * (frames - len(planes))), frozenset(flags)


def _phases(dataset: Item, frame: Macros, whole: list[str]) -> tuple[str, ...]:
    content, cardiac = frame["FrameContentSequence"], frame["CardiacSynchronizationSequence"]
    found = {
        "acquisition number": text(dataset, "AcquisitionNumber") or text(content, "FrameAcquisitionNumber"),
        "temporal position": text(content, "TemporalPositionIndex") or text(dataset, "TemporalPositionIdentifier"),
        "cardiac phase": text(cardiac, "NominalPercentageOfCardiacPhase"),
        "trigger time": text(dataset, "TriggerTime"),
        "stack": text(content, "StackID"),
        "image type": text(frame["CTImageFrameTypeSequence"], "FrameType") or "\\".join(whole),
        "kernel": text(frame["CTReconstructionSequence"], "ConvolutionKernel"),
        "tube voltage": text(frame["CTXRayDetailsSequence"], "KVP"),
        "acquisition time": text(content, "FrameAcquisitionDateTime")
        or text(dataset, "AcquisitionDateTime")
        or text(dataset, "AcquisitionTime"),
        "content time": text(dataset, "ContentTime"),
    }
    return tuple(found[phase] for phase in PHASES)


def _rescale(item: Item, image_type: list[str]) -> tuple[Rescale, frozenset[str]]:
    """Stored values to HU (PS3.3 C.11.1 and C.7.6.16.2.9), and flags. Raises Refusal where the values are not HU."""
    if tables := items(item, "ModalityLUTSequence"):
        return _table(tables[0]), frozenset()
    slope, intercept = numbers(item, "RescaleSlope", 1), numbers(item, "RescaleIntercept", 1)
    if slope is None or intercept is None or slope[0] == 0:
        raise Refusal("no-hounsfield-units", "The header gives no rescale to Hounsfield units.")
    rescale = Rescale(slope[0], intercept[0])
    unit, original = text(item, "RescaleType").upper(), image_type[0] == "ORIGINAL"
    if unit != "HU" and not original and MAPS.search(" ".join(image_type)):
        raise Refusal("no-hounsfield-units", "The pixel values are a derived map, not Hounsfield units.")
    if unit in ("", "HU"):
        return rescale, frozenset()
    # "US" (unspecified) is written by some archives on original slices; on a derived image it means some other map.
    if unit == "US" and original:
        return rescale, frozenset({"unspecified-rescale-type"})
    raise Refusal("no-hounsfield-units", "The pixel values are a derived map, not Hounsfield units.")


def _table(item: Dataset) -> Rescale:
    """A Modality LUT (PS3.3 C.11.1.1): Descriptor is number of entries, first stored value mapped, bits of an entry."""
    descriptor = numbers(item, "LUTDescriptor", 3)
    if text(item, "ModalityLUTType").upper() != "HU" or descriptor is None:
        raise Refusal("no-hounsfield-units", "Its Modality LUT does not give Hounsfield units.")
    entries, first, bits = (int(number) for number in descriptor)
    data = item.get("LUTData")
    if isinstance(data, bytes):
        values = tuple(memoryview(data[: len(data) // 2 * 2]).cast("H")) if bits > 8 else tuple(data)
    else:
        values = tuple(int(value) for value in numbers(item, "LUTData") or ())
    if len(values) < (entries or 65536):
        raise Refusal("no-hounsfield-units", "Its Modality LUT is shorter than it declares.")
    return Rescale(1.0, 0.0, (first, values[: entries or 65536]))


def check_deflated(stream: BinaryIO) -> None:
    """Refuse a deflated data set that would fill the memory: pydicom inflates it in one go, whatever is asked of it.

    Leaves the stream at its beginning. Raises Refusal.
    """
    head = stream.read(META_BYTES)
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in head:
        if len(head) == META_BYTES and _meta_end(head) > META_BYTES - 12:  # so that it may say so further on
            raise Refusal("damaged-file", f"Its file meta information is longer than {META_BYTES >> 10} KiB.")
        return
    if head[132:140] != b"\x02\0\0\0UL\4\0":
        raise Refusal("damaged-file", "The DICOM header lacks the length of its file meta information.")
    stream.seek(144 + int.from_bytes(head[140:144], "little"))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    while block := inflater.unconsumed_tail or stream.read(1 << 20):
        size += len(inflater.decompress(block, 1 << 24))
        if size > MAX_INFLATED_BYTES:
            raise Refusal("too-large", f"The deflated data set unpacks to more than {MAX_INFLATED_BYTES >> 20} MiB.")
        if inflater.eof:
            break
    stream.seek(0)


def _meta_end(head: bytes) -> int:
    """Where the elements of group 2 end (PS3.10 section 7.1), or one ends that lies beyond `head`."""
    at = 132 if head[128:132] == b"DICM" else 0
    while at + 12 <= len(head) and head[at : at + 2] == b"\x02\0":
        vr = head[at + 4 : at + 6]
        if not vr.isalpha():  # implicit, against the standard
            at += 8 + int.from_bytes(head[at + 4 : at + 8], "little")
        elif vr in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR"):
            at += 12 + int.from_bytes(head[at + 8 : at + 12], "little")
        else:
            at += 8 + int.from_bytes(head[at + 6 : at + 8], "little")
    return at
