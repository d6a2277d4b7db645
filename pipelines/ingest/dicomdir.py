"""DICOMDIR: the files that a medium says it holds (PS3.3 Annex F, PS3.10 section 8), found or named as missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydicom.dataset import Dataset

from pipelines.ingest.dicom import parse
from pipelines.ingest.files import FileRef
from pipelines.ingest.refusals import Refusal
from pipelines.ingest.values import text


def referenced_files(path: Path) -> Iterator[Path | tuple[str, Refusal]]:
    """The files of the file set in the order of its records, or what the record names and why it is no file.

    Names are matched without regard to case, as media and the systems that copy them differ in it.  Raises Refusal
    where it is damaged.
    """
    with FileRef(str(path)).open() as stream:
        directory = parse(stream, stop_before_pixels=True)
    for record in _records(directory):
        parts = [part for part in text(record, "ReferencedFileID").split("\\") if part]
        if not parts:
            continue
        name = "/".join(parts)
        if any(part in (".", "..") or "/" in part or "\0" in part for part in parts):
            yield name, Refusal("path-traversal", "The DICOMDIR names a file outside its own folder.")
        elif found := _find(path.parent, parts):
            yield found
        else:
            yield name, Refusal("missing-from-file-set", "The DICOMDIR names this file, but it is not there.")


def _records(directory: Dataset) -> Iterator[Dataset]:
    try:
        yield from directory.get("DirectoryRecordSequence") or ()
    except Exception as error:  # pydicom meets damaged bytes with errors of many types
        raise Refusal("damaged-file", "The records of the DICOMDIR are damaged.") from error


def _find(folder: Path, parts: list[str]) -> Path | None:
    """The file below `folder`; ISO 9660 names can carry a version behind a semicolon."""
    here = folder
    for part in parts:
        exact = here / part
        if not exact.exists():
            try:
                names = {entry.name.partition(";")[0].rstrip(".").lower(): entry for entry in here.iterdir()}
            except OSError:
                return None
            if part.lower() not in names:
                return None
            exact = names[part.lower()]
        here = exact
    return here if here.is_file() else None
