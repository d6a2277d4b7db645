"""The masks of a report as a DICOM segmentation (BINARY), frame by frame on the source's slices.

Only masks become segments.  An evidence box is no outline: a viewer would show it, and measure it, as if it were one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from highdicom import (
    AlgorithmIdentificationSequence,
    PixelMeasuresSequence,
    PlaneOrientationSequence,
    PlanePositionSequence,
)
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from reports.bundle import Bundle
from reports.dicom import concepts
from reports.dicom.objects import Role, finish, identity, superseding, uid
from reports.dicom.source import SourceSeries, source_series
from reports.dicom.text import line
from reports.formats import CannotCarryError
from reports.schema import Report, Segment
from reports.texts import words

ROLE: Final = Role("seg", "SEG", 9003, "segmentation")


def render(bundle: Bundle) -> bytes:
    """The segmentation as a DICOM file. Raises CannotCarryError."""
    report, source = bundle.report, source_series(bundle)
    segments = [each for each in report.segments if each.id in bundle.segments and bundle.segments[each.id].any()]
    if not segments:
        raise CannotCarryError("the report has no masks; evidence boxes are in the formats sr and sc")
    # [S, H, W, segment] in which the planes of a segment lie together: highdicom is three times as quick as otherwise
    planes = np.moveaxis(np.stack([bundle.segments[each.id] for each in segments]), 0, -1)
    if len(planes) != len(source.instances):
        raise CannotCarryError(f"the masks have {len(planes)} slices, the source series {len(source.instances)}")
    images, order = _source_images(report, source, planes.shape[1:3])
    document = Segmentation(
        source_images=images,
        pixel_array=planes[order],
        segmentation_type="BINARY",
        segment_descriptions=[_describe(number, each, report) for number, each in enumerate(segments, 1)],
        content_label="SCANSCRIBE",
        content_description=superseding(report) or None,
        **identity(report, source, ROLE),
    )
    organisation = uid(report.id, report.language, ROLE.name, "dimensions")
    document.DimensionOrganizationSequence[0].DimensionOrganizationUID = organisation
    for index in document.DimensionIndexSequence:
        index.DimensionOrganizationUID = organisation
    return finish(document, report, source)


def _describe(number: int, segment: Segment, report: Report) -> SegmentDescription:
    return SegmentDescription(
        segment_number=number,
        segment_label=line(words(report.language).term("segment", segment.title)) or f"segment {number}",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=concepts.coded(segment.code) if segment.code else concepts.private(segment.id),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=line(segment.method) or "unnamed",
            version=line(report.model.version) or "-",
            family=concepts.private("segmentation-method", "Method of the segmentation"),
        ),
        tracking_id=f"{report.id}/{line(segment.id, 40)}",
        tracking_uid=uid(report.id, "tracking", segment.id),
    )


def _source_images(
    report: Report, source: SourceSeries, size: tuple[int, ...]
) -> tuple[list[Dataset], slice | list[int]]:
    """The source as highdicom wants to see it, and the slices in its order: a data set an instance, or the one
    multi-frame instance with the place of each frame."""
    spacing, thickness = (
        report.technique.spacing_mm,
        report.technique.slice_thickness_mm or report.technique.slice_spacing_mm,
    )
    positions = [list(instance.position_mm) for instance in source.instances if instance.position_mm]
    placed = source.frame_of_reference_uid and len(positions) == len(source.instances)
    if not (placed and source.orientation and spacing and thickness):
        raise CannotCarryError(
            "the source does not say where its slices lie: frame of reference, position, orientation, spacing or "
            "thickness is missing in its header"
        )
    measures = PixelMeasuresSequence(pixel_spacing=spacing, slice_thickness=thickness)
    plane = PlaneOrientationSequence("PATIENT", source.orientation)
    images = [source.reference(instance) for instance in source.instances]
    for image, position in zip(images, positions, strict=True):
        image.Rows, image.Columns = size
        image.FrameOfReferenceUID = source.frame_of_reference_uid
        image.PositionReferenceIndicator = ""
        image.ImagePositionPatient = position
        image.ImageOrientationPatient = list(source.orientation)
        image.PixelSpacing = list(spacing)
        image.SliceThickness = thickness
    first = source.instances[0]
    if first.frames == 1:
        return images, slice(None)

    order = sorted(range(len(images)), key=lambda index: source.instances[index].frame)
    if [source.instances[index].frame for index in order] != list(range(1, first.frames + 1)):
        raise CannotCarryError("slices of the multi-frame source are missing, so its frames cannot be named one by one")
    image = images[0]
    image.NumberOfFrames = first.frames
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = measures, plane
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = []
    for index in order:
        frame = Dataset()
        frame.PlanePositionSequence = PlanePositionSequence("PATIENT", positions[index])
        image.PerFrameFunctionalGroupsSequence.append(frame)
    return [image], order
