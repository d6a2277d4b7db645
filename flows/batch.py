"""The batch flow: discover the inputs, read and report them batch by batch, export the index, leave a summary.

A task is a batch of pictures or one study, never a slice. What Prefect stores (parameters, names,
artifacts) holds hashes, counts and report ids only: file names can name a patient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.jobs import LISTENER, load_job
from pipelines.ingest import Unit
from pipelines.run import RunSummary, Session

PICTURES_A_BATCH = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """The units of one task."""

    name: str
    units: tuple[Unit, ...]


# One worker: there is one model on one device, and `Session.process` already decodes ahead of it.
@flow(
    name="scanscribe-batch",
    flow_run_name="job-{job}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # its futures are Prefect's own
    persist_result=False,
    validate_parameters=False,
)
def batch(job: str) -> RunSummary:
    """Report every input of the job with that hash (see `flows.jobs`)."""
    with Session(load_job(job), LISTENER.get()) as session:
        batches = group(discover(session))
        done = []
        try:
            for each in batches:
                done.append(read_and_report.with_options(task_run_name=each.name).submit(session, each))
            for future in done:
                future.result()
        except BaseException:
            session.stop()  # let the task that is at work end after the unit it is at
            wait(done)
            raise
        summary = export(session)
    summarise(summary)
    return summary


@task(cache_policy=NO_CACHE, persist_result=False)
def discover(session: Session) -> tuple[Unit, ...]:
    """What there is to report; unusable inputs go to `rejected.jsonl`."""
    return session.discover()


@task(cache_policy=NO_CACHE, persist_result=False)
def read_and_report(session: Session, batch: Batch) -> None:
    """Read the units of one batch with the model and write their reports."""
    session.process(batch.units)


@task(cache_policy=NO_CACHE, persist_result=False)
def export(session: Session) -> RunSummary:
    """Write what is over the whole folder: tables, the lot report, the HTML index."""
    return session.finish()


def group(units: Sequence[Unit]) -> tuple[Batch, ...]:
    """Batches in the order of the units: each study is one, and up to 16 pictures that follow each other are one."""
    batches: list[Batch] = []
    for kind, run in itertools.groupby(units, key=lambda unit: unit.kind):
        size, name = (1, "study") if kind == "series" else (PICTURES_A_BATCH, "pictures")
        members = tuple(run)
        for start in range(0, len(members), size):
            batches.append(Batch(f"batch {len(batches) + 1}: {name}", members[start : start + size]))
    return tuple(batches)


def summarise(summary: RunSummary) -> None:
    """Leave a table of the run with the flow run, without a file name."""
    lines = [
        f"{len(summary.reported)} reported, {len(summary.already_reported)} already there, "
        f"{len(summary.rejected)} refused, {summary.seconds:.1f} s.",
        "",
        "| report | kind | findings | disposition | confidence |",
        "|---|---|---|---|---|",
    ]
    for entry in summary.reported:
        confidence = "" if entry.confidence is None else f"{entry.confidence:.0%}"
        lines.append(f"| {entry.id} | {entry.kind} | {entry.findings} | {entry.disposition or ''} | {confidence} |")
    create_markdown_artifact(key="scanscribe-batch", markdown="\n".join(lines), description="What came of the run")
