"""One run, from paths to reports: plan, then for each unit load, read, build the report, write it, note it as done.

`execute` is the one-off run. The Prefect flow uses the same `Session` with its own order of batches.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import ingest
from pipelines.measures import NOT_MEASURED, measure_study
from pipelines.reporting import build_report, report_images
from pipelines.run_folder import IndexEntry, OutputError, RunFolder, cannot_write
from pipelines.store import find
from pipelines.study import ImageStudy, Rejection
from reports.bundle import Bundle
from reports.formats import check_formats, formats
from reports.rules import DEFAULT_RULES, load_rules
from reports.texts import LANGUAGES, Language
from reports.writing import THUMBNAIL, FormatError, write_report

if TYPE_CHECKING:
    from pipelines.reader import Reader

KINDS: Final = ("auto", "ct", "defect")
FORMATS: Final = ("json", "html")


class UsageError(ValueError):
    """The run was asked for in a way that cannot work. The message says how to mend it."""

    code = "usage"


@dataclass(frozen=True, slots=True)
class Job:
    """What a person asks for."""

    inputs: tuple[Path, ...]  # files, folders, zip archives
    out: Path
    formats: tuple[str, ...] = FORMATS
    model: str = "default"  # a name in the model store, or a folder
    device: str = "auto"
    kind: str = "auto"
    reference: Path | None = None  # golden sample of all pictures, or a folder of them, matched by file name
    rules: Path = DEFAULT_RULES  # what makes a finding severe and a part a reject
    language: Language = "en"  # of the reports' texts


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: `done` of `total` files are looked at, or studies and pictures reported."""

    stage: Literal["look", "report"]
    done: int
    total: int


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What came of a run."""

    out: Path
    index: Path  # the HTML index over all reports of the folder
    reported: tuple[IndexEntry, ...]
    already_reported: tuple[IndexEntry, ...]  # finished by an earlier run, or the same content twice in this one
    rejected: tuple[Rejection, ...]
    passed_over: int  # files that are no inputs, and second names of files
    without_golden_sample: int  # pictures for which the folder of golden samples has none
    seconds: float
    first_report_seconds: float | None  # from the start of the run until the first report was on disk

    @property
    def complete(self) -> bool:
        """Every input has its report in every format that was asked for."""
        return not self.rejected and not any(entry.errors for entry in self.reported)

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self) | {"out": str(self.out), "index": str(self.index), "complete": self.complete}


def execute(job: Job, listener: Listener | None = None) -> RunSummary:
    """Run a job in this process. Bad inputs become rejections; running again goes on where an earlier run stopped.

    Raises UsageError, OutputError and ModelError.
    """
    with Session(job, listener) as session:
        session.process(session.discover())
        return session.finish()


class Session:
    """A job at work: its output folder is locked, and what it has done so far is counted. A context manager."""

    def __init__(self, job: Job, listener: Listener | None = None) -> None:
        self._started = time.perf_counter()
        check_job(job)
        self.job = job
        self._model = find(job.model)
        self._listener = listener
        self._references = References(job.reference)
        self._rules = load_rules(job.rules)
        self._folder = RunFolder(job.out)
        self._reported: list[IndexEntry] = []
        self._already: list[IndexEntry] = []
        self._rejected: list[Rejection] = []
        self._passed_over = self._without_golden_sample = 0
        self._done = self._total = 0
        self._first_report: float | None = None
        self._stop = threading.Event()
        self._at_work = threading.Lock()  # the folder is not let go while a thread may still write into it

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        with self._at_work:
            if isinstance(error, KeyboardInterrupt):  # what is done can be looked at
                with contextlib.suppress(OutputError):
                    self._folder.write_html_index()
            self._folder.__exit__(kind, error, trace)

    def stop(self) -> None:
        """Ask `process` in another thread to return after the unit that it is at."""
        self._stop.set()

    def discover(self) -> tuple[ingest.Unit, ...]:
        """What there is to report. Inputs that cannot be used are put on record; golden samples are left out."""
        plan = ingest.plan(self.job.inputs, progress=functools.partial(self._tell, "look"))
        wrote = self._folder.wrote  # output and inputs may share a folder
        units = tuple(unit for unit in plan.units if not wrote(unit.files[0].path) and not self._references.has(unit))
        self._rejected = [rejection for rejection in plan.rejections if not wrote(rejection.path)]
        self._folder.start(self.job.inputs, self._rejected)
        self._passed_over = sum(not wrote(each.path) for each in plan.passed_over)
        self._without_golden_sample = sum(map(self._references.lacks, units))
        self._total = len(units)
        self._tell("report", 0, self._total)
        return units

    def process(self, units: Sequence[ingest.Unit]) -> None:
        """Report each unit or put it on record as rejected. The next unit is decoded while the model reads this one."""
        with self._at_work, ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder:
            if not units or self._stop.is_set():
                return
            ahead = [decoder.submit(self._prepare, units[0])]
            for following in (*units[1:], None):
                if self._stop.is_set():
                    return
                prepared = ahead.pop().result()
                if following is not None:
                    ahead.append(decoder.submit(self._prepare, following))
                self._conclude(prepared)

    def finish(self) -> RunSummary:
        """Write the HTML index over the folder and say what came of the run."""
        index = self._folder.write_html_index()
        return RunSummary(
            out=self.job.out,
            index=index,
            reported=tuple(self._reported),
            already_reported=tuple(self._already),
            rejected=tuple(self._rejected),
            passed_over=self._passed_over,
            without_golden_sample=self._without_golden_sample,
            seconds=time.perf_counter() - self._started,
            first_report_seconds=self._first_report,
        )

    def _prepare(self, unit: ingest.Unit) -> _Prepared | _Already | Rejection:
        """Decode a unit and its golden sample, unless its report is there: that is known from the bytes alone."""
        started = time.perf_counter()
        golden = self._references.of(unit)
        request = "" if isinstance(golden, Rejection) else self._request(unit, golden)
        if done := self._folder.finished(request, self.job.formats):
            return _Already(unit, done)
        study = ingest.load(unit)
        if isinstance(study, Rejection):
            return study
        reference = ingest.load(golden) if isinstance(golden, ingest.Unit) else golden
        if isinstance(reference, Rejection):
            reason = f"Its golden sample cannot be used: {reference.reason}"
            return Rejection(unit.path, "golden-sample-unreadable", reason, reference.remedy)
        if reference is not None and not _same_proportions(study, reference):
            reason = "Its golden sample has other proportions: it cannot be the same view."
            remedy = "Give the golden sample of this very view, cut alike."
            return Rejection(unit.path, "golden-sample-mismatch", reason, remedy)
        return _Prepared(unit, request, study, reference, time.perf_counter() - started)

    def _conclude(self, prepared: _Prepared | _Already | Rejection) -> None:
        """Report what was prepared, or put it on record as refused or done before."""
        if isinstance(prepared, Rejection):
            self._reject(prepared)
        elif isinstance(prepared, _Already):
            self._note_done(prepared.unit, prepared.entry)
        elif done := self._folder.finished(prepared.request, self.job.formats):  # the same content twice in one run
            self._note_done(prepared.unit, done)
        else:
            self._report(prepared)
        self._done += 1
        self._tell("report", self._done, self._total)

    def _note_done(self, unit: ingest.Unit, entry: IndexEntry) -> None:
        """The report is there. What it had to do without is still refused, by the name that it has in this run."""
        self._already.append(entry)
        names = [file.name for file in unit.files]
        for missing in entry.refused:
            self._reject(replace(missing, path=max(names, key=functools.partial(_shared_ending, missing.path))))

    def _request(self, unit: ingest.Unit, golden: ingest.Unit | None) -> str:
        """SHA-256 over what a report depends on: content, golden sample, model, kind, rules, language.
        Empty: unreadable."""
        parts: list[object] = [self._model.weights_sha256, self._model.config_sha256]
        parts += [self.job.kind, self._rules.digest, self.job.language]
        try:
            for each in filter(None, (unit, golden)):
                parts.append([each.page, each.frames, *sorted(map(_sha256, each.files))])
        except Exception:  # what is wrong with the file is for `ingest.load` to say
            return ""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _report(self, prepared: _Prepared) -> None:
        """Read one study with the model and write its report, then note it as done."""
        study, reference = prepared.study, prepared.reference
        for missing in study.rejected_sources:
            self._reject(missing)
        started = time.perf_counter()
        reader = load_reader(self.job.model, self.job.device)
        try:
            reading = reader.read(study, kind=self.job.kind, reference=reference)
            read = time.perf_counter()
            measures = measure_study(study) if reading.kind == "ct" else NOT_MEASURED
            report = build_report(
                study,
                reading,
                reader.info,
                kind=self.job.kind,
                reference=reference,
                rules=self._rules,
                language=self.job.language,
                measures=measures,
                timing={
                    "load": round(prepared.seconds, 3),
                    "read": round(read - started, 3),
                    "measure": round(time.perf_counter() - read, 3),
                },
            )
            bundle = Bundle(report, report_images(study, report, reference=reference), study.dicom, measures.masks)
        except Exception as error:  # whatever one input does to the model, the others are still reported
            self._reject(_failed(prepared.unit, error))
            return

        directory = self.job.out / report.id
        errors: dict[str, str] = {}
        try:
            files = write_report(directory, bundle, self.job.formats)
        except FormatError as error:
            files, errors = error.written, error.errors
        except OSError as error:
            raise cannot_write(error) from None
        entry = IndexEntry(
            id=report.id,
            kind=report.kind,
            title=report.title,
            request=prepared.request,
            inputs=tuple({"path": source.name, "sha256": source.sha256} for source in report.source.inputs),
            findings=len(report.findings),
            types=tuple(dict.fromkeys(finding.type for finding in report.findings)),
            disposition=report.disposition,
            confidence=max((finding.confidence for finding in report.findings), default=None),
            formats={name: str(path.relative_to(self.job.out)) for name, path in files.items()},
            thumbnail=str((directory / THUMBNAIL).relative_to(self.job.out)),
            errors=errors,
            model=f"{report.model.name} {report.model.version}",
            seconds=round(prepared.seconds + time.perf_counter() - started, 3),
            refused=study.rejected_sources,
        )
        self._reported.append(self._folder.add(entry))
        if self._first_report is None:
            self._first_report = time.perf_counter() - self._started

    def _reject(self, rejection: Rejection) -> None:
        self._rejected.append(rejection)
        self._folder.reject(rejection)

    def _tell(self, stage: Literal["look", "report"], done: int, total: int) -> None:
        if self._listener is not None:
            self._listener(Progress(stage, done, total))


@dataclass(frozen=True, slots=True)
class _Prepared:
    unit: ingest.Unit
    request: str
    study: ImageStudy
    reference: ImageStudy | None
    seconds: float  # to read and decode


@dataclass(frozen=True, slots=True)
class _Already:
    unit: ingest.Unit
    entry: IndexEntry


class References:
    """The golden samples: one for all pictures, or a folder of them, matched by file name without its ending."""

    def __init__(self, path: Path | None) -> None:
        """Raises UsageError where `path` cannot serve."""
        self._single: ingest.Unit | None = None
        self._by_stem: dict[str, ingest.Unit] = {}
        self._unusable: dict[str, Rejection] = {}
        if path is None:
            return
        plan = ingest.plan([path])
        pictures = [unit for unit in plan.units if unit.kind == "picture"]
        if plan.rejections and not pictures:
            worst = plan.rejections[0]
            raise UsageError(f"The golden sample {worst.path} cannot be used: {worst.reason} {worst.remedy}")
        if not path.is_dir() and len(pictures) == 1 and not plan.rejections:
            self._single = pictures[0]
            return
        archive = f"{ingest.FileRef(path).name}!"
        self._unusable = {Path(each.path.removeprefix(archive)).stem: each for each in plan.rejections}
        for unit in pictures:
            if self._by_stem.setdefault(_stem(unit), unit) is not unit:
                raise UsageError(f"{path} holds two golden samples called {_stem(unit)}: keep one of each name.")
        if not self._by_stem:
            raise UsageError(f"{path} holds no picture: --reference takes a golden sample or a folder of them.")

    def of(self, unit: ingest.Unit) -> ingest.Unit | Rejection | None:
        """The golden sample to compare `unit` with, or why it cannot be used; None where there is none."""
        if unit.kind != "picture":
            return None
        return self._single or self._by_stem.get(_stem(unit)) or self._unusable.get(_stem(unit))

    def lacks(self, unit: ingest.Unit) -> bool:
        """Whether `unit` is a picture for which the folder of golden samples has none."""
        return bool(self._by_stem) and unit.kind == "picture" and self.of(unit) is None

    def has(self, unit: ingest.Unit) -> bool:
        """Whether `unit` is itself a golden sample."""
        samples = [self._single] if self._single else self._by_stem.values()
        return any(
            file.member == sample.member and file.path.samefile(sample.path)
            for file in unit.files[:1]
            for sample in (s.files[0] for s in samples)
        )


def check_job(job: Job) -> None:
    """Raises UsageError or ModelError for what can be told to be wrong before any work."""
    if not job.inputs:
        raise UsageError("There is nothing to report: name at least one file, folder or zip archive.")
    # One missing path among others is a refused input; when nothing is there, the command itself is wrong.
    faults = [fault for fault in map(_out_of_reach, job.inputs) if fault]
    if len(faults) == len(job.inputs):
        raise UsageError(faults[0])
    if job.reference and (fault := _out_of_reach(job.reference)):
        raise UsageError(fault)
    if job.kind not in KINDS:
        raise UsageError(f"There is no kind {job.kind!r}: choose one of {', '.join(KINDS)}.")
    if job.language not in LANGUAGES:
        raise UsageError(f"There is no language {job.language!r}: choose one of {', '.join(LANGUAGES)}.")
    if not job.formats:
        raise UsageError(f"There is no format to write: choose from {', '.join(formats())}.")
    try:
        check_formats(job.formats)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    find(job.model)


def _out_of_reach(path: Path) -> str:
    """What is wrong with a path that leads to nothing; empty where something is there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"There is no file or folder {path}: check the spelling and the folder you are in."
    except OSError as error:
        return f"{path} cannot be reached ({error.strerror}): check the spelling and the rights of its folders."
    return ""


@functools.lru_cache(maxsize=1)
def load_reader(model: str, device: str) -> Reader:
    """The model, loaded once a process. Imports torch, which is why nothing else here does."""
    from pipelines.reader import Reader

    return Reader.load(model, device)


def _same_proportions(study: ImageStudy, reference: ImageStudy) -> bool:
    """Whether the sides of both pictures have the same ratio, to within a tenth."""
    (height, width), (golden_height, golden_width) = study.pixels.shape[1:3], reference.pixels.shape[1:3]
    return 0.9 < (width * golden_height) / (height * golden_width) < 1 / 0.9


def _shared_ending(one: str, other: str) -> int:
    """How many characters at their ends two names share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _sha256(file: ingest.FileRef) -> str:
    return hashlib.sha256(file.read()).hexdigest()


def _stem(unit: ingest.Unit) -> str:
    return Path(unit.files[0].basename).stem


def _failed(unit: ingest.Unit, error: Exception) -> Rejection:
    """The rejection for an input on which the model failed; foreign messages are left out: they can quote the input."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Rejection(
            path=unit.path,
            code="out-of-memory",
            reason="There was not enough memory to read it.",
            remedy="Close other programs and run again; with a small GPU, add --device cpu.",
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    return Rejection(
        path=unit.path,
        code="model-failed",
        reason=f"Reading it failed inside the program ({where}).",
        remedy="Run `scanscribe doctor`; if it finds nothing to mend, this is a fault of the program: report it.",
    )
