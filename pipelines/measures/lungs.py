"""Lungs from Hounsfield units: air inside the body without the main airways, left and right told by the geometry.

Found on the coarse grid (`pipelines.measures.grid`); the outline is decided on every voxel. Shapes: Z, Y, X coarse
(towards head, back, left); S, H, W as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

from pipelines.measures.body import Body
from pipelines.measures.grid import Grid
from pipelines.measures.sections import SECTIONS, box_of, fill, grow, shrink, sizes_of, with_neighbours
from reports.measurements import HOUNSFIELD
from reports.schema import Measurement

LUNG_HU: Final = -400  # half-way between lung (about -850) and soft tissue
GAS_HU: Final = -970  # the median of bowel gas lies below, that of lungs above
LUMEN_HU: Final = -800
AIRWAY_MM2: Final = (40.0, 900.0)  # of one axial section through an airway: no smaller bronchi, no lungs
TRACHEA_MM2: Final = (60.0, 700.0)
TRACHEA_RUN_MM: Final = 15.0  # what is a trachea goes on for at least this long
OFF_MIDLINE_MM: Final = 45.0
CLOSING_MM: Final = 8.0
WIDE_MM: Final = 20.0
PIECE_ML, PIECE_CM2 = 10.0, 2.0  # smaller pieces are no lungs
LEAST_ML, MOST_ML = 100.0, 6000.0  # of one lung
LEAST_CM2, MOST_CM2 = 15.0, 350.0  # of one lung on a single slice
RATIO: Final = 4.0  # between the larger and the smaller lung
PLAUSIBLE_HU: Final = (-970.0, -500.0)  # of the median
ONE_SIDED: Final = 0.8  # share of a piece beyond the midline, from which on it belongs to that side
DIVIDE_STEPS: Final = 8
CUT_CM2: Final = 1.0  # lung on the last section
EMPHYSEMA_HU: Final = -950
HIGH_HU: Final = (-600, -250)
SCANNED_PART: Final = "; of the scanned part, as the scan ends inside the lungs"
SIZE_METHOD: Final = "voxels of the lung mask times their size"
LAA_METHOD: Final = "share of both lungs below -950 HU; depends on kernel, slice thickness and noise"
HAA_METHOD: Final = "share of both lungs from -600 to -250 HU; the edges of vessels count too"


class NoLungsError(ValueError):
    """No lungs that could be measured. `code` is the reason; `reports/catalogue` has it in words (`why`)."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Lungs:
    """Both lungs on the coarse grid, bool `[Z, Y, X]`, disjoint."""

    left: np.ndarray
    right: np.ndarray
    airways: np.ndarray
    cut: tuple[str, ...]  # ends of the scan that lie inside the lungs: "top", "bottom"


def find_lungs(grid: Grid, body: Body) -> Lungs:
    """Raises NoLungsError with the reason where there are none, or none that can be trusted."""
    single = len(grid.hu_ZYX) == 1
    air = body.mask & (grid.hu_ZYX < LUNG_HU)
    airways = np.zeros_like(air) if single else find_airways(grid, body)
    pieces = _pieces(grid, air & ~airways, single)
    if not pieces:
        raise NoLungsError("no-lungs")
    if _open_to_the_side(grid, body):
        raise NoLungsError("lungs-beyond-field")
    sections = body.trunk[pieces[0].any(axis=(1, 2))]
    middle = float(np.average(np.arange(air.shape[2]), weights=sections.sum(axis=(0, 1))))
    left, right = _sides(pieces, middle)
    left, right = (_smooth(grid, side, airways) & body.mask for side in (left, right))
    right &= ~left
    _check(grid, left, right, single)
    return Lungs(left, right, airways, () if single else _cut(grid, left | right))


def find_airways(grid: Grid, body: Body) -> np.ndarray:
    """Trachea and main bronchi with their walls: followed from the top, section by section, until they open into
    a lung.

    On a single section a trachea cannot be told from another pocket of air by its course: volumes only.
    """
    found = np.zeros_like(body.mask)
    lumen = body.mask & (grid.hu_ZYX < LUMEN_HU)
    labels, _ = ndimage.label(lumen, SECTIONS)
    areas = sizes_of(labels, lumen) * grid.pixel_mm2
    need = max(2, round(TRACHEA_RUN_MM / grid.voxel_mm[0]))
    for top in range(len(labels) - 1, need - 2, -1):
        for seed in _trachea_like(grid, body, labels, areas, top):
            course = _follow(labels, areas, top, seed)
            if len(course) >= need:
                for z, members in course.items():
                    found[z] = np.isin(labels[z], members)
                return grow(found)
    return found


def _open_to_the_side(grid: Grid, body: Body) -> bool:
    """Whether a section that the field of view cuts has something outside of the body mask as dense and wide as lung:
    wider than cushions and clothes are."""
    hu = grid.hu_ZYX[body.cut]
    like_lung = (hu > -920) & (hu < -500) & ~body.mask[body.cut]
    steps = max(1, round(WIDE_MM / grid.voxel_mm[1]))
    wide = grow(shrink(like_lung, steps), steps)
    return bool((wide.sum(axis=(1, 2)) * grid.pixel_mm2 > 100 * LEAST_CM2).any())


def _trachea_like(grid: Grid, body: Body, labels: np.ndarray, areas: np.ndarray, z: int) -> list[int]:
    """Labels of a section that are round, of a trachea's size and near the middle of the body."""
    columns = np.flatnonzero(body.trunk[z].any(axis=0))
    present = np.flatnonzero(np.bincount(labels[z].ravel()))
    fit = present[(areas[present] >= TRACHEA_MM2[0]) & (areas[present] <= TRACHEA_MM2[1])]
    found = []
    for label in fit:
        ys, xs = np.nonzero(labels[z] == label)
        high, wide = np.ptp(ys) + 1, np.ptp(xs) + 1
        slim = high * grid.voxel_mm[1] / (wide * grid.voxel_mm[2])
        off = abs(xs.mean() - columns.mean()) * grid.voxel_mm[2]
        if 0.4 < slim < 2.5 and len(ys) > 0.5 * high * wide and off < OFF_MIDLINE_MM:
            found.append(int(label))
    return found


def _follow(labels: np.ndarray, areas: np.ndarray, top: int, seed: int) -> dict[int, list[int]]:
    """The labels of an airway by section, downwards from `seed`; a branch ends where it opens into a lung."""
    course = {top: [seed]}
    for z in range(top - 1, -1, -1):
        before = course[z + 1]
        below = np.unique(labels[z][np.isin(labels[z + 1], before)])
        most = min(AIRWAY_MM2[1], 2.5 * max(areas[before]))
        members = [int(label) for label in below if label and AIRWAY_MM2[0] <= areas[label] <= most]
        if not members:
            break
        course[z] = members
    return course


def _pieces(grid: Grid, air: np.ndarray, single: bool) -> list[np.ndarray]:
    """Connected parts of the air that are large enough and denser than gas, each as a mask; the largest first."""
    labels, _ = ndimage.label(air)
    sizes = sizes_of(labels, air)
    least = 100 * PIECE_CM2 / grid.pixel_mm2 if single else PIECE_ML / grid.voxel_ml
    pieces = [labels == label for label in np.argsort(-sizes) if sizes[label] >= least]
    return [piece for piece in pieces if np.median(grid.hu_ZYX[piece]) > GAS_HU]


def _sides(pieces: list[np.ndarray], middle: float) -> tuple[np.ndarray, np.ndarray]:
    """(left, right): each piece by the side of the midline that it lies on; one that spans both is divided."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    largest = pieces[0].sum()
    for piece in pieces:
        columns = piece.sum(axis=(0, 1))
        share = columns[np.arange(len(columns)) > middle].sum() / columns.sum()
        if share >= ONE_SIDED:
            sides[0].append(piece)
        elif share <= 1 - ONE_SIDED:
            sides[1].append(piece)
        elif piece.sum() > largest / 10:  # smaller ones are a trachea
            for side, part in zip(sides, _divide(piece, middle), strict=True):
                side.append(part)
    if not (sides[0] and sides[1]):
        raise NoLungsError("not-two-lungs")
    left, right = (_main(side) for side in sides)
    return left, right


def _main(parts: list[np.ndarray]) -> np.ndarray:
    """The largest part with those that are at least a tenth of it: a lobe apart belongs to a lung, bowel does not."""
    most = max(part.sum() for part in parts)
    return np.logical_or.reduce([part for part in parts if part.sum() >= most / 10])


def _divide(piece: np.ndarray, middle: float) -> tuple[np.ndarray, np.ndarray]:
    """Parts (left, right) two lungs that touch: shrunk until they come apart, then grown back side by side."""
    box = box_of(piece)
    whole = piece[box]
    shrunk = whole
    for steps in range(1, DIVIDE_STEPS + 1):
        shrunk = shrink(shrunk)
        labels, count = ndimage.label(shrunk)
        if count < 2:
            continue
        sizes = sizes_of(labels, shrunk)
        one, other = np.argsort(-sizes)[:2]
        if sizes[other] < 0.15 * whole.sum():
            continue
        centres = [float(np.nonzero(labels == label)[2].mean()) + box[2].start for label in (one, other)]
        if min(centres) < middle < max(centres):
            left, right = (one, other) if centres[0] > centres[1] else (other, one)
            grown = _grow_back(whole, labels == left, labels == right, 2 * steps)
            parts = np.zeros_like(piece), np.zeros_like(piece)
            parts[0][box], parts[1][box] = grown
            return parts
    raise NoLungsError("lungs-not-divided")


def _grow_back(whole: np.ndarray, left: np.ndarray, right: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(steps):
        left = grow(left, within=whole & ~right)
        right = grow(right, within=whole & ~left)
    return left, right


def _smooth(grid: Grid, lung: np.ndarray, airways: np.ndarray) -> np.ndarray:
    """Closes vessels and fills what a lung encloses within each section."""
    steps = max(1, round(CLOSING_MM / grid.voxel_mm[1]))
    box = box_of(lung)
    crop = np.pad(lung[box], ((0, 0), (steps, steps), (steps, steps)))
    crop = fill(shrink(grow(crop, steps), steps))[:, steps:-steps, steps:-steps]
    out = np.zeros_like(lung)
    out[box] = crop
    return out & ~airways


def _check(grid: Grid, left: np.ndarray, right: np.ndarray, single: bool) -> None:
    """Raises NoLungsError where the masks do not look like two lungs."""
    unit = grid.pixel_mm2 / 100 if single else grid.voxel_ml
    least, most = (LEAST_CM2, MOST_CM2) if single else (LEAST_ML, MOST_ML)
    small, large = sorted((left.sum() * unit, right.sum() * unit))
    if small < least or large > most or large > RATIO * small:
        raise NoLungsError("lungs-of-odd-size")
    if not PLAUSIBLE_HU[0] <= np.median(grid.hu_ZYX[left | right]) <= PLAUSIBLE_HU[1]:
        raise NoLungsError("lungs-of-odd-density")


def _cut(grid: Grid, lungs: np.ndarray) -> tuple[str, ...]:
    areas = lungs.sum(axis=(1, 2)) * grid.pixel_mm2 / 100
    return tuple(end for end, area in (("top", areas[-1]), ("bottom", areas[0])) if area >= CUT_CM2)


class Outline:
    """Lungs on every voxel: the coarse masks with their surface where the HU cross the threshold."""

    def __init__(self, grid: Grid, lungs: Lungs) -> None:
        # Along axes that were not made coarser there is nothing to refine.
        axes = [axis for axis, block in enumerate(grid.blocks) if block > 1]
        self._grid = grid
        airways = grid.stored(lungs.airways)
        masks = [grid.stored(side) for side in (lungs.left, lungs.right)]
        self._cores = [~with_neighbours(~mask, axes) for mask in masks]
        self._hulls = [with_neighbours(mask, axes) & ~airways for mask in masks]

    def on_slice(self, index: int, hu_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(left, right) on slice `index`, whose HU are `hu_HW`."""
        low = hu_HW < LUNG_HU
        left, right = (
            self._grid.on_slice(core, index) | (self._grid.on_slice(hull, index) & low)
            for core, hull in zip(self._cores, self._hulls, strict=True)
        )
        return left, right & ~left


@dataclass(slots=True)
class Tally:
    """Adds up the figures of a lung, slice by slice."""

    size: int = 0
    total: float = 0.0
    below: int = 0
    high: int = 0

    def add(self, hu: np.ndarray) -> None:
        """`hu`: the values of some voxels, 1-d."""
        self.size += hu.size
        self.total += float(hu.sum(dtype=np.float64))
        self.below += int(np.count_nonzero(hu < EMPHYSEMA_HU))
        self.high += int(np.count_nonzero((hu >= HIGH_HU[0]) & (hu <= HIGH_HU[1])))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.size + other.size, self.total + other.total, self.below + other.below, self.high + other.high)


def lung_figures(grid: Grid, left: Tally, right: Tally, *, cut: bool) -> list[Measurement]:
    """Sizes of both lungs and densitometry of the two together; areas on a single slice.

    LAA-950: Gevenois et al., AJRCCM 1996. High-attenuation area: Lederer et al., AJRCCM 2009.
    """
    both = left + right
    single = grid.shape_SHW[0] == 1
    sized, unit = ("area", "cm2") if single else ("volume", "mL")
    one = grid.stored_voxel_mm3 / (100 if single else 1000)
    part = SCANNED_PART if cut else ""
    return [
        Measurement(name=f"{name} {sized}", value=tally.size * one, unit=unit, method=f"{SIZE_METHOD}{part}")
        for name, tally in (("left lung", left), ("right lung", right), ("lung", both))
    ] + [
        Measurement(name=name, value=value / both.size, unit=unit, method=f"{method}{part}")
        for name, value, unit, method in (
            ("mean lung density", both.total, HOUNSFIELD, "mean over both lungs"),
            ("LAA-950", 100.0 * both.below, "%", LAA_METHOD),
            ("high-attenuation area", 100.0 * both.high, "%", HAA_METHOD),
        )
    ]
