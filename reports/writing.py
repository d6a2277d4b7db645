"""Files appear whole or not at all. A report is written in any of the registered formats; a new format is one module
with a `render(report, images)` and one line in `FORMATS`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from reports.images import ReportImages, thumbnail
from reports.schema import Report

THUMBNAIL: Final = "thumb.jpg"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a report."""

    name: str
    filename: str
    renderer: str  # module:function, imported when first used: a format that nobody asks for costs nothing

    def render(self, report: Report, images: ReportImages) -> bytes:
        module, function = self.renderer.split(":")
        rendered: bytes = getattr(import_module(module), function)(report, images)
        return rendered


FORMATS: Final = {
    each.name: each
    for each in (
        Format("json", "report.json", "reports.writing:render_json"),
        Format("html", "report.html", "reports.html:render"),
    )
}


class UnknownFormatError(ValueError):
    """A format that is not registered."""

    code = "unknown-format"


class FormatError(RuntimeError):
    """Some formats of a report could not be rendered; the others are written.

    `errors` says why by format name; `written` are the files that are in place.
    """

    code = "format-failed"

    def __init__(self, errors: dict[str, str], written: dict[str, Path]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in errors.items()))
        self.errors = errors
        self.written = written


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file under a temporary name in the same folder, syncs it and renames it.

    Whatever happens, `path` is the old file, the new one, or absent: never half of one.  Raises OSError (a full disk,
    no right to write); the temporary file is then gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system can do that (Windows cannot open a folder)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_formats(formats: Collection[str]) -> None:
    """Raises UnknownFormatError for a name that is not registered, before any work is done."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UnknownFormatError(f"unknown format {', '.join(unknown)}; known formats are {', '.join(FORMATS)}")


def write_report(
    directory: Path, report: Report, images: ReportImages, formats: Collection[str] = ("json", "html")
) -> dict[str, Path]:
    """Writes the report in each format, and its thumbnail (`thumb.jpg`), into `directory`; returns the files by format.

    Raises UnknownFormatError before anything is written, OSError when the disk fails, and FormatError after all other
    formats are in place when one of them could not be rendered.
    """
    check_formats(formats)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".*.tmp"):  # of a run that was killed; a report folder has one writer
        leftover.unlink(missing_ok=True)
    written: dict[str, Path] = {}
    errors: dict[str, str] = {}
    for name in dict.fromkeys(formats):
        try:
            data = FORMATS[name].render(report, images)
        except Exception as error:  # a renderer's fault must not cost the person the other formats
            errors[name] = f"{type(error).__name__}: {error}"
            continue
        path = directory / FORMATS[name].filename
        atomic_write(path, data)
        written[name] = path
    _write_thumbnail(directory, report, images)
    if errors:
        raise FormatError(errors, written)
    return written


def render_json(report: Report, images: ReportImages) -> bytes:
    """The report object as it is; the pictures are not part of it."""
    return report.model_dump_json(indent=2).encode("utf-8") + b"\n"


def _write_thumbnail(directory: Path, report: Report, images: ReportImages) -> None:
    """The slice with the surest finding, with its boxes; the first picture when there is no finding."""
    evidence = [e for f in sorted(report.findings, key=lambda f: -f.confidence) for e in f.evidence]
    shown = next((e.slice_index for e in evidence if e.slice_index in images.slices), min(images.slices, default=None))
    if shown is not None:
        boxes = [e.bbox for e in evidence if e.slice_index == shown]
        atomic_write(directory / THUMBNAIL, thumbnail(images.slices[shown], boxes))
