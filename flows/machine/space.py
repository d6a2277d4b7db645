"""Room on the disks: work stops before one is full, and goes on when there is space again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

MIN_FREE: Final = 1 << 30  # bytes


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies, or will lie when it is made."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def shortage(disks: Mapping[str, Path], min_free: int) -> str:
    """What to tell a person when one of the disks, by what it is for, has less than `min_free` bytes; else ""."""
    for what, folder in disks.items():
        if free_bytes(folder) < min_free:
            return f"Less than {min_free >> 20} MiB are free for the {what}: no work is taken until there is."
    return ""


class Room:
    """Whether all disks have room. Says so once when one has not, and once when it has again. For several threads."""

    def __init__(self, disks: Mapping[str, Path], min_free: int, log: Callable[..., None]) -> None:
        self._disks, self._min_free, self._log = disks, min_free, log
        self._lock = threading.Lock()
        self.words = ""  # what was said last, while it holds

    def __call__(self) -> bool:
        words = shortage(self._disks, self._min_free)
        with self._lock:
            before, self.words = self.words, words
        if words and words != before:
            self._log("disk-low", message=words)
        elif before and not words:
            self._log("disk-low-over")
        return not words
