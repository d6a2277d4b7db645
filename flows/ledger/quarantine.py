"""The quarantine: for each input that failed for good, copies of its files and a JSON file that says why.

Originals stay where they are; nothing of a user's is moved or deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from flows.machine.space import free_bytes
from pipelines.run_folder import QUARANTINE
from pipelines.study import Rejection
from reports.files import all_or_none, clear_leftovers

REASON: Final = "reason.json"


def quarantine(out: Path, request: str, files: Sequence[Path], why: Rejection, *, attempts: int, spare: int) -> Path:
    """Put an input into `out/quarantine/REQUEST`, 16 digits of the hash; returns that folder. Raises OSError.

    The files are copied if the disk keeps `spare` bytes free; those that are gone or unreadable are just named.
    """
    place = out / QUARANTINE / request[:16]
    place.mkdir(parents=True, exist_ok=True)
    clear_leftovers(place)
    with all_or_none(place) as folder:
        copies = {str(path): _copy(path, folder, number, spare) for number, path in enumerate(files, 1)}
        reason = {
            "item": request,
            "code": why.code,
            "reason": why.reason,
            "remedy": why.remedy,
            "attempts": attempts,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": [{"path": path, "copy": copy} for path, copy in copies.items()],
        }
        (folder / REASON).write_text(json.dumps(reason, indent=1) + "\n", encoding="utf-8")
    return place


def leave_quarantine(out: Path, request: str) -> None:
    """The input has its report now."""
    shutil.rmtree(out / QUARANTINE / request[:16], ignore_errors=True)


def _copy(path: Path, folder: Path, number: int, spare: int) -> str | None:
    """The name of the copy; None where there is none."""
    name = f"{number:04}-{os.fsencode(path.name).decode('utf-8', 'replace')}"
    try:
        if free_bytes(folder) - path.stat().st_size < spare:
            return None
        shutil.copyfile(path, folder / name)
    except OSError:
        (folder / name).unlink(missing_ok=True)
        return None
    return name
