"""What ingest hands on: an image study in physical units with its provenance, or a typed rejection.

One `ImageStudy` becomes one report: a DICOM series (or what of it can be read), a photo, or one page of a
multi-page file. Nothing here knows about models or report formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from reports.dicom_source import DicomSource

PixelUnits = Literal["HU", "display"]


@dataclass(frozen=True, slots=True)
class Rejection:
    """An input that was refused: a code for machines, a sentence and a remedy for people."""

    path: str
    code: str  # kebab-case, stable
    reason: str  # one sentence: what is wrong
    remedy: str  # one sentence: what would mend it


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file: what it is called for a person, and what it contains for a machine."""

    path: str  # as the user named it; "archive.zip!member.dcm" for a member of an archive
    sha256: str  # of the file's bytes, lower-case hex
    media_type: str  # "application/dicom", "image/png", ...
    page: int | None = None  # 0-based page or frame of a multi-page file
    sop_instance_uid: str | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the pixels are. Millimetres; the patient coordinate system is DICOM's LPS (PS3.3 C.7.6.2.1.1)."""

    spacing_mm: tuple[float, float] | None = None  # between rows, between columns
    orientation: tuple[float, float, float, float, float, float] | None = None  # row then column direction cosines
    positions_mm: tuple[tuple[float, float, float], ...] | None = None  # centre of the first pixel, per slice
    slice_spacing_mm: float | None = None  # along the normal; None when irregular or a single slice
    slice_thickness_mm: float | None = None
    spacing_from: Literal["header", "user"] = "header"  # who says so: the file itself, or the person who asked


@dataclass(frozen=True, slots=True)
class Document:
    """A page of text that came with the images: a request form, a prior report, an inspection sheet."""

    text: str  # as it stands in the document
    kind: Literal["request", "prior-report", "inspection-sheet", "text"]
    source: SourceFile


@dataclass(frozen=True, slots=True)
class ImageStudy:
    """Pixels in physical units with their geometry and provenance.

    `pixels` is `[S, H, W]` (int16 or float32) Hounsfield units when `units == "HU"`, else one picture: `[1, H, W]`
    uint8/uint16 grey or `[1, H, W, 3]` uint8 RGB.  `sources[s]` is the file of slice `s` (one entry for all
    frames of a multi-frame file is repeated).  `window` is the (centre, width) that the file asks to be shown in.
    """

    key: str  # SHA-256 over the content of all sources in order: the same pixels always get the same key
    name: str  # short display name: a file name or "series 3"
    units: PixelUnits
    pixels: np.ndarray
    sources: tuple[SourceFile, ...]
    geometry: Geometry = field(default_factory=Geometry)
    window: tuple[float, float] | None = None
    study_uid: str | None = None
    series_uid: str | None = None
    kernel: str | None = None
    contrast_agent: str | None = None  # what the header says, if anything
    body_part: str | None = None  # what the header says, if anything
    identifiers: Mapping[str, str] = field(default_factory=dict)  # accession, lot, part, serial: where known
    identifiers_from: Mapping[str, str] = field(default_factory=dict)  # the document, file or folder that each stood in
    documents: tuple[Document, ...] = ()
    dicom: DicomSource | None = None
    quality_flags: tuple[str, ...] = ()  # kebab-case codes, listed in `pipelines/ingest/series.py`
    rejected_sources: tuple[Rejection, ...] = ()  # files of the series that the study had to do without

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over all that a report takes from the study: its key and what is known beside the pixels."""
        scale = self.geometry.spacing_mm if self.geometry.spacing_from == "user" else None
        quoted = [(note.source.sha256, note.source.page, note.kind) for note in self.documents]
        if not (scale or quoted or self.identifiers_from):
            return self.key
        beside = [self.key, scale, quoted, sorted(self.identifiers.items()), sorted(self.identifiers_from.items())]
        return hashlib.sha256(json.dumps(beside).encode()).hexdigest()


def content_key(sources: Iterable[SourceFile]) -> str:
    """SHA-256 (hex) over the content hashes and page numbers of `sources` in order: file names play no part."""
    lines = (f"{source.sha256}#{source.page or 0}\n" for source in sources)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
