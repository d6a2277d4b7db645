"""Files appear whole or not at all; files that belong together appear together. And what their JSON is made of."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

_TEMPORARY: Final = re.compile(r"\.(.+\.)?\d+-[0-9a-f]+\.tmp")


def atomic_write(path: Path, data: bytes | str | Iterable[bytes]) -> None:
    """Writes a file, whole or part by part, under a temporary name in the same folder, syncs it and renames it.

    Whatever happens, `path` is the old file, the new one, or absent: never half of one.  Raises OSError (a full disk,
    no right to write); the temporary file is then gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(data, bytes | str):
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
            else:
                file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


@contextmanager
def all_or_none(directory: Path) -> Iterator[Path]:
    """Gives a temporary folder beside the others of `directory`; what was written into it moves there at the end.

    No file is moved before all are on the disk; when the block raises, none is and the folder is gone.  Raises OSError.
    """
    temporary = directory / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, directory / file.name)
        _sync_folder(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Removes what a killed process left of its temporary files; the folder must have one writer."""
    for leftover in directory.glob(".*.tmp"):
        if not is_temporary(leftover.name):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of that name is one of the temporary ones that are made here."""
    return _TEMPORARY.fullmatch(name) is not None


def plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass, for `json.dumps(..., default=plain)`: `asdict` copies all that is in them."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system can do that (Windows cannot open a folder)."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
