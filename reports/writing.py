"""A report folder is written: the report, its parts, its thumbnail, and each format that was asked for; and so are the
formats over a whole run."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Final

from reports.bundle import REPORT, Bundle, BundleError, save_parts
from reports.files import all_or_none, clear_leftovers
from reports.formats import CannotCarryError, RunReports, check_formats, formats
from reports.images import thumbnail

THUMBNAIL: Final = "thumb.jpg"


class FormatError(RuntimeError):
    """Some formats of a report could not be written; the others are.

    `errors` says why by format name; `written` are the first files of the formats that are in place.
    """

    code = "format-failed"

    def __init__(self, errors: dict[str, str], written: dict[str, Path]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in errors.items()))
        self.errors = errors
        self.written = written


def write_report(directory: Path, bundle: Bundle, names: Collection[str] = ("json", "html")) -> dict[str, Path]:
    """Writes the report folder: `report.json` and what it takes to render it again, then each format.

    Returns the first file of each format by its name.  Raises UnknownFormatError before anything is written, OSError
    when the disk fails, and FormatError after all other formats are in place when one of them could not be written.
    """
    check_formats(names)
    directory.mkdir(parents=True, exist_ok=True)
    clear_leftovers(directory)
    with all_or_none(directory) as folder:
        save_parts(folder, bundle)
        _write_thumbnail(folder, bundle)
        (folder / REPORT).write_bytes(render_json(bundle))
        written, errors = _render(folder, bundle, names)
    return _in_place(directory, written, errors)


def write_formats(directory: Path, bundle: Bundle, names: Collection[str], *, tag: str = "") -> dict[str, Path]:
    """Writes formats of a report beside what is there already. Returns and raises as `write_report`.

    With a `tag` their files have other names: `report.TAG.html`.
    """
    check_formats(names)
    clear_leftovers(directory)
    with all_or_none(directory) as folder:
        written, errors = _render(folder, bundle, names, tag)
    return _in_place(directory, written, errors)


def _render(
    folder: Path, bundle: Bundle, names: Collection[str], tag: str = ""
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes formats into a folder: by format the name of its first file, and why those that failed did."""
    written: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name in report_formats(names):
        try:
            files = formats()[name].render(bundle)
        except CannotCarryError as error:
            errors[name] = str(error)
            continue
        except Exception as error:  # a renderer's fault must not cost the person the other formats
            errors[name] = fault(error)
            continue
        for filename, data in files.items():
            (folder / _tagged(filename, tag)).write_bytes(data)
        written[name] = _tagged(next(iter(files)), tag)
    return written, errors


def _in_place(directory: Path, written: dict[str, str], errors: dict[str, str]) -> dict[str, Path]:
    """The first file of each format. Raises FormatError."""
    files = {name: directory / filename for name, filename in written.items()}
    if errors:
        raise FormatError(errors, files)
    return files


def fault(error: Exception) -> str:
    """The type of an error that nobody expected, and where it arose; not its words, which can quote a patient's header.

    Those of Python itself on missing modules and attributes quote none, and say what is wrong with a format's renderer.
    """
    if isinstance(error, ImportError | AttributeError):
        return f"{type(error).__name__}: {error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"


def _tagged(filename: str, tag: str) -> str:
    stem, dot, ending = filename.partition(".")
    return f"{stem}.{tag}{dot}{ending}" if tag else filename


def write_run_formats(reports: RunReports, names: Collection[str]) -> dict[str, Path]:
    """Writes the formats among `names` that are over a whole run. Returns and raises as `write_report`."""
    written: dict[str, Path] = {}
    errors: dict[str, str] = {}
    for name in run_formats(names):
        try:
            with all_or_none(reports.folder) as folder:
                formats()[name].write(reports, folder)
        except (CannotCarryError, BundleError) as error:
            errors[name] = str(error)
        except OSError:
            raise
        except Exception as error:  # as above
            errors[name] = fault(error)
        else:
            written[name] = reports.folder / formats()[name].filename
    if errors:
        raise FormatError(errors, written)
    return written


def report_formats(names: Collection[str]) -> tuple[str, ...]:
    """Those of `names` that are written for each report, each once."""
    return tuple(name for name in dict.fromkeys(names) if formats()[name].scope == "report")


def run_formats(names: Collection[str]) -> tuple[str, ...]:
    """Those of `names` that are written once over all reports of a run, each once."""
    return tuple(name for name in dict.fromkeys(names) if formats()[name].scope == "run")


def render_json(bundle: Bundle) -> bytes:
    """The report object as it was made: a later report does not change it. The pictures are not part of it."""
    return bundle.report.model_dump_json(indent=2, exclude={"superseded_by"}).encode("utf-8") + b"\n"


def _write_thumbnail(directory: Path, bundle: Bundle) -> None:
    """The slice with the surest finding, with its boxes; the first picture when there is no finding."""
    slices = bundle.images.slices
    evidence = [e for f in sorted(bundle.report.findings, key=lambda f: -f.confidence) for e in f.evidence]
    shown = next((e.slice_index for e in evidence if e.slice_index in slices), min(slices, default=None))
    if shown is not None:
        boxes = [e.bbox for e in evidence if e.slice_index == shown]
        (directory / THUMBNAIL).write_bytes(thumbnail(slices[shown], boxes))
