"""The outline of what an evidence box marks, by its contrast with the surroundings, and the sizes of that outline.

Shapes: H, W of the image, h, w of the window around the box. scipy is imported where it is needed: a run without
findings does not pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

Box = tuple[float, float, float, float]

MOST_PIXELS: Final = 1 << 17  # of a window; larger ones are looked at in steps
RING_SHARE: Final = 0.5  # width of the ring on each side over the box's side
RING_PIXELS: Final = (4, 200)  # its least and most width
BINS: Final = 128
DISTINCT: Final = 3.0  # contrast over the spread of the surroundings
RING_MARKED: Final = 0.2  # share of the ring above the threshold: more, and the box's content goes on around it
LEAST_PIXELS: Final = 6
SPAN: Final = 0.65  # of the box's sides: what takes less of them is a part of the finding, or only texture


@dataclass(frozen=True, slots=True)
class Outline:
    """A connected part of an image: `mask` `[h, w]` lies at (`x`, `y`), each of its pixels `step` image pixels wide."""

    mask: np.ndarray
    x: int
    y: int
    step: int

    @property
    def pixels(self) -> int:
        """Area in pixels of the image."""
        return int(np.count_nonzero(self.mask)) * self.step**2


def find_outline(
    image: np.ndarray, bbox: Box, *, least_contrast: float, reference: np.ndarray | None = None
) -> Outline | None:
    """The largest part of the box that stands out from the ring around it, or from the golden sample; None where none
    does clearly.

    `image` and `reference`, a golden sample of the same size, are `[H, W]` or RGB, `[H, W, 3]`. Otsu's
    threshold (IEEE Trans. SMC 9, 1979) on the distance of each value from the median of the ring.
    `least_contrast` is in the image's units.
    """
    height, width = image.shape[:2]
    (x0, x1), (y0, y1) = _pixels(bbox[0], bbox[2], width), _pixels(bbox[1], bbox[3], height)
    ring_x, ring_y = (int(np.clip(RING_SHARE * (b - a), *RING_PIXELS)) for a, b in ((x0, x1), (y0, y1)))
    left, top = max(x0 - ring_x, 0), max(y0 - ring_y, 0)
    right, bottom = min(x1 + ring_x, width), min(y1 + ring_y, height)
    step = max(1, int(np.ceil(np.sqrt((right - left) * (bottom - top) / MOST_PIXELS))))
    window = (slice(top, bottom, step), slice(left, right, step))
    seen = _grey(image[window])
    rows, columns = np.arange(top, bottom, step), np.arange(left, right, step)
    box = ((rows >= y0) & (rows < y1))[:, np.newaxis] & ((columns >= x0) & (columns < x1))
    known = np.isfinite(seen)
    if reference is not None:
        distance = np.abs(seen - _grey(reference[window]))
    elif (ring := seen[~box & known]).size:
        distance = np.abs(seen - np.median(ring))
    else:  # the box is the whole image
        return None
    distance[~known] = 0
    threshold = _otsu(distance)
    above = distance > threshold
    marked, rest = distance[above & box], distance[~above]
    if not (marked.size and rest.size):
        return None
    around, around_marked = distance[~box], above[~box]
    spread = 1.4826 * float(np.median(around)) if around.size else 0.0
    if float(marked.mean() - rest.mean()) < max(least_contrast, DISTINCT * spread):
        return None
    if around.size and around_marked.mean() > RING_MARKED:
        return None
    from scipy import ndimage

    labels, _ = ndimage.label(above & box, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    # A hole is what is not around it: labelling that takes a quarter of the time of `binary_fill_holes`.
    outside, _ = ndimage.label(np.pad(labels != sizes.argmax(), 1, constant_values=True))
    mask = (outside != outside[0, 0])[1:-1, 1:-1]
    partial = any(_span(mask, axis) < SPAN * _span(box, axis) for axis in (0, 1))
    if mask.sum() < LEAST_PIXELS or (partial and reference is None):
        return None
    return Outline(mask, left, top, step)


def least_rectangle(outline: Outline, spacing: tuple[float, float]) -> tuple[float, float]:
    """(length, width) of the rectangle of least area around the outline, at any angle; in the units of `spacing`.

    One of its sides lies on a side of the convex hull (Freeman and Shapira, CACM 18, 1975).
    """
    hull = _hull(outline, spacing)
    edges = np.roll(hull, -1, axis=0) - hull
    along = edges / np.linalg.norm(edges, axis=1, keepdims=True)
    sides = np.stack([np.ptp(hull @ along.T, axis=0), np.ptp(hull @ _turned(along).T, axis=0)])
    best = sides[:, sides.prod(axis=0).argmin()]
    return float(best.max()), float(best.min())


def axes(outline: Outline, spacing: tuple[float, float]) -> tuple[float, float]:
    """(longest diameter, largest extent at right angles to it) of the outline, in the units of `spacing`."""
    hull = _hull(outline, spacing)
    between = hull[:, np.newaxis] - hull
    lengths = np.linalg.norm(between, axis=-1)
    first, last = np.unravel_index(lengths.argmax(), lengths.shape)
    across = _turned(between[first, last] / lengths[first, last])
    return float(lengths.max()), float(np.ptp(hull @ across))


def _hull(outline: Outline, spacing: tuple[float, float]) -> np.ndarray:
    """Corners of the convex hull `[N, (x, y)]` over the corners of all pixels; `spacing` is (of rows, of columns)."""
    from scipy.spatial import ConvexHull

    ys, xs = np.nonzero(outline.mask & ~_interior(outline.mask))
    corners = np.concatenate([np.stack([xs + dx, ys + dy], axis=1) for dx in (0, 1) for dy in (0, 1)])
    points = corners * (outline.step * np.array([spacing[1], spacing[0]]))
    return np.asarray(points[ConvexHull(points).vertices])


def _interior(mask: np.ndarray) -> np.ndarray:
    """Pixels with all four neighbours in the mask: they are no corner of the hull."""
    padded = np.pad(mask, 1)
    return np.asarray(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def _turned(vectors: np.ndarray) -> np.ndarray:
    return np.stack([-vectors[..., 1], vectors[..., 0]], axis=-1)


def _grey(values: np.ndarray) -> np.ndarray:
    """float32 `[h, w]`; RGB by its luma (ITU-R BT.601)."""
    if values.ndim == 2:
        return values.astype(np.float32)
    return np.asarray(values @ np.array([0.299, 0.587, 0.114], np.float32))


def _span(mask: np.ndarray, axis: int) -> int:
    """Rows (axis 0) or columns (axis 1) from the first to the last that the mask reaches."""
    return int(np.ptp(np.flatnonzero(mask.any(axis=1 - axis)))) + 1


def _otsu(values: np.ndarray) -> float:
    """The threshold with the largest variance between what lies below and above it."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * centres)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (means[0] - means[1]) ** 2)])


def _pixels(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(int(np.floor(low)), 0), size - 1)
    return first, min(max(int(np.ceil(high)), first + 1), size)
