"""Files appear whole or not at all; files that belong together appear together. And what their JSON is made of."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

SYNCED_AT_A_TIME: Final = 16
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
    _sync_one(path.parent)


@contextmanager
def all_or_none(directory: Path) -> Iterator[Path]:
    """Gives a temporary folder in `directory`; what was written into it, in folders too, moves there at the end.

    No file is moved before all are on the disk; when the block raises, none is and the folder is gone.  Raises OSError.
    """
    temporary = directory / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        _sync(files)
        places = [directory / file.relative_to(temporary) for file in files]
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        _sync({directory, *(place.parent for place in places)})
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


def _sync(paths: Collection[Path]) -> None:
    """Waits until files, and the names in folders, would survive a power cut.

    All at a time: the file system writes its journal once for what is asked of it meanwhile.
    """
    if len(paths) == 1:
        _sync_one(*paths)
    elif paths:
        with ThreadPoolExecutor(min(len(paths), SYNCED_AT_A_TIME)) as together:
            list(together.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows cannot open one
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
