"""How a service is seen while it runs: its log, its metrics, its notifications. All three hear the same events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.ledger import Ledger
from flows.seeing.log import EventLog
from flows.seeing.metrics import Metrics
from flows.seeing.notify import Notifier
from flows.seeing.services import running


@dataclass(frozen=True, slots=True)
class Seeing:
    """What a service tells its events to."""

    log: EventLog
    tell: Callable[..., None] | None  # notifies of what must be told before it is on record
    metrics: Metrics


@contextlib.contextmanager
def seeing(
    service: str,
    *,
    detail: str = "",
    log_json: bool = False,
    silent: bool = False,
    port: int | None = None,
    notify: str | None = None,
    disks: Mapping[str, Path] | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Seeing]:
    """The log of a service, which `scanscribe status` shows while it runs; with `silent` nothing is written.

    With `port` also metrics on it, of `ledger` and `disks` too; with `notify` notifications to that URL.

    Raises MetricsError and NotifyError.
    """
    metrics = Metrics()
    quiet = EventLog(as_json=log_json, silent=silent)
    with contextlib.ExitStack() as stack:
        notifier = stack.enter_context(Notifier(notify, quiet)) if notify else None
        if port is not None:
            metrics.show_disks(disks or {})
            if ledger is not None:
                metrics.show_ledger(ledger)
            if notifier is not None:
                waiting = "Notifications that are still to be sent."
                metrics.show("scanscribe_notifications_waiting", waiting, lambda: notifier.waiting)
        hearers = (metrics.hear, *((notifier.hear,) if notifier else ()))
        log = EventLog(as_json=log_json, silent=silent, hearers=hearers)
        if port is not None:
            endpoint = stack.enter_context(metrics.serve(port))
            port = endpoint.port
            log("metrics", port=port)
        stack.enter_context(running(service, metrics=port, detail=detail))
        yield Seeing(log, notifier.tell if notifier else None, metrics)
