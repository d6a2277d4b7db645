"""All measurements of a whole CT study: masks are found on a coarse grid, then one pass over the slices.

scipy is imported when a study in HU is really measured: photos do not pay for it (0.2 s).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from pipelines.measures.grid import MOST_THREADS, Grid, clean, coarse_grid
from pipelines.measures.quality import NOISY_HU, noise, thickness_flags
from pipelines.study import ImageStudy
from reports.schema import Code, Measurement, NotAssessed, Segment
from reports.taxonomy import UNDETERMINED

if TYPE_CHECKING:
    from pipelines.measures.body import Body
    from pipelines.measures.lungs import Lungs, Tally

BODY_TRUNCATED, LUNGS_INCOMPLETE, NOISY = "body-truncated", "lungs-incomplete", "densitometry-noisy"

_BODY = Segment(
    id="body",
    title="Body",
    code=Code(value="38266002", scheme="SCT", meaning="Entire body"),
    method="tissue above -250 HU, largest connected part, table removed by opening, holes filled in each section",
)
_BONE = Segment(
    id="bone",
    title="Bone",
    code=Code(value="272673000", scheme="SCT", meaning="Bone"),
    method="at least 200 HU in the body, parts under 0.5 mL left out; contrast medium of that density counts too",
)
_LUNG_METHOD: Final = (
    "air in the body below -400 HU without trachea and main bronchi, vessels closed with a radius of 8 mm; the side by"
    " the direction cosines"
)
_LEFT = Segment(
    id="lung-left",
    title="Left lung",
    code=Code(value="44029006", scheme="SCT", meaning="Left lung"),
    method=_LUNG_METHOD,
)
_RIGHT = Segment(
    id="lung-right",
    title="Right lung",
    code=Code(value="3341006", scheme="SCT", meaning="Right lung"),
    method=_LUNG_METHOD,
)


@dataclass(frozen=True, slots=True)
class StudyMeasures:
    """Measurements of a study, with the masks that they were made in (by `Segment.id`: bool `[S, H, W]`)."""

    measurements: tuple[Measurement, ...] = ()
    segments: tuple[Segment, ...] = ()
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    region: str | None = None  # head, chest, abdomen, pelvis, extremity; None when unsure
    not_assessed: tuple[NotAssessed, ...] = ()
    quality_flags: tuple[str, ...] = ()


NOT_MEASURED: Final = StudyMeasures()

# What the model may call the region that the geometry shows. Bones are everywhere, and kidneys lie in the abdomen.
_REGIONS: Final = {
    "head": {"head-and-neck"},
    "chest": {"chest"},
    "abdomen": {"abdomen", "pelvis-and-urinary"},
    "pelvis": {"pelvis-and-urinary", "abdomen"},
    "extremity": set[str](),
}


def region_fits(estimate: str, read: str) -> bool:
    """Whether the region that the model read can be the one estimated from HU and geometry."""
    return read in _REGIONS[estimate] | {"musculoskeletal", UNDETERMINED}


def measure_study(study: ImageStudy) -> StudyMeasures:
    """Everything that can be measured of a study in HU; of any other study nothing.

    A volume needs an even slice distance; a single slice gives areas. docs/measurements.md has the methods' sources.
    """
    if study.units != "HU":
        return NOT_MEASURED
    geometry, single = study.geometry, len(study.pixels) == 1
    flags = thickness_flags(geometry)
    between = geometry.slice_spacing_mm or (1.0 if single else None)
    if not geometry.spacing_mm:
        return _nothing("no-pixel-size", flags)
    if not between:
        return _nothing("uneven-slices", flags)
    grid = coarse_grid(study.pixels, (between, *geometry.spacing_mm), geometry)
    if grid is None:
        return _nothing("unknown-orientation", flags)
    if single and grid.axes[0] != 0:
        return _nothing("not-axial", flags)
    from pipelines.measures.body import find_body
    from pipelines.measures.lungs import NoLungsError, find_lungs

    body = find_body(grid)
    if body is None:
        return _nothing("no-body", flags)
    lungs, missing = None, []
    try:
        lungs = find_lungs(grid, body)
    except NoLungsError as error:
        missing.append(NotAssessed.of("lungs", why=error.code))
    return _measure(study, grid, body, lungs, StudyMeasures(not_assessed=tuple(missing), quality_flags=flags))


def _nothing(why: str, flags: tuple[str, ...]) -> StudyMeasures:
    return StudyMeasures(not_assessed=(NotAssessed.of("body-and-lungs", why=why),), quality_flags=flags)


def _measure(study: ImageStudy, grid: Grid, body: Body, lungs: Lungs | None, so_far: StudyMeasures) -> StudyMeasures:
    from pipelines.measures.body import bone_size, diameters, region_estimate, vote_region
    from pipelines.measures.lungs import lung_figures

    spacing = study.geometry.spacing_mm or (1.0, 1.0)
    not_assessed, flags = list(so_far.not_assessed), list(so_far.quality_flags)
    found = list(diameters(grid, body))
    if not found:
        flags.append(BODY_TRUNCATED)
        not_assessed.append(NotAssessed.of("diameters"))
    vote = vote_region(grid, body, lungs.left | lungs.right if lungs else np.zeros_like(body.mask))
    if vote.region:
        found.append(region_estimate(vote))
    with ThreadPoolExecutor(1) as beside:
        noise_to_come = beside.submit(noise, study.pixels, spacing, grid, body.mask)
        masks, tallies = _masks(study.pixels, grid, body, lungs)
    found.append(bone_size(grid, int(np.count_nonzero(masks[_BONE.id]))))
    noise_figure = noise_to_come.result()
    if noise_figure:
        found.append(noise_figure)
    segments = [_BODY, _BONE]
    if lungs:
        segments += [_LEFT, _RIGHT]
        found += lung_figures(grid, *tallies, cut=bool(lungs.cut))
        flags += [LUNGS_INCOMPLETE] if lungs.cut else []
        flags += [NOISY] if noise_figure and noise_figure.value > NOISY_HU else []
    return StudyMeasures(
        measurements=tuple(found),
        segments=tuple(segments),
        masks=masks,
        region=vote.region,
        not_assessed=tuple(not_assessed),
        quality_flags=tuple(flags),
    )


def _masks(
    volume_SHW: np.ndarray, grid: Grid, body: Body, lungs: Lungs | None
) -> tuple[dict[str, np.ndarray], tuple[Tally, Tally]]:
    """The masks on every voxel, by segment id, and the tallies of the left and the right lung."""
    from pipelines.measures.body import BONE_HU, near_bone
    from pipelines.measures.lungs import Outline, Tally

    wanted = [_BODY.id, _BONE.id, *((_LEFT.id, _RIGHT.id) if lungs else ())]
    masks = {name: np.empty(volume_SHW.shape, bool) for name in wanted}
    outline = Outline(grid, lungs) if lungs else None
    inside, bone = grid.stored(body.mask), grid.stored(near_bone(body))
    tallies = Tally(), Tally()

    def fill(index: int) -> list[np.ndarray]:
        """The masks of one slice; the HU of its voxels in either lung."""
        hu = clean(volume_SHW[index])
        masks[_BODY.id][index] = grid.on_slice(inside, index)
        masks[_BONE.id][index] = grid.on_slice(bone, index) & (hu >= BONE_HU)
        sides = outline.on_slice(index, hu) if outline else ()
        for name, mask in zip((_LEFT.id, _RIGHT.id), sides, strict=False):  # none without lungs
            masks[name][index] = mask
        return [hu[mask] for mask in sides]

    with ThreadPoolExecutor(MOST_THREADS) as pool:
        for values in pool.map(fill, range(len(volume_SHW))):
            for tally, hu in zip(tallies, values, strict=False):
                tally.add(hu)
    return masks, tallies
