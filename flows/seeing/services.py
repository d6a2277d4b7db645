"""Which services of this state folder run. Each keeps a note while it does.

A note of a dead process is no service, nor is one that was not renewed for long: of processes in other containers
nothing else can be told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from flows.machine.beats import regularly
from flows.machine.owners import is_gone, process_id, this_process
from flows.machine.server import state_folder
from reports.files import atomic_write

RENEW_S: Final = 30.0


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
    mark = hashlib.sha256(service.owner.encode()).hexdigest()[:16]
    path = _folder() / f"{name}-{mark}.json"

    def renew() -> None:
        with contextlib.suppress(OSError):
            path.touch() if path.exists() else atomic_write(path, json.dumps(asdict(service)))

    renew()
    try:
        with regularly(renew, RENEW_S):
            yield
    finally:
        path.unlink(missing_ok=True)


def services() -> list[Service]:
    """Those that run; the notes of dead ones are removed."""
    found = []
    for path in sorted(_folder().glob("[a-z]*.json")):
        try:
            service = Service(**json.loads(path.read_text("utf-8")))
            silent = time.time() - path.stat().st_mtime > 4 * RENEW_S
        except (OSError, ValueError, TypeError):
            continue
        if silent or is_gone(service.owner):
            path.unlink(missing_ok=True)
        else:
            found.append(service)
    return found


def _folder() -> Path:
    folder = state_folder() / "services"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
