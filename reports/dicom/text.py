"""Text as DICOM's value representations take it (PS3.5 section 6.2)."""

from __future__ import annotations

from typing import Final

from reports.texts import visible, visible_lines

ELLIPSIS: Final = "…"


def line(text: str, length: int = 64) -> str:
    """One line of at most `length` bytes (LO, SH): no controls, and no backslash, which parts values.

    The standard counts characters; validators and archives count bytes.
    """
    plain = visible(text).replace("\\", "/").strip()
    if len(plain.encode()) <= length:
        return plain
    room = length - len(ELLIPSIS.encode())
    return plain.encode()[:room].decode("utf-8", "ignore").rstrip() + ELLIPSIS


def prose(text: str) -> str:
    """Text of any length (UT); never empty, for a text that is there must say something."""
    return visible_lines(text).strip() or "-"
