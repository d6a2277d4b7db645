"""A CT volume on a coarse grid in the patient's own axes: where masks are found, before they go back to every voxel.

Shapes: S, H, W of the volume as it was stored; Z, Y, X of the grid: indices rise towards head, back and left.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipelines.study import Geometry

COARSE_MM: Final = 2.0  # finer does not change a lung's outline, which is decided on every voxel afterwards
AIR_HU: Final = -1024
MOST_THREADS: Final = 4  # numpy lets others run while it copies, adds and compares: half the time on two cores
NEAREST_AXIS: Final = 0.8  # cosine: an axis further off its body axis than 37 degrees has no plain name


@dataclass(frozen=True, slots=True)
class Grid:
    """Block means of HU, with the way back to the stored voxels."""

    hu_ZYX: np.ndarray  # int16
    voxel_mm: tuple[float, float, float]  # Z, Y, X
    blocks: tuple[int, int, int]  # stored voxels per coarse one along S, H, W
    shape_SHW: tuple[int, int, int]
    axes: tuple[int, int, int]  # the stored axis behind Z, Y, X
    flips: tuple[bool, bool, bool]  # whether Z, Y, X run against the stored axis

    @property
    def pixel_mm2(self) -> float:
        """Area of one coarse pixel of an axial section."""
        return self.voxel_mm[1] * self.voxel_mm[2]

    @property
    def voxel_ml(self) -> float:
        return self.voxel_mm[0] * self.pixel_mm2 / 1000

    @property
    def stored_voxel_mm3(self) -> float:
        """Volume of a voxel of the volume itself; of a single slice its area in mm2 (the slice counts as 1 mm)."""
        return float(np.prod(self.voxel_mm) / np.prod(self.blocks))

    def stored(self, mask_ZYX: np.ndarray) -> np.ndarray:
        """The coarse mask along the stored axes `[s, h, w]`, still coarse."""
        turned = np.flip(mask_ZYX, tuple(np.flatnonzero(self.flips)))
        return np.ascontiguousarray(np.moveaxis(turned, (0, 1, 2), self.axes))

    def on_slice(self, stored_shw: np.ndarray, index: int) -> np.ndarray:
        """Slice `index` of a mask from `stored`, spread over the volume's own pixels."""
        _, height, width = self.shape_SHW
        coarse = stored_shw[index // self.blocks[0]]
        # Pixels within the few rows first, whole rows then: the other way round takes three times as long.
        return coarse.repeat(self.blocks[2], axis=1)[:, :width].repeat(self.blocks[1], axis=0)[:height]


def patient_axes(geometry: Geometry) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]] | None:
    """(stored axis behind Z, Y, X; whether each runs against it), or None for an oblique or unknown orientation.

    Source: direction cosines, DICOM PS3.3 C.7.6.2.1.1; in LPS x rises to the left, y to the back, z to the head.
    Slices are stored by rising position along the normal.
    """
    if not geometry.orientation:
        return None
    row, column = np.asarray(geometry.orientation[:3]), np.asarray(geometry.orientation[3:])
    directions = np.stack([np.cross(row, column), column, row])  # of the stored axes S, H, W
    nearest = np.abs(directions).argmax(axis=1)
    if sorted(nearest) != [0, 1, 2] or np.abs(directions).max(axis=1).min() < NEAREST_AXIS:
        return None
    axes = [int(np.flatnonzero(nearest == axis)[0]) for axis in (2, 1, 0)]
    flips = [bool(directions[stored, axis] < 0) for stored, axis in zip(axes, (2, 1, 0), strict=True)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def coarse_grid(volume_SHW: np.ndarray, spacing_mm: tuple[float, float, float], geometry: Geometry) -> Grid | None:
    """The volume on a grid of about 2 mm; `spacing_mm` along S, H, W. None for an oblique or unknown orientation."""
    turned = patient_axes(geometry)
    if turned is None:
        return None
    axes, flips = turned
    blocks = [min(max(1, round(COARSE_MM / mm)), size) for mm, size in zip(spacing_mm, volume_SHW.shape, strict=True)]
    coarse = _block_means(volume_SHW, blocks)
    along = [mm * block for mm, block in zip(spacing_mm, blocks, strict=True)]
    moved = np.flip(coarse.transpose(axes), tuple(np.flatnonzero(flips)))
    return Grid(
        hu_ZYX=np.ascontiguousarray(moved),
        voxel_mm=(along[axes[0]], along[axes[1]], along[axes[2]]),
        blocks=(blocks[0], blocks[1], blocks[2]),
        shape_SHW=(volume_SHW.shape[0], volume_SHW.shape[1], volume_SHW.shape[2]),
        axes=axes,
        flips=flips,
    )


def clean(slice_HW: np.ndarray) -> np.ndarray:
    """HU with everything that is no measurement (not a number, padding below air) as air."""
    if slice_HW.dtype.kind == "f":
        slice_HW = np.nan_to_num(slice_HW, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
    return np.maximum(slice_HW, AIR_HU)


def _block_means(volume_SHW: np.ndarray, blocks: list[int]) -> np.ndarray:
    """`[s, h, w]` int16, slabs of slices; the last block of an axis repeats its edge where it is short."""
    slices, height, width = volume_SHW.shape
    deep, high, wide = blocks
    short = [(0, -height % high), (0, -width % wide)]
    out = np.empty((-(-slices // deep), -(-height // high), -(-width // wide)), np.int16)

    def fill(index: int) -> None:
        slab = volume_SHW[index * deep : (index + 1) * deep]
        total = np.zeros((out.shape[1], width + short[1][1]), np.float32)
        for each in slab:
            hu = clean(each)
            if short != [(0, 0), (0, 0)]:
                hu = np.pad(hu, short, mode="edge")
            for y in range(high):
                total += hu[y::high]
        mean = sum(total[:, x::wide] for x in range(wide)) / (len(slab) * high * wide)
        out[index] = np.clip(np.rint(mean), AIR_HU, np.iinfo(np.int16).max)

    with ThreadPoolExecutor(MOST_THREADS) as pool:
        list(pool.map(fill, range(len(out))))
    return out
