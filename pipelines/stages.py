"""The three stages of a run: a unit is opened, read by the model together with others, and written.

All threads that bring units share them: while the model reads some, the next ones are decoded, and the reports of
former ones are written. Of how much is under way at a time, in units and in bytes, there is one count for all.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from pipelines.desk import Opened
from pipelines.ingest import Unit

MOST_OPEN: Final = 2 << 30  # bytes of decoded pixels, above which nothing more is opened
# What a file takes when it is decoded, until the first of its kind is: a slice of 512 x 512, a photo of 12 megapixels.
A_FILE: Final = {"series": 512 << 10, "picture": 36 << 20, "pdf": 36 << 20}

Open = Callable[[int, Unit], Opened | None]
Read = Callable[[Sequence[Opened]], Sequence[Any]]
Write = Callable[[int, Opened, Any], None]


@dataclass(frozen=True, slots=True)
class Width:
    """How much goes on at a time."""

    under_way: int  # units, from their opening until their report is written
    openers: int
    together: int  # units that the model reads at once, at most
    writers: int


@dataclass(slots=True, eq=False)
class _Bringing:
    """One call of `run`, and how it goes on with its units."""

    open: Open
    write: Write
    under_way: set[_Passing] = field(default_factory=set)
    over: bool = False
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class _Passing:
    """A unit under way."""

    by: _Bringing
    place: int
    unit: Unit
    size: int  # bytes that it takes or, until it is open, is expected to
    opened: Opened | None = None


class Stages:
    """Takes units through, several at a time. Safe to use from several threads."""

    def __init__(self, read: Read, let_go: Callable[[Opened], None], stopped: threading.Event) -> None:
        """`read` says of each unit what is to be written; `let_go` is told of those that are not written after all.

        When `stopped` is set, only what is being written is brought to its end.
        """
        self._read, self._let_go, self._stopped = read, let_go, stopped
        self._turn = threading.Lock()  # those who bring units do so one after the other
        self._changed = threading.Condition()  # guards what follows
        self._under_way = self._bytes = 0
        self._a_file = dict(A_FILE)
        self._ready: deque[_Passing] = deque()
        self._pools = contextlib.ExitStack()
        self._width: Width | None = None

    def widen(self, width: Width) -> None:
        """How much is to go on at a time from now on."""
        with self._changed:
            if width == self._width:
                return
            self._width = width
            self._openers, self._writers, self._reader = (
                self._pools.enter_context(ThreadPoolExecutor(count, thread_name_prefix=name))
                for count, name in ((width.openers, "open"), (width.writers, "write"), (1, "read"))
            )

    def close(self) -> None:
        """Ends all threads. Nobody may be in `run`."""
        self._pools.close()

    def run(self, units: Iterable[tuple[int, Unit]], open: Open, write: Write) -> None:
        """Take each unit through, in this order as far as they do not overtake each other; an int goes with it.

        `open` gives None for one that needs no reading. Raises what `open`, `write` or the reading raised, when what is
        being written is at its end.
        """
        by = _Bringing(open, write)
        try:
            with self._turn:
                for place, unit in units:
                    if not self._begin(by, place, unit):
                        break
            self._wait_for(by)
        finally:
            by.over = True
            self._wait_for(by)
        if by.error is not None:
            raise by.error

    def _begin(self, by: _Bringing, place: int, unit: Unit) -> bool:
        """Waits until one more may be under way, and lets it begin; False where it shall not."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(by) or self._has_room(unit))
            if self._is_over(by):
                return False
            passing = _Passing(by, place, unit, self._expected(unit))
            try:
                by.under_way.add(passing)
                self._under_way += 1
                self._bytes += passing.size
                self._openers.submit(self._open, passing)
            except BaseException as error:  # no thread can be started, or Ctrl-C
                self._end(passing, error)
        return True

    def _has_room(self, unit: Unit) -> bool:
        assert self._width is not None
        fits = self._under_way < self._width.under_way and self._bytes + self._expected(unit) <= MOST_OPEN
        return fits or not self._under_way

    def _expected(self, unit: Unit) -> int:
        return len(unit.files) * self._a_file[unit.kind]

    def _is_over(self, by: _Bringing) -> bool:
        return by.over or by.error is not None or self._stopped.is_set()

    def _wait_for(self, by: _Bringing) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not by.under_way)

    # Whatever happens to a unit under way, it comes to its end: others wait for that.

    def _open(self, passing: _Passing) -> None:
        try:
            opened = None if self._is_over(passing.by) else passing.by.open(passing.place, passing.unit)
            if opened is None:
                self._end(passing)
                return
            passing.opened = opened
            with self._changed:
                self._bytes += opened.size - passing.size
                passing.size = opened.size
                usual, this = self._a_file[passing.unit.kind], opened.size // len(passing.unit.files)
                self._a_file[passing.unit.kind] = (usual + this) // 2
                self._ready.append(passing)
            self._reader.submit(self._read_ready)
        except BaseException as error:
            self._end(passing, error)

    def _read_ready(self) -> None:
        """Read what is ready, as much as goes together; what becomes ready meanwhile comes with the next call."""
        with self._changed:
            assert self._width is not None
            taken = [self._ready.popleft() for _ in range(min(len(self._ready), self._width.together))]
        going = {each: each.opened for each in taken if each.opened and not self._is_over(each.by)}
        try:
            outcomes = self._read(list(going.values())) if going else ()
            for each, outcome in zip(going, outcomes, strict=True):
                self._writers.submit(self._write, each, outcome)
                taken.remove(each)
        except BaseException as error:
            for each in taken:
                self._end(each, error if each in going else None)
        else:
            for each in taken:
                self._end(each)

    def _write(self, passing: _Passing, outcome: Any) -> None:
        try:
            opened, passing.opened = passing.opened, None
            assert opened is not None
            passing.by.write(passing.place, opened, outcome)
            self._end(passing)
        except BaseException as error:
            self._end(passing, error)

    def _end(self, passing: _Passing, error: BaseException | None = None) -> None:
        """A unit is no longer under way; what of it is open, and was not given to `write`, is let go."""
        by, opened = passing.by, passing.opened
        try:
            if opened is not None:
                passing.opened = None
                self._let_go(opened)
        except BaseException as another:
            error = error or another
        with self._changed:
            by.error = by.error or error
            if passing in by.under_way:
                by.under_way.remove(passing)
                self._under_way -= 1
                self._bytes -= passing.size
            self._changed.notify_all()
