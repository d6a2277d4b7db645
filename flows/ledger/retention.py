"""What an output folder keeps for how long: copies in quarantine and superseded versions go, or move to an archive.

A current report never goes, nor does what says why an input was refused (`reason.json`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.ledger.quarantine import REASON
from pipelines.run_folder import QUARANTINE, RunFolder
from reports.bundle import SUPERSEDED

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Expired:
    """Something that was kept for long enough."""

    kind: Literal["quarantine", "superseded"]
    name: str  # the item, or the report
    paths: tuple[Path, ...]
    size: int  # bytes
    since: float  # when it was put there, or superseded; seconds since the epoch


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would go."""

    expired: tuple[Expired, ...]

    @property
    def size(self) -> int:
        return sum(each.size for each in self.expired)

    def count(self, kind: str) -> int:
        return sum(each.kind == kind for each in self.expired)


def expired(folder: RunFolder, days: float, now: float | None = None) -> Pruned:
    """What of an output folder was kept for longer than `days`."""
    before = (time.time() if now is None else now) - days * DAY_S
    found = [*_quarantined(folder.path), *_superseded(folder)]
    return Pruned(tuple(each for each in found if each.since < before))


def prune(out: Path, days: float, *, archive: Path | None = None, dry_run: bool = True) -> Pruned:
    """Delete it, or move it to `archive`. Raises OutputError where the folder is in use, OSError."""
    with RunFolder(out) as folder:
        found = expired(folder, days)
        if dry_run:
            return found
        if archive is not None:
            for each in found.expired:
                for path in each.paths:
                    _copy(path, archive / path.relative_to(out))
        # Off the record first: a folder without a line costs space, a line without its folder would be a lie.
        folder.drop({each.name for each in found.expired if each.kind == "superseded"})
        for each in found.expired:
            for path in each.paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        folder.write_html_index()
    return found


def _quarantined(out: Path) -> Iterator[Expired]:
    for reason in sorted((out / QUARANTINE).glob(f"*/{REASON}")):
        copies = tuple(path for path in sorted(reason.parent.iterdir()) if path.name != REASON)
        if copies:
            yield Expired("quarantine", reason.parent.name, copies, sum(map(_size, copies)), reason.stat().st_mtime)


def _superseded(folder: RunFolder) -> Iterator[Expired]:
    """Also such that an earlier call, which was killed, took off the record only."""
    for note in sorted(folder.path.glob(f"*/{SUPERSEDED}")):
        place, entry = note.parent, folder.entry(note.parent.name)
        if entry is None or entry.superseded_by is not None:
            yield Expired("superseded", place.name, (place,), _size(place), note.stat().st_mtime)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(path) for name in names)


def _copy(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, place, dirs_exist_ok=True)
    else:
        shutil.copy2(path, place)
