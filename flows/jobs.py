"""How a job reaches the batch flow: as a file in the state folder, named by its hash.

Prefect keeps and shows the parameters of a flow, so they must not hold paths; the hash says nothing about a patient.
Importing this module does not import prefect.
"""

from __future__ import annotations

import hashlib
import json
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path

from flows.server import LocalServer, import_prefect, state_folder
from pipelines import run
from pipelines.run import Job, Listener, References, RunSummary, check_job
from reports.files import atomic_write
from reports.lot.sampling import LotPlan

LISTENER: ContextVar[Listener | None] = ContextVar("LISTENER", default=None)  # who watches the flow in this process


def run_batch(job: Job, listener: Listener | None = None) -> RunSummary:
    """Run the job as a Prefect flow in this process, against a server of its own or that of `PREFECT_API_URL`.

    Raises what `pipelines.run.execute` raises, and ServerError.
    """
    check_job(job)
    References(job.reference)  # a golden sample that cannot serve is told now, not after the server is up
    with LocalServer() as server:
        run.load_reader(job.model, job.device)  # both while the server starts
        prefect = import_prefect()
        from prefect.events.worker import EventsWorker

        from flows.batch import batch

        name = save_job(job)
        LISTENER.set(listener)
        try:
            with prefect.settings.temporary_settings({prefect.settings.PREFECT_API_URL: server.url()}):
                return batch(name)
        finally:
            EventsWorker.drain_all(timeout=10)  # what Prefect has yet to tell the server, before that stops
            _path(name).unlink(missing_ok=True)


def save_job(job: Job) -> str:
    """Keep the job in the state folder; returns its hash, 16 hex digits. The same job has the same hash."""
    here = Path.cwd()  # the flow may run elsewhere
    plain = asdict(job) | {
        "inputs": [str(here / path) for path in job.inputs],
        "out": str(here / job.out),
        "reference": str(here / job.reference) if job.reference else None,
        "rules": str(here / job.rules),
        "identifiers": str(here / job.identifiers),
        "lot": job.lot.model_dump(),
    }
    text = json.dumps(plain, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    _path(name).parent.mkdir(mode=0o700, exist_ok=True)
    atomic_write(_path(name), text)
    return name


def load_job(name: str) -> Job:
    """The job with that hash. Raises FileNotFoundError for one that was never saved here."""
    plain = json.loads(_path(name).read_text(encoding="utf-8"))
    return Job(
        **plain
        | {
            "inputs": tuple(map(Path, plain["inputs"])),
            "out": Path(plain["out"]),
            "formats": tuple(plain["formats"]),
            "reference": Path(plain["reference"]) if plain["reference"] else None,
            "rules": Path(plain["rules"]),
            "identifiers": Path(plain["identifiers"]),
            "lot": LotPlan.model_validate(plain["lot"]),
        }
    )


def _path(name: str) -> Path:
    return state_folder() / "jobs" / f"{name}.json"
