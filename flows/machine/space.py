"""Room on the disks: work stops before one is full or when one is lost, and goes on when it has space again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

MIN_FREE: Final = 1 << 30  # bytes


def free_bytes(folder: Path) -> int:
    """Free space where `folder` lies, or will lie when it is made."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def mount_point(folder: Path) -> Path:
    """Where the disk of `folder` is mounted; for one that does not exist yet, the disk on which it will be made."""
    return next(each for each in (folder, *folder.parents) if os.path.ismount(each) or each == each.parent)


class Room:
    """Whether all disks are there, as at the start, and have room. Says so once when that is not so, and once when it
    is again. For several threads."""

    def __init__(self, disks: Mapping[str, Path], min_free: int, log: Callable[..., None]) -> None:
        """`disks` by what they are for; each has to have `min_free` bytes."""
        self._disks = {what: (folder, mount_point(Path(os.path.realpath(folder)))) for what, folder in disks.items()}
        self._min_free, self._log = min_free, log
        self._lock = threading.Lock()
        self._event = self.words = ""  # what was said last, while it holds

    def __call__(self) -> bool:
        event, words = self._look()
        with self._lock:
            before, self._event, self.words = self._event, event, words
            if before and before != event:
                self._log(f"{before}-over")
            if event and before != event:
                self._log(event, message=words)
        return not event

    def _look(self) -> tuple[str, str]:
        for what, (folder, mount) in self._disks.items():
            try:
                # Below the place of a share that is not mounted any more there is another, local disk.
                lost, free = not os.path.ismount(mount), free_bytes(folder)
            except OSError:
                lost, free = True, 0
            if lost:
                return "disk-lost", f"The disk of the {what} is not there: no work is taken until it is mounted again."
            if free < self._min_free:
                words = (
                    f"Less than {self._min_free >> 20} MiB are free for the {what}: no work is taken until there is."
                )
                return "disk-low", words
        return "", ""
