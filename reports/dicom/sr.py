"""The report as a Comprehensive 3D SR after TID 1500 (Measurement Report), for archives and viewers that draw findings.

An evidence box is a closed polyline on the image that it was found on (SCOORD, TID 1410): every viewer of TID 1500
draws that, whether it knows the patient's coordinate system or not.  A finding without a box is a group of qualitative
evaluations (TID 1501), and so is each field of the study.  What is text in the report stays text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from highdicom import sr
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from reports.bundle import Bundle
from reports.dicom import concepts
from reports.dicom.objects import MANUFACTURER, Role, finish, identity, predecessor, superseding, uid
from reports.dicom.source import SourceSeries, source_series
from reports.dicom.text import prose
from reports.dicom_source import Instance
from reports.schema import Evidence, FieldValue, Finding, Measurement, Report
from reports.texts import words

ROLE: Final = Role("sr", "SR", 9001, "findings")
SOP_CLASS: Final = "1.2.840.10008.5.1.4.1.1.88.34"
QUALITATIVE_EVALUATIONS: Final = Code("C0034375", "UMLS", "Qualitative Evaluations")  # TID 1500 row 12
BODY: Final = Code("38266002", "SCT", "Entire body")

Group = sr.PlanarROIMeasurementsAndQualitativeEvaluations | sr.MeasurementsAndQualitativeEvaluations


def render(bundle: Bundle) -> bytes:
    """The SR document as a DICOM file. Raises CannotCarryError."""
    report, source = bundle.report, source_series(bundle)
    marked = [evidence.slice_index for finding in report.findings for evidence in finding.evidence]
    document = sr.Comprehensive3DSR(
        evidence=source.references(sorted({*report.technique.slices_read, *marked})),
        content=_content(report, source),
        is_complete=not report.not_assessed,
        is_final=False,
        is_verified=False,
        previous_versions=predecessor(report, source, ROLE, SOP_CLASS),
        **identity(report, source, ROLE),
    )
    return finish(document, report, source)


def _content(report: Report, source: SourceSeries) -> sr.MeasurementReport:
    content = sr.MeasurementReport(
        observation_context=observation_context(report),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion if source.modality == "CT" else codes.SCT.ImagingProcedure,
        imaging_measurements=[
            *(group for finding in report.findings for group in _finding(finding, report, source)),
            *(_field(name, value, report) for name, value in fields(report).items()),
            _study(report),
        ],
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(
            concepts.language(report.language)
        ),
    )
    narrative = sr.ContainerContentItem(QUALITATIVE_EVALUATIONS, relationship_type="CONTAINS")
    narrative.ContentSequence = sr.ContentSequence(list(_narrative(report)))
    content[0].ContentSequence.append(narrative)
    return content


def observation_context(report: Report) -> sr.ObservationContext:
    """The model as the observer (TID 1001, 1004)."""
    model = report.model
    attributes = sr.DeviceObserverIdentifyingAttributes(
        uid=uid(model.weights_sha256, model.config_sha256, "device"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=prose(f"{model.name} {model.version}"),
        serial_number=model.weights_sha256,
    )
    return sr.ObservationContext(observer_device_context=sr.ObserverContext(codes.DCM.Device, attributes))


def fields(report: Report) -> dict[str, FieldValue]:
    """The categorical fields of the study, technique first."""
    technique = {name: getattr(report.technique, name) for name in ("region", "plane", "contrast")}
    return {name: value for name, value in technique.items() if value} | report.fields


def _finding(finding: Finding, report: Report, source: SourceSeries) -> Iterator[Group]:
    """A group for each box, all under one tracking identifier; measurements and words go with the first."""
    tracking = _tracking(finding.id, report)
    common: dict[str, Any] = {
        "tracking_identifier": tracking,
        "finding_type": concepts.finding_type(finding),
        "algorithm_id": _algorithm(report),
        "finding_sites": list(_site(finding, report)),
    }
    evaluations = [
        sr.QualitativeEvaluation(concepts.private("finding-type", "Type in the report"), concepts.private(finding.type))
    ]
    if finding.severity:
        evaluations.append(sr.QualitativeEvaluation(codes.SCT.Severity, concepts.private(finding.severity)))
    measured = [_certainty(codes.DCM.CertaintyOfFinding, finding.confidence), *map(_measurement, finding.measurements)]
    if not finding.evidence:
        group: Group = sr.MeasurementsAndQualitativeEvaluations(
            measurements=measured, qualitative_evaluations=evaluations, **common
        )
        yield _described(group, finding, report)
    for number, evidence in enumerate(finding.evidence):
        first = number == 0
        kind = sr.QualitativeEvaluation(concepts.private("localisation"), _LOCALISATION[evidence.localisation])
        group = sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            referenced_region=_region(evidence, source.slice_of(evidence)),
            measurements=measured if first else [],
            qualitative_evaluations=[*evaluations, kind] if first else [kind],
            **common,
        )
        yield _described(group, finding, report) if first else group


_LOCALISATION: Final = {
    "box": concepts.private("box", "Box of a detected finding, no outline"),
    "weak": concepts.private("weak", "Region that the model attended to, no outline"),
}


def _described(group: Group, finding: Finding, report: Report) -> Group:
    _say(group, codes.DCM.Comment, finding.description)
    if finding.location:
        _say(group, concepts.private("location", "Place in the image"), finding.location)
    return group


def _region(evidence: Evidence, instance: Instance) -> sr.ImageRegion:
    """The box as a closed polyline; SCOORD and the report both count from the image's upper left corner."""
    x0, y0, x1, y1 = evidence.bbox
    return sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]),
        source_image=sr.SourceImageForRegion(
            referenced_sop_class_uid=instance.sop_class_uid,
            referenced_sop_instance_uid=instance.sop_instance_uid,
            referenced_frame_numbers=[instance.frame] if instance.frames > 1 else None,
        ),
    )


def _site(finding: Finding, report: Report) -> Iterator[sr.FindingSite]:
    """The body region and side, as far as they are known."""
    region = concepts.REGIONS.get(report.technique.region.value) if report.technique.region else None
    side = concepts.SIDES.get(finding.laterality or "")
    if region or side:
        yield sr.FindingSite(region or BODY, laterality=side)


def _field(name: str, value: FieldValue, report: Report) -> Group:
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(name, report),
        algorithm_id=_algorithm(report),
        measurements=[_certainty(codes.DCM.CertaintyOfFeature, value.confidence)],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(concepts.field(name), concepts.field_value(name, value.value))
        ],
    )


def _study(report: Report) -> Group:
    """What was measured over the whole series, and what kind of document this is."""
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking("study", report),
        algorithm_id=_algorithm(report),
        measurements=list(map(_measurement, report.measurements)),
    )
    _say(group, codes.DCM.Comment, report.title)
    return group


def _narrative(report: Report) -> Iterator[sr.TextContentItem]:
    say = words(report.language)
    yield _text(codes.DCM.Impression, report.impression)
    if report.disposition:
        yield _text(concepts.private("disposition"), report.disposition)
    for missing in report.not_assessed:
        yield _text(concepts.private("not-assessed"), f"{missing.what} {say.bracketed(missing.reason)}")
    for flag in report.quality_flags:
        yield _text(concepts.private("quality-flag"), say.flag(flag))
    if report.supersedes:
        yield _text(concepts.private("supersedes", "Replaces report"), superseding(report))
    yield _text(concepts.private("disclaimer"), report.disclaimer)


def _measurement(measured: Measurement) -> sr.Measurement:
    quantity = concepts.quantity(measured.name)
    item = sr.Measurement(
        quantity.concept,
        measured.value,
        concepts.unit(measured.unit),
        derivation=quantity.derivation,
        finding_sites=[sr.FindingSite(quantity.site, quantity.side)] if quantity.site else None,
    )
    # TID 300 has a code for the method; ours is a sentence.
    method = sr.TextContentItem(codes.SCT.MeasurementMethod, prose(measured.method), "HAS CONCEPT MOD")
    children = item[0].get("ContentSequence", sr.ContentSequence())
    item[0].ContentSequence = sr.ContentSequence([*children, method])
    return item


def _certainty(concept: Code, probability: float) -> sr.Measurement:
    return sr.Measurement(concept, round(100 * probability, 4), concepts.unit("%"))


def _tracking(name: str, report: Report) -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(uid=uid(report.id, "tracking", name), identifier=prose(f"{report.id}/{name}"))


def _algorithm(report: Report) -> sr.AlgorithmIdentification:
    model = report.model
    return sr.AlgorithmIdentification(
        name=prose(model.name),
        version=prose(model.version),
        parameters=[f"weights SHA-256 {model.weights_sha256}", f"configuration SHA-256 {model.config_sha256}"],
    )


def _say(group: Group, concept: Code | sr.CodedConcept, text: str) -> None:
    group[0].ContentSequence.append(_text(concept, text))


def _text(concept: Code | sr.CodedConcept, text: str) -> sr.TextContentItem:
    return sr.TextContentItem(concept, prose(text), "CONTAINS")
