"""What a look at the headers finds: units of work, and for DICOM a verdict on each series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.ingest.files import FileRef


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes one report: a CT series, a photo, a page of a multi-page file, or a picture in a PDF.

    Small and picklable.
    """

    name: str  # short, for people: "series 3", "tile.png", "scan.tif page 2", "form.pdf page 2 image 1"
    kind: Literal["series", "picture", "pdf"]
    files: tuple[FileRef, ...]  # of a series: in the order of its slices
    page: int | None = None  # 0-based, for multi-page pictures and PDF
    frames: tuple[tuple[int, ...], ...] | None = None  # of each file, where a series does not take all of them
    image: int | None = None  # 0-based, on the page of a PDF; None: the page is drawn
    documents: tuple[FileRef, ...] = ()  # PDF and text files that belong to it
    part: int = 1  # of a series whose files cannot all lie on each other, from 1

    @property
    def path(self) -> str:
        """The file, or the folder or archive that holds the series, as the user named it."""
        first = self.files[0]
        return first.name if len(self.files) == 1 else first.parent


@dataclass(frozen=True, slots=True)
class SeriesVerdict:
    """What a DICOM series is good for, and why. A series whose files cannot lie on each other has several parts."""

    study_uid: str
    series_uid: str
    part: int  # from 1
    kind: str  # `pipelines.ingest.kinds.Kind`
    verdict: Literal["volume", "slices", "refused"]
    code: str | None  # why it is no volume
    reason: str  # a few sentences
    score: int  # 0 to 100: how well it serves for reading
    preferred: bool  # the best of its study
    files: tuple[str, ...]  # in the order of their slices
    shape: tuple[int, int, int] | None  # slices, rows, columns
    spacing_mm: tuple[float | None, float | None, float | None] | None  # between slices, rows, columns
    contrast: str  # the contrast phase in words, or ""
    flags: tuple[str, ...]  # quality flags that the headers show
    unit: Unit | None  # None where it is refused
