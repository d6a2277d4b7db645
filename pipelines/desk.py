"""What is done around the model for one unit: it is decoded before, its report is written afterwards.

A desk keeps what it has decoded until the report is written, so that pixels need not move. `Desk` works in this
process; `Desks` are several, in processes of their own, for a device that reads faster than one process can write.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import ingest
from pipelines.ingest.identifiers import load_patterns
from pipelines.ingest.refusals import MissingPackageError
from pipelines.measures import NOT_MEASURED, StudyMeasures, measure_study
from pipelines.reading import ModelIdentity, NotFiniteError, Reading
from pipelines.reporting import build_report, report_images
from pipelines.run_folder import IndexEntry, cannot_write, figures_of
from pipelines.sight import Sight, as_volume, sight
from pipelines.store import find
from pipelines.study import ImageStudy, Rejection
from reports.bundle import Bundle
from reports.rules import load_rules
from reports.writing import THUMBNAIL, FormatError, fault, report_formats, write_report

if TYPE_CHECKING:
    from pipelines.run import Job

MOST_DESKS: Final = 16
WORTH: Final = 128  # pictures
# What a desk imports with its first units. A wrong name here is passed over in silence, and costs each desk time.
IMPORTED_LATE: Final = (
    "pipelines.ingest.attach",
    "pipelines.ingest.pictures",
    "reports.html",
    "scipy.ndimage",
    "scipy.spatial",
)
FREED: Final = 32 << 20  # bytes of a block that comes from the heap, and of free heap that is kept; glibc's limit


@dataclass(frozen=True, slots=True)
class Opened:
    """A unit that lies decoded on a desk: what the model is to see of it, and by what its report is known."""

    unit: ingest.Unit
    golden: ingest.Unit | None
    request: str
    token: int
    sight: Sight
    subject: str
    identity: str  # `ImageStudy.identity`
    reference_key: str | None
    refused: tuple[Rejection, ...]  # files that it had to do without
    seconds: float  # to read and decode
    size: int  # bytes of pixels


@dataclass(frozen=True, slots=True)
class Version:
    """Which report it is."""

    id: str
    version: int = 1
    supersedes: str | None = None


@dataclass(slots=True)
class _Study:
    study: ImageStudy
    reference: ImageStudy | None
    measured: Future[tuple[StudyMeasures, float]] | None


class Desk:
    """A desk in this process. Safe to use from several threads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._formats = report_formats(job.formats)
        self._rules = load_rules(job.rules, find(job.model).own_types)
        self._patterns = load_patterns(job.identifiers)
        self._tokens = itertools.count()
        self._studies: dict[int, _Study] = {}
        self._measuring: ThreadPoolExecutor | None = None

    def open(self, unit: ingest.Unit, golden: ingest.Unit | None, request: str) -> Opened | Rejection:
        """Decodes a unit and its golden sample, and looks at it for the model."""
        started = time.perf_counter()
        study = ingest.load(unit, self._patterns)
        if isinstance(study, Rejection):
            return study
        if study.units == "display" and (side := self._job.mm_per_pixel):
            study = replace(study, geometry=replace(study.geometry, spacing_mm=(side, side), spacing_from="user"))
        reference = ingest.load(golden) if golden is not None else None
        if isinstance(reference, Rejection):
            return golden_unusable(unit, reference)
        if reference is not None and not _same_proportions(study, reference):
            reason = "Its golden sample has other proportions: it cannot be the same view."
            remedy = "Give the golden sample of this very view, cut alike."
            return Rejection(unit.path, "golden-sample-mismatch", reason, remedy)
        measured = self._measure(study) if as_volume(study, self._job.kind) else None
        try:
            seen = sight(study, kind=self._job.kind, reference=reference)
        except Exception as error:
            return failed(unit, error)
        token = next(self._tokens)
        self._studies[token] = _Study(study, reference, measured)
        return Opened(
            unit,
            golden,
            request,
            token,
            seen,
            _subject(study, unit),
            study.identity,
            reference.key if reference else None,
            study.rejected_sources,
            time.perf_counter() - started,
            study.pixels.nbytes,
        )

    def _measure(self, study: ImageStudy) -> Future[tuple[StudyMeasures, float]]:
        """Measure a CT study while the model looks at it and reads it."""

        def measure() -> tuple[StudyMeasures, float]:
            started = time.perf_counter()
            return measure_study(study), time.perf_counter() - started

        if self._measuring is None:
            self._measuring = ThreadPoolExecutor(1, thread_name_prefix="measure")
        return self._measuring.submit(measure)

    def report(
        self, opened: Opened, reading: Reading, model: ModelIdentity, version: Version, seconds: float
    ) -> IndexEntry | Rejection:
        """Writes the report on what was opened; `seconds` were spent on reading it. Raises OutputError."""
        started = time.perf_counter()
        lying = self._studies[opened.token]
        study, reference = lying.study, lying.reference
        try:
            measures, measuring = NOT_MEASURED, 0.0
            if reading.kind == "ct":
                measures, measuring = (lying.measured or self._measure(study)).result()
            report = build_report(
                study,
                reading,
                model,
                kind=self._job.kind,
                reference=reference,
                rules=self._rules,
                language=self._job.language,
                measures=measures,
                timing={"load": round(opened.seconds, 3), "read": round(seconds, 3), "measure": round(measuring, 3)},
            )
            report = report.model_copy(
                update={"id": version.id, "version": version.version, "supersedes": version.supersedes}
            )
            bundle = Bundle(report, report_images(study, report, reference=reference), study.dicom, measures.masks)
        except Exception as error:  # whatever one input does, the others are still reported
            return failed(opened.unit, error)
        directory = self._job.out / report.id
        files, errors = written(self._job.out, write_report, directory, bundle, self._formats)
        return IndexEntry(
            id=report.id,
            kind=report.kind,
            request=opened.request,
            inputs=tuple({"path": source.name, "sha256": source.sha256} for source in report.source.inputs),
            formats=files,
            thumbnail=str((directory / THUMBNAIL).relative_to(self._job.out)),
            errors=errors,
            model=f"{report.model.name} {report.model.version}",
            seconds=round(opened.seconds + seconds + time.perf_counter() - started, 3),
            refused=opened.refused,
            version=report.version,
            supersedes=report.supersedes,
            subject=opened.subject,
            **figures_of(report),
        )

    def clear(self, opened: Opened) -> None:
        """Lets go of what was opened."""
        self._studies.pop(opened.token, None)

    def close(self) -> None:
        self._studies.clear()
        if self._measuring is not None:
            self._measuring.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Seat:
    """A process with a desk, and how much it has to do."""

    pool: ProcessPoolExecutor
    waiting: int = 0


@dataclass(slots=True)
class _Lying:
    """What was opened, and on whose desk; `kept` until its report is written."""

    seat: _Seat
    opened: Opened
    kept: bool = True


class Desks:
    """Desks in processes of their own. Safe to use from several threads; each call takes as long as its work does."""

    def __init__(self, job: Job, count: int, own: Desk) -> None:
        """`own` is the desk of this process: it keeps what it has, and serves large pictures."""
        self._job, self._own, self.count = job, own, count
        self._seats = [_Seat(self._pool()) for _ in range(count)]
        self._where: dict[int, _Lying] = {}
        self._tokens = itertools.count(1)
        self._lock = threading.Lock()

    def _pool(self) -> ProcessPoolExecutor:
        # Forked from one process that has imported what desks need, and has no GPU and no threads but BLAS's idle ones.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *IMPORTED_LATE])
        return ProcessPoolExecutor(1, mp_context=context, initializer=_sit_down, initargs=(self._job,))

    def open(self, unit: ingest.Unit, golden: ingest.Unit | None, request: str) -> Opened | Rejection:
        with self._lock:
            seat = min(self._seats, key=lambda each: each.waiting)
        try:
            opened = self._ask(seat, _open, unit, golden, request)
        except BrokenExecutor:  # the process was killed: perhaps not by this unit
            self._replace(seat)
            return self._open_apart(unit, golden, request)
        if isinstance(opened, Rejection):
            return opened
        if opened.sight.large:  # its pixels have to be where the model is
            return self._own.open(unit, golden, request)
        token = next(self._tokens)
        shown = replace(opened.sight, glances=(), lungs=(), closer={})  # the desk has no use for it
        self._where[-token] = _Lying(seat, replace(opened, sight=shown))
        return replace(opened, token=-token)

    def _open_apart(self, unit: ingest.Unit, golden: ingest.Unit | None, request: str) -> Opened | Rejection:
        """Opens it in a process where no other unit can be to blame if that dies, too; then on the desk of this one."""
        seat = _Seat(self._pool())
        with seat.pool:
            try:
                opened = self._ask(seat, _open, unit, golden, request)
            except BrokenExecutor:
                return process_died(unit.path)
        return opened if isinstance(opened, Rejection) else self._own.open(unit, golden, request)

    def report(
        self, opened: Opened, reading: Reading, model: ModelIdentity, version: Version, seconds: float
    ) -> IndexEntry | Rejection:
        if opened.token not in self._where:
            return self._own.report(opened, reading, model, version, seconds)
        lying = self._where[opened.token]
        reported = replace(reading, findings=tuple(each for each in reading.findings if each.reported))
        try:
            outcome: IndexEntry | Rejection = self._ask(
                lying.seat, _report, lying.opened, reported, model, version, seconds
            )
            lying.kept = False
            return outcome
        except (BrokenExecutor, KeyError):  # the process was killed, or it is the second time: decoded again
            self._replace(lying.seat)
            again = self._own.open(opened.unit, opened.golden, opened.request)
            if isinstance(again, Rejection):
                return again
            try:
                return self._own.report(again, reading, model, version, seconds)
            finally:
                self._own.clear(again)

    def clear(self, opened: Opened) -> None:
        if known := self._where.pop(opened.token, None):
            if known.kept:
                with contextlib.suppress(BrokenExecutor, RuntimeError):
                    known.seat.pool.submit(_clear, known.opened)
        else:
            self._own.clear(opened)

    def close(self) -> None:
        self._own.close()
        with ThreadPoolExecutor(len(self._seats)) as at_once:
            list(at_once.map(lambda seat: seat.pool.shutdown(cancel_futures=True), self._seats))

    def _ask(self, seat: _Seat, what: Callable[..., Any], *parts: object) -> Any:
        with self._lock:
            work = seat.pool.submit(what, *parts)
            seat.waiting += 1
        try:
            return work.result()
        finally:
            with self._lock:
                seat.waiting -= 1

    def _replace(self, seat: _Seat) -> None:
        with self._lock:
            try:
                seat.pool.submit(os.getpid).result()
            except BrokenExecutor:
                seat.pool = self._pool()


def work_of(units: Sequence[ingest.Unit]) -> int:
    """How much there is to decode and write, in pictures."""
    return sum(16 if unit.kind == "series" else 1 for unit in units)


def may_be_gpu(device: str) -> bool:
    """Whether the model will be on a GPU, as far as that can be told without importing torch."""
    return device.startswith("cuda") or (device == "auto" and bool(list(Path("/dev").glob("nvidia[0-9]*"))))


def desks_for(work: int) -> int:
    """How many desks in processes of their own that much work is worth: each takes a core seconds to start."""
    cores = len(os.sched_getaffinity(0))
    return min(cores - 2, MOST_DESKS) if work >= WORTH and cores >= 4 else 0


_desk: Desk | None = None  # of a process that is one


def _sit_down(job: Job) -> None:
    global _desk
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session says when it is over
    _keep_freed_memory()
    _desk = Desk(job)


def _keep_freed_memory() -> None:
    """Every picture asks for blocks of the same sizes; fresh pages for them cost a tenth of a desk's time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_trim_threshold, FREED)
        libc.mallopt(m_mmap_threshold, FREED)


def _open(unit: ingest.Unit, golden: ingest.Unit | None, request: str) -> Opened | Rejection:
    assert _desk is not None
    opened = _desk.open(unit, golden, request)
    if isinstance(opened, Rejection):
        return opened
    if opened.sight.large:
        _desk.clear(opened)
    return replace(opened, sight=replace(opened.sight, source=None))


def _report(
    opened: Opened, reading: Reading, model: ModelIdentity, version: Version, seconds: float
) -> IndexEntry | Rejection:
    assert _desk is not None
    outcome = _desk.report(opened, reading, model, version, seconds)
    _desk.clear(opened)
    return outcome


def _clear(opened: Opened) -> None:
    assert _desk is not None
    _desk.clear(opened)


def written(
    out: Path, write: Callable[[Path, Bundle, Sequence[str]], dict[str, Path]], *what: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """What was written by format, and why what was not was not. Raises OutputError."""
    errors: dict[str, str] = {}
    try:
        files = write(*what)
    except FormatError as error:
        files, errors = error.written, error.errors
    except OSError as error:
        raise cannot_write(error) from None
    return {name: str(path.relative_to(out)) for name, path in files.items()}, errors


def golden_unusable(unit: ingest.Unit, why: Rejection) -> Rejection:
    reason = f"Its golden sample cannot be used: {why.reason}"
    return Rejection(unit.path, "golden-sample-unreadable", reason, why.remedy)


def process_died(path: str) -> Rejection:
    """The rejection for an input that ended the process each time."""
    reason = "The program ended each time that it was read."
    remedy = "Report it as a fault of the program, with the input if that can be shared."
    return Rejection(path, "process-died", reason, remedy)


def failed(unit: ingest.Unit, error: Exception) -> Rejection:
    """The rejection for an input on which the model failed. Raises MissingPackageError."""
    if isinstance(error, ModuleNotFoundError):
        raise MissingPackageError(error.name) from error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Rejection(
            path=unit.path,
            code="out-of-memory",
            reason="There was not enough memory to read it.",
            remedy="Close other programs and run again; with a small GPU, add --device cpu.",
        )
    if isinstance(error, NotFiniteError):
        return Rejection(
            path=unit.path,
            code=error.code,
            reason="The model's numbers for it were not finite.",
            remedy="Look at the picture: if it is as it should be, this is a fault of the model: report it.",
        )
    return Rejection(
        path=unit.path,
        code="model-failed",
        reason=f"Reading it failed inside the program ({fault(error)}).",
        remedy="Run `scanscribe doctor`; if it finds nothing to mend, this is a fault of the program: report it.",
    )


def _subject(study: ImageStudy, unit: ingest.Unit) -> str:
    """A hash of what a report is about, so that a later one on it can be told: the part of a DICOM series, or file and
    page."""
    if not study.series_uid:
        return subject_of_file(unit)
    about: list[object] = ["series", study.series_uid]
    return _hash(about + ([unit.part] if unit.part > 1 else []))  # the first keeps its reports when there is a second


def subject_of_file(unit: ingest.Unit) -> str:
    """The subject of a unit that is no DICOM series: the file, and the page."""
    first = unit.files[0]
    about: list[object] = ["file", os.path.abspath(first.path), first.member, unit.page, unit.image]
    return _hash(about + ([unit.part] if unit.part > 1 else []))


def _hash(about: list[object]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _same_proportions(study: ImageStudy, reference: ImageStudy) -> bool:
    """Whether the sides of both pictures have the same ratio, to within a tenth."""
    (height, width), (golden_height, golden_width) = study.pixels.shape[1:3], reference.pixels.shape[1:3]
    return 0.9 < (width * golden_height) / (height * golden_width) < 1 / 0.9
