"""The batch flow: discover the inputs, read and report them batch by batch, export the index, leave a summary.

A task is a batch of pictures, one study or, for a worker, several; never a slice. What Prefect stores (parameters,
names, artifacts) holds hashes, counts and report ids only: file names can name a patient. Links to reports are in the
summary when the environment says under which address they are served.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from flows.crew import LEAST_A_BATCH, MOST_OUT, Crew, Handed, workers
from flows.jobs import ASKED, Crewing, load_job
from flows.ledger import OPEN, Ledger
from flows.ledger.items import CHANGED, let_go
from flows.machine.server import LocalServer
from flows.machine.space import Room
from flows.seeing.log import EventLog
from flows.seeing.notify import is_critical
from flows.seeing.seeing import Seeing
from pipelines.desk import may_be_gpu
from pipelines.ingest import Unit
from pipelines.ingest.refusals import REMEDIES
from pipelines.run import RunSummary, Session
from pipelines.run_folder import IndexEntry, OutputError
from pipelines.store import home
from pipelines.study import Rejection

PICTURES_A_BATCH: Final = 64  # at most: Prefect takes some 40 ms of a core for a task
STUDIES_A_BATCH: Final = 8  # of a worker: while one is read, others are decoded
BATCHES_A_WORKER: Final = 8  # at least, if there is enough to do: it takes several before others have had any
MOST_TASKS: Final = 24  # at a time: a study is one, and its task takes a while beside the reading
ROWS_SHOWN, PICTURES_SHOWN = 500, 12  # in the summary of a run
HASHERS: Final = 4
LOOK_S: Final = 0.2
URL_VARIABLE: Final = "SCANSCRIBE_REPORTS_URL"  # under which the folder that the output folder lies in is served


@dataclass(frozen=True, slots=True)
class Batch:
    """The units of one task."""

    name: str
    units: tuple[Unit, ...]
    place: int  # of the first among all units of the run: tasks may begin in another order


# Several tasks at a time: while the model reads the units of one, those of the next are decoded, and the reports of the
# last are written.
@flow(
    name="scanscribe-batch",
    flow_run_name="job-{job}",
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_TASKS),  # type: ignore[arg-type]  # its futures are Prefect's own
    persist_result=False,
    validate_parameters=False,
)
def batch(job: str) -> RunSummary:
    """Report every input of the job with that hash (see `flows.jobs`)."""
    asked = ASKED.get()
    telling = Telling(asked.seen) if asked.seen else None
    with Session(load_job(job), asked.listener, told=telling) as session:
        if telling:
            telling.session = session
        units = tuple(discover(session))
        pictures, studies = PICTURES_A_BATCH, 1
        if asked.crewing:  # small enough that all have something to do until the end
            a_worker = len(units) // (BATCHES_A_WORKER * max(1, len(workers(asked.server.url()) or ())))
            pictures = min(max(a_worker, LEAST_A_BATCH), PICTURES_A_BATCH)
            studies = min(max(a_worker, 1), STUDIES_A_BATCH)
        batches = deque(group(units, pictures, studies))
        del units  # a unit is let go when it is done
        if asked.crewing:
            let_workers_report(session, batches, asked.server, asked.crewing)
        else:
            report_here(session, batches, asked.min_free)
        summary = export(session)
    summarise(summary)
    return summary


class Telling:
    """Lets log, metrics and notifications hear what came of each unit."""

    def __init__(self, seen: Seeing) -> None:
        self._seen, self._last, self._busy = seen, time.monotonic(), 0.0
        self.session: Session | None = None

    def __call__(self, outcome: IndexEntry | Rejection) -> None:
        if isinstance(outcome, Rejection):
            self._seen.log("refused", code=outcome.code)
            return
        if self._seen.tell and is_critical(outcome):
            self._seen.tell("critical-finding", item=outcome.request[:16], report=outcome.id, kind=outcome.kind)
        now, busy = time.monotonic(), self.session.device_seconds if self.session else 0.0
        # Units overlap: what counts is the time since the last one was done.
        seconds, read = round(now - self._last, 3), round(busy - self._busy, 6)
        self._last, self._busy = now, busy
        self._seen.log(
            "reported", report=outcome.id, kind=outcome.kind, version=outcome.version, read=read, seconds=seconds
        )


def report_here(session: Session, batches: deque[Batch], min_free: int) -> None:
    """Each batch is a task of this process; takes them out of `batches`."""
    room = Room({"reports": session.job.out, "state folder": home()}, min_free, lambda event, **facts: None)
    at_once = MOST_TASKS if may_be_gpu(session.job.device) else 2
    running: deque[PrefectFuture[None]] = deque()
    try:
        while batches:
            each = batches.popleft()
            named = read_and_report.with_options(task_run_name=each.name)
            quoted: Any = quote(each)  # Prefect does not look through it
            running.append(named.submit(session, quoted, room))
            if len(running) >= at_once:
                running.popleft().result()
        for future in running:
            future.result()
    except BaseException:
        session.stop()  # let the tasks that are at work end after the units that they are at
        wait(list(running))
        raise


def let_workers_report(session: Session, batches: deque[Batch], server: LocalServer, crewing: Crewing) -> None:
    """Each batch is a task of a worker; takes them out of `batches`. What a stopped flow leaves, the next takes up."""
    units: dict[str, list[tuple[int, Unit]]] = {}  # and their places; the same content may be there under several names
    anew: set[int] = set()  # places of units that were replaced when workers had them
    with Ledger(session.job.out, crewing.ledger) as ledger, ThreadPoolExecutor(HASHERS) as hashers:
        log = EventLog()
        crew = Crew(session.job, ledger, server, log)

        def hand_out(placed: Sequence[tuple[int, Unit]]) -> None:
            requests = list(hashers.map(session.request, [unit for _, unit in placed]))
            session.refresh()  # workers go on with what a former flow gave them
            states = {row.request: row.state for row in ledger.some(filter(None, requests))}
            handed = []
            for (place, unit), request in zip(placed, requests, strict=True):
                if not request:  # it cannot be read: that is said here
                    session.conclude(session.prepare(unit), place)
                elif request in units:
                    units[request].append((place, unit))
                # What is still open on the ledger is for a worker to settle there, also where its report was written
                # before the worker, or the flow that asked for it again, was killed.
                elif states.get(request) in OPEN or not session.settled(unit, request, place, already=True, whole=True):
                    units[request] = [(place, unit)]
                    handed.append(Handed(request, _files(unit), unit))
            # The report is not there, or a person starts the run again to have it tried again.
            ledger.retry(h.request for h in handed if states.get(h.request) in ("done", "quarantined"))
            if handed:
                crew.give(handed, crewing.lane)

        def were_replaced(request: str, alike: Sequence[tuple[int, Unit]]) -> bool:
            """Once: what changes all the time is refused."""
            first = not anew.intersection(place for place, _ in alike)
            return first and any(session.request(unit) != request for _, unit in alike)

        def look() -> None:
            for handed, row in crew.settled():
                session.refresh()
                alike = units.pop(handed.request)
                (place, first), *others = alike
                if row is None:
                    session.conclude(session.prepare(first), place)  # says what is wrong with it
                    hand_out(others)
                elif row.state == "quarantined":
                    if row.code == CHANGED and were_replaced(row.request, alike):
                        anew.update(place for place, _ in alike)
                        hand_out(alike)
                        if row.request not in units:  # no file holds that any more
                            let_go(ledger, log, session.job.out, row.request)
                        continue
                    remedy = REMEDIES.get(row.code or "", "")
                    for _, unit in alike:
                        session.refused(Rejection(unit.path, row.code or "", row.reason or "", remedy))
                elif not session.settled(first, row.request, place):  # it was removed meanwhile
                    hand_out(alike)
                else:
                    for place, unit in others:
                        session.settled(unit, row.request, place, already=True)

        while batches:
            each = batches.popleft()
            hand_out(tuple(enumerate(each.units, each.place)))
            while len(crew) > MOST_OUT:
                look()
                time.sleep(LOOK_S)
        while len(crew):
            look()
            time.sleep(LOOK_S)


def _files(unit: Unit) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(file.path.absolute()) for file in unit.files))


@task(cache_policy=NO_CACHE, persist_result=False)
def discover(session: Session) -> Iterator[Unit]:
    """What there is to report; unusable inputs go to `rejected.jsonl`."""
    return iter(session.discover())  # of each member of a tuple Prefect would keep a record


@task(cache_policy=NO_CACHE, persist_result=False)
def read_and_report(session: Session, batch: Batch, room: Room) -> None:
    """Read the units of one batch with the model and write their reports, while there is room for them."""
    if not room():
        raise OutputError(f"{room.words} The same command then goes on where it stopped.")
    session.process(batch.units, place=batch.place)


@task(cache_policy=NO_CACHE, persist_result=False)
def export(session: Session) -> RunSummary:
    """Write what is over the whole folder: tables, the lot report, the HTML index."""
    return session.finish()


def group(units: Sequence[Unit], pictures: int = PICTURES_A_BATCH, studies: int = 1) -> tuple[Batch, ...]:
    """Batches in the order of the units: up to so many studies, or so many pictures, that follow each other.

    Sizes play no part here: units of all batches go through the same `pipelines.stages`, and of what is read at a time
    `pipelines.look` lets frames of one size through together, as many as its budget of pixels allows.
    """
    batches: list[Batch] = []
    place = 0
    for kind, run in itertools.groupby(units, key=lambda unit: unit.kind):
        size, name = (studies, "study") if kind == "series" else (pictures, "pictures")
        members = tuple(run)
        for start in range(0, len(members), size):
            together = members[start : start + size]
            batches.append(Batch(f"batch {len(batches) + 1}: {name}", together, place))
            place += len(together)
    return tuple(batches)


def summarise(summary: RunSummary) -> None:
    """Leave a table of the run with the flow run, without a file name."""
    served = os.environ.get(URL_VARIABLE, "").rstrip("/")
    place = f"{served}/{urllib.parse.quote(summary.out.name)}" if served else ""
    index = f"[{summary.index.name}]({place}/{summary.index.name})" if place else summary.index.name
    lines = [
        f"{len(summary.reported)} reported, {len(summary.already_reported)} already there, "
        f"{len(summary.rejected)} refused, {summary.left} not got to, {summary.seconds:.1f} s.",
        "",
        *timing(summary),
        f"The reports are in the output folder: open its {index}.",
        "",
        "| report | kind | findings | disposition | confidence |",
        "|---|---|---|---|---|",
    ]
    for entry in summary.reported[:ROWS_SHOWN]:
        confidence = "" if entry.confidence is None else f"{entry.confidence:.0%}"
        findings = entry.findings if entry.findings or entry.assessed else "not assessed"
        page = entry.formats.get("html")
        report = f"[{entry.id}]({place}/{page})" if place and page else entry.id
        lines.append(f"| {report} | {entry.kind} | {findings} | {entry.disposition or ''} | {confidence} |")
    if (more := len(summary.reported) - ROWS_SHOWN) > 0:
        lines.append(f"| and {more} more | | | | |")
    pictures = [(entry.id, summary.out / entry.thumbnail) for entry in summary.reported if entry.thumbnail]
    for name, path in pictures[:PICTURES_SHOWN]:
        with contextlib.suppress(OSError):
            data = base64.b64encode(path.read_bytes()).decode()
            lines += ["", f"{name}  ", f"![{name}](data:image/jpeg;base64,{data})"]
    create_markdown_artifact(key="scanscribe-batch", markdown="\n".join(lines), description="What came of the run")


def timing(summary: RunSummary) -> list[str]:
    """What the time went into."""
    if not summary.reported:
        return []
    rate = len(summary.reported) / max(summary.seconds, 1e-9)
    waited = "" if summary.device_wait is None else f", the device waited {summary.device_wait:.0%} of the time"
    first = "" if summary.first_report_seconds is None else f", the first after {summary.first_report_seconds:.1f} s"
    return [f"{rate:.3g} reports a second{first}{waited}.", ""]
