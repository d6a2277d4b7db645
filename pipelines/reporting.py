"""A study and its reading become a report: findings with evidence, measurements and rules, and what was not assessed.

Everything here is deterministic; what the model said is taken over, never added to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Literal, cast

import numpy as np

from pipelines import inputs, tiles
from pipelines.measures import NOT_MEASURED, StudyMeasures, measure_defect, measure_lesion, region_fits
from pipelines.reading import OUT_OF_DOMAIN, FieldReading, FindingReading, ModelIdentity, Reading
from pipelines.study import Geometry, ImageStudy, SourceFile
from reports import measurements, taxonomy
from reports.codes import code_of
from reports.grammar import zone_of
from reports.images import Picture, ReportImages, around
from reports.measurements import Box
from reports.rules import Defect, Rules, load_rules
from reports.schema import (
    ContextNote,
    Evidence,
    FieldValue,
    Finding,
    Measurement,
    ModelInfo,
    NotAssessed,
    Point,
    Report,
    Source,
    SourceInput,
    Technique,
)
from reports.texts import Language, worded

KIND_UNCERTAIN_BELOW: Final = 0.75
MAX_DETAILS: Final = 100  # findings of a large picture that are kept at full size
MAX_DETAIL_SIDE: Final = 2048  # of their surroundings; what is larger shows on the overview
OBLIQUE_BELOW: Final = 0.8  # cosine between slice normal and nearest body axis: below, the plane has no plain name


def report_id(
    study_key: str, reference_key: str | None, model: ModelIdentity, kind: str, rules: str, language: Language = "en"
) -> str:
    """The identity of a report, 16 hex digits: the same content, reference, model, asked-for kind, rules (their digest)
    and language give the same id.

    `kind` is what the user asked for ("auto", "ct", "defect"), so that the id is known before the model has run.  The
    device is not part of it.
    """
    parts = [
        study_key,
        reference_key,
        model.name,
        model.version,
        model.weights_sha256,
        model.config_sha256,
        kind,
        rules,
        language,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_report(
    study: ImageStudy,
    reading: Reading,
    model: ModelIdentity,
    *,
    kind: str = "auto",
    reference: ImageStudy | None = None,
    rules: Rules | None = None,
    language: Language = "en",
    measures: StudyMeasures = NOT_MEASURED,
    timing: dict[str, float] | None = None,
) -> Report:
    """The report on one study.  `kind` is what the user asked for, as in `Reader.read`; `timing` is in seconds;
    `measures` is what `pipelines.measures.measure_study` found: its masks go into the report's bundle."""
    if OUT_OF_DOMAIN in reading.quality_flags:
        reading = _withheld(reading)
    reported = [finding for finding in reading.findings if finding.reported]
    flags = _quality_flags(study, reading, reference, measures)
    technique = _technique(study, reading)
    findings = tuple(_finding(n, reported, study, reading, reference) for n in range(1, len(reported) + 1))
    disposition, rule, open_rules = None, None, cast(tuple[str, ...], ())
    rules = rules or load_rules()
    if reading.kind == "defect":
        judgement = rules.judge([_defect(finding, study) for finding in findings], flags)
        findings = tuple(
            f.model_copy(update={"severity": s}) for f, s in zip(findings, judgement.severities, strict=True)
        )
        disposition, rule, open_rules = judgement.disposition, judgement.rule, judgement.unassessed
    report = Report(
        id=report_id(study.identity, reference.key if reference else None, model, kind, rules.digest, language),
        kind=cast(Literal["ct", "defect"], reading.kind),
        created=datetime.now(UTC).replace(microsecond=0),
        title="",
        source=Source(
            name=_text(study.name) or "",
            inputs=tuple(_input(source) for source in _inputs(study)),
            reference=_input(reference.sources[0]) if reference else None,
            study_uid=study.study_uid,
            series_uid=study.series_uid,
            **{name: _text(value) for name, value in study.identifiers.items()},
            read_from={name: _text(place) or "" for name, place in study.identifiers_from.items()},
        ),
        context=tuple(
            ContextNote(
                text=_text(note.text) or "",
                kind=note.kind,
                name=_text(note.source.path) or "",
                sha256=note.source.sha256,
                page=note.source.page,
            )
            for note in study.documents
        ),
        technique=technique,
        fields={
            name: _field_value(value)
            for name, value in reading.fields.items()
            if name == "laterality" or (name == "covid19" and _is_chest(technique))
        },
        findings=findings,
        measurements=(*_whole(study, reading.kind, findings), *measures.measurements),
        segments=measures.segments,
        impression="",
        disposition=disposition,
        disposition_rule=rule,
        not_assessed=(
            *_not_assessed(study, reading, technique, reference),
            *measures.not_assessed,
            *(NotAssessed.of("rule-without-scale", rule=name) for name in open_rules),
        ),
        quality_flags=flags,
        model=ModelInfo(
            name=model.name,
            version=model.version,
            weights_sha256=model.weights_sha256,
            config_sha256=model.config_sha256,
            device=model.device,
        ),
        timing_s=reading.timing_s | (timing or {}),
    )
    return worded(report, language)


def report_images(study: ImageStudy, report: Report, *, reference: ImageStudy | None = None) -> ReportImages:
    """The pictures of a report: each slice with evidence, or the middle one of those read; 8 bit, full size."""
    shown = sorted({e.slice_index for finding in report.findings for e in finding.evidence})
    read = report.technique.slices_read or (0,)
    window = study.window or (inputs.LUNG if _is_chest(report.technique) else inputs.SOFT_TISSUE)
    slices = {index: _picture(study, index, window) for index in shown or [read[len(read) // 2]]}
    return ReportImages(
        slices=slices,
        reference=_picture(reference, 0, reference.window or inputs.SOFT_TISSUE) if reference else None,
        details=_details(study, report, slices[0]) if _is_large(study) else {},
    )


# Findings


def _finding(
    number: int,
    reported: Sequence[FindingReading],
    study: ImageStudy,
    reading: Reading,
    reference: ImageStudy | None,
) -> Finding:
    finding = reported[number - 1]
    height, width = study.pixels.shape[1:3]
    bbox = measurements.clip(finding.bbox, width, height)
    location = finding.location.strip() or zone_of(bbox, width, height)
    source = study.sources[finding.slice_index]
    evidence = Evidence(
        input_index=_inputs(study).index(source),
        slice_index=finding.slice_index,
        sop_instance_uid=source.sop_instance_uid,
        bbox=bbox,
        bbox_mm=box_in_patient(bbox, finding.slice_index, study.geometry) if reading.kind == "ct" else None,
        localisation="box" if finding.localisation == "box" else "weak",
    )
    return Finding(
        id=f"F{number}",
        type=finding.type,
        word=finding.word or None,
        code=code_of(finding.type) if reading.kind == "ct" else None,
        description="",
        location=location,
        extent=cast(Literal["small", "medium", "large"] | None, finding.extent.strip() or None),
        laterality=_laterality(reading) if len(reported) == 1 else None,
        evidence=(evidence,),
        measurements=_measure(number, reported, study, reading.kind, reference),
        confidence=_unit(finding.confidence),
    )


def _laterality(reading: Reading) -> str | None:
    """The side that the model read for the whole image; it speaks of a finding only when there is just one."""
    side = reading.fields.get("laterality")
    return side.value if side and side.value not in (taxonomy.UNDETERMINED, "unspecified") else None


def _measure(
    number: int, reported: Sequence[FindingReading], study: ImageStudy, kind: str, reference: ImageStudy | None
) -> tuple[Measurement, ...]:
    height, width = study.pixels.shape[1:3]
    boxes = [measurements.clip(finding.bbox, width, height) for finding in reported]
    finding, bbox = reported[number - 1], boxes[number - 1]
    weak = finding.localisation != "box"
    if kind == "ct":
        return measure_lesion(study, bbox, finding.slice_index, weak=weak)
    others = boxes[: number - 1] + boxes[number:]
    return measure_defect(study, bbox, others, weak=weak, reference=reference)


def _defect(finding: Finding, study: ImageStudy) -> Defect:
    height, width = study.pixels.shape[1:3]
    return Defect(
        type=finding.type,
        bbox=finding.evidence[0].bbox,
        image_size=(int(width), int(height)),
        spacing_mm=study.geometry.spacing_mm,
        confidence=finding.confidence,
    )


def box_in_patient(bbox: Box, slice_index: int, geometry: Geometry) -> tuple[Point, Point] | None:
    """First and last corner of a pixel box in patient coordinates (LPS, mm), or None without full geometry.

    Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1.  Its indices name pixel centres, a box its outer edges: hence
    the half pixel.
    """
    if not (geometry.spacing_mm and geometry.orientation and geometry.positions_mm):
        return None
    between_rows, between_columns = geometry.spacing_mm
    along_row = np.asarray(geometry.orientation[:3]) * between_columns
    along_column = np.asarray(geometry.orientation[3:]) * between_rows
    origin = np.asarray(geometry.positions_mm[slice_index])

    def corner(x: float, y: float) -> Point:
        a, b, c = origin + along_row * (x - 0.5) + along_column * (y - 0.5)
        return round(float(a), 4), round(float(b), 4), round(float(c), 4)

    return corner(bbox[0], bbox[1]), corner(bbox[2], bbox[3])


def _withheld(reading: Reading) -> Reading:
    """Of a study unlike those that the model was made for, nothing that the model said is reported."""
    undetermined = taxonomy.UNDETERMINED
    return replace(
        reading,
        product_line=None,
        fields={name: FieldReading(undetermined, field.probabilities) for name, field in reading.fields.items()},
        findings=tuple(replace(finding, reported=False) for finding in reading.findings),
    )


# The study as a whole


def _technique(study: ImageStudy, reading: Reading) -> Technique:
    height, width = study.pixels.shape[1:3]
    size = (int(width), int(height))
    geometry = study.geometry
    read_from: dict[str, Literal["model", "header", "geometry", "user"]] = {}
    if geometry.spacing_mm:
        read_from["spacing_mm"] = geometry.spacing_from
    if reading.kind == "defect":
        if reading.product_line:
            read_from["product_line"] = "model"
        return Technique(
            image_size_px=size,
            spacing_mm=geometry.spacing_mm,
            product_line=reading.product_line,
            read_from=read_from,
        )
    fields = {
        name: _field_value(reading.fields[name]) for name in ("region", "plane", "contrast") if name in reading.fields
    }
    read_from |= dict.fromkeys(fields, "model")
    if plane := _plane(geometry):  # geometry beats a guess
        fields["plane"] = FieldValue(value=plane, confidence=1, probabilities={plane: 1})
        read_from["plane"] = "geometry"
    header = {
        "slice_spacing_mm": geometry.slice_spacing_mm,
        "slice_thickness_mm": geometry.slice_thickness_mm,
        "kernel": _text(study.kernel),
        "contrast_agent": _text(study.contrast_agent),
        "body_part": _text(study.body_part),
    }
    read_from |= {name: "header" for name, value in header.items() if value is not None}
    return Technique.model_validate(
        header
        | fields
        | {
            "slice_count": len(study.pixels),
            "slices_read": reading.slices_read,
            "windows": reading.windows,
            "image_size_px": size,
            "spacing_mm": geometry.spacing_mm,
            "read_from": read_from,
        }
    )


def _plane(geometry: Geometry) -> str | None:
    if not geometry.orientation:
        return None
    normal = np.abs(np.cross(geometry.orientation[:3], geometry.orientation[3:]))
    axis = int(normal.argmax())
    return ("sagittal", "coronal", "axial")[axis] if normal[axis] >= OBLIQUE_BELOW else None


def _whole(study: ImageStudy, kind: str, findings: Sequence[Finding]) -> tuple[Measurement, ...]:
    height, width = study.pixels.shape[1:3]
    if kind == "defect":
        count = Measurement(name="defects reported", value=len(findings), unit="1", method="count of findings")
        boxes = [e.bbox for finding in findings for e in finding.evidence]
        return (count, measurements.covered_share(boxes, width, height))
    found = list(measurements.hounsfield_range(study.pixels)) if study.units == "HU" else []
    if (between := study.geometry.slice_spacing_mm) and len(study.pixels) > 1:
        length = len(study.pixels) * between
        found.append(Measurement(name="scanned length", value=length, unit="mm", method="slices times their spacing"))
    return tuple(found)


def _quality_flags(
    study: ImageStudy, reading: Reading, reference: ImageStudy | None, measures: StudyMeasures
) -> tuple[str, ...]:
    flags = [*study.quality_flags, *reading.quality_flags, *measures.quality_flags]
    if measures.region and (region := reading.fields.get("region")) and not region_fits(measures.region, region.value):
        flags.append("region-disagrees")
    if reading.kind_confidence < KIND_UNCERTAIN_BELOW:
        flags.append("kind-uncertain")
    if reading.kind == "defect":
        if reading.product_line is None:
            flags.append("product-line-undetermined")
        if reading.product_line == "board" and reference is None:
            flags.append("no-reference")
        if reference is not None and reference.pixels.shape[1:3] != study.pixels.shape[1:3]:
            flags.append("reference-size-differs")
    return tuple(dict.fromkeys(flags))


def _not_assessed(
    study: ImageStudy, reading: Reading, technique: Technique, reference: ImageStudy | None
) -> Iterable[NotAssessed]:
    if OUT_OF_DOMAIN in reading.quality_flags:
        yield NotAssessed.of("out-of-domain")
    if reading.kind == "defect":
        yield from _defects_not_assessed(reading, reference)
    else:
        yield from _ct_not_assessed(study, reading, technique)
    if not study.geometry.spacing_mm:
        yield NotAssessed.of("scale")


def _defects_not_assessed(reading: Reading, reference: ImageStudy | None) -> Iterable[NotAssessed]:
    code = "other-product" if reading.product_line else "unknown-product"
    for line in reading.lines:
        if line.name != reading.product_line:
            yield NotAssessed.of(code, line=line.name, types=line.types)
    yield NotAssessed.of("other-defects")
    if reading.product_line == "board" and reference is None:
        yield NotAssessed.of("golden-sample")


def _ct_not_assessed(study: ImageStudy, reading: Reading, technique: Technique) -> Iterable[NotAssessed]:
    yield NotAssessed.of("other-findings", types=taxonomy.CT_TYPES)
    if reading.unsure:
        yield NotAssessed.of("unsure-findings", types=reading.unsure)
    yield NotAssessed.of("absence")
    yield NotAssessed.of("history")
    for name, field in reading.fields.items():
        decided_by_geometry = technique.read_from.get(name) == "geometry"
        if name == "covid19" and not _is_chest(technique):
            yield NotAssessed.of("covid19")
        elif field.value == taxonomy.UNDETERMINED and not decided_by_geometry:
            guess, probability = max(field.probabilities.items(), key=lambda item: item[1], default=("", 0.0))
            guessed: dict[str, str | float] = {"guess": guess, "probability": _unit(probability)} if guess else {}
            yield NotAssessed.of("field-guessed" if guess else "field", field=name, **guessed)
    if unread := sorted(set(range(len(study.pixels))) - set(reading.slices_read)):
        yield NotAssessed.of("slices", count=len(unread), total=len(study.pixels), slices=_ranges(unread))
    if study.rejected_sources:
        yield NotAssessed.of("files", count=len(study.rejected_sources))
    if study.units != "HU":
        yield NotAssessed.of("hounsfield")


def _ranges(indices: Sequence[int]) -> str:
    """0-based indices as people count: [0, 1, 2, 5] -> "1–3, 6"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], index]
        else:
            runs.append([index])
    return ", ".join("–".join(str(end + 1) for end in run) for run in runs)


# Small parts


def _is_chest(technique: Technique) -> bool:
    return technique.region is not None and technique.region.value == "chest"


def _field_value(field: FieldReading) -> FieldValue:
    probabilities = {value: _unit(p) for value, p in field.probabilities.items()}
    sure = probabilities.get(field.value, max(probabilities.values(), default=0.0))
    return FieldValue(value=field.value, confidence=sure, probabilities=probabilities)


def _unit(probability: float) -> float:
    """Rounding in float32 can leave [0, 1] by a hair."""
    return min(max(float(probability), 0.0), 1.0)


def _inputs(study: ImageStudy) -> tuple[SourceFile, ...]:
    """The study's files, each once: all frames of one file name the same one."""
    return tuple(dict.fromkeys(study.sources))


def _input(source: SourceFile) -> SourceInput:
    return SourceInput(
        name=_text(source.path) or "",
        sha256=source.sha256,
        media_type=source.media_type,
        page=source.page,
        sop_instance_uid=source.sop_instance_uid,
    )


def _text(words: str | None) -> str | None:
    """File names and headers may hold bytes that are no text (lone surrogates); a report is valid UTF-8."""
    return None if words is None else words.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _picture(study: ImageStudy, index: int, window: tuple[float, float]) -> Picture:
    values = study.pixels[index]
    spacing = study.geometry.spacing_mm
    aspect = spacing[0] / spacing[1] if spacing else 1.0
    if study.units == "HU":
        centre, width = window
        return Picture(inputs.window(values, centre, width), _window_words(centre, width, "HU"), aspect)
    if tiles.is_large(values):
        height, width = values.shape[:2]
        return Picture(tiles.overview(values), _shown_as(values), aspect, (0, 0, width, height))
    if values.dtype == np.uint8:
        return Picture(values, pixel_aspect=aspect)
    low, high = inputs.grey_range(values)
    return Picture(inputs.grey8(values), _window_words((low + high) / 2, high - low), aspect)


def _details(study: ImageStudy, report: Report, overview: Picture) -> dict[str, Picture]:
    """Of a picture that is kept as an overview: the surroundings of each finding, at full size."""
    values = study.pixels[0]
    details = {}
    for finding in report.findings[:MAX_DETAILS]:
        x0, y0, x1, y1 = (round(edge) for edge in around(finding.evidence[0].bbox, overview))
        if max(x1 - x0, y1 - y0) <= MAX_DETAIL_SIDE:
            part = np.ascontiguousarray(values[y0:y1, x0:x1])
            shown = part if part.dtype == np.uint8 else inputs.grey8(part, tiles.grey_span(values))
            details[finding.id] = Picture(shown, _shown_as(values), overview.pixel_aspect, (x0, y0, x1, y1))
    return details


def _is_large(study: ImageStudy) -> bool:
    return study.units == "display" and tiles.is_large(study.pixels[0])


def _shown_as(values: np.ndarray) -> str:
    if values.dtype == np.uint8:
        return ""
    low, high = tiles.grey_span(values)
    return _window_words((low + high) / 2, high - low)


def _window_words(level: float, width: float, unit: str = "") -> str:
    """The grey scale in the notation of viewers, which is the same in every language."""
    return f"WL {level:g} · WW {width:g} {unit}".strip().replace("-", "−")
