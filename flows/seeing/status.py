"""How everything stands, looked up in one go: ledger, services, schedules, server, disks. Changes nothing."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.ledger import Ledger, LedgerError, State
from flows.machine.server import ServerError, check_server, running_server, waiting_for_server
from flows.machine.space import free_bytes
from flows.schedules.files import Last, next_run, progress, schedules
from flows.seeing.services import Service, services
from pipelines.store import home

LAST_REPORTS = 5


@dataclass(frozen=True, slots=True)
class Folder:
    """An output folder on the ledger."""

    path: str
    counts: dict[State, int]
    oldest: float | None  # when the oldest item was added that is not settled
    last: tuple[tuple[str, float], ...]  # report, when
    free: int | None  # bytes; None: the folder is not on this machine


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A schedule."""

    name: str
    when: str
    zone: str
    window: str | None
    state: str  # active, paused, running
    next: float | None
    last: Last | None


@dataclass(frozen=True, slots=True)
class Status:
    """How everything stands at `time`, seconds since the epoch."""

    time: float
    ledger: bool  # whether it answers
    folders: tuple[Folder, ...]
    services: tuple[Service, ...]
    schedules: tuple[Scheduled, ...]
    server: str | None  # its address, where one of ours runs or the user named one
    state_folder: str
    state_free: int
    trouble: tuple[str, ...] = field(default=())  # what a person should see to

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        for service, each in zip(plain["services"], self.services, strict=True):
            service["pid"] = each.pid
            del service["owner"]
        return plain


def look(out: Path | None = None, url: str | None = None, *, min_free: int = 0) -> Status:
    """Of one output folder, or of all on the ledger."""
    now = time.time()
    folders: tuple[Folder, ...] = ()
    silent: list[str] = []  # what does not answer, in words
    try:
        with Ledger(out or Path(), url) as ledger:
            paths = [ledger.scope] if out else ledger.scopes()
            folders = tuple(_folder(path, url) for path in paths)
    except LedgerError as error:
        silent.append(str(error))
    ledger_answers = not silent
    server = running_server()
    try:
        if server:
            check_server(server)
    except ServerError:
        silent.append(waiting_for_server(server))
    damaged: list[str] = []
    scheduled = tuple(look_at_schedules(now, damaged))
    found = tuple(services())
    state_free = free_bytes(home())
    return Status(
        now,
        ledger_answers,
        folders,
        found,
        scheduled,
        re.sub("//[^/]*@", "//", server) or None,  # without a password
        str(home()),
        state_free,
        (*silent, *_troubles(folders, found, scheduled, state_free, min_free), *damaged),
    )


def _folder(path: str, url: str | None) -> Folder:
    with Ledger(path, url) as ledger:
        last = tuple((row.report or "", row.changed) for row in ledger.last_done(LAST_REPORTS))
        free = free_bytes(Path(path)) if Path(path).is_dir() else None
        return Folder(path, ledger.counts(), ledger.oldest(), last, free)


def look_at_schedules(now: float | None = None, damaged: list[str] | None = None) -> list[Scheduled]:
    """All schedules; what to do about damaged ones is added to `damaged`."""
    now, found = time.time() if now is None else now, []
    for each in schedules(damaged):
        how_far = progress(each)
        state = "running" if how_far.running is not None else "paused" if each.paused else "active"
        window = str(each.timing.window) if each.timing.window else None
        found.append(
            Scheduled(each.name, each.timing.words, each.timing.zone, window, state, next_run(each, now), how_far.last)
        )
    return found


def _troubles(
    folders: tuple[Folder, ...],
    found: tuple[Service, ...],
    scheduled: tuple[Scheduled, ...],
    state_free: int,
    min_free: int,
) -> list[str]:
    said = []
    if any(each.state == "active" for each in scheduled) and not any(each.name == "schedule" for each in found):
        said.append("Nothing runs the schedules: start `scanscribe schedule serve`.")
    for each in scheduled:
        if each.state != "paused" and each.last and each.last.result in ("failed", "died"):
            why = each.last.words or "its process was killed"
            more = f"`scanscribe schedule run {each.name}` says more"
            said.append(f"The last run of the schedule {each.name} failed ({why}): {more}.")
    at_work = [each for each in found if each.name not in ("receive", "schedule")]  # these bring items, and report none
    if any(each.counts["waiting"] + each.counts["failed"] for each in folders) and not at_work:
        said.append(
            "Items wait, and no service reports them: start `scanscribe watch` or `scanscribe worker`, or run the "
            "batch again."
        )
    if low := [each for each in folders if each.free is not None and each.free < min_free]:
        said.append(f"Less than {min_free >> 20} MiB are free for {low[0].path}: no work is taken until there is.")
    if state_free < min_free:
        said.append(f"Less than {min_free >> 20} MiB are free in the state folder: no work is taken until there is.")
    return said
