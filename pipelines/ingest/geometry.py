"""Frames of one series into stacks, by their positions along the slice normal: never by file name, and by number only
where there are no positions.  Works on headers; no pixels are needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from pipelines.ingest.dicom import PHASES, Direction, Header, Plane
from pipelines.ingest.refusals import rejection
from pipelines.study import Geometry, Rejection

SAME_PLACE_MM: Final = 0.01
REGULAR_MM: Final = 0.06  # headers round positions to 0.1 mm at worst; a scanner's own jitter stays below this
TILT: Final = 0.02  # mm sideways for each mm along the normal: a shear of about one degree
SAME_DIRECTION: Final = 0.01  # between direction cosines: about half a degree

Verdict = Literal["volume", "slices", "refused"]


@dataclass(frozen=True, slots=True)
class FrameOf:
    """One frame of one file."""

    header: Header
    index: int

    @property
    def plane(self) -> Plane:
        return self.header.planes[self.index]

    @property
    def order(self) -> tuple[float, float, int]:
        """Acquisition, instance and frame number."""
        return (*self.header.order, self.index)


@dataclass(frozen=True, slots=True)
class Stack:
    """Frames in their order, and whether they make a volume."""

    frames: tuple[FrameOf, ...]
    geometry: Geometry
    verdict: Verdict
    code: str | None  # why it is no volume
    reason: str
    flags: frozenset[str]
    dropped: tuple[Rejection, ...] = ()  # further slices at a place that is taken


def split(headers: Iterable[Header]) -> list[tuple[FrameOf, ...]]:
    """The frames of one series, apart where they cannot lie on top of each other: by size, plane and spacing, by kind
    and, where several lie at one place, by what tells time points and reconstructions apart."""
    frames = [FrameOf(header, index) for header in headers for index in range(len(header.planes))]
    planes = _Directions()
    groups: dict[Hashable, list[FrameOf]] = defaultdict(list)
    for frame in frames:
        layout, plane = frame.header.layout, frame.plane
        assert layout is not None
        spacing = plane.spacing and tuple(round(mm, 3) for mm in plane.spacing)
        kind, reference = frame.header.kind, frame.header.frame_of_reference
        groups[layout.rows, layout.columns, spacing, kind, reference, planes.number(plane.orientation)].append(frame)
    radial = len(groups) > max(3, len(frames) // 3)  # each frame in a plane of its own: nothing to stack
    return [tuple(frames)] if radial else [part for group in groups.values() for part in _phases(group)]


def arrange(frames: Sequence[FrameOf]) -> Stack:
    """Put the frames of one part in order and say whether they make a volume: `slices` are never made to look like one.

    Rising position along the normal: feet to head for axial slices.
    """
    orientation, size_of_pixels = frames[0].plane.orientation, frames[0].plane.spacing
    normal = _normal(orientation)
    if not all(_same_direction(frame.plane.orientation, orientation, 2 * SAME_DIRECTION) for frame in frames):
        return _numbered(frames, "mixed-orientation", "The slices lie in different planes.")
    if normal is None or any(frame.plane.position is None for frame in frames):
        return _numbered(
            frames, "missing-geometry", "The files give no usable position: slices are in their numbers' order."
        )
    places = sorted(((_depth(normal, frame), frame) for frame in frames), key=lambda pair: (pair[0], pair[1].order))
    places, dropped = _without_copies(places)
    depths = np.array([depth for depth, _ in places])
    ordered = tuple(frame for _, frame in places)
    positions = tuple(frame.plane.position for frame in ordered if frame.plane.position)
    code, reason, spacing, flags = _gate(depths, np.array(positions))
    if size_of_pixels is None and code is None:
        code, reason = "missing-geometry", "The files do not give the size of their pixels."
    flags |= {code} if code and code != "single-slice" else set()
    flags |= {"duplicate-slices"} if dropped else set()
    geometry = Geometry(
        spacing_mm=size_of_pixels,
        orientation=orientation,
        positions_mm=positions,
        slice_spacing_mm=spacing,
        slice_thickness_mm=ordered[0].plane.thickness,
    )
    return Stack(ordered, geometry, "slices" if code else "volume", code, reason, frozenset(flags), dropped)


def _gate(depths: np.ndarray, positions: np.ndarray) -> tuple[str | None, str, float | None, set[str]]:
    """(code of what forbids a volume, reason, mm between slices along the normal or None, further flags)."""
    count = len(depths)
    if count == 1:
        return "single-slice", "There is one slice.", None, set()
    steps = np.diff(depths)
    usual = float(np.median(steps))
    mean = float(depths[-1] - depths[0]) / (count - 1)
    even = depths[0] + mean * np.arange(count)
    if mean <= 0 or np.abs(depths - even).max() > max(REGULAR_MM, 0.02 * mean):
        multiples = steps / usual if usual > 0 else np.zeros(1)
        if np.all(np.abs(multiples - np.round(multiples)) < 0.1) and multiples.min() > 0.5:
            lost = int(np.round(multiples).sum()) - count + 1
            return "missing-slices", f"Slices are missing: the gaps have room for {lost:,} more.", None, set()
        low, high = float(steps.min()), float(steps.max())
        return "irregular-spacing", f"The slices lie {low:.2f} to {high:.2f} mm apart.", None, set()
    run = (positions[-1] - positions[0]) / (count - 1)
    if np.linalg.norm(positions - (positions[0] + run * np.arange(count)[:, None]), axis=1).max() > max(
        1.0, 0.1 * mean
    ):
        return "irregular-spacing", "The slices are shifted against each other.", mean, set()
    sideways = float(np.sqrt(max(run @ run - mean * mean, 0.0)))
    if sideways > TILT * mean:
        degrees = np.degrees(np.arctan2(sideways, mean))
        return "gantry-tilt", f"The slices are sheared by {degrees:.1f} degrees against their normal.", mean, set()
    return None, f"{count:,} slices {mean:.2f} mm apart: a volume.", mean, set()


def _numbered(frames: Sequence[FrameOf], code: str, reason: str) -> Stack:
    """Frames without a common place, by acquisition and instance number."""
    ordered = tuple(sorted(frames, key=lambda frame: frame.order))
    plane = ordered[0].plane
    geometry = Geometry(spacing_mm=plane.spacing, slice_thickness_mm=plane.thickness)
    return Stack(ordered, geometry, "slices", code, reason, frozenset({code}))


def _phases(frames: list[FrameOf]) -> list[tuple[FrameOf, ...]]:
    """One stack, or several where each place holds one frame of each of several time points or reconstructions."""
    most = _most_at_one_place(frames)
    if most == 1:
        return [tuple(frames)]
    for phase in range(len(PHASES)):
        groups: dict[str, list[FrameOf]] = defaultdict(list)
        for frame in frames:
            groups[frame.plane.phases[phase]].append(frame)
        # A time that differs from slice to slice makes more groups than there are frames at any place.
        if 1 < len(groups) <= most and all(_most_at_one_place(group) == 1 for group in groups.values()):
            return [tuple(group) for group in groups.values()]
    return [tuple(frames)]


def _most_at_one_place(frames: Iterable[FrameOf]) -> int:
    """How many frames share their place at most; copies of one instance count once, frames without a place not."""
    places: dict[Hashable, set[Hashable]] = defaultdict(set)
    for number, frame in enumerate(frames):
        position, uid = frame.plane.position, frame.header.instance.sop_instance_uid
        place: Hashable = position and tuple(round(mm / SAME_PLACE_MM) for mm in position)
        places[place or number].add((uid, frame.index) if uid else number)
    return max(map(len, places.values()))


def _without_copies(places: list[tuple[float, FrameOf]]) -> tuple[list[tuple[float, FrameOf]], tuple[Rejection, ...]]:
    """Of frames (sorted by depth) at one place keep one: lossless before lossy, then the first by number."""
    groups: list[list[tuple[float, FrameOf]]] = []
    for place in places:
        if (
            groups
            and place[0] - groups[-1][0][0] < SAME_PLACE_MM
            and _apart(place[1], groups[-1][0][1]) < SAME_PLACE_MM
        ):
            groups[-1].append(place)
        else:
            groups.append([place])
    kept, copies = [], {}
    for group in groups:
        best, *others = sorted(group, key=lambda pair: (pair[1].header.lossy, pair[1].order, pair[1].header.ref.name))
        kept.append(best)
        for _, other in others:
            same = other.header.instance.sop_instance_uid == best[1].header.instance.sop_instance_uid != ""
            what = "The same instance with other content" if same else "Another slice of its series"
            path = other.header.ref.name
            copies[path] = rejection(path, "duplicate-slice", f"{what} lies at the same position.")
    return kept, tuple(copies.values())


def _apart(one: FrameOf, other: FrameOf) -> float:
    return float(np.linalg.norm(np.subtract(one.plane.position or 0, other.plane.position or 0)))


def _depth(normal: np.ndarray, frame: FrameOf) -> float:
    """mm along the normal."""
    return float(np.dot(normal, frame.plane.position or (0, 0, 0)))


def _normal(orientation: Direction | None) -> np.ndarray | None:
    """Unit normal of the slice plane, or None where the direction cosines make no plane."""
    if orientation is None:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    return normal / length if 0.9 < length < 1.1 else None


class _Directions:
    """Numbers for plane orientations; those within rounding of each other share one."""

    def __init__(self) -> None:
        self._numbers: dict[Direction | None, int] = {}
        self._first: list[Direction | None] = []

    def number(self, orientation: Direction | None) -> int:
        if orientation not in self._numbers:
            self._numbers[orientation] = next(
                (n for n, first in enumerate(self._first) if _same_direction(orientation, first)), len(self._first)
            )
            if self._numbers[orientation] == len(self._first):
                self._first.append(orientation)
        return self._numbers[orientation]


def _same_direction(one: Direction | None, other: Direction | None, tolerance: float = SAME_DIRECTION) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or max(abs(a - b) for a, b in zip(one, other, strict=True)) < tolerance
