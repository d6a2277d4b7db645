"""What a report must know of the DICOM series that it was made from, so that derived objects can name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Instance:
    """One slice of the source series: a DICOM instance, or one frame of it."""

    sop_instance_uid: str
    sop_class_uid: str
    instance_number: int | None = None
    frames: int = 1  # that the instance has
    frame: int = 1  # the one that this slice is, counted from 1
    position_mm: tuple[float, float, float] | None = None  # centre of the first pixel (LPS)


@dataclass(frozen=True, slots=True)
class DicomSource:
    """The source series, as far as a derived object must name it.

    `header` is the DICOM JSON model (PS3.18 Annex F) of the first instance, without pixel data, overlays and private
    elements: patient, study, series, frame of reference, equipment and image plane.  `instances` has one entry for each
    slice of the study, in its order.  `orientation` holds the direction cosines of a row and of a column, the same for
    all slices; None where the files give none.
    """

    header: Mapping[str, Any]
    instances: tuple[Instance, ...]
    orientation: tuple[float, float, float, float, float, float] | None = None
