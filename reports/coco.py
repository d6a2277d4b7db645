"""All reports of a run as COCO detections: `instances.json` with images, annotations and categories, in one pass.

Besides COCO's own keys, an image says its report and disposition, an annotation its finding, severity and score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from reports.formats import RunReports
from reports.schema import Evidence, Finding, Measurement, Report
from reports.taxonomy import CT_TYPES, DEFECT_TYPES

FILE: Final = "instances.json"


def write(reports: RunReports, folder: Path) -> None:
    """Puts `instances.json` into `folder`. Raises BundleError and OSError."""
    categories = {name: number for number, name in enumerate((*DEFECT_TYPES, *CT_TYPES), 1)}  # the same in every run
    images = annotations = 0
    with (
        (folder / FILE).open("w", encoding="utf-8") as file,
        TemporaryFile("w+", encoding="utf-8", dir=folder) as aside,  # annotations, until the images are all written
    ):
        file.write('{"info": {"description": "ScanScribe: findings of preliminary draft reports"},\n"images": [')
        for report in reports:
            for slice_index, image in _images(report):
                images += 1
                _append(file, {"id": images} | image, first=images == 1)
                for finding in report.findings:
                    for evidence in finding.evidence:
                        if evidence.slice_index == slice_index:
                            annotations += 1
                            category = categories.setdefault(finding.type, len(categories) + 1)
                            annotation = {"id": annotations, "image_id": images, "category_id": category}
                            _append(aside, annotation | _annotation(finding, evidence), first=annotations == 1)
        file.write('],\n"annotations": [')
        aside.seek(0)
        while part := aside.read(1 << 20):
            file.write(part)
        file.write('],\n"categories": ')
        json.dump([{"id": number, "name": name} for name, number in categories.items()], file, ensure_ascii=False)
        file.write("}\n")


def _append(file: Any, record: dict[str, Any], *, first: bool) -> None:
    file.write(("\n" if first else ",\n") + json.dumps(record, ensure_ascii=False))


def _images(report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every picture that was looked at or carries evidence, by its slice index."""
    width, height = report.technique.image_size_px
    inputs = report.source.inputs
    owners = {e.slice_index: e.input_index for finding in report.findings for e in finding.evidence}
    for slice_index in sorted({*owners, *report.technique.slices_read}) or [0]:
        # A multi-frame file is one input for all slices; else there is an input a slice.
        owner = owners.get(slice_index, slice_index if len(inputs) > 1 else 0)
        source = inputs[min(owner, len(inputs) - 1)]
        yield (
            slice_index,
            {
                "file_name": source.name,
                "width": width,
                "height": height,
                "date_captured": report.created.isoformat(),
                "slice": slice_index,
                "page": source.page,
                "sha256": source.sha256,
                "report": report.id,
                "version": report.version,
                "supersedes": report.supersedes,
                "lot": report.source.lot,
                "disposition": report.disposition,
                "measurements": _measurements(report.measurements),
                "without_box": [
                    {"finding": f.id, "type": f.type, "severity": f.severity, "score": f.confidence}
                    | {"measurements": _measurements(f.measurements)}
                    for f in report.findings
                    if not f.evidence
                ],
            },
        )


def _annotation(finding: Finding, evidence: Evidence) -> dict[str, Any]:
    (x0, x1), (y0, y1) = sorted(evidence.bbox[::2]), sorted(evidence.bbox[1::2])
    wide, high = x1 - x0, y1 - y0
    return {
        "bbox": [x0, y0, wide, high],
        "area": wide * high,
        "iscrowd": 0,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "score": finding.confidence,
        "finding": finding.id,
        "severity": finding.severity,
        "localisation": evidence.localisation,
        "measurements": _measurements(finding.measurements),
    }


def _measurements(measurements: tuple[Measurement, ...]) -> list[dict[str, Any]]:
    return [{"name": m.name, "value": m.value, "unit": m.unit} for m in measurements]
