"""Checks JPEG Lossless and 12-bit JPEG streams before GDCM sees them: it ends its process, or makes up pixels, on
headers that contradict the image or themselves (ITU-T T.81 annexes B and H)."""

from __future__ import annotations

import struct
from typing import Final

from pipelines.ingest.refusals import Refusal

SOI, SOS, DHT, DQT, SOF1, SOF3, DRI = 0xD8, 0xDA, 0xC4, 0xDB, 0xC1, 0xC3, 0xDD
FRAME_HEADERS: Final = frozenset((*range(0xC0, 0xD0), 0xF7)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, JPEG-LS's SOF55
SKIPPED: Final = frozenset((*range(0xE0, 0xF0), 0xFE))  # application data and comments


def size_of(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) by the header of a JPEG, JPEG-LS or JPEG 2000 stream; None where it has none."""
    try:
        if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: the size comes first (ITU-T T.800 A.5.1)
            right, bottom, left, top = struct.unpack_from(">IIII", frame, 8)
            return bottom - top, right - left
        at = 2
        while frame[at] == 0xFF:
            if frame[at + 1] in FRAME_HEADERS:
                rows, columns = struct.unpack_from(">HH", frame, at + 5)
                return rows, columns
            at += 1 if frame[at + 1] == 0xFF else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    except (IndexError, struct.error):
        pass
    return None


def checked_stream(frame: bytes, rows: int, columns: int, bits_allocated: int) -> bytes:
    """`frame` without comments and application data, of which GDCM accepts some only.

    Raises Refusal unless it is one scan of one component of the given size, lossless or sequential.
    """
    try:
        return _checked(frame, rows, columns, bits_allocated)
    except (IndexError, struct.error) as error:
        raise _damaged("ends too early") from error


def _checked(frame: bytes, rows: int, columns: int, bits_allocated: int) -> bytes:
    if frame[:2] != bytes((0xFF, SOI)):
        raise _damaged("does not start as one")
    at, tables, process, kept = 2, set(), 0, frame[:2]
    while True:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        segment = frame[at + 4 : at + 2 + length]
        if frame[at] != 0xFF or length < 2 or len(segment) != length - 2:
            raise _damaged("has a broken segment")
        if marker == DHT:
            tables |= _huffman_tables(segment)
        elif marker in (SOF1, SOF3):
            precision, height, width, components = struct.unpack_from(">BHHB", segment)
            expected = (rows, columns, 1, 9)
            if process or (height, width, components, len(segment)) != expected or not 2 <= precision <= bits_allocated:
                raise _damaged("is of another size than the image")
            component, sampling = segment[6], segment[7]
            if sampling != 0x11:
                raise _damaged("is subsampled")
            process = marker
        elif marker == SOS:
            # one component, a table that is there, a predictor of 1 to 7, no point transform beyond the precision
            if not process or len(segment) != 6 or segment[:2] != bytes((1, component)):
                raise _damaged("has a broken scan")
            lossless = 1 <= segment[3] <= 7 and not segment[4] and segment[5] < precision
            if segment[2] >> 4 not in tables or (process == SOF3 and not lossless):
                raise _damaged("has a broken scan")
            return kept + frame[at:]
        elif marker == DRI:
            # a restart has to fall on the start of a row
            if len(segment) != 2 or struct.unpack(">H", segment)[0] % columns:
                raise _damaged("has a broken restart interval")
        elif marker not in SKIPPED and marker != DQT:
            raise _damaged("is of another process")
        if marker not in SKIPPED:
            kept += frame[at : at + 2 + length]
        at += 2 + length


def _huffman_tables(segment: bytes) -> set[int]:
    """The numbers of the tables in a DHT segment, AC tables from 16 on; raises Refusal where one is no prefix code."""
    found, at = set(), 0
    while at < len(segment):
        number, counts = segment[at], segment[at + 1 : at + 17]
        at += 17 + sum(counts)
        values = segment[at - sum(counts) : at]
        room = 1.0
        for bits, count in enumerate(counts, 1):
            room -= count / (1 << bits)
        if number & 0xEC or len(counts) != 16 or not values or at > len(segment) or room < 0:
            raise _damaged("has a broken code table")
        if number < 16 and max(values) > 16:
            raise _damaged("has a broken code table")
        found.add(number)
    return found


def _damaged(what: str) -> Refusal:
    return Refusal("damaged-image", f"The JPEG data {what}.")
