"""Reports are rendered again from what their folders keep: one, or all of an output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.correct import CORRECTED
from pipelines.run import UsageError, write_over_run
from pipelines.run_folder import INDEX, IndexEntry, RunFolder, cannot_write
from reports.bundle import REPORT, Bundle, BundleError, load_bundle
from reports.formats import check_formats, formats
from reports.lot.sampling import LotPlan
from reports.texts import Language, worded
from reports.writing import FormatError, report_formats, run_formats, write_formats

Tell = Callable[[int, int], None]  # reports done, of how many


@dataclass(frozen=True, slots=True)
class Failure:
    """A format that could not be written."""

    place: str  # the report's folder, or the output folder for a format over all of it
    format: str
    message: str


@dataclass(slots=True)
class ExportSummary:
    """What came of an export."""

    reports: int = 0
    written: int = 0  # formats of single reports
    files: list[str] = field(default_factory=list)  # over whole output folders
    failures: list[Failure] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        failures = [{"place": f.place, "format": f.format, "message": f.message} for f in self.failures]
        return {
            "reports": self.reports,
            "written": self.written,
            "files": self.files,
            "failures": failures,
            "complete": not failures,
        }


def export(
    paths: Sequence[Path],
    names: Sequence[str],
    *,
    language: Language | None = None,
    lot: LotPlan | None = None,
    tell: Tell = lambda done, total: None,
) -> ExportSummary:
    """Writes the formats `names` for each report folder and each output folder among `paths`.

    Without a `language` each report is in its own; in another one, its files are called `report.LANGUAGE.html` and so
    on.  What fails is in the summary and in `index.jsonl`.  Raises UsageError, UnknownFormatError and OutputError.
    """
    check_formats(names)
    if not names:
        raise UsageError(f"There is no format to write: choose from {', '.join(formats())}.")
    wanted = _sort(paths, run_formats(names))
    summary = ExportSummary()
    total = sum(len(ids) for ids in wanted.values())
    for out, ids in wanted.items():
        with RunFolder(out) as folder:
            for report_id in ids:
                entry = folder.entry(report_id)
                files, failed = _render(out / report_id, report_formats(names), language)
                summary.written += len(files)
                summary.failures += [Failure(str(out / report_id), *each) for each in failed.items()]
                if entry is not None and (files or failed):
                    folder.add(_updated(entry, files, failed, out))
                summary.reports += 1
                tell(summary.reports, total)
            if any(Path(os.path.abspath(path)) == out for path in paths):
                done, failed = write_over_run(folder, names, lot or LotPlan(), language or "en")
                summary.files += [str(out / file) for file in done.values()]
                summary.failures += [Failure(str(out), *each) for each in failed.items()]
            if folder.entries:
                folder.write_html_index()
    return summary


def _sort(paths: Sequence[Path], over_run: Sequence[str]) -> dict[Path, list[str]]:
    """The report ids that are meant, by output folder. Raises UsageError."""
    wanted: dict[Path, dict[str, None]] = {}
    for path in (Path(os.path.abspath(path)) for path in paths):
        if (path / REPORT).is_file():
            if over_run:
                raise UsageError(
                    f"{', '.join(over_run)} is written over a whole output folder, and {path} is one report: "
                    f"name {path.parent}."
                )
            wanted.setdefault(path.parent, {})[path.name] = None
        elif (path / INDEX).is_file():
            with RunFolder(path) as folder:
                wanted.setdefault(path, {}).update({entry.id: None for entry in folder.entries})
        else:
            raise UsageError(f"{path} is neither the folder of a report ({REPORT}) nor an output folder ({INDEX}).")
    return {out: list(ids) for out, ids in wanted.items()}


def _render(directory: Path, names: Iterable[str], language: Language | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Writes formats of one report; returns the first file of each, and why the others could not be written."""
    names = tuple(names)
    if not names:
        return {}, {}
    tag = ""
    try:
        bundle = load_bundle(directory)
        if language and language != bundle.report.language:
            tag, bundle = language, _in_language(bundle, language)
        written = write_formats(directory, bundle, names, tag=tag)
    except BundleError as error:
        return {}, dict.fromkeys(names, str(error))
    except FormatError as error:
        written, failed = error.written, error.errors
    except OSError as error:
        raise cannot_write(error) from None
    else:
        failed = {}
    suffix = f".{tag}" if tag else ""
    return {name + suffix: path for name, path in written.items()}, {n + suffix: why for n, why in failed.items()}


def _in_language(bundle: Bundle, language: Language) -> Bundle:
    if CORRECTED in bundle.report.quality_flags:
        raise BundleError("A person corrected this report: its words cannot be made again in another language.")
    return replace(bundle, report=worded(bundle.report, language))


def _updated(entry: IndexEntry, files: dict[str, Path], failed: dict[str, str], out: Path) -> IndexEntry:
    errors = {name: why for name, why in entry.errors.items() if name not in files} | failed
    return replace(entry, formats={name: str(path.relative_to(out)) for name, path in files.items()}, errors=errors)
