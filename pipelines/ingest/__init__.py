"""Files to studies, in two steps: `plan` looks at headers only, `load` decodes one unit of the plan.

Nothing is skipped in silence: a path ends up in a unit, in `Plan.rejections`, in `Plan.passed_over`, or in the
`rejected_sources` of a study.  Importing this package loads neither pydicom nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from pipelines.ingest.files import FileRef, Found, PassedOver, discover
from pipelines.ingest.refusals import rejected
from pipelines.study import ImageStudy, Rejection

__all__ = ["FileRef", "PassedOver", "Plan", "Unit", "load", "plan"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What becomes one report: a CT series, a photo, or one page of a multi-page file. Small and picklable."""

    name: str  # short, for people: "series 3", "tile.png", "scan.tif page 2"
    kind: Literal["series", "picture"]
    files: tuple[FileRef, ...]
    page: int | None = None  # 0-based, for multi-page pictures

    @property
    def path(self) -> str:
        """The file, or the folder or archive that holds the series, as the user named it."""
        first = self.files[0]
        return first.name if len(self.files) == 1 else first.parent


@dataclass(frozen=True, slots=True)
class Plan:
    """The units in a fixed order, what was refused, and what was left alone."""

    units: tuple[Unit, ...]
    rejections: tuple[Rejection, ...]
    passed_over: tuple[PassedOver, ...] = ()


def plan(inputs: Iterable[Path], *, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Find the studies in files, folders (to any depth) and zip archives from their headers; decodes no pixels.

    `progress(done, total)` is called after each file.  Never raises for bad input: a file that cannot be used is in
    `rejections`.  The order of units depends on `inputs` and on file names only.
    """
    met = list(discover(Path(path) for path in inputs))
    rejections = [item for item in met if isinstance(item, Rejection)]
    passed_over = tuple(item for item in met if isinstance(item, PassedOver))
    found = [item for item in met if isinstance(item, Found)]
    units: list[tuple[int, Unit]] = []  # with the number of the first file, which gives the order
    series: dict[object, dict[object, list[tuple[int, FileRef, str]]]] = {}
    for number, item in enumerate(found):
        try:
            if item.format == "picture":
                units += [(number, unit) for unit in _pages(item.ref)]
            else:
                from pipelines.ingest.dicom import read_header

                header = read_header(item.ref)
                stacks = series.setdefault(header.series, {})
                stacks.setdefault(header.stack, []).append((number, item.ref, header.series_number))
        except Exception as error:  # nothing that a file holds may stop the run
            rejections.append(rejected(item.ref.name, error))
        if progress:
            progress(number + 1, len(found))
    for stacks in series.values():
        for part, members in enumerate(stacks.values(), 1):
            first, _, series_number = members[0]
            files = tuple(ref for _, ref, _ in members)
            name = _series_name(files, series_number)
            units.append((first, Unit(name if len(stacks) == 1 else f"{name} part {part}", "series", files)))
    units.sort(key=lambda pair: pair[0])
    return Plan(tuple(unit for _, unit in units), tuple(rejections), passed_over)


def _series_name(files: tuple[FileRef, ...], number: str) -> str:
    if len(files) == 1:
        return files[0].basename
    return f"series {number}" if number else PurePath(files[0].parent).name or "series"


def _pages(ref: FileRef) -> list[Unit]:
    from pipelines.ingest.pictures import count_pages

    pages, called = count_pages(ref)
    if pages == 1:
        return [Unit(ref.basename, "picture", (ref,))]
    return [Unit(f"{ref.basename} {called} {page + 1}", "picture", (ref,), page) for page in range(pages)]


def load(unit: Unit) -> ImageStudy | Rejection:
    """Decode one unit. Never raises for bad input: what cannot be decoded comes back as its rejection."""
    try:
        if unit.kind == "picture":
            from pipelines.ingest.pictures import load_picture

            return load_picture(unit.files[0], unit.page, unit.name)
        from pipelines.ingest.series import load_series

        return load_series(unit.files, unit.name)
    except Exception as error:  # nothing that a file holds may stop the run
        return rejected(unit.path, error)
