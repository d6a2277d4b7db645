"""The formats that reports can be written in. A new one is one module with a `render(bundle)` and one line here, or,
in another package, an entry point of the group `scanscribe.formats` that names a `Format`.

A format of the scope "run" is written once over all current reports of an output folder: its function is called as
`write(reports, folder)` with `RunReports` and a folder to put its files into.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Literal

from reports.bundle import Bundle, load_report
from reports.lot.sampling import LotPlan
from reports.schema import Report

ENTRY_POINTS: Final = "scanscribe.formats"
KINDS: Final = ("ct", "defect")


class CannotCarryError(ValueError):
    """A format that cannot carry this report; the message says what it lacks. The other formats are still written."""

    code = "cannot-carry"


class UnknownFormatError(ValueError):
    """A format that is not registered."""

    code = "unknown-format"


@dataclass(frozen=True, slots=True)
class RunReports:
    """The current reports of an output folder, read one by one each time that they are iterated over."""

    folder: Path
    ids: tuple[str, ...]
    lot: LotPlan = field(default_factory=LotPlan)
    language: Literal["en", "zh-CN"] = "en"

    def __iter__(self) -> Iterator[Report]:
        """Raises BundleError at a report that cannot be read."""
        return (load_report(self.folder / report_id) for report_id in self.ids)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a report, or all reports of a run: a file, or a few."""

    name: str
    summary: str  # for `--help`
    filename: str  # of the file, or of the first where there are several
    renderer: str  # module:function, imported when first used: a format that nobody asks for costs nothing
    scope: Literal["report", "run"] = "report"
    also: tuple[str, ...] = ()  # further files of a format over a run, by which the output folder knows its own

    def render(self, bundle: Bundle) -> Mapping[str, bytes]:
        """The files of a report by name. Raises CannotCarryError."""
        rendered = self._function()(bundle)
        return {self.filename: rendered} if isinstance(rendered, bytes) else rendered

    def write(self, reports: RunReports, folder: Path) -> None:
        """Puts the files over a whole run into `folder`. Raises CannotCarryError, BundleError and OSError."""
        self._function()(reports, folder)

    def _function(self) -> Callable[..., Any]:
        module, function = self.renderer.split(":")
        return getattr(import_module(module), function)


BUILT_IN: Final = (
    Format("json", "the report object", "report.json", "reports.writing:render_json"),
    Format("html", "one page with the evidence drawn in", "report.html", "reports.html:render"),
    Format(
        name="csv",
        summary="tables for spreadsheets: a row an image, a row a finding, a row a measurement",
        filename="findings.csv",
        renderer="reports.tables:write_csv",
        scope="run",
        also=("images.csv", "measurements.csv"),
    ),
    Format(
        name="parquet",
        summary="the same tables with typed columns",
        filename="findings.parquet",
        renderer="reports.tables:write_parquet",
        scope="run",
        also=("images.parquet", "measurements.parquet"),
    ),
    Format("coco", "detections with boxes and scores (COCO)", "instances.json", "reports.coco:write", scope="run"),
    Format(
        name="lot",
        summary="verdict on each lot by ISO 2859-1, p-chart, Pareto, defect map",
        filename="lot.html",
        renderer="reports.lot.page:write",
        scope="run",
        also=("lot.json",),
    ),
    Format("pdf", "PDF/A and PDF/UA, to print and to keep", "report.pdf", "reports.pdf:render"),
    Format("md", "Markdown", "report.md", "reports.text:render_markdown"),
    Format("txt", "plain text, to paste into a RIS or an e-mail", "report.txt", "reports.text:render_text"),
    Format("fhir", "FHIR R4B bundle, PDF attached", "report.fhir.json", "reports.fhir:render_r4b"),
    Format("fhir-r5", "FHIR R5 bundle, PDF attached", "report.fhir-r5.json", "reports.fhir:render_r5"),
    Format("sr", "DICOM structured report, TID 1500", "findings.sr.dcm", "reports.dicom.sr:render"),
    Format("sr-text", "DICOM structured report, prose", "narrative.sr.dcm", "reports.dicom.sr_text:render"),
    Format("sc", "DICOM key images", "key-image-001.sc.dcm", "reports.dicom.secondary_capture:render"),
    Format("seg", "DICOM segmentation", "masks.seg.dcm", "reports.dicom.seg:render"),
    Format("dicom-pdf", "PDF in DICOM", "report.pdf.dcm", "reports.dicom.encapsulated_pdf:render"),
)


@cache
def formats() -> Mapping[str, Format]:
    """Every format by its name: the product's own and those of other packages."""
    foreign = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            foreign.append(point.load())
        except Exception as error:  # whatever is wrong with another package, the product's own formats work
            warnings.warn(f"The format {point.name} of another package cannot be loaded: {error}", stacklevel=2)
    return {each.name: each for each in (*foreign, *BUILT_IN)}


def own_files() -> frozenset[str]:
    """The names of the files that formats over a whole run put into the output folder."""
    return frozenset(name for each in formats().values() if each.scope == "run" for name in (each.filename, *each.also))


def run_file_links(folder: Path) -> dict[str, str]:
    """By format, the first file of each format over a whole run that lies in `folder`."""
    over_run = (each for each in formats().values() if each.scope == "run")
    return {each.name: each.filename for each in over_run if (folder / each.filename).is_file()}


def by_reason(errors: Mapping[str, str]) -> dict[str, list[str]]:
    """Why formats could not be written -> their names, from reasons by name."""
    names: dict[str, list[str]] = {}
    for name, reason in errors.items():
        names.setdefault(reason, []).append(name)
    return names


def check_formats(names: Collection[str]) -> None:
    """Raises UnknownFormatError for a name that is not registered, before any work is done."""
    if unknown := [name for name in names if name not in formats()]:
        raise UnknownFormatError(f"unknown format {', '.join(unknown)}; known formats are {', '.join(formats())}")
