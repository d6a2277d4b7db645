"""How a job reaches the batch flow: as a file in the state folder, named by its hash.

Prefect keeps and shows the parameters of a flow, so they must not hold paths; the hash says nothing about a patient.
Importing this module does not import prefect.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

from flows.machine.beats import regularly
from flows.machine.server import LocalServer, check_server, import_prefect, lost_server, state_folder
from flows.machine.space import MIN_FREE
from pipelines import run
from pipelines.ingest.identifiers import DEFAULT_PATTERNS
from pipelines.run import Job, Listener, References, RunSummary, check_job
from pipelines.store import is_folder
from pipelines.study import Rejection
from reports.files import atomic_write
from reports.lot.sampling import LotPlan
from reports.rules import DEFAULT_RULES

if TYPE_CHECKING:
    from flows.seeing.seeing import Seeing

Lane = Literal["urgent", "normal", "off-peak"]
KEEP_S: Final = 2.0  # between two looks whether the server lives
LANES: Final[tuple[Lane, ...]] = ("urgent", "normal", "off-peak")  # a worker takes what waits in an earlier one first
_FILES: Final = {"reference": None, "rules": DEFAULT_RULES, "identifiers": DEFAULT_PATTERNS}  # and their defaults


@dataclass(frozen=True, slots=True)
class Crewing:
    """How a batch flow uses workers: it hands its batches to whatever workers serve, by way of the server."""

    lane: Lane = "normal"
    ledger: str | None = None  # URL


@dataclass(frozen=True, slots=True)
class Asked:
    """What a flow is told beside its parameters, by who runs it in this process."""

    server: LocalServer
    listener: Listener | None = None
    crewing: Crewing | None = None
    min_free: int = MIN_FREE
    seen: Seeing | None = None  # who hears of reports and failures


ASKED: ContextVar[Asked] = ContextVar("ASKED")


def run_batch(
    job: Job,
    listener: Listener | None = None,
    crewing: Crewing | None = None,
    *,
    flow_run: UUID | None = None,
    min_free: int = MIN_FREE,
    seen: Seeing | None = None,
) -> RunSummary:
    """Run the job as a Prefect flow in this process, against the machine's server or that of `PREFECT_API_URL`.

    With `crewing` the batches go to workers; `flow_run` is a run that the server has for it already.
    With less than `min_free` bytes on the disk of the reports the flow ends before its next batch (OutputError).

    Raises what `pipelines.run.execute` raises, ServerError and LedgerError.
    """
    check_job(job)
    References(job.reference)  # a golden sample that cannot serve is told now, not after the server is up
    with LocalServer() as server:
        if crewing is None:
            run.load_reader(job.model, job.device)  # both while the server starts
        prefect = import_prefect()
        import httpx
        from prefect.events.clients import PrefectEventsClient
        from prefect.events.worker import EventsWorker

        from flows.batch import batch

        # A file of its own: another run of the same job may end, and remove its own, before this one has read it.
        name, url = save_job(job, secrets.token_hex(4)), server.url()
        ASKED.set(Asked(server, listener, crewing, min_free, seen))
        # What a lost server cannot be told is dropped at once; by default each of its events is tried for 8 s.
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=0)
        logging.getLogger(EventsWorker.__name__).setLevel(logging.CRITICAL)
        try:
            check_server(url)
            with (
                prefect.settings.temporary_settings({prefect.settings.PREFECT_API_URL: url}),
                regularly(server.keep, KEEP_S),
            ):
                summary = batch(name) if flow_run is None else _as_run(flow_run, name)
            if seen is not None:
                _say_refused(job, summary.rejected, seen)
            return summary
        except Exception as error:
            lost = lost_server(url, error) if isinstance(error, httpx.HTTPError) else None  # the client has given up
            if seen is not None:
                seen.log("run-failed", code=str(getattr(lost or error, "code", "fault")))
            if lost:
                raise lost from None
            raise
        finally:
            EventsWorker.drain_all(timeout=10)  # what Prefect has yet to tell the server, before that stops
            _path(name).unlink(missing_ok=True)


def _say_refused(job: Job, rejected: Sequence[Rejection], seen: Seeing) -> None:
    """Log how many inputs a run refused, and notify of it unless the last run of this job refused the same."""
    told = _path(f"{_digest(job)}-refused")
    if not rejected:
        with contextlib.suppress(OSError):
            told.unlink()
        return
    counts = Counter(each.code for each in rejected).most_common()
    codes = ", ".join(f"{code} {count}" for code, count in counts)
    now = {hashlib.sha256(os.fsencode(f"{each.code} {each.path}")).hexdigest()[:16] for each in rejected}
    if seen.tell:
        before: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(told.read_text())
        if new := len(now.difference(before)):
            seen.tell("inputs-refused", count=len(rejected), new=new, codes=codes)
        with contextlib.suppress(OSError):  # a full disk: it is told once more
            atomic_write(told, json.dumps(sorted(now)))
    seen.log("inputs-refused", count=len(rejected), codes=codes)


def _as_run(flow_run: UUID, name: str) -> RunSummary:
    """Run the batch flow as a run that the server has already."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow

    from flows.batch import batch

    with get_client(sync_client=True) as client:
        known = client.read_flow_run(flow_run)
    return run_flow(batch, flow_run=known, parameters={"job": name})  # type: ignore[return-value]  # of a plain flow


def save_job(job: Job, run: str = "") -> str:
    """Keep the job in the state folder, for one run if that is given; returns by what name.

    The name is a hash of the job, 16 hex digits, and the run: the same job has the same hash.
    """
    name = f"{_digest(job)}-{run}" if run else _digest(job)
    _path(name).parent.mkdir(mode=0o700, exist_ok=True)
    atomic_write(_path(name), json.dumps(as_plain(job), sort_keys=True))
    return name


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps(as_plain(job), sort_keys=True).encode()).hexdigest()[:16]


def load_job(name: str) -> Job:
    """The job with that name. Raises FileNotFoundError for one that was never saved here."""
    return from_plain(json.loads(_path(name).read_text(encoding="utf-8")))


def as_plain(job: Job) -> dict[str, Any]:
    """The job as JSON values, with paths that hold in any folder and, for files of the product, on any machine."""
    here = Path.cwd()
    files = {name: getattr(job, name) for name in _FILES}
    return asdict(job) | {
        "inputs": [str(here / path) for path in job.inputs],
        "out": str(here / job.out),
        "model": str(here / job.model) if is_folder(job.model) else job.model,
        **{name: str(here / path) if path and path != _FILES[name] else None for name, path in files.items()},
        "lot": job.lot.model_dump(),
    }


def from_plain(plain: dict[str, Any]) -> Job:
    """The inverse of `as_plain`."""
    return Job(
        **plain
        | {
            "inputs": tuple(map(Path, plain["inputs"])),
            "out": Path(plain["out"]),
            "formats": tuple(plain["formats"]),
            **{name: Path(plain[name]) if plain[name] else default for name, default in _FILES.items()},
            "lot": LotPlan.model_validate(plain["lot"]),
        }
    )


def _path(name: str) -> Path:
    return state_folder() / "jobs" / f"{name}.json"
