"""The ledger: which piece of content is waiting, at work, done or in quarantine, and who works on it until when.

A row is one request (the hash over content, golden sample, model and settings that a run computes) in one scope (an
output folder). SQLite on a local disk by default; PostgreSQL by URL, where several machines work together. The row that
says "done" is written last: what the files of a report say, a row may lag behind, never the other way round.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import sqlalchemy as sql

from flows.ledger.database import Database, LedgerError
from flows.machine.beats import regularly
from flows.machine.owners import is_gone, this_process
from flows.machine.server import state_folder

State = Literal["waiting", "claimed", "done", "failed", "quarantined"]
STATES: Final = ("waiting", "claimed", "done", "failed", "quarantined")
OPEN: Final = ("waiting", "claimed", "failed")  # there is still something to do
LEASE_S: Final = 60.0
TRIES: Final = 5
BACK_OFF_S: Final = 5.0  # before the second try; doubles with each further one
MOST_BACK_OFF_S: Final = 600.0
CHUNK: Final = 500  # rows a statement

_TABLES = sql.MetaData()
_ITEMS = sql.Table(
    "items",
    _TABLES,
    sql.Column("scope", sql.Text, primary_key=True),
    sql.Column("request", sql.String(64), primary_key=True),
    sql.Column("state", sql.String(12), nullable=False),
    sql.Column("files", sql.Text, nullable=False),  # JSON
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("due", sql.Double, nullable=False),  # may be claimed from then on; while claimed: the end of the lease
    sql.Column("token", sql.String(16)),  # of the claim in force
    sql.Column("owner", sql.Text),
    sql.Column("report", sql.String(16)),
    sql.Column("code", sql.Text),
    sql.Column("reason", sql.Text),
    sql.Column("added", sql.Double, nullable=False),
    sql.Column("changed", sql.Double, nullable=False),
    sql.Index("items_due", "scope", "state", "due"),
)
_SEEN = sql.Table(
    "seen",
    _TABLES,
    sql.Column("scope", sql.Text, primary_key=True),
    sql.Column("path", sql.Text, primary_key=True),  # JSON, as names of files need not be text
    sql.Column("size", sql.BigInteger, nullable=False),
    sql.Column("mtime_ns", sql.BigInteger, nullable=False, key="stamp"),
    sql.Column("study", sql.String(16), nullable=False),
    sql.Column("instance", sql.String(16), nullable=False),
)
# Statements of every item are built once.
_DUE = (
    sql.select(_ITEMS.c.request)
    .where(
        _ITEMS.c.scope == sql.bindparam("its_scope"),
        _ITEMS.c.state.in_(OPEN),
        sql.or_(_ITEMS.c.due <= sql.bindparam("now"), _ITEMS.c.due > sql.bindparam("never")),
    )
    .order_by(_ITEMS.c.due, _ITEMS.c.added)
    .limit(sql.bindparam("most"))
    .with_for_update(skip_locked=True)  # SQLite's writers are alone anyway
)
_DUE_ONE = _DUE.where(_ITEMS.c.request == sql.bindparam("its_request"))
_TAKE = (
    sql.update(_ITEMS)
    .where(
        _ITEMS.c.scope == sql.bindparam("its_scope"), _ITEMS.c.request.in_(sql.bindparam("requests", expanding=True))
    )
    .values(attempts=_ITEMS.c.attempts + 1)
    .returning(_ITEMS.c.request, _ITEMS.c.files, _ITEMS.c.attempts)
)
_MINE = sql.update(_ITEMS).where(
    _ITEMS.c.scope == sql.bindparam("its_scope"),
    _ITEMS.c.request == sql.bindparam("its_request"),
    _ITEMS.c.token == sql.bindparam("its_token"),
)
_T = TypeVar("_T")


class LeaseLostError(Exception):
    """The claim is no longer ours: its lease ran out and another owner has the item."""

    code = "lease-lost"


@dataclass(frozen=True, slots=True)
class Claim:
    """An item that is ours until its lease runs out."""

    request: str
    files: tuple[str, ...]
    attempt: int  # from 1
    tries: int  # how many there are
    token: str

    @property
    def last(self) -> bool:
        """Whether a failure of this attempt is one for good."""
        return self.attempt >= self.tries

    @property
    def exhausted(self) -> bool:
        """Whether every attempt ended with the death of its process: put it in quarantine, do not try it."""
        return self.attempt > self.tries


@dataclass(frozen=True, slots=True)
class Row:
    """What the ledger says about an item. Times are seconds since the epoch."""

    request: str
    state: State
    files: tuple[str, ...]
    attempts: int
    due: float  # waiting, failed: not before; claimed: the end of the lease
    owner: str | None
    report: str | None  # the id of the report, when done
    code: str | None  # of the last failure
    reason: str | None
    added: float
    changed: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Seen:
    """A file whose content is on record, so that a restart need not read it again."""

    path: str
    size: int
    stamp: int  # when it last changed, in nanoseconds: its content, or all that the system keeps of it
    study: str = ""  # hash of its Study Instance UID
    instance: str = ""  # hash of its SOP Instance UID


class Ledger:
    """The items of one scope. Safe to use from several threads, processes and, with PostgreSQL, machines.

    `scope` is the output folder. Without `url` the ledger is `ledger.db` in the state folder. `clock` gives seconds
    since the epoch; machines that share a ledger must agree on the time to within a fraction of the lease.  Raises
    LedgerError, as all its methods do.
    """

    def __init__(
        self,
        scope: Path | str,
        url: str | None = None,
        *,
        owner: str | None = None,
        lease_s: float = LEASE_S,
        tries: int = TRIES,
        back_off_s: float = BACK_OFF_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.scope = os.fsencode(os.path.realpath(scope)).decode("utf-8", "backslashreplace")
        self.owner = owner or this_process()
        self.lease_s, self.tries, self.back_off_s = lease_s, tries, back_off_s
        self._clock = clock
        self._database = Database(url or f"sqlite:///{state_folder() / 'ledger.db'}", _TABLES)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, items: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Put (request, files) on record as waiting; a request that is there stays as it is."""
        now = self._clock()
        rows = [
            {
                "scope": self.scope,
                "request": request,
                "state": "waiting",
                "files": _plain(files),
                "attempts": 0,
                "due": now,
                "added": now,
                "changed": now,
            }
            for request, files in items
        ]

        def work(connection: sql.Connection) -> None:
            for chunk in _chunks(rows):
                connection.execute(self._database.insert(_ITEMS).on_conflict_do_nothing(), chunk)

        self._database.run(work)

    def claim(self, limit: int = 1, *, request: str | None = None) -> list[Claim]:
        """Take up to `limit` items that are due, the oldest first, or that one `request` if it is.

        Due are items that wait, failed ones after their back-off, and those whose owner let the lease run out; also
        those that a clock put on record that was ahead.
        """
        now = self._clock()
        token, asked = secrets.token_hex(8), {"its_request": request}
        due = {"its_scope": self.scope, "now": now, "never": now + self._longest_wait, "most": limit}
        mine = {"owner": self.owner, "token": token, "due": now + self.lease_s, "state": "claimed", "changed": now}

        def work(connection: sql.Connection) -> list[Claim]:
            wanted = connection.scalars(_DUE, due) if request is None else connection.scalars(_DUE_ONE, due | asked)
            chosen = wanted.all()
            rows: list[Any] = []
            for chunk in _chunks(chosen):
                rows += connection.execute(_TAKE, mine | {"its_scope": self.scope, "requests": chunk})
            order = {name: place for place, name in enumerate(chosen)}
            rows.sort(key=lambda row: order[row.request])
            return [Claim(row.request, _files(row.files), row.attempts, self.tries, token) for row in rows]

        return self._database.run(work)

    @property
    def _longest_wait(self) -> float:
        """What is due later than that was put on record by a clock that was ahead: it is due now."""
        return max(MOST_BACK_OFF_S, self.back_off_s) + self.lease_s

    def is_due(self, row: Row) -> bool:
        """Whether somebody may claim an open item."""
        return not 0 < row.due - self._clock() <= self._longest_wait

    def beat(self, claim: Claim) -> None:
        """Extend the lease. Raises LeaseLostError."""
        self._change(claim, due=self._clock() + self.lease_s)

    @contextlib.contextmanager
    def holding(self, *claims: Claim) -> Iterator[None]:
        """Extends the leases of claims three times a lease for as long as the block runs."""
        held = list(claims)

        def beat() -> None:
            with contextlib.suppress(LedgerError):  # it may be back at the next beat
                for claim in list(held):
                    try:
                        self.beat(claim)
                    except LeaseLostError:  # it is done, or lost: the owner hears of that when it is done
                        held.remove(claim)

        with regularly(beat, self.lease_s / 3):
            yield

    def done(self, claim: Claim, report: str) -> None:
        """The report is whole on disk. Raises LeaseLostError."""
        self._change(claim, state="done", report=report, code=None, reason=None, **_FREE)

    def failed(self, claim: Claim, code: str, reason: str) -> None:
        """The attempt failed; another one may do, after a while. Raises LeaseLostError."""
        wait = min(self.back_off_s * 2 ** (claim.attempt - 1), MOST_BACK_OFF_S)
        self._change(claim, state="failed", due=self._clock() + wait, code=code, reason=reason, **_FREE)

    def quarantined(self, claim: Claim, code: str, reason: str) -> None:
        """It failed for good. Raises LeaseLostError."""
        self._change(claim, state="quarantined", code=code, reason=reason, **_FREE)

    def release(self, claim: Claim, **why: str) -> None:
        """Give it back as if it had not been claimed; `code` and `reason` may say why. Raises LeaseLostError."""
        self._change(claim, state="waiting", due=self._clock(), attempts=claim.attempt - 1, **_FREE, **why)

    def hand_over(self) -> int:
        """Make claims due at once whose owner was a process of this machine that is gone; returns how many."""
        now = self._clock()
        mine = _ITEMS.c.scope == self.scope, _ITEMS.c.state == "claimed"

        def work(connection: sql.Connection) -> int:
            owners = connection.scalars(sql.select(_ITEMS.c.owner).where(*mine).distinct())
            gone = [owner for owner in owners if is_gone(owner)]
            taken = sql.update(_ITEMS).where(*mine, _ITEMS.c.owner.in_(gone)).values(due=now)
            return connection.execute(taken).rowcount if gone else 0

        return self._database.run(work)

    def get(self, request: str) -> Row | None:
        """The row of a request."""
        rows = self._rows(_ITEMS.c.request == request)
        return rows[0] if rows else None

    def some(self, requests: Iterable[str]) -> list[Row]:
        """The rows of requests; those without one are left out."""
        return [row for chunk in _chunks(list(requests)) for row in self._rows(_ITEMS.c.request.in_(chunk))]

    def now(self) -> float:
        """The time by which items are due."""
        return self._clock()

    def rows(self, state: State | None = None, *, beginning: str = "") -> list[Row]:
        """All rows, or those in a state, or whose request begins so; the oldest first."""
        wanted = [_ITEMS.c.request.startswith(beginning, autoescape=True)]
        return self._rows(*wanted, *([_ITEMS.c.state == state] if state else []))

    def counts(self) -> dict[State, int]:
        """How many items are in each state."""
        count = sql.select(_ITEMS.c.state, sql.func.count()).where(_ITEMS.c.scope == self.scope)
        found = self._database.run(lambda c: {state: n for state, n in c.execute(count.group_by(_ITEMS.c.state))})
        return {state: found.get(state, 0) for state in STATES}

    def oldest(self) -> float | None:
        """When the oldest item was added that is not settled; None where all are."""
        wanted = sql.select(sql.func.min(_ITEMS.c.added)).where(_ITEMS.c.scope == self.scope, _ITEMS.c.state.in_(OPEN))
        return self._database.run(lambda connection: connection.scalar(wanted))

    def scopes(self) -> list[str]:
        """Every output folder that is on record, of whatever ledger."""
        wanted = sql.select(_ITEMS.c.scope).distinct().order_by(_ITEMS.c.scope)
        return self._database.run(lambda connection: list(connection.scalars(wanted)))

    def last_done(self, count: int) -> list[Row]:
        """The items that were done last, the newest first."""
        return self._rows(_ITEMS.c.state == "done", order=_ITEMS.c.changed.desc(), limit=count)

    def retry(self, requests: Iterable[str]) -> int:
        """Let items wait again with all their tries, unless somebody works on them; returns how many.

        Their files are looked at again.
        """
        now = self._clock()
        again = {"state": "waiting", "attempts": 0, "due": now, "changed": now, "report": None}
        return self._each(sql.update(_ITEMS).values(**again), requests)

    def forget(self, requests: Iterable[str]) -> int:
        """Take items off the record, unless somebody works on them; returns how many. Their reports stay.

        Files that are still there are taken anew by the next watcher that starts.
        """
        return self._each(sql.delete(_ITEMS), requests)

    def seen(self) -> list[Seen]:
        """The files whose content is on record."""
        columns = [column for column in _SEEN.c if column.name != "scope"]
        wanted = sql.select(*columns).where(_SEEN.c.scope == self.scope)
        return self._database.run(lambda c: [Seen(json.loads(row[0]), *row[1:]) for row in c.execute(wanted)])

    def see(self, files: Iterable[Seen]) -> None:
        """Put files on record whose content is."""
        rows = [{"scope": self.scope} | asdict(file) | {"path": json.dumps(file.path)} for file in files]
        insert = self._database.insert(_SEEN)
        values = {name: insert.excluded[name] for name in ("size", "stamp", "study", "instance")}
        put = insert.on_conflict_do_update(index_elements=["scope", "path"], set_=values)

        def work(connection: sql.Connection) -> None:
            for chunk in _chunks(rows):
                connection.execute(put, chunk)

        self._database.run(work)

    def unsee(self, paths: Iterable[str]) -> None:
        """Take files off the record: they are gone, or to be looked at again."""
        self._database.run(lambda connection: self._unsee(connection, list(paths)))

    def _unsee(self, connection: sql.Connection, paths: list[str]) -> None:
        for chunk in _chunks([json.dumps(path) for path in paths]):
            connection.execute(sql.delete(_SEEN).where(_SEEN.c.scope == self.scope, _SEEN.c.path.in_(chunk)))

    def _change(self, claim: Claim, **values: Any) -> None:
        mine = {"its_scope": self.scope, "its_request": claim.request, "its_token": claim.token}
        change = mine | values | {"changed": self._clock()}
        if self._database.run(lambda connection: connection.execute(_MINE, change).rowcount) != 1:
            raise LeaseLostError(
                "Another worker has taken the item over: this one was silent for longer than its lease."
            )

    def _rows(
        self, *where: sql.ColumnElement[bool], order: sql.ColumnElement[Any] = _ITEMS.c.added, limit: int | None = None
    ) -> list[Row]:
        columns = [column for column in _ITEMS.c if column.name not in ("scope", "token")]
        wanted = sql.select(*columns).where(_ITEMS.c.scope == self.scope, *where).order_by(order).limit(limit)
        rows = self._database.run(lambda connection: [row._asdict() for row in connection.execute(wanted)])
        return [Row(**row | {"files": _files(row["files"])}) for row in rows]

    def _each(self, change: Any, requests: Iterable[str]) -> int:
        """Change rows that nobody works on, or whose lease has run out, and take their files off what was seen."""
        now, due = self._clock(), _ITEMS.c.due
        lapsed = (due <= now) | (due > now + self._longest_wait)
        mine = _ITEMS.c.scope == self.scope, (_ITEMS.c.state != "claimed") | lapsed

        def work(connection: sql.Connection) -> int:
            count = 0
            for chunk in _chunks(list(requests)):
                rows = *mine, _ITEMS.c.request.in_(chunk)
                files = [
                    file
                    for text in connection.scalars(sql.select(_ITEMS.c.files).where(*rows))
                    for file in _files(text)
                ]
                count += connection.execute(change.where(*rows)).rowcount
                self._unsee(connection, files)
            return count

        return self._database.run(work)


_FREE: Final = {"token": None, "owner": None}


def _plain(files: Sequence[str]) -> str:
    return json.dumps(list(files))


def _files(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _chunks(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
