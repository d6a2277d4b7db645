"""All reports of a run as tables, in CSV and in Parquet: a row an image, a row a finding, a row a measurement.

CSV is for spreadsheets: UTF-8 with a byte order mark (Excel knows it by that alone), RFC 4180, one line a row, and text
that a spreadsheet would take for a formula has an apostrophe before it.  Parquet has the texts as they are.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from reports.formats import RunReports
from reports.schema import Finding, Report
from reports.texts import visible

Row = dict[str, Any]
ROWS_A_GROUP: Final = 10_000  # of a Parquet file: what is held in memory at a time
_FORMULA: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # and their full-width forms


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its columns with their Arrow types, and the rows of a report."""

    name: str
    columns: dict[str, str]
    rows: Callable[[Report], Iterator[Row]]


def _images(report: Report) -> Iterator[Row]:
    source, technique = report.source, report.technique
    first = source.inputs[0]
    yield _key(report) | {
        "created": report.created,
        "language": report.language,
        "title": report.title,
        "page": first.page,
        "sha256": first.sha256,
        "inputs": len(source.inputs),
        "golden_sample": source.reference.name if source.reference else None,
        "study_uid": source.study_uid,
        "series_uid": source.series_uid,
        "accession": source.accession,
        "product_line": technique.product_line,
        "width_px": technique.image_size_px[0],
        "height_px": technique.image_size_px[1],
        "slices": technique.slice_count,
        "row_spacing_mm": technique.spacing_mm[0] if technique.spacing_mm else None,
        "column_spacing_mm": technique.spacing_mm[1] if technique.spacing_mm else None,
        "findings": len(report.findings),
        **{
            severity: sum(f.severity == severity for f in report.findings)
            for severity in ("critical", "major", "minor")
        },
        "types": "; ".join(dict.fromkeys(f.type for f in report.findings)),
        "confidence": max((f.confidence for f in report.findings), default=None),
        "disposition": report.disposition,
        "disposition_rule": report.disposition_rule,
        "impression": report.impression,
        "not_assessed": "; ".join(f"{item.what} ({item.reason})" for item in report.not_assessed),
        "quality_flags": "; ".join(report.quality_flags),
        "status": report.status,
        "supersedes": report.supersedes,
        "model": f"{report.model.name} {report.model.version}",
        "weights_sha256": report.model.weights_sha256,
    }


def _findings(report: Report) -> Iterator[Row]:
    for finding in report.findings:
        place = finding.evidence[0] if finding.evidence else None
        yield _key(report) | {
            "finding": finding.id,
            "type": finding.type,
            "code": f"{finding.code.scheme} {finding.code.value}" if finding.code else None,
            "description": finding.description,
            "severity": finding.severity,
            "disposition": report.disposition,
            "confidence": finding.confidence,
            "location": finding.location,
            "laterality": finding.laterality,
            "boxes": len(finding.evidence),
            "slice": place.slice_index + 1 if place else None,
            "evidence": report.source.inputs[place.input_index].name if place else None,
            **dict(zip(("x0_px", "y0_px", "x1_px", "y1_px"), place.bbox if place else (None,) * 4, strict=True)),
            "localisation": place.localisation if place else None,
            "area_percent": _measured(finding, ("share of the image",), "%"),
            "long_side_mm": _measured(finding, ("long axis", "length"), "mm"),
            "short_side_mm": _measured(finding, ("short axis", "width"), "mm"),
        }


def _measurements(report: Report) -> Iterator[Row]:
    owners = [(finding.id, finding.measurements) for finding in report.findings] + [(None, report.measurements)]
    for finding, measurements in owners:
        for m in measurements:
            yield _key(report) | {
                "finding": finding,
                "name": m.name,
                "value": m.value,
                "unit": m.unit,
                "method": m.method,
            }


def _key(report: Report) -> Row:
    source = report.source
    return {
        "report": report.id,
        "version": report.version,
        "kind": report.kind,
        "image": source.inputs[0].name,
        "lot": source.lot,
        "part": source.part,
        "serial": source.serial,
    }


_KEY: Final = {
    "report": "string",
    "version": "int32",
    "kind": "string",
    "image": "string",
    "lot": "string",
    "part": "string",
    "serial": "string",
}
IMAGES: Final = Table(
    "images",
    _KEY
    | {
        "created": "timestamp[us, tz=UTC]",
        "language": "string",
        "title": "string",
        "page": "int32",
        "sha256": "string",
        "inputs": "int32",
        "golden_sample": "string",
        "study_uid": "string",
        "series_uid": "string",
        "accession": "string",
        "product_line": "string",
        "width_px": "int32",
        "height_px": "int32",
        "slices": "int32",
        "row_spacing_mm": "double",
        "column_spacing_mm": "double",
        "findings": "int32",
        "critical": "int32",
        "major": "int32",
        "minor": "int32",
        "types": "string",
        "confidence": "double",
        "disposition": "string",
        "disposition_rule": "string",
        "impression": "string",
        "not_assessed": "string",
        "quality_flags": "string",
        "status": "string",
        "supersedes": "string",
        "model": "string",
        "weights_sha256": "string",
    },
    _images,
)
FINDINGS: Final = Table(
    "findings",
    _KEY
    | {
        "finding": "string",
        "type": "string",
        "code": "string",
        "description": "string",
        "severity": "string",
        "disposition": "string",
        "confidence": "double",
        "location": "string",
        "laterality": "string",
        "boxes": "int32",
        "slice": "int32",
        "evidence": "string",
        "x0_px": "double",
        "y0_px": "double",
        "x1_px": "double",
        "y1_px": "double",
        "localisation": "string",
        "area_percent": "double",
        "long_side_mm": "double",
        "short_side_mm": "double",
    },
    _findings,
)
MEASUREMENTS: Final = Table(
    "measurements",
    _KEY | {"finding": "string", "name": "string", "value": "double", "unit": "string", "method": "string"},
    _measurements,
)
TABLES: Final = (FINDINGS, IMAGES, MEASUREMENTS)


def write_csv(reports: RunReports, folder: Path) -> None:
    """The tables as `findings.csv`, `images.csv`, `measurements.csv`. Raises BundleError and OSError."""
    with ExitStack() as files:
        writers = []
        for table in TABLES:
            file = files.enter_context((folder / f"{table.name}.csv").open("w", encoding="utf-8-sig", newline=""))
            writers.append(csv.DictWriter(file, list(table.columns)))
            writers[-1].writeheader()
        for report in reports:
            for table, writer in zip(TABLES, writers, strict=True):
                writer.writerows({name: cell(value) for name, value in row.items()} for row in table.rows(report))


def write_parquet(reports: RunReports, folder: Path) -> None:
    """The tables as Parquet files with typed columns. Raises BundleError and OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [pa.schema([(name, _arrow_type(alias)) for name, alias in table.columns.items()]) for table in TABLES]
    with ExitStack() as files:
        writers = [
            files.enter_context(pq.ParquetWriter(folder / f"{table.name}.parquet", schema, compression="zstd"))
            for table, schema in zip(TABLES, schemas, strict=True)
        ]
        stream = iter(reports)
        while batch := list(islice(stream, ROWS_A_GROUP // 10)):
            for table, schema, writer in zip(TABLES, schemas, writers, strict=True):
                rows = [row for report in batch for row in table.rows(report)]
                writer.write_table(pa.Table.from_pylist(rows, schema))


def cell(value: object) -> object:
    """A value as a CSV cell: numbers as they are, text on one line, and never a formula."""
    if not isinstance(value, str):
        return value.isoformat() if hasattr(value, "isoformat") else value
    text = visible(value)
    return f"'{text}" if text.lstrip("' ").startswith(_FORMULA) else text


def _arrow_type(alias: str) -> Any:
    import pyarrow as pa

    return pa.timestamp("us", "UTC") if alias.startswith("timestamp") else pa.type_for_alias(alias)


def _measured(finding: Finding, names: tuple[str, ...], unit: str) -> float | None:
    return next((m.value for m in finding.measurements if m.name in names and m.unit == unit), None)
