"""The patient in the scan: body and bone masks, effective and water-equivalent diameter, and which region is shown.

Shapes: Z, Y, X of the coarse grid (`pipelines.measures.grid`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Final

import numpy as np
from scipy import ndimage

from pipelines.measures.grid import AIR_HU, Grid
from pipelines.measures.sections import SECTIONS, by_sections, fill, grow, shrink, sizes_of
from reports.schema import Measurement

TISSUE_HU: Final = -250  # half-way between air and fat, nearer to fat: mattresses and clothes stay out
TABLE_MM: Final = 4.0  # an opening of this radius takes away table tops, and of a chest wall only its thinnest spots
BONE_HU: Final = 200
SKIN_MM: Final = 4.0
BONE_PIECE_ML: Final = 0.5
BORDER_SHARE: Final = 0.03  # of the body's outline at the image border, from which on the patient does not fit in


@dataclass(frozen=True, slots=True)
class Body:
    """Masks on the coarse grid, bool `[Z, Y, X]`."""

    mask: np.ndarray
    bone: np.ndarray
    trunk: np.ndarray  # `mask` with the largest part of each axial section only: no arms beside it
    cut: np.ndarray  # [Z]: whether the trunk reaches beyond the field of view


def find_body(grid: Grid) -> Body | None:
    """The largest connected object, holes filled, without the table; None where nothing is as large as a finger."""
    tissue = grid.hu_ZYX > TISSUE_HU
    # The opening is found on every other pixel: it only has to tell a patient from a table.
    half = np.ascontiguousarray(tissue[:, ::2, ::2])
    steps = max(1, round(TABLE_MM / (grid.voxel_mm[1] + grid.voxel_mm[2])))
    core = largest(grow(shrink(half, steps), steps, within=half))
    if core is None:
        return None
    near = grow(core, 2 * steps)  # and brings those spots back
    near = near.repeat(2, axis=1)[:, : tissue.shape[1]].repeat(2, axis=2)[:, :, : tissue.shape[2]]
    mask = fill(tissue & near)
    if mask.sum() * grid.pixel_mm2 < 100 * len(mask):
        return None
    # Sharp kernels lift the skin to the density of bone.
    below_skin = shrink(mask, max(1, round(SKIN_MM / grid.voxel_mm[1])))
    bone = _without_specks((grid.hu_ZYX >= 0.75 * BONE_HU) & below_skin, BONE_PIECE_ML / grid.voxel_ml)
    trunk = by_sections(_trunk, mask)
    around = 4 * np.sqrt(trunk.sum(axis=(1, 2)))  # pixels of the outline, more or less
    return Body(mask, bone, trunk, (trunk & _border(grid)).sum(axis=(1, 2)) > BORDER_SHARE * around)


def _trunk(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, SECTIONS)
    chosen = np.zeros(count + 1, bool)
    for section, inside in zip(labels, mask, strict=True):
        chosen[sizes_of(section, inside).argmax()] = True
    chosen[0] = False
    return np.asarray(chosen[labels])


def _border(grid: Grid) -> np.ndarray:
    """`[1, Y, X]`: the last pixels of the field of view, a circle where the corners of the images are empty."""
    _, height, width = grid.hu_ZYX.shape
    y, x = np.ogrid[:height, :width]
    if (grid.hu_ZYX[:, [0, 0, -1, -1], [0, -1, 0, -1]] <= AIR_HU).all() and 0.9 < height / width < 1.1:
        radius = np.hypot(y - (height - 1) / 2, (x - (width - 1) / 2) * height / width)
        return (radius > height / 2 - 2)[np.newaxis]
    return ((y == 0) | (y == height - 1) | (x == 0) | (x == width - 1))[np.newaxis]


def largest(mask: np.ndarray) -> np.ndarray | None:
    """The largest connected part (faces touch) of a mask, or None where it is empty."""
    labels, count = ndimage.label(mask)
    if not count:
        return None
    return np.asarray(labels == sizes_of(labels, mask).argmax())


def _without_specks(mask: np.ndarray, least: float) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    members = labels[mask]
    kept = np.zeros_like(mask)
    kept[mask] = np.bincount(members)[members] >= least
    return kept


def circle_mm(area_mm2: np.ndarray) -> np.ndarray:
    """Diameter of the circle of the same area."""
    return 2 * np.sqrt(area_mm2 / pi)


def effective_diameter_mm(grid: Grid, body: Body) -> np.ndarray:
    """`[Z]`: diameter of the circle of the same area as the patient's section (AAPM report 204)."""
    return circle_mm(body.trunk.sum(axis=(1, 2)) * grid.pixel_mm2)


def water_equivalent_diameter_mm(grid: Grid, body: Body) -> np.ndarray:
    """`[Z]`: diameter of the water cylinder that attenuates as much: 2 sqrt((mean HU / 1000 + 1) A / pi).

    Source: AAPM report 220, equation 3, with the region of interest along the body's outline.
    """
    inside = body.trunk
    water = np.sum(grid.hu_ZYX, axis=(1, 2), where=inside, dtype=np.float64) / 1000 + inside.sum(axis=(1, 2))
    return circle_mm(np.maximum(water, 0) * grid.pixel_mm2)


def diameters(grid: Grid, body: Body) -> tuple[Measurement, ...]:
    """Both diameters, mean over the sections that lie wholly within the field of view; nothing where most do not."""
    whole = body.trunk.any(axis=(1, 2)) & ~body.cut
    if whole.sum() <= len(whole) / 2:
        return ()
    return (
        Measurement(
            name="effective diameter",
            value=float(effective_diameter_mm(grid, body)[whole].mean()),
            unit="mm",
            method="2 sqrt(A / pi), A the body's axial section without arms apart (AAPM report 204); mean over the"
            " sections that lie wholly within the field of view",
        ),
        Measurement(
            name="water-equivalent diameter",
            value=float(water_equivalent_diameter_mm(grid, body)[whole].mean()),
            unit="mm",
            method="2 sqrt((mean HU / 1000 + 1) A / pi), A the body's axial section without arms apart (AAPM report"
            " 220); mean over the sections that lie wholly within the field of view",
        ),
    )


def near_bone(body: Body) -> np.ndarray:
    """Where on the coarse grid voxels of `BONE_HU` are bone: the mask and its neighbours."""
    return grow(body.bone) & body.mask


def bone_size(grid: Grid, voxels: int) -> Measurement:
    """Volume of bone in the scanned part; area on a single slice."""
    single = grid.shape_SHW[0] == 1
    one = grid.stored_voxel_mm3 / (100 if single else 1000)
    return Measurement(
        name=f"bone {'area' if single else 'volume'}",
        value=voxels * one,
        unit="cm2" if single else "mL",
        method="voxels of the bone mask times their size",
    )


@dataclass(frozen=True, slots=True)
class RegionVote:
    """Which part of the body the sections look like."""

    region: str | None  # head, chest, abdomen, pelvis, extremity; None when unsure
    share: float  # of the sections that look like it


REGIONS: Final = ("head", "chest", "abdomen", "pelvis", "extremity")
REGION_SHARE: Final = 0.6
REGION_RULE: Final = (
    "share of axial sections that look alike, at least 60%. Chest: lungs over 10% of the body's area. Otherwise only of"
    " sections wholly within the field of view. Head: effective diameter 130 to 220 mm, over half of the area inside a"
    " ring of bone. Extremity: effective diameter under 150 mm, bone over 8% of the area, no ring of bone around more"
    " than a third, no air inside. Pelvis: effective diameter over 180 mm, over 200 mm wide, bone over 6% of the area,"
    " at least half of it in the outer quarters of both sides. Abdomen: effective diameter over 180 mm, bone 0.5 to 6%"
    " of the area, less than 40% of it in the outer quarters, air in less than 10%"
)


def vote_region(grid: Grid, body: Body, lungs_ZYX: np.ndarray) -> RegionVote:
    """Each axial section votes by `REGION_RULE`; fewer than 60% alike: unsure."""
    votes = [_section(grid, body, lungs_ZYX, z) for z in range(len(body.mask))]
    counted = {region: votes.count(region) / len(votes) for region in REGIONS}
    best = max(REGIONS, key=lambda region: counted[region])
    return RegionVote(best if counted[best] >= REGION_SHARE else None, counted[best])


def _section(grid: Grid, body: Body, lungs_ZYX: np.ndarray, z: int) -> str | None:
    mask = body.trunk[z]
    bone = body.bone[z] & mask
    pixels = int(mask.sum())
    if not pixels:
        return None
    if lungs_ZYX[z].sum() >= 0.1 * pixels:
        return "chest"
    if body.cut[z]:
        return None
    diameter = float(circle_mm(np.array(pixels * grid.pixel_mm2)))
    bone_share = bone.sum() / pixels
    columns = np.flatnonzero(mask.any(axis=0))
    wide = (columns[-1] - columns[0] + 1) * grid.voxel_mm[2]
    enclosed = (fill(bone[np.newaxis])[0].sum() - bone.sum()) / pixels
    if 130 <= diameter <= 220 and enclosed > 0.5:
        return "head"
    air = ((grid.hu_ZYX[z] < -400) & mask).sum() / pixels
    if diameter < 150 and bone_share > 0.08 and enclosed < 1 / 3 and air < 0.002:
        return "extremity"
    if diameter < 180:
        return None
    middle, quarter = columns.mean(), len(columns) / 4
    left, right = bone[:, round(middle + quarter) :].sum(), bone[:, : round(middle - quarter) + 1].sum()
    outer = (left + right) / max(bone.sum(), 1)
    if wide > 200 and bone_share > 0.06 and outer >= 0.5 and min(left, right) > 0.15 * bone.sum():
        return "pelvis"
    if 0.005 < bone_share < 0.06 and outer < 0.4 and air < 0.1:
        return "abdomen"
    return None


def region_estimate(vote: RegionVote) -> Measurement:
    """The share of sections behind a region that is sure."""
    return Measurement(name=f"sections like {vote.region}", value=100 * vote.share, unit="%", method=REGION_RULE)
