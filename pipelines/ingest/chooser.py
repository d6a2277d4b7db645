"""The series chooser: headers to series, each with a verdict (volume, slices, refused), a score and its reasons."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Final

import numpy as np

from pipelines.ingest.dicom import Header
from pipelines.ingest.files import FileRef, PassedOver
from pipelines.ingest.geometry import FrameOf, Stack, arrange, split
from pipelines.ingest.refusals import rejection
from pipelines.ingest.units import SeriesVerdict, Unit
from pipelines.study import Rejection

# The score adds up to 100. A volume of thin, original, axial slices serves a reader best.
VERDICT_POINTS: Final = {"volume": 40, "slices": 10}
KIND_POINTS: Final = {"original": 25, "reformatted": 10, "derived": 5}
AXIAL_POINTS: Final = 10
COUNT_POINTS: Final = 10  # from 40 slices on
THIN_POINTS: Final = ((1.5, 10), (3.0, 7), (5.0, 4))  # mm, points
LOSSLESS_POINTS: Final = 5
AXIAL: Final = 0.8  # cosine between the normal and the body's long axis


@dataclass(frozen=True, slots=True)
class Chosen:
    """The series of a run, and the files that are not used."""

    series: tuple[SeriesVerdict, ...]
    rejections: tuple[Rejection, ...]
    passed_over: tuple[PassedOver, ...]


def choose(headers: Iterable[Header]) -> Chosen:
    """Group headers by study and series, put each series in order and judge it. Order: by first file met."""
    series: dict[tuple[str, ...], list[Header]] = defaultdict(list)
    for header in headers:
        series[header.series].append(header)
    verdicts: list[SeriesVerdict] = []
    rejections: list[Rejection] = []
    passed_over: list[PassedOver] = []
    for members in series.values():
        readable, copies = _without_copies([header for header in members if header.fault is None])
        passed_over += copies
        parts = split(readable)
        for number, frames in enumerate(parts, 1):
            stack = arrange(frames)
            verdicts.append(_judge(stack, _unit(frames, stack, number, len(parts)), number, frames[0].header))
            rejections += stack.dropped
        faulty: dict[str, list[Header]] = defaultdict(list)
        for header in members:
            if header.fault is not None:
                faulty[header.fault[0]].append(header)
                rejections.append(rejection(header.ref.name, *header.fault))
        verdicts += [_refuse(group, len(parts) + number) for number, group in enumerate(faulty.values(), 1)]
    return Chosen(tuple(_prefer(verdicts)), tuple(rejections), tuple(passed_over))


def _without_copies(headers: list[Header]) -> tuple[list[Header], list[PassedOver]]:
    """Byte-identical copies of an instance are the same instance: the first by number and name stays."""
    groups: dict[object, list[Header]] = defaultdict(list)
    for number, header in enumerate(headers):
        uid = header.instance.sop_instance_uid
        groups[uid or (header.order, header.planes[0].position) if uid or header.planes[0].position else number].append(
            header
        )
    kept, copies = [], []
    for group in groups.values():
        first: dict[str, Header] = {}
        for header in group:
            if len(group) == 1 or (same := first.setdefault(_digest(header.ref), header)) is header:
                kept.append(header)
            else:
                copies.append(PassedOver(header.ref.name, f"a copy of {same.ref.name}, byte for byte"))
    return kept, copies


def _digest(ref: FileRef) -> str:
    try:
        return ref.sha256()
    except Exception:  # what is wrong with the file is for `load` to say
        return ref.name


def _unit(frames: Sequence[FrameOf], stack: Stack, part: int, parts: int) -> Unit:
    """The unit of one part: the files of its slices in order, then those that share a place with one."""
    taken: dict[FileRef, list[int]] = {}
    headers: dict[FileRef, Header] = {}
    for frame in (*stack.frames, *frames):
        indices = taken.setdefault(frame.header.ref, [])
        headers[frame.header.ref] = frame.header
        if frame.index not in indices:
            indices.append(frame.index)
    every = all(len(indices) == len(headers[ref].planes) for ref, indices in taken.items())
    files = tuple(taken)
    number = frames[0].header.series_number
    name = f"series {number}" if number else PurePath(files[0].parent).name or "series"
    name = files[0].basename if len(files) == 1 else name
    return Unit(
        name if parts == 1 else f"{name} part {part}",
        "series",
        files,
        frames=None if every else tuple(tuple(sorted(indices)) for indices in taken.values()),
        part=part,
    )


def _judge(stack: Stack, unit: Unit, part: int, header: Header) -> SeriesVerdict:
    layout, geometry = header.layout, stack.geometry
    assert layout is not None
    words = ["Original slices" if header.kind == "original" else f"{header.kind.capitalize()} images"]
    points = VERDICT_POINTS[stack.verdict] + KIND_POINTS.get(header.kind, 0)
    if geometry.orientation is not None:
        axial = abs(np.cross(geometry.orientation[:3], geometry.orientation[3:])[2]) > AXIAL
        words.append("axial" if axial else "not axial")
        points += AXIAL_POINTS * axial
    thickness = geometry.slice_thickness_mm
    if thickness is not None:
        words.append(f"{thickness:g} mm thick")
        points += next((extra for limit, extra in THIN_POINTS if thickness <= limit), 0)
    if header.contrast:
        words.append(header.contrast)
    lossy = any(frame.header.lossy for frame in stack.frames)
    if lossy:
        words.append("lossy compression")
    points += LOSSLESS_POINTS * (not lossy) + min(COUNT_POINTS, len(stack.frames) * COUNT_POINTS // 40)
    flags = stack.flags.union(*(frame.header.flags for frame in stack.frames))
    return SeriesVerdict(
        study_uid=header.study_uid,
        series_uid=header.series_uid,
        part=part,
        kind=header.kind,
        verdict=stack.verdict,
        code=stack.code,
        reason=f"{stack.reason} {', '.join(words)}.",
        score=int(points),
        preferred=False,
        files=tuple(dict.fromkeys(frame.header.ref.name for frame in stack.frames)),
        shape=(len(stack.frames), layout.rows, layout.columns),
        spacing_mm=(geometry.slice_spacing_mm, *(geometry.spacing_mm or (None, None))),
        contrast=header.contrast,
        flags=tuple(sorted(flags | ({"lossy-compression"} if lossy else set()))),
        unit=unit,
    )


def _refuse(headers: list[Header], part: int) -> SeriesVerdict:
    (code, reason), _ = Counter(header.fault for header in headers if header.fault).most_common(1)[0]
    first = headers[0]
    return SeriesVerdict(
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        part=part,
        kind=first.kind,
        verdict="refused",
        code=code,
        reason=reason,
        score=0,
        preferred=False,
        files=tuple(header.ref.name for header in sorted(headers, key=lambda header: (header.order, header.ref.name))),
        shape=None,
        spacing_mm=None,
        contrast=first.contrast,
        flags=(),
        unit=None,
    )


def _prefer(verdicts: list[SeriesVerdict]) -> list[SeriesVerdict]:
    """Mark the best series of each study; of equals the one with more slices, then the first."""
    best: dict[str, SeriesVerdict] = {}
    for each in verdicts:
        rank = (each.score, each.shape[0] if each.shape else 0)
        held = best.get(each.study_uid)
        if each.unit is not None and (held is None or rank > (held.score, held.shape[0] if held.shape else 0)):
            best[each.study_uid] = each
    return [replace(each, preferred=each is best.get(each.study_uid)) for each in verdicts]
