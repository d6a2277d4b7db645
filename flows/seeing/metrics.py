"""Figures for Prometheus: what services did, from their events, and how things stand, looked up at each scrape.

    scanscribe watch inbox --out reports --metrics 9464
    curl http://127.0.0.1:9464/metrics

The endpoint is on loopback: a scraper on another machine comes by a proxy or an exporter that the owner trusts.
Labels are codes, kinds and states; nothing names a file or a patient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flows.ledger import Ledger
from flows.ledger.database import LedgerError
from flows.machine.space import free_bytes
from flows.seeing.log import Fact

HOST: Final = "127.0.0.1"
_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OUTCOMES: Final = {"reported": "reported", "failed": "failed", "quarantined": "quarantined"}
_RUNS: Final = frozenset(("run-done", "run-stopped", "run-failed", "run-skipped"))


class MetricsError(Exception):
    """The endpoint cannot be opened. The message says how to mend it."""

    code = "metrics"


class Metrics:
    """The figures of one process. `hear` takes its events; as a context manager it serves them on a port."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._reports = Counter("scanscribe_reports", "Reports written.", ["kind"], registry=self.registry)
        self._attempts = Counter(
            "scanscribe_attempts",
            "Attempts to report an item, by what came of them.",
            ["outcome"],
            registry=self.registry,
        )
        self._failures = Counter(
            "scanscribe_failures",
            "Attempts that failed, by code; final: the item went to quarantine.",
            ["code", "final"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "scanscribe_report_seconds",
            "From taking an item up to its report being on record.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._runs = Counter("scanscribe_runs", "Runs of schedules, by result.", ["result"], registry=self.registry)
        self._device = Counter(
            "scanscribe_device_seconds",
            "Seconds of work, by whether the device read or waited for the rest of the machine.",
            ["state"],
            registry=self.registry,
        )
        self._received = Counter(
            "scanscribe_received_instances",
            "DICOM instances that were sent to the receiver, once their association has ended.",
            ["result"],
            registry=self.registry,
        )
        for result in ("stored", "refused"):  # a rate needs its zero
            self._received.labels(result)
        for outcome in _OUTCOMES.values():
            self._attempts.labels(outcome)
        for state in ("busy", "waiting"):
            self._device.labels(state)

    def hear(self, event: str, facts: Mapping[str, Fact]) -> None:
        """Count an event of the log."""
        if outcome := _OUTCOMES.get(event):
            self._attempts.labels(outcome).inc()
        if event == "reported":
            kind, seconds, read = str(facts.get("kind", "")), _number(facts, "seconds"), _number(facts, "read")
            self._reports.labels(kind).inc()
            self._seconds.labels(kind).observe(seconds)
            self._device.labels("busy").inc(read)
            self._device.labels("waiting").inc(max(seconds - read, 0.0))
        elif event == "received":
            self._received.labels("stored").inc(_number(facts, "files"))
            self._received.labels("refused").inc(_number(facts, "refused"))
        elif event == "refused":
            self._failures.labels(str(facts.get("code", "")), "true").inc()
        elif event in _RUNS:
            self._runs.labels(event.removeprefix("run-")).inc(_number(facts, "count") or 1)
        elif event in ("failed", "quarantined"):
            self._failures.labels(str(facts.get("code", "")), str(event == "quarantined").lower()).inc()

    def show(self, name: str, words: str, value: Callable[[], float]) -> None:
        """A figure that is looked up at each scrape."""
        self.registry.register(_Gauges(lambda: [_gauge(name, words, value())]))

    def show_ledger(self, ledger: Ledger) -> None:
        """Queue depth by state, and the age of the oldest item that is not settled."""
        self.registry.register(_Gauges(lambda: _of_ledger(ledger)))

    def show_disks(self, disks: Mapping[str, Path]) -> None:
        """Free space by what is kept there, such as `reports`."""

        def look() -> Iterable[Metric]:
            family = GaugeMetricFamily(
                "scanscribe_disk_free_bytes", "Free space, by what is kept there.", labels=["disk"]
            )
            for name, folder in disks.items():
                family.add_metric([name], free_bytes(folder))
            return [family]

        self.registry.register(_Gauges(look))

    def serve(self, port: int) -> Endpoint:
        """Serve the figures on loopback; a context manager. Port 0 takes a free one.  Raises MetricsError."""
        return Endpoint(self.registry, port)


class Endpoint:
    """`http://127.0.0.1:PORT/metrics`, until the block ends."""

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=HOST, registry=registry)
        except OSError as error:
            raise MetricsError(
                f"Port {port} cannot serve metrics ({error.strerror}): give --metrics a free one."
            ) from None

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Gauges(Collector):
    """Figures that are looked up at each scrape; nothing is looked up to register them."""

    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        return self._look()

    def describe(self) -> Iterable[Metric]:
        return ()


def _of_ledger(ledger: Ledger) -> Iterable[Metric]:
    depth = GaugeMetricFamily("scanscribe_items", "Items on the ledger, by state.", labels=["state"])
    try:
        counts, oldest = ledger.counts(), ledger.oldest()
    except LedgerError:
        return [_gauge("scanscribe_ledger_up", "Whether the ledger answers.", 0)]
    for state, count in counts.items():
        depth.add_metric([state], count)
    age = 0.0 if oldest is None else max(time.time() - oldest, 0.0)
    return [
        _gauge("scanscribe_ledger_up", "Whether the ledger answers.", 1),
        depth,
        _gauge(
            "scanscribe_oldest_item_age_seconds", "Age of the oldest item that is not settled; 0: there is none.", age
        ),
    ]


def _gauge(name: str, words: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, words)
    family.add_metric([], value)
    return family


def _number(facts: Mapping[str, Any], name: str) -> float:
    return float(facts.get(name) or 0.0)
