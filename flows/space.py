"""Room on the disks: work stops before one is full, and goes on when there is space again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
