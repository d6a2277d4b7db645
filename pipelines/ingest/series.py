"""One CT series: its files decoded side by side straight into the volume, in the order of their positions.

Quality flags that a study can carry:

    missing-slices            gaps of whole multiples of the usual spacing
    irregular-spacing         slices at uneven distances, or shifted against each other
    missing-geometry          no usable position, orientation or pixel size
    mixed-orientation         each slice lies in a plane of its own
    gantry-tilt               slices sheared against their normal
    duplicate-slices          further slices at the same position were left out
    unreadable-slices         files of the series could not be read and were left out
    padding-masked            pixels outside the scanned field were set to -1024 HU
    padding-looks-like-tissue the declared padding value maps to HU that tissue has; it was masked all the same
    unused-bits-masked        bits beyond Bits Stored were not empty and were taken off
    excess-pixel-data         the file holds more pixel data than its frames need
    signedness-mismatch       the JPEG 2000 stream and the header differ on whether values are signed
    lossy-compression         the pixels went through lossy compression
    coarse-hu                 neighbouring stored values are more than 4 HU apart
    implausible-hu            values that no CT has: far too dense, or nothing as light as fat anywhere
    unspecified-rescale-type  the header does not name HU as the unit; original slices are taken as HU
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from pipelines.ingest.codecs import CORES
from pipelines.ingest.dicom import MAX_VOXELS, About, Header, read_about, read_header
from pipelines.ingest.files import FileRef
from pipelines.ingest.geometry import FrameOf, Stack, arrange
from pipelines.ingest.pixels import Overflow, fits_int16, read_stored, to_hu
from pipelines.ingest.refusals import Refusal, rejected
from pipelines.ingest.units import Unit
from pipelines.study import ImageStudy, Rejection, SourceFile, content_key
from reports.dicom_source import DicomSource

FAT_HU: Final = 100  # a series without any pixel below, air and fat being everywhere, is not in HU


def load_series(unit: Unit) -> ImageStudy:
    """Decode and stack one series: `[S, H, W]` HU, slices by rising position along the normal (feet to head for
    axial slices). Files that cannot be read stand in `rejected_sources`. Raises Refusal where none can."""
    headers, unread = _headers(unit)
    chosen = dict(zip(unit.files, unit.frames, strict=True)) if unit.frames else {}
    frames = [FrameOf(h, index) for h in headers for index in chosen.get(h.ref, range(len(h.planes)))]
    if not frames:
        raise Refusal(unread[0].code, unread[0].reason)
    stack = arrange(frames)
    with ThreadPoolExecutor(1) as beside:  # one header is read in full while the slices are decoded
        about = beside.submit(read_about, stack.frames[0].header.ref)
        volume, read, failed = _decode(stack)
    unread += failed
    if not any(read):
        raise Refusal(unread[0].code, unread[0].reason)
    if not all(read):  # the order stands, but whether it still makes a volume has to be seen anew
        dropped = stack.dropped
        stack = arrange([frame for frame, done in zip(stack.frames, read, strict=True) if done])
        stack = replace(stack, dropped=dropped, flags=stack.flags | ({"duplicate-slices"} if dropped else set()))
        volume = volume[[done is not None for done in read]]
    results = [done for done in read if done]
    said = about.result() if all(read) else read_about(stack.frames[0].header.ref)
    return _study(unit, stack, volume, results, unread, said)


@dataclass(frozen=True, slots=True)
class _Read:
    """What decoding found out of one frame beside its pixels."""

    sha256: str
    flags: frozenset[str]


def _headers(unit: Unit) -> tuple[list[Header], list[Rejection]]:
    headers, unread = [], []
    for ref in unit.files:
        try:
            header = read_header(ref)
            if header.fault is not None:  # the file has changed since it was planned
                raise Refusal(*header.fault)
            headers.append(header)
        except Exception as error:  # one broken file must not take the series with it
            unread.append(rejected(ref.name, error))
    return headers, unread


def _decode(stack: Stack) -> tuple[np.ndarray, list[_Read | None], list[Rejection]]:
    """The volume, what each slice's decoding found (None where it failed), and what failed."""
    layout = stack.frames[0].header.layout
    assert layout is not None
    shape = (len(stack.frames), layout.rows, layout.columns)
    if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
        raise Refusal("too-large", f"The series has more than {MAX_VOXELS:,} voxels.")
    whole = all(fits_int16(frame.plane.rescale) for frame in stack.frames)
    try:
        return _fill(stack, np.empty(shape, np.int16 if whole else np.float32))
    except Overflow:
        return _fill(stack, np.empty(shape, np.float32))


def _fill(stack: Stack, volume: np.ndarray) -> tuple[np.ndarray, list[_Read | None], list[Rejection]]:
    places: dict[FileRef, list[int]] = {}  # file -> its slices
    for place, frame in enumerate(stack.frames):
        places.setdefault(frame.header.ref, []).append(place)
    read: list[_Read | None] = [None] * len(stack.frames)
    failed: list[Rejection] = []

    def one_file(ref: FileRef, spread: Callable[[Callable[[int], None], list[int]], Iterable[None]]) -> None:
        header = stack.frames[places[ref][0]].header
        try:
            stored = read_stored(header, frames=len(stack.frames))

            def one_frame(place: int) -> None:
                frame, layout = stack.frames[place], header.layout
                assert layout is not None
                flags = to_hu(stored.frame(frame.index), layout, frame.plane.rescale, volume[place])
                read[place] = _Read(stored.sha256, stored.flags | flags)

            list(spread(one_frame, places[ref]))
        except Overflow:
            raise
        except Exception as error:  # one broken file must not take the series with it
            for place in places[ref]:
                read[place] = None
            failed.append(rejected(ref.name, error))

    with ThreadPoolExecutor(CORES) as pool:
        if len(places) < CORES:  # a few files of many frames
            for ref in places:
                one_file(ref, pool.map)
        else:
            list(pool.map(lambda ref: one_file(ref, map), places))
    return volume, read, failed


def _study(
    unit: Unit, stack: Stack, volume: np.ndarray, read: Sequence[_Read], unread: list[Rejection], about: About
) -> ImageStudy:
    sources = tuple(_source(frame, done.sha256) for frame, done in zip(stack.frames, read, strict=True))
    flags = stack.flags.union(*(done.flags for done in read), *(frame.header.flags for frame in stack.frames))
    flags |= {"lossy-compression"} if any(frame.header.lossy for frame in stack.frames) else set()
    flags |= {"unreadable-slices"} if unread else set()
    flags |= {"implausible-hu"} if volume[::2, ::16].min() > FAT_HU else set()
    first = stack.frames[0].header
    return ImageStudy(
        key=content_key(sources),
        name=unit.name,
        units="HU",
        pixels=volume,
        sources=sources,
        geometry=stack.geometry,
        window=about.window,
        study_uid=first.study_uid or None,
        series_uid=first.series_uid or None,
        kernel=about.kernel,
        contrast_agent=about.contrast_agent,
        body_part=about.body_part,
        identifiers={"accession": about.accession} if about.accession else {},
        dicom=DicomSource(
            header=about.json,
            instances=tuple(
                replace(frame.header.instance, frame=frame.index + 1, position_mm=frame.plane.position)
                for frame in stack.frames
            ),
            orientation=stack.geometry.orientation,
        ),
        quality_flags=tuple(sorted(flags)),
        rejected_sources=(*unread, *stack.dropped),
    )


def _source(frame: FrameOf, sha256: str) -> SourceFile:
    header = frame.header
    return SourceFile(
        path=header.ref.name,
        sha256=sha256,
        media_type="application/dicom",
        page=frame.index if len(header.planes) > 1 else None,
        sop_instance_uid=header.instance.sop_instance_uid or None,
    )
