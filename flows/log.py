"""What services say while they run: one line an event on standard error, for people or as JSON.

Facts are hashes, report ids, codes and counts; names of files and what stands in headers can name a patient.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime


class EventLog:
    """Writes events as `2026-01-31T12:00:00Z reported report=0123456789abcdef files=1`, or as a JSON object a line."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json

    def __call__(self, event: str, **facts: str | int | float | None) -> None:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in facts.items() if value is not None}
        if self._as_json:
            line = json.dumps({"time": moment, "event": event, **known})
        else:
            words = (
                f"{name}={json.dumps(value) if isinstance(value, str) and ' ' in value else value}"
                for name, value in known.items()
            )
            line = " ".join((moment, event, *words))
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
