"""Hands units to the workers that share a Prefect server, and learns from the ledger what came of them.

Prefect carries a batch to one worker, at least once; the ledger sees to it that each unit in it is reported once. What
a dead worker had claimed is carried to another one when its lease ends, and what it had been sent and not claimed, or
gave back, at once: Prefect takes that for delivered. What a worker that is still there gave back is carried to one
again after as long as a lease. Paths and hashes travel, never pixels.
"""

from __future__ import annotations

import contextvars
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from flows.jobs import LANES, Lane, as_plain
from flows.ledger import Ledger, Row, State
from flows.ledger.items import TROUBLES
from flows.machine.server import LocalServer, ServerError, import_prefect, waiting_for_server
from flows.seeing.log import EventLog
from pipelines.ingest import Unit
from pipelines.run import Job

LEAST_A_BATCH: Final = 8  # units
MOST_OUT: Final = 1024  # units that workers have or wait for
LOOK_S: Final = 1.0  # between two looks for what has to be handed out again
LONELY_S: Final = 10.0  # without news, until it is said that nobody works
PAUSE_S: Final = 2.0  # before the server is tried again
_TROUBLE_CODES: Final = frozenset(each.code for each in TROUBLES)


@dataclass(frozen=True, slots=True)
class Handed:
    """A unit on its way to a worker."""

    request: str
    files: tuple[str, ...]
    unit: Unit


@dataclass(slots=True)
class _Out:
    """A unit that is not settled yet."""

    handed: Handed
    lane: Lane
    since: float = 0.0  # when it was last handed out; 0: it has to be


class Crew:
    """The units of one output folder that workers have, or wait for. Not for several threads at once."""

    def __init__(self, job: Job, ledger: Ledger, server: LocalServer, log: EventLog) -> None:
        self._plain, self._ledger, self._server, self._log = as_plain(job), ledger, server, log
        self._out: dict[str, _Out] = {}
        self._next_look = self._not_before = 0.0
        self._moved = time.monotonic()  # when the ledger last told something new
        self._lonely = self._stuck = self._server_lost = False
        self._told: set[str | None] = set()  # why workers gave something back
        self._present: frozenset[str] = frozenset()  # workers
        self._left = -math.inf  # when the last of them was gone
        self._rows: dict[str, tuple[State, float]] = {}

    def __len__(self) -> int:
        return len(self._out)

    def __contains__(self, request: str) -> bool:
        return request in self._out

    def give(self, units: Sequence[Handed], lane: Lane = "normal") -> None:
        """Put a batch on record and hand it out. Raises LedgerError."""
        self._ledger.add((each.request, each.files) for each in units)
        self._out |= {each.request: _Out(each, lane) for each in units if each.request not in self._out}
        self._hand_out([self._out[each.request] for each in units])

    def settled(self) -> list[tuple[Handed, Row | None]]:
        """What of it is done or in quarantine since the last call; None: its files are gone.

        Raises LedgerError and ServerError; the next call returns what this one would have.
        """
        rows = self._ledger.some(self._out)
        settled: dict[str, Row | None] = {row.request: row for row in rows if row.state in ("done", "quarantined")}
        for request in self._out.keys() - {row.request for row in rows}:  # it was taken off the record
            out = self._out[request]
            if any(map(os.path.lexists, out.handed.files)):
                self._ledger.add([(request, out.handed.files)])
                out.since = 0.0
            else:
                settled[request] = None
        still_open = [row for row in rows if row.request not in settled]
        told = {row.request: (row.state, row.changed) for row in still_open}
        for row in still_open:
            if row.state == "waiting" and row.code in _TROUBLE_CODES and row.reason not in self._told:
                self._told.add(row.reason)
                self._log("broken", message=row.reason, code=row.code)
        now = time.monotonic()
        if settled or told != self._rows:
            self._moved, self._rows = now, told
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look_at_workers(now)
            self._ledger.hand_over()
            stranded = self._stranded(still_open, now)
            size = max(LEAST_A_BATCH, len(stranded) // 16)
            for start in range(0, len(stranded), size):
                self._hand_out(stranded[start : start + size])
        return [(self._out.pop(request).handed, row) for request, row in settled.items()]

    def _look_at_workers(self, now: float) -> None:
        """Notes that one is gone, and says so when there is none or nothing comes from them."""
        present = workers(self._server.url()) if self._out else None
        if present is None:
            return
        # Of all that waits, most is still in the server's queue: it is not handed out twice for each worker of many.
        if now - self._left > self._ledger.lease_s:
            self._left = now if self._present - present else self._left
            self._present = present
        self._present |= present
        lonely = now - self._moved > LONELY_S and not present
        if lonely and not self._lonely:
            self._log("no-worker", message="No worker takes batches: start one with `scanscribe worker`.")
        self._lonely = lonely
        stuck = now - self._moved > self._ledger.lease_s and bool(present)
        if stuck and not self._stuck:
            self._log("no-progress", message="Workers are there, and nothing comes from them: their logs say why.")
        self._stuck = stuck

    def _stranded(self, rows: Iterable[Row], now: float) -> list[_Out]:
        """What no worker has and none will get: to be handed out again."""
        stuck = now - self._moved > self._ledger.lease_s  # a server that was started anew knows nothing of them
        stranded = []
        for row in rows:
            out = self._out[row.request]
            due = row.state in ("claimed", "failed") and self._ledger.is_due(row)
            waiting = row.state == "waiting"
            lately = now - out.since < (PAUSE_S if due else self._ledger.lease_s)
            # A worker gave it back since it was handed out: nothing else changes what waits.
            given_back = self._ledger.lease_s < self._ledger.now() - row.changed < now - out.since
            lost = waiting and (out.since < self._left or given_back or (stuck and not lately))
            if not out.since or lost or (due and not lately):
                stranded.append(out)
        return stranded

    def _hand_out(self, units: Sequence[_Out]) -> None:
        """Let the server carry a batch to a worker; when it cannot, the next look tries again."""
        if not units or time.monotonic() < self._not_before:
            return
        for lane in LANES:
            batch = [each for each in units if each.lane == lane]
            if not batch:
                continue
            try:
                # In a context without the flow: Prefect would send that along, its code and settings with it.
                contextvars.Context().run(_send, self._server.url(), lane, self._plain, [each.handed for each in batch])
            except ServerError:
                raise
            except Exception as error:  # of the network; Prefect has many types for it
                if not self._server_lost:
                    words = waiting_for_server(self._server.url())
                    self._log("server-lost", message=words, error=type(error).__name__)
                self._server_lost = True
                self._not_before = time.monotonic() + PAUSE_S
                return
            if self._server_lost:
                self._server_lost = False
                self._log("server-lost-over")
            for each in batch:
                each.since = time.monotonic()


def _send(url: str, lane: Lane, plain: dict[str, Any], batch: Sequence[Handed]) -> None:
    import_prefect()
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.worker import TASKS

    with temporary_settings({PREFECT_API_URL: url}):
        TASKS[lane].delay(plain, tuple(batch))


def workers(url: str) -> frozenset[str] | None:
    """Names of the workers that the Prefect server at `url` knows; None where it does not answer."""
    try:
        answer = httpx.post(f"{url}/task_workers/filter", json={}, timeout=PAUSE_S).raise_for_status()
        return frozenset(each["identifier"] for each in answer.json())
    except (httpx.HTTPError, ValueError):
        return None
