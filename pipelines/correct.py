"""A person's corrections of a report become its next version; the report itself stays as it is.

A person's word stands. Where text and structured findings of the new version contradict each other, that is told, and
the report carries a flag.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from pipelines.run_folder import INDEX, IndexEntry, RunFolder, cannot_write, figures_of
from reports.bundle import Bundle, load_bundle
from reports.language import Contradiction, Sentence, contradictions
from reports.schema import Report
from reports.writing import FormatError, report_formats, write_report

CORRECTED: Final = "corrected"  # the quality flag of a report that a person corrected
CONTRADICTORY: Final = "contradicts-findings"  # of one whose text then does not agree with its findings
FIXED: Final = (
    *("schema_version", "id", "kind", "status", "created", "version", "supersedes", "superseded_by"),
    *("source", "model"),
)


class CorrectionError(ValueError):
    """A correction that cannot be made. The message says what would mend it."""

    code = "bad-correction"


@dataclass(frozen=True, slots=True)
class Change:
    """One value that was changed: where it stands in the report, as in `findings.0.severity`."""

    place: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Correction:
    """The new version."""

    directory: Path
    report: Report
    changes: tuple[Change, ...]
    contradictions: tuple[Contradiction, ...]  # of its text with its findings
    errors: dict[str, str]  # formats that could not be written


def correct(directory: Path, edits: Path) -> Correction:
    """Makes the next version of the report in `directory` by the JSON in the file `edits`.

    The file is a corrected `report.json`, or holds only what changes (JSON Merge Patch, RFC 7396; lists are given
    whole).  The new version is written in the same formats and supersedes the old one.  Raises CorrectionError,
    BundleError and OutputError.
    """
    directory = Path(os.path.abspath(directory))
    bundle = load_bundle(directory)
    if not (directory.parent / INDEX).is_file():
        raise CorrectionError(f"{directory} lies in no output folder: its parent has no {INDEX}. Move it back there.")
    with RunFolder(directory.parent) as folder:
        entry = folder.entry(bundle.report.id)
        if entry is None:
            raise CorrectionError(f"{INDEX} does not name report {bundle.report.id}: make the report again first.")
        if entry.superseded_by:
            raise CorrectionError(
                f"Report {entry.id} was superseded by {entry.superseded_by}: correct that one, in "
                f"{directory.parent / entry.superseded_by}."
            )
        report, changes = corrected(bundle.report, _read(edits))
        doubts = contradictory(report)
        if doubts:
            report = report.model_copy(update={"quality_flags": (*report.quality_flags, CONTRADICTORY)})
        made, errors = _write(directory.parent / report.id, replace(bundle, report=report), entry, folder)
        folder.add(made)
        folder.write_html_index()
    return Correction(directory.parent / report.id, report, changes, doubts, errors)


def corrected(report: Report, edits: dict[str, Any]) -> tuple[Report, tuple[Change, ...]]:
    """The next version of `report` and what changed. Raises CorrectionError."""
    before = report.model_dump(mode="json")
    after = edits if "schema_version" in edits else merge_patch(before, edits)
    if fixed := [name for name in FIXED if after.get(name) != before[name]]:
        raise CorrectionError(f"{', '.join(fixed)} cannot be corrected: leave it as it is in report.json.")
    changes = tuple(_changes(before, after))
    if not changes:
        raise CorrectionError("The correction changes nothing: edit a copy of report.json, or give what is to change.")
    places = {change.place for change in changes}
    if "disposition" in places and "disposition_rule" not in places:
        after = after | {"disposition_rule": None}  # no rule gave it
    digest = hashlib.sha256(json.dumps([report.id, after], sort_keys=True).encode()).hexdigest()
    after = after | {
        "id": digest[:16],
        "version": report.version + 1,
        "supersedes": report.id,
        "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
    }
    try:
        new = Report.model_validate_json(json.dumps(after))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CorrectionError(f"The corrected report is not valid ({faults}).") from None
    flags = (*(flag for flag in new.quality_flags if flag not in (CORRECTED, CONTRADICTORY)), CORRECTED)
    new = new.model_copy(update={"quality_flags": flags})
    ids = [finding.id for finding in new.findings]
    if len(set(ids)) < len(ids):
        raise CorrectionError("Two findings have the same id: give each its own, F1, F2, ...")
    if any(e.input_index >= len(new.source.inputs) for finding in new.findings for e in finding.evidence):
        raise CorrectionError("Evidence names an input that there is not: input_index counts source.inputs from 0.")
    return new, changes


def contradictory(report: Report) -> tuple[Contradiction, ...]:
    """What its impression and the descriptions of its findings say that its structured findings do not."""
    described = (Sentence(finding.description, finding.id) for finding in report.findings)
    return tuple(contradictions(report, [report.impression, *described]))


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects are merged, null takes a member away, everything else replaces what was there."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def _changes(before: Any, after: Any, place: str = "") -> Iterator[Change]:
    """The leaves that differ; a list of another length is one change."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _changes(before.get(name), after.get(name), f"{place}.{name}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _changes(old, new, f"{place}.{index}")
    elif before != after:
        yield Change(place, before, after)


def _read(edits: Path) -> dict[str, Any]:
    try:
        value = json.loads(edits.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorrectionError(f"{edits} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CorrectionError(f"{edits} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CorrectionError(
            f"{edits} holds no JSON object: give a corrected report.json, or what is to change in it."
        )
    return value


def _write(directory: Path, bundle: Bundle, entry: IndexEntry, folder: RunFolder) -> tuple[IndexEntry, dict[str, str]]:
    """Writes the new version in the formats of the old one; returns its line."""
    names = report_formats([name for name in entry.formats if "." not in name])  # not those in other languages
    errors: dict[str, str] = {}
    try:
        files = write_report(directory, bundle, names)
    except FormatError as error:
        files, errors = error.written, error.errors
    except OSError as error:
        raise cannot_write(error) from None
    report = bundle.report
    line = replace(
        entry,
        id=report.id,
        formats={name: str(path.relative_to(folder.path)) for name, path in files.items()},
        errors=errors,
        thumbnail=entry.thumbnail and entry.thumbnail.replace(entry.id, report.id),
        version=report.version,
        supersedes=report.supersedes,
        **figures_of(report),
    )
    return line, errors
