"""Deterministic measurements of evidence boxes and of whole images, each with its method and its unit (UCUM).

A box is not an outline: what is measured is the box, and the method says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Final

import numpy as np

from reports.schema import Measurement

Box = tuple[float, float, float, float]
PIXEL: Final = "{pixel}"
HOUNSFIELD: Final = "[hnsf'U]"
_WEAK: Final = "the marked region (class activation, no outline of the finding)"
_BOX: Final = "the evidence box"


def clip(bbox: Box, width: int, height: int) -> Box:
    """The part of `bbox` inside a `width` x `height` image; corners in rising order, never empty."""
    x0, x1 = sorted((min(max(bbox[0], 0.0), width), min(max(bbox[2], 0.0), width)))
    y0, y1 = sorted((min(max(bbox[1], 0.0), height), min(max(bbox[3], 0.0), height)))
    x0, y0 = min(x0, width - 0.01), min(y0, height - 0.01)
    return x0, y0, max(x1, x0 + 0.01), max(y1, y0 + 0.01)


def box_on_picture(
    bbox: Box, width: int, height: int, spacing_mm: tuple[float, float] | None, *, weak: bool
) -> tuple[Measurement, ...]:
    """Size of a box on a photo: pixels, share of the image, and mm where `spacing_mm` (row, column) is known."""
    what = _WEAK if weak else _BOX
    wide, high = bbox[2] - bbox[0], bbox[3] - bbox[1]
    found = [
        Measurement(name="width", value=wide, unit=PIXEL, method=f"width of {what}"),
        Measurement(name="height", value=high, unit=PIXEL, method=f"height of {what}"),
        Measurement(name="diagonal", value=hypot(wide, high), unit=PIXEL, method=f"diagonal of {what}"),
        Measurement(name="area", value=wide * high, unit=PIXEL, method=f"area of {what}, counted in pixels"),
        Measurement(
            name="share of the image",
            value=100 * wide * high / (width * height),
            unit="%",
            method=f"area of {what} over the area of the image",
        ),
    ]
    if spacing_mm:
        found.extend(box_sides_mm(bbox, spacing_mm, weak=weak))
    return tuple(found)


def box_sides_mm(bbox: Box, spacing_mm: tuple[float, float], *, weak: bool) -> tuple[Measurement, Measurement]:
    """The box's long and short side in millimetres; `spacing_mm` is (between rows, between columns)."""
    what = _WEAK if weak else _BOX
    sides = sorted(((bbox[2] - bbox[0]) * spacing_mm[1], (bbox[3] - bbox[1]) * spacing_mm[0]), reverse=True)
    return (
        Measurement(name="long side", value=sides[0], unit="mm", method=f"long side of {what}, by pixel spacing"),
        Measurement(name="short side", value=sides[1], unit="mm", method=f"short side of {what}, by pixel spacing"),
    )


def box_hounsfield(bbox: Box, slice_HW: np.ndarray, *, weak: bool) -> tuple[Measurement, Measurement]:
    """Mean and standard deviation (of the population) of the HU of all pixels whose centre lies in the box."""
    what = _WEAK if weak else _BOX
    height, width = slice_HW.shape
    x0, x1 = _centres(bbox[0], bbox[2], width)
    y0, y1 = _centres(bbox[1], bbox[3], height)
    inside = slice_HW[y0:y1, x0:x1].astype(np.float64)
    method = f"over all pixels of {what}"
    return (
        Measurement(name="mean attenuation", value=float(inside.mean()), unit=HOUNSFIELD, method=f"mean {method}"),
        Measurement(
            name="spread of attenuation",
            value=float(inside.std()),
            unit=HOUNSFIELD,
            method=f"standard deviation {method}",
        ),
    )


def _centres(low: float, high: float, size: int) -> tuple[int, int]:
    """First and past-the-last index of pixels with their centre in [low, high); the nearest one where there is none."""
    first = min(max(int(np.ceil(low - 0.5)), 0), size - 1)
    return first, min(max(int(np.ceil(high - 0.5)), first + 1), size)


def hounsfield_range(volume_SHW: np.ndarray) -> tuple[Measurement, Measurement]:
    """Lowest and highest HU of all slices, whether the model looked at them or not."""
    method = "over all pixels of all slices"
    return (
        Measurement(name="lowest attenuation", value=float(volume_SHW.min()), unit=HOUNSFIELD, method=method),
        Measurement(name="highest attenuation", value=float(volume_SHW.max()), unit=HOUNSFIELD, method=method),
    )


def covered_share(boxes: Sequence[Box], width: int, height: int) -> Measurement:
    """Share of the image under at least one box; overlaps count once."""
    spans = [(*_centres(x0, x1, width), *_centres(y0, y1, height)) for x0, y0, x1, y1 in boxes]
    # On the grid of all their edges, which is small however large the image is.
    columns, rows = (np.unique([span[k : k + 2] for span in spans]) for k in (0, 2))
    covered = np.zeros((max(len(rows) - 1, 0), max(len(columns) - 1, 0)), dtype=bool)
    for left, right, top, bottom in spans:
        covered[slice(*np.searchsorted(rows, (top, bottom))), slice(*np.searchsorted(columns, (left, right)))] = True
    pixels = np.diff(rows) @ covered @ np.diff(columns) if spans else 0
    return Measurement(
        name="image under evidence boxes",
        value=100 * float(pixels) / (width * height),
        unit="%",
        method="pixels in at least one evidence box over all pixels; overlaps count once",
    )
