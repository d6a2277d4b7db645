"""Figures of image quality: noise, and slice thickness against slice distance."""

from __future__ import annotations

from typing import Final

import numpy as np

from pipelines.measures.grid import AIR_HU, Grid, clean
from pipelines.study import Geometry
from reports.measurements import HOUNSFIELD
from reports.schema import Measurement

PATCH_MM: Final = 6.0
SLICES: Final = 9  # spread over the scan; more change nothing
PATCHES: Final = 60  # fewer say nothing about the noise
SOFT_TISSUE_HU: Final = (0.0, 100.0)
AIR_BELOW_HU: Final = -950.0
CLIPPED: Final = 0.01  # share of pixels at the lowest value from which on air no longer shows its noise
NOISY_HU: Final = 40.0  # healthy lung (-860 HU) then falls below -950 by chance in more than 1% of its voxels
SLICE_GAP, SLICE_OVERLAP = "slice-gap", "slice-overlap"


def noise(
    volume_SHW: np.ndarray, spacing_mm: tuple[float, float], grid: Grid, body_ZYX: np.ndarray
) -> Measurement | None:
    """Global noise level: the most frequent standard deviation in small patches of soft tissue, after Christianson et
    al., AJR 2015; where there is too little soft tissue, the median in patches of air outside of the body.

    `body_ZYX` is the mask on `grid`. None where neither can be had.
    """
    inside = grid.stored(body_ZYX)
    slices = volume_SHW.shape[0]
    chosen = np.unique(np.linspace(0, slices - 1, min(SLICES, slices) + 2)[1:-1].round().astype(int))
    tissue: list[np.ndarray] = []
    air: list[np.ndarray] = []
    pixels = 0
    for index in chosen:
        hu = clean(volume_SHW[index]).astype(np.float32)
        patches = _patches(hu, spacing_mm)
        if not patches.size:
            return None
        mask = _patches(grid.on_slice(inside, int(index)), spacing_mm)
        mean, spread = patches.mean(axis=-1), patches.std(axis=-1, ddof=1)
        within = mask.all(axis=-1) & (mean >= SOFT_TISSUE_HU[0]) & (mean <= SOFT_TISSUE_HU[1])
        tissue.append(spread[within])
        lowest = (patches <= AIR_HU).mean(axis=-1)
        air.append(spread[~mask.any(axis=-1) & (mean < AIR_BELOW_HU) & (lowest < CLIPPED)])
        pixels = patches.shape[-1]
    in_tissue, in_air = np.concatenate(tissue), np.concatenate(air)
    if in_tissue.size >= PATCHES:
        # The most frequent deviation of n values lies a little below the true one (mode of the chi distribution).
        value = _mode(in_tissue) * float(np.sqrt((pixels - 1) / (pixels - 2)))
        method = "most frequent standard deviation in 6 mm patches of soft tissue, 0 to 100 HU (global noise level)"
    elif in_air.size >= PATCHES:
        value = float(np.median(in_air))
        method = "median standard deviation in 6 mm patches of air outside of the body"
    else:
        return None
    return Measurement(name="image noise", value=value, unit=HOUNSFIELD, method=method)


def _patches(slice_HW: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """The slice cut into squares of `PATCH_MM`, at least 4 pixels a side: `[N, pixels]`; empty for a tiny slice."""
    high, wide = (max(4, round(PATCH_MM / mm)) for mm in spacing_mm)
    rows, columns = slice_HW.shape[0] // high, slice_HW.shape[1] // wide
    cut = slice_HW[: rows * high, : columns * wide].reshape(rows, high, columns, wide)
    return cut.transpose(0, 2, 1, 3).reshape(rows * columns, high * wide)


def _mode(values: np.ndarray) -> float:
    """The mean of the densest quarter: where most values lie, without bins."""
    ordered = np.sort(values)
    size = len(ordered) // 4
    start = int(np.argmin(ordered[size:] - ordered[:-size]))
    return float(ordered[start : start + size].mean())


def thickness_flags(geometry: Geometry) -> tuple[str, ...]:
    """Slices thinner than their distance leave tissue out; thicker ones show it twice. A tenth is no
    difference."""
    thickness, distance = geometry.slice_thickness_mm, geometry.slice_spacing_mm
    if not (thickness and distance):
        return ()
    if thickness < 0.9 * distance:
        return (SLICE_GAP,)
    return (SLICE_OVERLAP,) if thickness > 1.1 * distance else ()
