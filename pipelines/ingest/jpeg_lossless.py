"""Makes JPEG Lossless streams safe to decode. The only codec at hand for them, GDCM, ends the whole process on headers
that contradict the image or themselves, so they are checked here first (ITU-T T.81 annexes B and H)."""

from __future__ import annotations

import struct
from typing import Final

from pipelines.ingest.refusals import Refusal

SOI, EOI, SOS, DHT, SOF3, DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xC3, 0xDD
SKIPPED: Final = frozenset((*range(0xE0, 0xF0), 0xFE))  # application data and comments


def checked_stream(frame: bytes, rows: int, columns: int, bits_allocated: int) -> bytes:
    """`frame` without comments and application data, of which GDCM accepts some only.

    Raises Refusal unless it is one complete lossless scan of one component of the given size.
    """
    try:
        return _checked(frame, rows, columns, bits_allocated)
    except (IndexError, struct.error) as error:
        raise _damaged("ends too early") from error


def _checked(frame: bytes, rows: int, columns: int, bits_allocated: int) -> bytes:
    if frame[:2] != bytes((0xFF, SOI)):
        raise _damaged("does not start as one")
    if bytes((0xFF, EOI)) not in frame[-8:]:
        raise Refusal("truncated", "The JPEG data ends too early.")
    at, tables, sized, kept = 2, set(), False, frame[:2]
    while True:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        segment = frame[at + 4 : at + 2 + length]
        if frame[at] != 0xFF or length < 2 or len(segment) != length - 2:
            raise _damaged("has a broken segment")
        if marker == DHT:
            tables |= _huffman_tables(segment)
        elif marker == SOF3:
            precision, height, width, components = struct.unpack_from(">BHHB", segment)
            expected = (rows, columns, 1, 9)
            if sized or (height, width, components, len(segment)) != expected or not 2 <= precision <= bits_allocated:
                raise _damaged("is of another size than the image")
            component, sampling = segment[6], segment[7]
            if sampling != 0x11:
                raise _damaged("is subsampled")
            sized = True
        elif marker == SOS:
            # one component, a table that is there, a predictor of 1 to 7, no point transform beyond the precision
            if not sized or len(segment) != 6 or segment[:2] != bytes((1, component)):
                raise _damaged("has a broken scan")
            if segment[2] >> 4 not in tables or not 1 <= segment[3] <= 7 or segment[4] or segment[5] >= precision:
                raise _damaged("has a broken scan")
            return kept + frame[at:]
        elif marker == DRI:
            # a restart has to fall on the start of a row
            if len(segment) != 2 or struct.unpack(">H", segment)[0] % columns:
                raise _damaged("has a broken restart interval")
        elif marker not in SKIPPED:
            raise _damaged("is of another process")
        if marker not in SKIPPED:
            kept += frame[at : at + 2 + length]
        at += 2 + length


def _huffman_tables(segment: bytes) -> set[int]:
    """The numbers of the DC tables in a DHT segment; raises Refusal for tables that are no prefix code."""
    found, at = set(), 0
    while at < len(segment):
        number, counts = segment[at], segment[at + 1 : at + 17]
        at += 17 + sum(counts)
        values = segment[at - sum(counts) : at]
        room = 1.0
        for bits, count in enumerate(counts, 1):
            room -= count / (1 << bits)
        if number > 3 or len(counts) != 16 or not values or at > len(segment) or max(values) > 16 or room < 0:
            raise _damaged("has a broken code table")
        found.add(number)
    return found


def _damaged(what: str) -> Refusal:
    return Refusal("damaged-image", f"The JPEG data {what}.")
