"""One CT series: its files decoded side by side, put in order along the slice normal, checked, stacked.

Quality flags that a study can carry:

    missing-slices            gaps of whole multiples of the usual spacing
    irregular-spacing         slices at uneven distances
    missing-geometry          no usable position or orientation: ordered by instance number instead
    gantry-tilt               slices sheared against their normal
    duplicate-slices          copies at the same position were left out
    unreadable-slices         files of the series could not be read and were left out
    mixed-orientation         slices of another orientation were left out
    padding-masked            pixels outside the scanned field were set to -1024 HU
    lossy-compression         the pixels went through lossy compression
    coarse-hu                 neighbouring stored values are more than 4 HU apart
    unspecified-rescale-type  the header does not name HU as the unit; original slices are taken as HU
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from pipelines.ingest.dicom import MAX_VOXELS, Direction, Slice, load_slices, read_header_json
from pipelines.ingest.files import FileRef
from pipelines.ingest.refusals import Refusal, rejected, rejection
from pipelines.study import Geometry, ImageStudy, Rejection, content_key
from reports.dicom_source import DicomSource

WORKERS: Final = min(4, os.cpu_count() or 1)
SAME_PLACE_MM: Final = 0.01
REGULAR_MM: Final = 0.05  # headers round positions; a scanner's own jitter stays below this


def load_series(files: Sequence[FileRef], name: str) -> ImageStudy:
    """Decode and stack one series: `[S, H, W]` HU, slices by rising position along the normal (feet to head for
    axial slices). Files that cannot be read stand in `rejected_sources`. Raises Refusal where none can."""
    with ThreadPoolExecutor(WORKERS) as pool:
        outcomes = list(pool.map(_read, files))
    slices = [s for outcome in outcomes if isinstance(outcome, list) for s in outcome]
    unread = tuple(outcome for outcome in outcomes if isinstance(outcome, Rejection))
    if not slices:
        raise Refusal(unread[0].code, unread[0].reason)
    if sum(s.pixels.size for s in slices) > MAX_VOXELS:
        raise Refusal("too-large", f"The series has more than {MAX_VOXELS:,} voxels.")

    stack = _stack(slices)
    first = stack.slices[0]
    dtype = np.result_type(*{s.pixels.dtype for s in stack.slices})
    flags = stack.flags.union(*(s.flags for s in stack.slices))
    if unread:
        flags |= {"unreadable-slices"}
    return ImageStudy(
        key=content_key(s.source for s in stack.slices),
        name=name,
        units="HU",
        pixels=np.stack([s.pixels for s in stack.slices], dtype=dtype),
        sources=tuple(s.source for s in stack.slices),
        geometry=stack.geometry,
        window=first.about.window,
        study_uid=first.about.study_uid,
        series_uid=first.about.series_uid,
        kernel=first.about.kernel,
        contrast_agent=first.about.contrast_agent,
        body_part=first.about.body_part,
        identifiers={"accession": first.about.accession} if first.about.accession else {},
        dicom=DicomSource(
            header=read_header_json(next(ref for ref in files if ref.name == first.source.path)),
            instances=tuple(s.instance for s in stack.slices),
            orientation=stack.geometry.orientation,
        ),
        quality_flags=tuple(sorted(flags)),
        rejected_sources=unread + stack.dropped,
    )


@dataclass(frozen=True, slots=True)
class _Stack:
    slices: list[Slice]  # in order
    geometry: Geometry
    flags: frozenset[str]
    dropped: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    depth: float  # mm along the normal
    slice: Slice


def _read(ref: FileRef) -> list[Slice] | Rejection:
    try:
        return load_slices(ref)
    except Exception as error:  # one broken file must not take the series with it
        return rejected(ref.name, error)


def _stack(slices: list[Slice]) -> _Stack:
    slices, dropped = _same_orientation(slices)
    flags = {rejection.code for rejection in dropped}
    orientation = slices[0].orientation
    normal = _normal(orientation)
    placed = [_Placed(float(np.dot(normal, s.position)), s) for s in slices if s.position and normal is not None]
    if len(placed) < len(slices):
        ordered = sorted(slices, key=lambda s: s.order)
        geometry = Geometry(spacing_mm=slices[0].spacing, slice_thickness_mm=slices[0].thickness)
        return _Stack(ordered, geometry, frozenset(flags | {"missing-geometry"}), dropped)

    placed, copies = _without_copies(sorted(placed, key=lambda p: (p.depth, p.slice.order)))
    if copies:
        flags.add("duplicate-slices")
    positions = tuple(p.slice.position for p in placed if p.slice.position)
    spacing = None
    if len(placed) > 1:
        spacing, spacing_flags = _spacing(np.diff([p.depth for p in placed]))
        flags |= spacing_flags
        run = np.subtract(positions[-1], positions[0])
        along = placed[-1].depth - placed[0].depth
        if np.linalg.norm(run) > along * 1.0002:  # a shear of more than about one degree
            flags.add("gantry-tilt")
    ordered = [p.slice for p in placed]
    geometry = Geometry(
        spacing_mm=ordered[0].spacing,
        orientation=orientation,
        positions_mm=positions,
        slice_spacing_mm=spacing,
        slice_thickness_mm=ordered[0].thickness,
    )
    return _Stack(ordered, geometry, frozenset(flags), dropped + copies)


def _same_orientation(slices: list[Slice]) -> tuple[list[Slice], tuple[Rejection, ...]]:
    """Frames of one file can differ in orientation; keep the most frequent one."""
    keys = [s.orientation and tuple(round(v, 2) + 0.0 for v in s.orientation) for s in slices]
    usual = Counter(keys).most_common(1)[0][0]
    others = {s.source.path: s for s, key in zip(slices, keys, strict=True) if key != usual}
    reason = "It holds slices of another orientation than most of the series."
    return (
        [s for s, key in zip(slices, keys, strict=True) if key == usual],
        tuple(rejection(path, "mixed-orientation", reason) for path in others),
    )


def _without_copies(placed: list[_Placed]) -> tuple[list[_Placed], tuple[Rejection, ...]]:
    """Of slices (sorted by depth) at one place keep one: lossless before lossy, then the first by number."""
    places: list[list[_Placed]] = []
    for p in placed:
        if places and p.depth - places[-1][0].depth < SAME_PLACE_MM:
            places[-1].append(p)
        else:
            places.append([p])
    kept = []
    copies: dict[str, Rejection] = {}
    for place in places:
        best, *others = sorted(place, key=lambda p: (p.slice.lossy, p.slice.order, p.slice.source.path))
        kept.append(best)
        for other in others:
            path = other.slice.source.path
            copies[path] = rejection(path, "duplicate-slice", "Another slice of its series lies at the same position.")
    return kept, tuple(copies.values())


def _spacing(steps: np.ndarray) -> tuple[float | None, set[str]]:
    """(mm between slices, flags); None when the distances differ."""
    usual = float(np.median(steps))
    if np.all(np.abs(steps - usual) < max(REGULAR_MM, 0.01 * usual)):
        return float(np.mean(steps)), set()
    multiples = steps / usual
    if np.all(np.abs(multiples - np.round(multiples)) < 0.1) and multiples.min() > 0.5:
        return None, {"missing-slices"}
    return None, {"irregular-spacing"}


def _normal(orientation: Direction | None) -> np.ndarray | None:
    """Unit normal of the slice plane, or None where the direction cosines make no plane."""
    if orientation is None:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    return normal / length if 0.9 < length < 1.1 else None
