"""Notifications by webhook: what failed, and critical findings, as signed JSON without a name.

A notification is a file in the state folder before it is sent, and leaves it when the receiver has said 2xx. So it
is sent at least once, whatever is killed, in the order in which things happened; the receiver knows a repeated one by
its id. One that it refuses (4xx) is tried again later and holds up no other. Sending is a thread of its own and never
holds work up.

The signature is in `X-ScanScribe-Signature`: `t=SECONDS,v1=HEX`, HMAC-SHA256 over `SECONDS.BODY` by the secret.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from flows.machine.server import state_folder
from flows.seeing.log import Fact
from pipelines.run_folder import IndexEntry
from reports.files import atomic_write

SECRET_VARIABLE: Final = "SCANSCRIBE_NOTIFY_SECRET"
URL_VARIABLE: Final = "SCANSCRIBE_NOTIFY"  # the default of --notify
SIGNATURE: Final = "X-ScanScribe-Signature"
# What is told when the log hears of it. What must be told before it is on record is told by who puts it there:
# quarantine, critical findings, refused inputs.
EVENTS: Final = frozenset(
    (
        *("run-failed", "disk-low", "disk-low-over", "disk-lost", "disk-lost-over", "broken", "broken-over"),
        *("folder-lost", "folder-lost-over", "run-failed-over"),
    )
)
# CT findings that call a radiologist at once; of defects, the rules say what is critical.
CRITICAL_TYPES: Final = frozenset(
    ("hemorrhage", "free-air", "thrombus-or-embolus", "aneurysm-or-dissection", "laceration-or-injury")
)
TIMEOUT_S: Final = 10.0
FIRST_PAUSE_S: Final = 1.0  # before the second try; doubles with each further one
MOST_PAUSE_S: Final = 300.0
KEEP_S: Final = 7 * 86400.0  # a receiver that is away for longer is told no more
LOOK_S: Final = 1.0  # between looks for notifications that other processes left
# Answers that are about one notification: any of 4xx but a time-out, too early, and too many.
REFUSALS: Final = frozenset(f"HTTP {status}" for status in range(400, 500) if status not in (408, 425, 429))


class NotifyError(Exception):
    """Notifications cannot be sent so. The message says how to mend it."""

    code = "notify"


class Notifier:
    """Sends notifications to one URL; a context manager. Processes with the same URL share one spool and one sender."""

    def __init__(
        self,
        url: str,
        log: Callable[..., None] | None = None,
        *,
        secret: str | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """`log` is told when a receiver fails.  Without `secret` it is the environment's SCANSCRIBE_NOTIFY_SECRET.

        Raises NotifyError.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise NotifyError(f"{url!r} is no address to notify: give one like https://host.example/hook.")
        self._url, self._log = url, log or (lambda event, **facts: None)
        self._secret = (os.environ.get(SECRET_VARIABLE, "") if secret is None else secret).encode()
        self._first_pause = first_pause_s
        self._spool = state_folder() / "notifications" / hashlib.sha256(url.encode()).hexdigest()[:16]
        try:
            self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise NotifyError(f"Notifications cannot be kept in {self._spool.parent} ({error.strerror}).") from None
        self._news, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="notify", daemon=True)

    def __enter__(self) -> Notifier:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is not sent yet is sent by the next process with this URL; one more try is made for a quick receiver."""
        self._over.set()
        self._news.set()
        self._thread.join(TIMEOUT_S)

    def hear(self, event: str, facts: Mapping[str, Fact]) -> None:
        """Keep an event of the log for sending, if it is one to tell: what repeats itself is told the first time."""
        if event in EVENTS and not facts.get("repeats"):
            self.tell(event, **facts)

    def tell(self, event: str, **facts: Fact) -> None:
        """Keep a notification for sending. Facts with the same event and item are the same notification."""
        about = [event, facts.get("item") or time.time_ns(), facts.get("report"), facts.get("attempts")]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        body = {"id": name, "event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}
        with contextlib.suppress(OSError):  # a full disk: the log has it, and work goes before notifications
            atomic_write(self._spool / f"{time.time_ns():020}-{name}.json", json.dumps(body))
        self._news.set()

    @property
    def waiting(self) -> int:
        """How many are still to be sent."""
        return len(self._kept())

    def _kept(self) -> list[Path]:
        return sorted(self._spool.glob("[0-9]*.json"))

    def _send_all(self) -> None:
        """Send what is in the spool, the oldest first, until the end; only one process does at a time."""
        with (self._spool / "sender.lock").open("w") as lock, httpx.Client(timeout=TIMEOUT_S) as client:
            pause = rest = self._first_pause  # for one that fails, and one that refuses some
            refused: dict[str, str] = {}  # by name, and why; not tried until `again`, whatever else is sent meanwhile
            failing, mine, again = "", False, 0.0
            while True:
                over = self._over.is_set()
                mine = mine or _taken(lock)
                if anew := time.monotonic() >= again:
                    refused.clear()
                broken = self._send_kept(client, refused) if mine else ""
                why = broken or next(iter(refused.values()), "")
                if why and why != failing:
                    self._log("notify-failed", reason=why, waiting=self.waiting)
                elif failing and not why:
                    self._log("notify-failed-over")
                failing = why
                if over:
                    return
                if not refused:
                    rest = self._first_pause
                elif anew:
                    again, rest = time.monotonic() + rest, min(2 * rest, MOST_PAUSE_S)
                if broken:
                    self._over.wait(pause)
                    pause = min(2 * pause, MOST_PAUSE_S)
                else:
                    pause = self._first_pause
                    self._news.wait(LOOK_S)
                    self._news.clear()

    def _send_kept(self, client: httpx.Client, refused: dict[str, str]) -> str:
        """Send until the receiver fails; why it did, "" when all are sent but those that it refuses, now or before."""
        for path in self._kept():
            if path.name in refused:
                continue
            try:
                body = path.read_bytes()
            except FileNotFoundError:
                continue
            why = self._send(client, body)
            if why and time.time() - path.stat().st_mtime < KEEP_S:
                if why not in REFUSALS:
                    return why
                refused[path.name] = why
                continue
            if why:
                self._log("notify-given-up", notification=path.stem.partition("-")[2])
            path.unlink(missing_ok=True)
        return ""

    def _send(self, client: httpx.Client, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._secret:
            headers[SIGNATURE] = sign(body, self._secret, int(time.time()))
        try:
            answer = client.post(self._url, content=body, headers=headers)
        except Exception as error:  # whatever a receiver does, the thread lives on
            return type(error).__name__
        return "" if answer.is_success else f"HTTP {answer.status_code}"


def is_critical(entry: IndexEntry) -> bool:
    """Whether a report has a finding that somebody must hear of now."""
    return entry.severity == "critical" or not CRITICAL_TYPES.isdisjoint(entry.types)


def sign(body: bytes, secret: bytes, seconds: int) -> str:
    """The value of the signature's header, as a receiver computes it, too."""
    digest = hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"


def _taken(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
