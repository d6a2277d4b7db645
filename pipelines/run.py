"""One run, from paths to reports: plan, then for each unit load, read, build the report, write it, note it as done.

`execute` is the one-off run. The Prefect flow uses the same `Session` with its own order of batches.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import ingest
from pipelines.ingest.identifiers import DEFAULT_PATTERNS, load_patterns
from pipelines.measures import NOT_MEASURED, measure_study
from pipelines.reading import NotFiniteError
from pipelines.reporting import build_report, report_images
from pipelines.run_folder import IndexEntry, OutdatedVersionError, OutputError, RunFolder, cannot_write
from pipelines.store import find
from pipelines.study import ImageStudy, Rejection
from reports.bundle import Bundle, BundleError, load_bundle
from reports.files import clear_leftovers
from reports.formats import RunReports, check_formats, formats
from reports.lot.sampling import LotPlan
from reports.rules import DEFAULT_RULES, WORST_FIRST, load_rules
from reports.schema import Report
from reports.texts import LANGUAGES, Language
from reports.writing import (
    THUMBNAIL,
    FormatError,
    fault,
    report_formats,
    run_formats,
    write_formats,
    write_report,
    write_run_formats,
)

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
    mm_per_pixel: float | None = None  # of pictures; None: what the file's resolution tag says, if that is a scale
    identifiers: Path = DEFAULT_PATTERNS  # what accession, lot, part and serial numbers look like
    lot: LotPlan = field(default_factory=LotPlan)  # how the lot report judges


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
    files: dict[str, str] = field(default_factory=dict)  # format over the whole run -> file, relative to the folder
    errors: dict[str, str] = field(default_factory=dict)  # format over the whole run -> why it could not be written

    @property
    def complete(self) -> bool:
        """Every input has its report in every format that was asked for."""
        return not (self.rejected or self.errors or any(entry.errors for entry in self.reported))

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

    def __init__(
        self,
        job: Job,
        listener: Listener | None = None,
        *,
        member: bool = False,
        told: Callable[[IndexEntry | Rejection], None] | None = None,
    ) -> None:
        """`member`: for units of another session that owns the output folder. `told` hears of reports and refusals."""
        self._started = time.perf_counter()
        check_job(job)
        self.job = job
        self._model = find(job.model)
        self._listener, self._told = listener, told
        self._formats = report_formats(job.formats)
        self._references = References(job.reference)
        self._rules = load_rules(job.rules, self._model.own_line.types if self._model.own_line else ())
        self._patterns = load_patterns(job.identifiers)
        self._folder = RunFolder(job.out, member=member)
        self._reported: list[IndexEntry] = []
        self._made: set[str] = set()  # the requests of this run's reports
        self._already: list[IndexEntry] = []
        self._rejected: dict[Rejection, None] = {}  # what the header pass refuses is refused by its series, too
        self._passed_over = self._without_golden_sample = 0
        self._done = self._total = 0
        self.device_seconds = 0.0  # that the model spent on reading
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
        plan = self.plan(self.job.inputs)
        self._rejected = dict.fromkeys(plan.rejections)
        if self._told is not None:
            for each in plan.rejections:
                self._told(each)
        self.start(self.job.inputs, plan.rejections)
        self._passed_over = len(plan.passed_over)
        self._without_golden_sample = sum(map(self._references.lacks, plan.units))
        self._total = len(plan.units)
        self._tell("report", 0, self._total)
        return plan.units

    def plan(self, inputs: Sequence[Path]) -> ingest.Plan:
        """What some inputs hold, without golden samples and what runs wrote. Puts nothing on record."""
        plan = ingest.plan(inputs, progress=functools.partial(self._tell, "look"))
        wrote = self._folder.wrote  # output and inputs may share a folder
        return replace(
            plan,
            units=tuple(
                replace(unit, documents=tuple(each for each in unit.documents if not wrote(each.path)))
                for unit in plan.units
                if not wrote(unit.files[0].path) and not self._references.has(unit)
            ),
            rejections=tuple(each for each in plan.rejections if not wrote(each.path)),
            passed_over=tuple(each for each in plan.passed_over if not wrote(each.path)),
        )

    def start(self, inputs: Sequence[Path], rejections: Sequence[Rejection]) -> None:
        """Put on record what is refused of some inputs, in place of what was refused of them earlier."""
        self._folder.start(inputs, rejections)

    def process(self, units: Sequence[ingest.Unit]) -> None:
        """Report each unit or put it on record as rejected. The next unit is decoded while the model reads this one."""
        with self._at_work, ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder:
            if not units or self._stop.is_set():
                return
            ahead = [decoder.submit(self.prepare, units[0])]
            for following in (*units[1:], None):
                if self._stop.is_set():
                    return
                prepared = ahead.pop().result()
                if following is not None:
                    ahead.append(decoder.submit(self.prepare, following))
                self.conclude(prepared)

    def finish(self) -> RunSummary:
        """Write what is over the whole folder, the HTML index last, and say what came of the run."""
        files, errors = write_over_run(self._folder, self.job.formats, self.job.lot, self.job.language)
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
            files=files,
            errors=errors,
        )

    def request(self, unit: ingest.Unit) -> str:
        """SHA-256 over all that the report of `unit` depends on, from the files' bytes; empty where one is unreadable.

        A ledger knows a unit by it, before anything is decoded.
        """
        golden = self._references.of(unit)
        return "" if isinstance(golden, Rejection) else self._request(unit, golden)

    def reported(self, request: str) -> str | None:
        """The id of the current report on `request`, when it is there in all formats of the job."""
        entry = self._folder.finished(request, self._formats)
        return entry.id if entry else None

    def settled(self, unit: ingest.Unit, request: str, *, before: bool = False) -> bool:
        """Count a unit whose report is there, `before` this run or by another session of it; False where it is not."""
        entry = self._folder.finished(request, self._formats)
        if entry is None:
            return False
        (self._already if before else self._reported).append(entry)
        if before:
            self._reject_missing(unit, entry)
        self._rejected |= dict.fromkeys(entry.refused)
        self._count()
        return True

    def refused(self, rejection: Rejection) -> None:
        """Count a unit that another session of this run has put on record as refused."""
        self._rejected[rejection] = None
        self._count()

    def refresh(self) -> None:
        """Take note of what other sessions have written into the output folder."""
        self._folder.refresh()

    def prepare(self, unit: ingest.Unit) -> Prepared:
        """Decode a unit and its golden sample, unless its report is there: that is known from the bytes alone.

        Puts nothing on record; `conclude` does.  Safe in another thread.
        """
        started = time.perf_counter()
        golden = self._references.of(unit)
        request = "" if isinstance(golden, Rejection) else self._request(unit, golden)
        if done := self._folder.finished(request, self._formats):
            return _Already(unit, done)
        if known := self._folder.known(request):
            with contextlib.suppress(BundleError):  # what is damaged is made again from its source
                return _Stored(unit, known, load_bundle(self.job.out / known.id))
        study = ingest.load(unit, self._patterns)
        if isinstance(study, Rejection):
            return study
        if study.units == "display" and (side := self.job.mm_per_pixel):
            study = replace(study, geometry=replace(study.geometry, spacing_mm=(side, side), spacing_from="user"))
        reference = ingest.load(golden) if isinstance(golden, ingest.Unit) else golden
        if isinstance(reference, Rejection):
            reason = f"Its golden sample cannot be used: {reference.reason}"
            return Rejection(unit.path, "golden-sample-unreadable", reason, reference.remedy)
        if reference is not None and not _same_proportions(study, reference):
            reason = "Its golden sample has other proportions: it cannot be the same view."
            remedy = "Give the golden sample of this very view, cut alike."
            return Rejection(unit.path, "golden-sample-mismatch", reason, remedy)
        return _Decoded(unit, request, study, reference, time.perf_counter() - started)

    def conclude(self, prepared: Prepared) -> IndexEntry | Rejection:
        """Report what was prepared, or put it on record as refused or done before; says which. Raises OutputError."""
        outcome: IndexEntry | Rejection
        if isinstance(prepared, Rejection):
            outcome = self._reject(prepared)
        elif isinstance(prepared, _Already):
            outcome = self._note_done(prepared.unit, prepared.entry)
        elif isinstance(prepared, _Stored):
            outcome = self._complete(prepared)
        elif prepared.request in self._made and (done := self._folder.known(prepared.request)):  # twice in one run
            outcome = self._note_done(prepared.unit, done)
        else:
            outcome = self._report(prepared)
            if self._told is not None and isinstance(outcome, IndexEntry):
                self._told(outcome)
        if self._told is not None and isinstance(outcome, Rejection):
            self._told(outcome)
        self._count()
        return outcome

    def _count(self) -> None:
        self._done += 1
        self._tell("report", self._done, self._total)

    def _note_done(self, unit: ingest.Unit, entry: IndexEntry) -> IndexEntry:
        """The report is there."""
        self._already.append(entry)
        self._reject_missing(unit, entry)
        return entry

    def _complete(self, stored: _Stored) -> IndexEntry:
        """The report is there, in other formats than the job's: write those that it lacks."""
        entry, directory = stored.entry, self.job.out / stored.entry.id
        here = {name for name, file in entry.formats.items() if (self.job.out / file).is_file()}
        files, errors = self._write(
            write_formats, directory, stored.bundle, [n for n in self._formats if n not in here]
        )
        errors = {name: why for name, why in entry.errors.items() if name not in self._formats} | errors
        self._reported.append(self._folder.add(replace(entry, formats=files, errors=errors)))
        self._reject_missing(stored.unit, entry)
        return self._reported[-1]

    def _write(
        self, write: Callable[[Path, Bundle, Sequence[str]], dict[str, Path]], *what: Any
    ) -> tuple[dict[str, str], dict[str, str]]:
        """What was written by format, and why what was not was not. Raises OutputError."""
        errors: dict[str, str] = {}
        try:
            files = write(*what)
        except FormatError as error:
            files, errors = error.written, error.errors
        except OSError as error:
            raise cannot_write(error) from None
        return {name: str(path.relative_to(self.job.out)) for name, path in files.items()}, errors

    def _reject_missing(self, unit: ingest.Unit, entry: IndexEntry) -> None:
        """What a report that is there had to do without is still refused, by the name that it has in this run."""
        names = [file.name for file in unit.files]
        for missing in entry.refused:
            self._reject(replace(missing, path=max(names, key=functools.partial(_shared_ending, missing.path))))

    def _request(self, unit: ingest.Unit, golden: ingest.Unit | None) -> str:
        """SHA-256 over what a report depends on: content, documents, numbers in names, golden sample, model and
        settings. Empty: unreadable."""
        parts: list[object] = [self._model.weights_sha256, self._model.config_sha256]
        parts += [self.job.kind, self._rules.digest, self.job.language, self.job.mm_per_pixel, self._patterns.digest]
        named = self._patterns.search((), unit.files)
        parts += sorted(named.values.items())
        try:
            for each in filter(None, (unit, golden)):
                parts.append([each.page, each.image, each.frames, *sorted(file.sha256() for file in each.files)])
                parts.append([document.sha256() for document in each.documents])
        except Exception:  # what is wrong with the file is for `ingest.load` to say
            return ""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _report(self, prepared: _Decoded) -> IndexEntry | Rejection:
        """Read one study with the model and write its report, then note it as done."""
        study, reference = prepared.study, prepared.reference
        for missing in study.rejected_sources:
            self._reject(missing)
        started = time.perf_counter()
        reader = load_reader(self.job.model, self.job.device)
        try:
            reading = reader.read(study, kind=self.job.kind, reference=reference)
            read = time.perf_counter()
            self.device_seconds += read - started
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
            return self._reject(_failed(prepared.unit, error))
        subject = _subject(study, prepared.unit)
        while True:
            try:
                return self._put(prepared, replace(bundle, report=report), subject, started)
            except OutdatedVersionError:  # another session has reported the same subject meanwhile
                continue

    def _put(self, prepared: _Decoded, bundle: Bundle, subject: str, started: float) -> IndexEntry:
        """Write a report as the next version of what the folder holds on its subject, then note it as done."""
        report = as_version(bundle.report, self._folder, prepared.request, subject)
        directory = self.job.out / report.id
        files, errors = self._write(write_report, directory, replace(bundle, report=report), self._formats)
        entry = IndexEntry(
            id=report.id,
            kind=report.kind,
            title=report.title,
            request=prepared.request,
            inputs=tuple({"path": source.name, "sha256": source.sha256} for source in report.source.inputs),
            findings=len(report.findings),
            types=tuple(dict.fromkeys(finding.type for finding in report.findings)),
            severity=_worst(report),
            disposition=report.disposition,
            confidence=max((finding.confidence for finding in report.findings), default=None),
            formats=files,
            thumbnail=str((directory / THUMBNAIL).relative_to(self.job.out)),
            errors=errors,
            model=f"{report.model.name} {report.model.version}",
            seconds=round(prepared.seconds + time.perf_counter() - started, 3),
            refused=prepared.study.rejected_sources,
            version=report.version,
            supersedes=report.supersedes,
            subject=subject,
        )
        self._reported.append(self._folder.add(entry))
        self._made.add(prepared.request)
        if self._first_report is None:
            self._first_report = time.perf_counter() - self._started
        return self._reported[-1]

    def _reject(self, rejection: Rejection) -> Rejection:
        self._rejected[rejection] = None
        self._folder.reject(rejection)
        return rejection

    def _tell(self, stage: Literal["look", "report"], done: int, total: int) -> None:
        if self._listener is not None:
            self._listener(Progress(stage, done, total))


@dataclass(frozen=True, slots=True)
class _Decoded:
    unit: ingest.Unit
    request: str
    study: ImageStudy
    reference: ImageStudy | None
    seconds: float  # to read and decode


@dataclass(frozen=True, slots=True)
class _Already:
    unit: ingest.Unit
    entry: IndexEntry


@dataclass(frozen=True, slots=True)
class _Stored:
    unit: ingest.Unit
    entry: IndexEntry
    bundle: Bundle


Prepared = _Decoded | _Already | _Stored | Rejection  # what `Session.prepare` hands to `Session.conclude`


def write_over_run(
    folder: RunFolder, names: Sequence[str], lot: LotPlan, language: Language
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes the formats among `names` that are over all current reports of a folder.

    Returns their first files, relative to the folder, and why those that are missing could not be written.  Raises
    OutputError when the disk fails.
    """
    ids = tuple(entry.id for entry in folder.entries if entry.superseded_by is None)
    errors: dict[str, str] = {}
    try:
        clear_leftovers(folder.path)
        files = write_run_formats(RunReports(folder.path, ids, lot, language), run_formats(names))
    except FormatError as error:
        files, errors = error.written, error.errors
    except OSError as error:
        raise cannot_write(error) from None
    return {name: path.name for name, path in files.items()}, errors


def as_version(report: Report, folder: RunFolder, request: str, subject: str) -> Report:
    """The report as a version of what the folder holds on its subject.

    A report on something new is version 1. One that was made on the same request is the former again, so that it keeps
    its id and version. Any other supersedes the former.
    """
    former = folder.current(subject)
    if former and former.request == request:
        return report.model_copy(update={"id": former.id, "version": former.version, "supersedes": former.supersedes})
    taken = folder.entry(report.id)
    # The same content was reported before something else, or on another request: a new report all the same.
    if taken and (taken.superseded_by or taken.request != request):
        parts = [report.id, subject, former.id if former else ""]
        report = report.model_copy(update={"id": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]})
    if former:
        report = report.model_copy(update={"version": former.version + 1, "supersedes": former.id})
    return report


def _worst(report: Report) -> str | None:
    """The severity of the worst finding."""
    found = {finding.severity for finding in report.findings}
    return next((severity for severity in WORST_FIRST if severity in found), None)


def _subject(study: ImageStudy, unit: ingest.Unit) -> str:
    """A hash of what a report is about, so that a later one on it can be told: the part of a DICOM series, or file and
    page."""
    first = unit.files[0]
    place = [os.path.abspath(first.path), first.member, unit.page, unit.image]
    about: list[object] = ["series", study.series_uid] if study.series_uid else ["file", *place]
    about += [unit.part] if unit.part > 1 else []  # the first keeps its reports when the series gets a second
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


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
        pictures = [unit for unit in plan.units if unit.kind != "series"]
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
        if unit.kind == "series":
            return None
        return self._single or self._by_stem.get(_stem(unit)) or self._unusable.get(_stem(unit))

    def lacks(self, unit: ingest.Unit) -> bool:
        """Whether `unit` is a picture for which the folder of golden samples has none."""
        return bool(self._by_stem) and unit.kind != "series" and self.of(unit) is None

    def has(self, unit: ingest.Unit) -> bool:
        """Whether `unit` is itself a golden sample."""
        samples = [self._single] if self._single else self._by_stem.values()
        return any(
            file.member == sample.member and file.path.samefile(sample.path)
            for file in unit.files[:1]
            for sample in (s.files[0] for s in samples)
        )


def check_job(job: Job) -> None:
    """Raises UsageError, PatternError or ModelError for what can be told to be wrong before any work."""
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
    if job.mm_per_pixel is not None and not 0 < job.mm_per_pixel < 1e6:
        raise UsageError(f"A pixel of {job.mm_per_pixel:g} mm is no scale: --mm-per-pixel takes a size above 0.")
    if job.language not in LANGUAGES:
        raise UsageError(f"There is no language {job.language!r}: choose one of {', '.join(LANGUAGES)}.")
    if not job.formats:
        raise UsageError(f"There is no format to write: choose from {', '.join(formats())}.")
    try:
        check_formats(job.formats)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    load_patterns(job.identifiers)
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


def device_name(device: str) -> str:
    """The device that is meant, by one name each: `cuda` and `auto` become `cuda:0` or `cpu`. Imports torch."""
    import torch

    if device in ("auto", "cuda"):
        device = "cuda:0" if torch.cuda.is_available() else "cpu" if device == "auto" else device
    return device


def _same_proportions(study: ImageStudy, reference: ImageStudy) -> bool:
    """Whether the sides of both pictures have the same ratio, to within a tenth."""
    (height, width), (golden_height, golden_width) = study.pixels.shape[1:3], reference.pixels.shape[1:3]
    return 0.9 < (width * golden_height) / (height * golden_width) < 1 / 0.9


def _shared_ending(one: str, other: str) -> int:
    """How many characters at their ends two names share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _stem(unit: ingest.Unit) -> str:
    return Path(unit.files[0].basename).stem


def _failed(unit: ingest.Unit, error: Exception) -> Rejection:
    """The rejection for an input on which the model failed."""
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
