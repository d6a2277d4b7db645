"""What services say while they run: one line an event on standard error, for people or as JSON.

Facts are hashes, report ids, codes and counts; names of files and what stands in headers can name a patient.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

Fact = str | int | float | None
Hearer = Callable[[str, Mapping[str, Fact]], None]


class EventLog:
    """Writes events as `2026-01-31T12:00:00Z reported report=0123456789abcdef files=1`, or as a JSON object a line.

    With `silent` nothing is written.  Each event also goes to the `hearers`: metrics, notifications.  Safe to call from
    several threads.
    """

    def __init__(self, *, as_json: bool = False, silent: bool = False, hearers: tuple[Hearer, ...] = ()) -> None:
        self._as_json, self._silent, self._hearers = as_json, silent, hearers
        self._lock = threading.Lock()

    def __call__(self, event: str, **facts: Fact) -> None:
        known = {name: value for name, value in facts.items() if value is not None}
        if not self._silent:
            self._write(event, known)
        for hear in self._hearers:
            hear(event, known)

    def _write(self, event: str, known: Mapping[str, Fact]) -> None:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._as_json:
            line = json.dumps({"time": moment, "event": event, **known})
        else:
            words = (
                f"{name}={json.dumps(value) if ' ' in str(value) or not str(value).isprintable() else value}"
                for name, value in known.items()
            )
            line = " ".join((moment, event, *words))
        with self._lock:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
