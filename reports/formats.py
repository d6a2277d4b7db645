"""The formats that a report can be written in. A new one is one module with a `render(bundle)` and one line here, or,
in another package, an entry point of the group `scanscribe.formats` that names a `Format`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

from reports.bundle import Bundle

ENTRY_POINTS: Final = "scanscribe.formats"
KINDS: Final = ("ct", "defect")


class CannotCarryError(ValueError):
    """A format that cannot carry this report; the message says what it lacks. The other formats are still written."""

    code = "cannot-carry"


class UnknownFormatError(ValueError):
    """A format that is not registered."""

    code = "unknown-format"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a report: a file, or a few."""

    name: str
    summary: str  # for `--help`
    filename: str  # of the file, or of the first where there are several
    renderer: str  # module:function, imported when first used: a format that nobody asks for costs nothing

    def render(self, bundle: Bundle) -> Mapping[str, bytes]:
        """The files by name. Raises CannotCarryError."""
        module, function = self.renderer.split(":")
        rendered = getattr(import_module(module), function)(bundle)
        return {self.filename: rendered} if isinstance(rendered, bytes) else rendered


BUILT_IN: Final = (
    Format("json", "the report object", "report.json", "reports.writing:render_json"),
    Format("html", "one page with the evidence drawn in", "report.html", "reports.html:render"),
)


@cache
def formats() -> Mapping[str, Format]:
    """Every format by its name: the product's own and those of other packages."""
    foreign = [point.load() for point in entry_points(group=ENTRY_POINTS)]
    return {each.name: each for each in (*foreign, *BUILT_IN)}


def check_formats(names: Collection[str]) -> None:
    """Raises UnknownFormatError for a name that is not registered, before any work is done."""
    if unknown := [name for name in names if name not in formats()]:
        raise UnknownFormatError(f"unknown format {', '.join(unknown)}; known formats are {', '.join(formats())}")
