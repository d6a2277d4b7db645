"""CT reports with all that their DICOM formats need, made from real files without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.reporting import box_in_patient, report_images
from pipelines.study import ImageStudy
from reports.bundle import Bundle
from reports.schema import (
    Code,
    Evidence,
    FieldValue,
    Finding,
    Measurement,
    NotAssessed,
    Report,
    Segment,
    Source,
    SourceInput,
    Technique,
)
from tests.ingest_doors import read
from tests.report_strategies import plain_report

PHANTOM = Path(__file__).parents[1] / "examples" / "ct" / "phantom-series"


def ct_bundle(*paths: Path, **changes: object) -> Bundle:
    """A report with a detected, a merely attended and an unplaced finding on the series in `paths`, and two masks."""
    study = read(*(paths or (PHANTOM,)))
    report = _report(study, changes)
    return Bundle(report, report_images(study, report), study.dicom, masks(study))


def masks(study: ImageStudy) -> dict[str, np.ndarray]:
    """Two boxes that do not touch, the second on the upper half of the slices only."""
    slices, height, width = study.pixels.shape
    left, right = (np.zeros((slices, height, width), dtype=bool) for _ in range(2))
    left[:, height // 4 : height // 2, width // 8 : width // 3] = True
    right[slices // 2 :, height // 4 : height // 2, width // 2 : width // 2 + 5] = True
    return {"lung-left": left, "lung-right": right}


def _report(study: ImageStudy, changes: dict[str, object]) -> Report:
    slices, height, width = study.pixels.shape
    first = (width * 0.1 + 0.25, height * 0.2, width * 0.3, height * 0.4)
    weak = (width * 0.5, height * 0.5, width * 0.75, height * 0.9)
    measured = (
        Measurement(name="long axis", value=12.345678, unit="mm", method="long side of the evidence box"),
        Measurement(name="mean attenuation", value=-33.25, unit="[hnsf'U]", method="mean over all pixels of the box"),
    )
    findings = (
        Finding(
            id="F1",
            type="nodule",
            code=Code(value="27925004", scheme="SCT", meaning="Nodule"),
            description="Small nodule in the upper left of the image.",
            location="upper left",
            laterality="left",
            evidence=(_evidence(study, 0, first, weak=False), _evidence(study, slices - 1, first, weak=False)),
            measurements=measured,
            confidence=0.8125,
        ),
        Finding(
            id="F2",
            type="obstruction-or-dilatation",
            description="Obstruction or dilatation in the centre of the image.",
            evidence=(_evidence(study, slices // 2, weak, weak=True),),
            confidence=0.5,
        ),
        Finding(id="F3", type="effusion", description="Effusion.", confidence=0.33),
    )
    least = {
        "kind": "ct",
        "title": "Chest CT, axial",
        "source": Source(
            inputs=tuple(
                SourceInput(
                    name=Path(source.path).name,
                    sha256=source.sha256,
                    media_type=source.media_type,
                    page=source.page,
                    sop_instance_uid=source.sop_instance_uid,
                )
                for source in study.sources
            ),
            study_uid=study.study_uid,
            series_uid=study.series_uid,
        ),
        "technique": Technique(
            image_size_px=(width, height),
            region=_field("chest"),
            plane=_field("axial"),
            contrast=_field("iv"),
            slice_count=slices,
            slices_read=tuple(range(slices)),
            spacing_mm=study.geometry.spacing_mm,
            slice_spacing_mm=study.geometry.slice_spacing_mm,
            slice_thickness_mm=study.geometry.slice_thickness_mm,
        ),
        "fields": {"laterality": _field("left"), "covid19": _field("false")},
        "findings": findings,
        "measurements": (
            Measurement(name="lowest attenuation", value=-1024, unit="[hnsf'U]", method="over all pixels"),
        ),
        "segments": (
            Segment(
                id="lung-left",
                title="Left lung 左肺",
                code=Code(value="39607008", scheme="SCT", meaning="Lung"),
                method="below -500 HU, the largest connected parts, closed, of the whole study: a long sentence",
            ),
            Segment(id="lung-right", title="Right lung", method="below -500 HU"),
        ),
        "impression": "Possible nodule.",
        "not_assessed": (NotAssessed(what="absence of disease", reason="what is not reported is not excluded"),),
        "quality_flags": ("gantry-tilt",),
    }
    return plain_report(**least | changes)


def _evidence(study: ImageStudy, index: int, box: tuple[float, float, float, float], *, weak: bool) -> Evidence:
    return Evidence(
        input_index=index,
        slice_index=index,
        sop_instance_uid=study.sources[index].sop_instance_uid,
        bbox=box,
        bbox_mm=box_in_patient(box, index, study.geometry),
        localisation="weak" if weak else "box",
    )


def _field(value: str) -> FieldValue:
    return FieldValue(value=value, confidence=0.9, probabilities={value: 0.9})
