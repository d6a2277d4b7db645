"""Values of DICOM attributes as text or finite numbers; absent where they break the rules of their kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from pipelines.ingest.scan import Plain

Numbers = tuple[float, ...]
Item = Dataset | Plain


def text(item: Item, keyword: str) -> str:
    """The value as stripped text, values of a list joined by a backslash; "" when absent."""
    return "\\".join([str(value).strip().strip("\0") for value in _values(item, keyword)])


def numbers(item: Item, keyword: str, count: int | None = None) -> Numbers | None:
    """The value as finite numbers, or None when it is absent, malformed or not of `count` numbers."""
    try:
        found = tuple([float(value) for value in _values(item, keyword)])
    except (TypeError, ValueError, OverflowError):
        return None
    if (count is not None and len(found) != count) or not found or not all(map(math.isfinite, found)):
        return None
    return found


def _values(item: Item, keyword: str) -> list[Any]:
    """The value or values of an attribute; empty where it is absent, empty or breaks its VR."""
    try:
        value = item.get(keyword)
    except Exception:  # pydicom meets values that break their VR with errors of many types
        return []
    if value is None or value == "":
        return []
    if type(value) in (str, int, float):  # what a scanned header gives: this is asked 100 times a file
        return [value]
    return list(value) if isinstance(value, list | pydicom.multival.MultiValue) else [value]


def number(item: Item, keyword: str, default: float = 0) -> float:
    return (numbers(item, keyword, 1) or (default,))[0]


def positive(found: Numbers | None) -> Numbers | None:
    return found if found and min(found) > 0 else None


def items(item: Item, keyword: str) -> list[Dataset]:
    """The items of a sequence; empty where it is absent or no sequence."""
    try:
        value = item.get(keyword)
    except Exception:  # as above
        return []
    return list(value) if isinstance(value, pydicom.sequence.Sequence) else []


def image_type(dataset: Item) -> list[str]:
    return [value.strip() for value in text(dataset, "ImageType").upper().split("\\")]


class Macros:
    """The functional group macros of one frame: `Macros(ds, 3)["PlanePositionSequence"]` is the item that holds them.

    Per-frame groups win over shared ones (PS3.3 C.7.6.16.1); a single-frame file answers with the data set itself.
    """

    def __init__(self, dataset: Item, frame: int) -> None:
        self.dataset = dataset
        self.groups = tuple(self._groups(frame)) if isinstance(dataset, Dataset) else ()

    def __getitem__(self, sequence: str) -> Item:
        for group in self.groups:
            if found := items(group, sequence):
                return found[0]
        return self.dataset

    def _groups(self, frame: int) -> Iterator[Dataset]:
        per_frame = items(self.dataset, "PerFrameFunctionalGroupsSequence")
        if frame < len(per_frame):
            yield per_frame[frame]
        yield from items(self.dataset, "SharedFunctionalGroupsSequence")
