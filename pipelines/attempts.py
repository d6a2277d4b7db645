"""Which units a run has under way, so that the next one knows on what it may have died.

Each unit that is begun or ended is a line in a file of the output folder. A process that is killed leaves there what it
had begun: the next run does that last, each by itself, and gives up on one that is the death of `MOST_DEATHS` runs.
Those stay in the file, so that no later run dies of them; without it they are tried again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Final, Literal

from reports.files import atomic_write

UNDER_WAY: Final = ".under-way"
MOST_DEATHS: Final = 3

State = Literal["begun", "ended", "waiting"]


class Attempts:
    """The attempts of one output folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / UNDER_WAY
        self._file: int | None = None  # when the first is begun
        self._lock = threading.Lock()
        self._begun: Counter[str] = Counter()  # the same content may be there twice
        self._deaths = self._left_behind()

    def _left_behind(self) -> dict[str, int]:
        """The requests that a former process has not ended, and how many have died while they were under way."""
        last: dict[str, tuple[int, str]] = {}
        with contextlib.suppress(OSError):
            for line in self._path.read_text("ascii", "replace").splitlines():
                request, deaths, state = [*line.split(), "", "", ""][:3]
                if deaths.isdigit():
                    last[request] = int(deaths), state
        return {name: deaths + (state == "begun") for name, (deaths, state) in last.items() if state != "ended"}

    def deaths(self, request: str) -> int:
        """How many runs have died while it was under way."""
        with self._lock:
            return self._deaths.get(request, 0)

    def begin(self, request: str) -> None:
        """Note that a unit is under way. Raises OSError."""
        with self._lock:
            if self._file is None:
                self._write()
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._begun[request] += 1
            if self._begun[request] == 1:
                self._note(request, self._deaths.get(request, 0), "begun")

    def end(self, request: str) -> None:
        """Note that it no longer is, whatever came of it."""
        with self._lock:
            if not self._begun[request]:
                return
            self._begun[request] -= 1
            if not self._begun[request]:
                del self._begun[request]
                self._deaths.pop(request, None)
                with contextlib.suppress(OSError):  # a full disk: it is done last the next time
                    self._note(request, 0, "ended")

    def _note(self, request: str, deaths: int, state: State) -> None:
        assert self._file is not None
        os.write(self._file, _line(request, deaths, state).encode())  # a process that dies has no time to flush

    def close(self, *, whole: bool) -> None:
        """The run is over; unless it is `whole`, what it has not got to is still to be done last."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                os.close(self._file)
                self._file = None
            if whole:
                self._deaths = {name: deaths for name, deaths in self._deaths.items() if deaths >= MOST_DEATHS}
            if self._deaths:
                self._write()
            else:
                self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        atomic_write(self._path, "".join(_line(name, deaths, "waiting") for name, deaths in self._deaths.items()))


def _line(request: str, deaths: int, state: State) -> str:
    return f"{request} {deaths} {state}\n"
