"""Deterministic measurements of evidence boxes and of whole images, each with its method and its unit (UCUM).

Methods are fixed sentences: `reports/catalogue` has them in each language. Outlines inside of boxes, and what is
measured of CT studies, are in `pipelines/measures`.
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
Scale = tuple[str, tuple[float, float]]  # UCUM unit, and its size of a pixel (between rows, between columns)
OUTLINE: Final = "the outline that stands out inside the evidence box (Otsu's threshold)"
_WEAK: Final = "the marked region (class activation, no outline of the finding)"
_BOX: Final = "the evidence box"


def clip(bbox: Box, width: int, height: int) -> Box:
    """The part of `bbox` inside a `width` x `height` image; corners in rising order, never empty."""
    x0, x1 = sorted((min(max(bbox[0], 0.0), width), min(max(bbox[2], 0.0), width)))
    y0, y1 = sorted((min(max(bbox[1], 0.0), height), min(max(bbox[3], 0.0), height)))
    x0, y0 = min(x0, width - 0.01), min(y0, height - 0.01)
    return x0, y0, max(x1, x0 + 0.01), max(y1, y0 + 0.01)


def what_is_measured(*, weak: bool) -> str:
    """The words for what a box marks, in a method."""
    return _WEAK if weak else _BOX


def box_share(bbox: Box, width: int, height: int, *, weak: bool) -> Measurement:
    """Share of the image that the box covers: what the rules go by."""
    return Measurement(
        name="share of the image",
        value=100 * (bbox[2] - bbox[0]) * (bbox[3] - bbox[1]) / (width * height),
        unit="%",
        method=f"area of {what_is_measured(weak=weak)} over the area of the image",
    )


def box_sides(bbox: Box, spacing: tuple[float, float]) -> tuple[float, float]:
    """(long, short) side of the box in the units of `spacing`, which is (between rows, between columns)."""
    sides = (bbox[2] - bbox[0]) * spacing[1], (bbox[3] - bbox[1]) * spacing[0]
    return max(sides), min(sides)


def edge_distance(bbox: Box, width: int, height: int, scale: Scale) -> Measurement:
    """From the box to the nearest edge of the image."""
    unit, (rows, columns) = scale
    value = min(bbox[0] * columns, (width - bbox[2]) * columns, bbox[1] * rows, (height - bbox[3]) * rows)
    method = "from the evidence box to the nearest edge of the image"
    return Measurement(name="distance to the nearest edge", value=max(value, 0.0), unit=unit, method=method)


def nearest_distance(bbox: Box, others: Sequence[Box], scale: Scale) -> Measurement:
    """From the box to the nearest other box; 0 where they touch."""
    unit, (rows, columns) = scale

    def gap(other: Box) -> float:
        across, down = (max(other[k] - bbox[k + 2], bbox[k] - other[k + 2], 0.0) for k in (0, 1))
        return hypot(across * columns, down * rows)

    method = "gap between the evidence boxes"
    return Measurement(name="distance to the nearest finding", value=min(map(gap, others)), unit=unit, method=method)


def box_hounsfield(bbox: Box, slice_HW: np.ndarray, *, weak: bool) -> tuple[Measurement, ...]:
    """Mean and standard deviation (of the population) of the HU of all pixels whose centre lies in the box."""
    height, width = slice_HW.shape
    x0, x1 = _centres(bbox[0], bbox[2], width)
    y0, y1 = _centres(bbox[1], bbox[3], height)
    inside = slice_HW[y0:y1, x0:x1].astype(np.float64)
    inside = inside[np.isfinite(inside)]
    if not inside.size:
        return ()
    method = f"over all pixels of {what_is_measured(weak=weak)}"
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


def hounsfield_range(volume_SHW: np.ndarray) -> tuple[Measurement, ...]:
    """Lowest and highest HU of all slices, whether the model looked at them or not."""
    low, high = (float(extreme.reduce(volume_SHW, axis=None)) for extreme in (np.fmin, np.fmax))  # pass over NaN
    if not np.isfinite((low, high)).all():
        return ()
    method = "over all pixels of all slices"
    return (
        Measurement(name="lowest attenuation", value=low, unit=HOUNSFIELD, method=method),
        Measurement(name="highest attenuation", value=high, unit=HOUNSFIELD, method=method),
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
