"""A quick look at the plain DICOM header: the few attributes that ingest asks for, without building data sets.

Serves files with preamble, file meta information and a little-endian data set whose wanted attributes stand at top
level.  Everything else (functional groups, deflated or big-endian data, odd encodings) is left to pydicom, against
which the result is tested.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

_NAMES: Final = """
    AcquisitionDateTime AcquisitionNumber AcquisitionTime BitsAllocated BitsStored BodyPartExamined Columns
    CompressionForce ContentTime ContrastBolusAgent ConvolutionKernel DecayCorrection EchoTime FrameOfReferenceUID
    HighBit ImageOrientationPatient ImagePositionPatient ImageType InstanceNumber KVP LossyImageCompression
    MagneticFieldStrength Manufacturer Modality NominalPercentageOfCardiacPhase NumberOfFrames PixelPaddingRangeLimit
    PixelPaddingValue PixelRepresentation PixelSpacing PositionerPrimaryAngle ProtocolName RescaleIntercept RescaleSlope
    RescaleType Rows SOPClassUID SOPInstanceUID SamplesPerPixel ScanOptions SeriesDescription SeriesInstanceUID
    SeriesNumber SliceThickness StudyInstanceUID TemporalPositionIdentifier TriggerTime
"""
WANTED: Final = tuple(_NAMES.split())
LEFT_TO_PYDICOM: Final = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ModalityLUTSequence",
)
_KEYWORDS: Final = {tag_for_keyword(keyword): keyword for keyword in WANTED}
_NESTED: Final = frozenset(tag_for_keyword(keyword) for keyword in LEFT_TO_PYDICOM)
_TYPES: Final = {keyword: dictionary_VR(tag) for tag, keyword in _KEYWORDS.items() if tag is not None}
_LONG: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_BINARY: Final = {"US": "<H", "UL": "<I", "FL": "<f", "FD": "<d", "US or SS": "<H"}
_ELEMENT: Final = struct.Struct("<HH2sH")  # group, element, and of explicit VR: VR and length
_UNDEFINED: Final = 0xFFFFFFFF
_PIXEL_DATA: Final = 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class Plain(dict[str, Any]):
    """The wanted attributes of one file by keyword; answers `get` and `in` as a pydicom data set does."""

    def __init__(self, values: dict[str, Any], syntax: str, media_uids: dict[str, str]) -> None:
        super().__init__(values)
        self.syntax = syntax
        self.media_uids = media_uids  # SOP class and instance by the file meta information


class _NotPlainError(Exception):
    """The file needs the full parser."""


def scan(head: bytes) -> tuple[Plain, int] | None:
    """The wanted attributes and the offset of the Pixel Data element, from the first bytes of a file.

    None where the file is not of the plain kind, or its pixel data do not begin within `head`.
    """
    if head[128:132] != b"DICM":
        return None
    try:
        return _scan(head)
    except (_NotPlainError, struct.error, IndexError, RecursionError):
        return None


def _scan(head: bytes) -> tuple[Plain, int]:
    meta: dict[int, bytes] = {}
    at = _walk(head, 132, explicit=True, found=meta, until=0x00030000)
    syntax = _uid(meta.get(0x00020010, b""))
    if not syntax or syntax in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
        raise _NotPlainError
    raw: dict[int, bytes] = {}
    at = _walk(head, at, explicit=syntax != ImplicitVRLittleEndian, found=raw, until=_PIXEL_DATA)
    if not _NESTED.isdisjoint(raw) or struct.unpack_from("<HH", head, at) != (0x7FE0, 0x0010):
        raise _NotPlainError
    values = {_KEYWORDS[tag]: _value(_KEYWORDS[tag], data) for tag, data in raw.items()}
    media_uids = {"SOPClassUID": _uid(meta.get(0x00020002, b"")), "SOPInstanceUID": _uid(meta.get(0x00020003, b""))}
    return Plain(values, syntax, media_uids), at


def _walk(head: bytes, at: int, *, explicit: bool, found: dict[int, bytes] | None, until: int) -> int:
    """Step over elements from `at` until a tag of `until` or above; keep the wanted values in `found`."""
    while True:
        group, number, vr, length = _ELEMENT.unpack_from(head, at)
        tag, start = group << 16 | number, at + 8
        if tag >= until:
            return at
        if not explicit:
            length = int.from_bytes(head[at + 4 : start], "little")
        elif vr in _LONG:
            start = at + 12
            length = int.from_bytes(head[at + 8 : start], "little")
        elif vr not in _SHORT:
            raise _NotPlainError
        if length == _UNDEFINED:
            if explicit and vr != b"SQ":
                raise _NotPlainError
            at = _skip_items(head, start, explicit=explicit)
        else:
            at = start + length
        if found is not None and (tag in _KEYWORDS or tag in _NESTED or group == 2):
            if at > len(head) or (tag in found):
                raise _NotPlainError
            found[tag] = b"" if length == _UNDEFINED else head[start:at]


def _skip_items(head: bytes, at: int, *, explicit: bool) -> int:
    """The end of a sequence of undefined length whose items begin at `at`."""
    while True:
        group, number, length = struct.unpack_from("<HHI", head, at)
        tag, at = group << 16 | number, at + 8
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _NotPlainError
        if length == _UNDEFINED:
            at = _walk(head, at, explicit=explicit, found=None, until=_ITEM) + 8
            if head[at - 8 : at - 4] != b"\xfe\xff\x0d\xe0":
                raise _NotPlainError
        else:
            at += length


def _value(keyword: str, data: bytes) -> Any:
    """A text, a list of texts, or a number: what pydicom would give, numbers in strings left as texts."""
    layout = _BINARY.get(_TYPES[keyword])
    if layout and data:
        if len(data) != struct.calcsize(layout):
            raise _NotPlainError
        return struct.unpack(layout, data)[0]
    text = data.decode("latin-1").strip(" \0")
    return text.split("\\") if "\\" in text else text


def _uid(data: bytes) -> str:
    return data.decode("latin-1").strip(" \0")
