"""Files to studies, in two steps: `plan` looks at headers only, `load` decodes one unit of the plan.

Nothing is skipped in silence: a path ends up in a unit, in `Plan.rejections`, in `Plan.passed_over`, or in the
`rejected_sources` of a study.  Importing this package loads neither pydicom nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.ingest.files import FileRef, Found, PassedOver, digests, discover
from pipelines.ingest.refusals import rejected
from pipelines.ingest.units import SeriesVerdict, Unit
from pipelines.study import ImageStudy, Rejection

if TYPE_CHECKING:
    from pipelines.ingest.dicom import Header
    from pipelines.ingest.identifiers import Patterns

__all__ = ["FileRef", "PassedOver", "Plan", "SeriesVerdict", "Unit", "digests", "load", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The units in a fixed order, what was refused, and what was left alone."""

    units: tuple[Unit, ...]
    rejections: tuple[Rejection, ...]
    passed_over: tuple[PassedOver, ...] = ()
    series: tuple[SeriesVerdict, ...] = ()  # of the DICOM files: also those that make no unit


def plan(inputs: Iterable[Path], *, named: bool = True, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Find the studies in files, folders (to any depth) and zip archives from their headers; decodes no pixels.

    Without `named` the inputs are not what a person asked for but what was met in some folder: companions of images
    are passed over, and a DICOMDIR stands for itself, not for the files that it names.
    `progress(done, total)` is called after each file.  Never raises for bad input: a file that cannot be used is in
    `rejections`.  The order of units depends on `inputs` and on file names only.
    """
    met = list(discover((Path(path) for path in inputs), named=named))
    rejections = [item for item in met if isinstance(item, Rejection)]
    passed_over = [item for item in met if isinstance(item, PassedOver)]
    found = [item for item in met if isinstance(item, Found)]
    units: list[Unit] = []
    headers: list[Header] = []
    for number, item in enumerate(found):
        try:
            if item.format == "picture":
                units += _pages(item.ref)
            elif item.format == "dicom":
                from pipelines.ingest.dicom import read_header

                headers.append(read_header(item.ref))
        except Exception as error:  # nothing that a file holds may stop the run
            rejections.append(rejected(item.ref.name, error))
        if progress:
            progress(number + 1, len(found))
    series: tuple[SeriesVerdict, ...] = ()
    if headers:
        from pipelines.ingest.chooser import choose

        chosen = choose(headers)
        series = chosen.series
        units += [each.unit for each in series if each.unit]
        rejections += chosen.rejections
        passed_over += chosen.passed_over
    if documents := [item for item in found if item.format in ("pdf", "text")]:
        from pipelines.ingest.attach import attach

        attached = attach(units, documents)
        units = list(attached.units)
        rejections += attached.rejections
        passed_over += attached.passed_over
    if headers or documents:  # pictures alone are in order
        met_at = {item.ref: number for number, item in enumerate(found)}
        units.sort(key=lambda unit: min(map(met_at.__getitem__, unit.files)))
    return Plan(tuple(units), tuple(rejections), tuple(passed_over), series)


def _pages(ref: FileRef) -> list[Unit]:
    from pipelines.ingest.pictures import count_pages

    pages, called = count_pages(ref)
    if pages == 1:
        return [Unit(ref.basename, "picture", (ref,))]
    return [Unit(f"{ref.basename} {called} {page + 1}", "picture", (ref,), page) for page in range(pages)]


def load(unit: Unit, patterns: Patterns | None = None) -> ImageStudy | Rejection:
    """Decode one unit, with the documents that belong to it and the numbers that `patterns` find there.

    Never raises for bad input: what cannot be decoded comes back as its rejection.
    """
    try:
        from pipelines.ingest.attach import with_documents

        return with_documents(_decode(unit), unit, patterns)
    except Exception as error:  # nothing that a file holds may stop the run
        return rejected(unit.path, error)


def _decode(unit: Unit) -> ImageStudy:
    if unit.kind == "series":
        from pipelines.ingest.series import load_series

        return load_series(unit)
    if unit.kind == "pdf":
        from pipelines.ingest.documents import load_page_picture

        return load_page_picture(unit)
    from pipelines.ingest.pictures import load_picture

    return load_picture(unit.files[0], unit.page, unit.name)
