"""Items by the ledger's rules: claimed, worked on, to quarantine if they fail for good, and put on record last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flows.ledger import Claim, LeaseLostError, Ledger, LedgerError
from flows.ledger.quarantine import leave_quarantine, quarantine
from flows.machine.server import ServerError
from flows.seeing.log import EventLog
from flows.seeing.notify import is_critical
from pipelines.desk import process_died
from pipelines.ingest import FileRef, Unit
from pipelines.ingest.identifiers import PatternError
from pipelines.ingest.refusals import REMEDIES, MissingPackageError
from pipelines.reading import DeviceLostError
from pipelines.run import Session, UsageError
from pipelines.run_folder import IndexEntry, OutputError
from pipelines.store import ModelError
from pipelines.study import Rejection
from reports.rules import RulesError

# What is wrong with the surroundings, not with an item, and may be over the next time.
TROUBLES: Final = (
    LedgerError,
    OutputError,
    ModelError,
    UsageError,
    RulesError,
    PatternError,
    MissingPackageError,
    ServerError,
    DeviceLostError,
)
PAUSE_S: Final = 2.0  # until an item is asked for again that somebody else had taken
CHANGED: Final = "changed-meanwhile"
# What may be otherwise at the next try. Whatever else is refused is refused for its content.
PASSING: Final = frozenset(
    (
        *("model-failed", "out-of-memory", "unreadable", "not-found", "decoding-timed-out", "golden-sample-unreadable"),
        CHANGED,
    )
)
_CHANGED: Final = "It is not what was planned: the file has changed, or this worker has another model or other rules."
_SAME_EVERYWHERE: Final = "Run again; see that all machines have the same model, rules and version of the program."


@dataclass(slots=True)
class Tally:
    """What a watcher has done since it started."""

    reported: int = 0
    known: int = 0  # content that had its report, or its place in quarantine, before
    refused: int = 0  # in quarantine now
    lacking: int = 0  # reports that lack a format


class Items:
    """Settles the items of one output folder: one at a time, or batches, of which several threads may each have one."""

    def __init__(
        self,
        ledger: Ledger,
        log: EventLog,
        out: Path,
        spare: int,
        interval: float,
        tell: Callable[..., None] | None = None,
        tally: Tally | None = None,
    ) -> None:
        """`spare` bytes stay free when copies go to quarantine; what was given back is due after `interval` seconds.

        `tell` notifies of what went to quarantine and of critical findings, before the ledger has it on record: what a
        death in between costs is a second notification, not the only one.
        """
        self._ledger, self._log, self._out, self._spare, self._interval = ledger, log, out, spare, interval
        self._tell = tell or (lambda event, **facts: None)
        self._kept: dict[str, Claim] = {}  # claims whose work the disk or the ledger broke off
        self._turns = _Turns()
        self._recording = threading.Lock()  # guards the tally and what follows
        self._batches = 0  # that are at work
        self._last = 0.0, 0.0  # when one of their items was done, and what the device had worked by then
        self.tally = tally or Tally()

    def settle(
        self,
        session: Session,
        key: str,
        files: list[str],
        work: Callable[[], IndexEntry | Rejection | None],
        request: Callable[[], str] = lambda: "",
    ) -> float | None:
        """Work on the item `key` if it is due; the time at which to come back to it, or None where it is settled.

        `work` reports it or says why not; with None it is given back untried.  `request` is that of what the files hold
        by then, empty where it cannot be told.  Raises OutputError and LedgerError: the claim is kept then, for the
        next call.
        """
        claim = self._claim(session, key, files)
        if isinstance(claim, float):
            return claim or None
        self._kept[key] = claim  # until it is on record what came of it, whatever breaks that off
        try:
            when = self._attempt(session, claim, files, work, request)
        except LeaseLostError:
            self._log("lease-lost", item=key[:16])
            when = time.time() + PAUSE_S
        except OSError as error:
            raise OutputError(f"The disk failed ({error.strerror}): see that it has space.") from None
        del self._kept[key]
        return when

    def _attempt(
        self,
        session: Session,
        claim: Claim,
        files: list[str],
        work: Callable[[], IndexEntry | Rejection | None],
        request: Callable[[], str],
    ) -> float | None:
        """Work on a claimed item and put on record what came of it."""
        started, busy = time.monotonic(), session.device_seconds
        if claim.exhausted:
            return self._give_up(session, claim, files)
        with self._ledger.holding(claim):
            outcome = work()
            now = outcome.request if isinstance(outcome, IndexEntry) else request()
        if now not in ("", claim.request):
            # The files have changed since they were hashed: what they hold now is an item of its own.
            self._ledger.release(claim)
            self._ledger.forget([claim.request])
            self._log("replaced", item=claim.request[:16])
            return time.time() + self._interval
        if outcome is None:  # not for now
            self._ledger.release(claim)
            return time.time() + self._interval
        return self._record(claim, outcome, files, session.device_seconds - busy, time.monotonic() - started)

    def settle_together(self, session: Session, batch: Sequence[tuple[str, list[str], Unit]]) -> None:
        """Work on what of a batch (key, files, unit) is due: all of it together, then what had a try before by itself.

        For the latter the batches of other threads wait.  What is not on record when one of `TROUBLES` breaks it off,
        or the session is stopped, is given back as if it had not been claimed, with the reason.  Raises `TROUBLES`.
        """
        together: list[tuple[Claim, list[str], Unit]] = []
        alone: list[tuple[int, str, list[str], Unit]] = []
        with self._turns.beside():
            for key, files, unit in batch:
                claim = self._claim_untired(session, key, files)
                if claim is None:
                    continue
                if claim.attempt == 1:
                    together.append((claim, files, unit))
                else:  # one that ends the process would cost the others a try each time: until its turn it is not ours
                    self._ledger.release(claim)
                    alone.append((claim.attempt, key, files, unit))
            if together:
                self._attempt_together(session, together)
        for _, key, files, unit in sorted(alone, key=lambda each: each[0]):  # the one that ends the process comes last
            with self._turns.alone():
                if claim := self._claim_untired(session, key, files):
                    self._attempt_together(session, [(claim, files, unit)])

    def _claim_untired(self, session: Session, key: str, files: list[str]) -> Claim | None:
        """The claim on an item if it is due; one whose tries are used up goes to quarantine instead."""
        claim = self._claim(session, key, files)
        if isinstance(claim, float):
            return None
        if claim.exhausted:
            with self._recording:
                self._give_up(session, claim, files)
            return None
        return claim

    def _give_up(self, session: Session, claim: Claim, files: list[str]) -> float | None:
        """Put on record what came of an item whose tries are used up."""
        if report := session.reported(claim.request):  # the last of them died when that was written
            leave_quarantine(self._out, claim.request)
            self._ledger.done(claim, report)
            return None
        return self._fail(claim, session.conclude(process_died(files[0])), files)

    def _attempt_together(self, session: Session, items: Sequence[tuple[Claim, list[str], Unit]]) -> None:
        """Work on claimed items, all of them together. As `settle_together`."""
        claims = {claim.request: (claim, files) for claim, files, _ in items}
        units = {unit: claim.request for claim, _, unit in items}
        with self._recording:
            if not self._batches:
                self._last = time.monotonic(), session.device_seconds
            self._batches += 1

        def heard(unit: Unit, outcome: IndexEntry | Rejection) -> None:
            with self._recording:
                key = units[unit]
                claim, files = claims[key]
                if isinstance(outcome, IndexEntry) and outcome.request != key:
                    outcome = Rejection(unit.path, CHANGED, _CHANGED, _SAME_EVERYWHERE)
                # They overlap: what counts is the time since the last one was done.
                now, busy = time.monotonic(), session.device_seconds
                (then, before), self._last = self._last, (now, busy)
                try:
                    self._record(claim, outcome, files, busy - before, now - then)
                except LeaseLostError:
                    self._log("lease-lost", item=key[:16])
                del claims[key]

        why: dict[str, str] = {}
        try:
            with self._ledger.holding(*(claim for claim, _ in claims.values())):
                session.process(list(units), heard)
        except OSError as error:
            raise OutputError(f"The disk failed ({error.strerror}): see that it has space.") from None
        except TROUBLES as error:
            why = {"code": error.code, "reason": str(error)}
            raise
        finally:
            with self._recording:
                self._batches -= 1
            for claim, _ in claims.values():
                with contextlib.suppress(LedgerError, LeaseLostError):
                    self._ledger.release(claim, **why)

    def _record(
        self, claim: Claim, outcome: IndexEntry | Rejection, files: list[str], read: float, seconds: float
    ) -> float | None:
        """Put on record what came of a claimed item: `read` seconds of the device and `seconds` in all went into it."""
        item = claim.request[:16]
        if isinstance(outcome, Rejection):
            return self._fail(claim, outcome, files)
        self._ledger.beat(claim)  # whoever has lost it clears and tells nothing
        leave_quarantine(self._out, claim.request)
        if is_critical(outcome):
            types = ",".join(outcome.types)
            self._tell("critical-finding", item=item, report=outcome.id, kind=outcome.kind, types=types)
        self._ledger.done(claim, outcome.id)
        self.tally.reported += 1
        self.tally.lacking += bool(outcome.errors)
        lacks = {"lacks": ",".join(outcome.errors)} if outcome.errors else {}
        self._log(
            "reported",
            item=item,
            report=outcome.id,
            kind=outcome.kind,
            version=outcome.version,
            files=len(files),
            attempt=claim.attempt,
            read=round(read, 6),
            seconds=round(seconds, 3),
            **lacks,
        )
        return None

    def _claim(self, session: Session, key: str, files: list[str]) -> Claim | float:
        """The claim on an item; else when to come back to it, 0 where it is settled."""
        if kept := self._kept.get(key):
            try:
                self._ledger.beat(kept)
                return kept
            except LeaseLostError:
                del self._kept[key]
        self._ledger.add([(key, files)])
        claims = self._ledger.claim(request=key)
        if not claims and self.settled(session, key, files):
            return 0.0
        claims = claims or self._ledger.claim(request=key)
        if claims:
            return claims[0]
        row = self._ledger.get(key)
        return max(row.due if row else 0.0, time.time() + self._interval)

    def settled(self, session: Session, key: str, files: Sequence[str]) -> bool:
        """Whether the report of an item is there, or its place in quarantine; a report that is lost is due again."""
        row = self._ledger.get(key)
        if row is None or row.state not in ("done", "quarantined"):
            return False
        if row.state == "done" and not (row.report and session.reported(key)):
            self._ledger.retry([key])  # the report was superseded or removed, or lacks a format
            return False
        if row.state == "quarantined" and session.reported(key):  # by one who had lost it to whoever gave it up
            self._ledger.retry([key])
            return False
        if row.state == "quarantined" and row.code:
            session.conclude(
                Rejection(files[0], row.code, row.reason or "", REMEDIES.get(row.code, process_died(files[0]).remedy))
            )
        with self._recording:
            self.tally.known += 1
        self._log("known", item=key[:16], state=row.state, report=row.report)
        return True

    def _fail(self, claim: Claim, why: IndexEntry | Rejection, files: list[str]) -> float | None:
        assert isinstance(why, Rejection)
        item = claim.request[:16]
        if not any(map(os.path.lexists, files)):
            self._ledger.release(claim)
            self._ledger.forget([claim.request])
            self._log("vanished", item=item)
            return time.time() + self._interval  # it may be a share that comes back: not seen, so taken anew then
        if why.code in PASSING and not claim.last:
            self._ledger.failed(claim, why.code, why.reason)
            row = self._ledger.get(claim.request)
            self._log("failed", item=item, code=why.code, attempt=claim.attempt)
            return row.due if row else time.time()
        self._ledger.beat(claim)  # whoever has lost it puts nothing into quarantine
        places = [Path(path) for path in files]
        spare = self._spare
        quarantine(self._out, claim.request, places, why, attempts=claim.attempt, spare=spare)
        self._tell("quarantined", item=item, code=why.code, attempts=claim.attempt)
        self._ledger.quarantined(claim, why.code, why.reason)
        self.tally.refused += 1
        self._log("quarantined", item=item, code=why.code, attempts=claim.attempt, files=len(files))
        return None


class _Turns:
    """Batches are at work beside each other, an item that may end the process is at work alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards what follows
        self._beside = self._waiting = 0
        self._alone = False

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Waits until none is alone, nor waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._beside += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nothing else is at work."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._beside)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def let_go(ledger: Ledger, log: EventLog, out: Path, request: str) -> None:
    """Take an item off the record that was refused; what its files hold now is one of its own. Raises LedgerError."""
    leave_quarantine(out, request)
    ledger.forget([request])
    log("replaced", item=request[:16])


def refusal_key(why: Rejection, path: Path) -> str:
    """The hash of what is refused before it has a request: its content, and why."""
    try:
        content = FileRef(str(path)).sha256()
    except Exception:  # it may be just what is wrong with it
        content = str(path)
    return hashlib.sha256(json.dumps(["refused", why.code, content, why.path.partition("!")[2]]).encode()).hexdigest()
