"""Which services of this state folder run: each leaves a note while it does, and a note of a dead one is no service."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.owners import is_gone, process_id, this_process
from flows.server import state_folder
from reports.files import atomic_write


@dataclass(frozen=True, slots=True)
class Service:
    """A process that runs for long."""

    name: str  # its command: watch, worker, ...
    owner: str
    since: float
    metrics: int | None = None  # port
    detail: str = ""  # such as the device of a worker

    @property
    def pid(self) -> int:
        return process_id(self.owner)


@contextlib.contextmanager
def running(name: str, *, metrics: int | None = None, detail: str = "") -> Iterator[None]:
    """Leave the note for as long as the block runs. A disk that takes none stops no service."""
    service = Service(name, this_process(), time.time(), metrics, detail)
    path = _folder() / f"{name}-{os.getpid()}.json"
    with contextlib.suppress(OSError):
        atomic_write(path, json.dumps(asdict(service)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def services() -> list[Service]:
    """Those that run; the notes of dead ones are removed."""
    found = []
    for path in sorted(_folder().glob("[a-z]*.json")):
        try:
            service = Service(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if is_gone(service.owner):
            path.unlink(missing_ok=True)
        else:
            found.append(service)
    return found


def _folder() -> Path:
    folder = state_folder() / "services"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
