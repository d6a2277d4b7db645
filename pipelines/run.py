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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import ingest
from pipelines.attempts import MOST_DEATHS, UNDER_WAY, Attempts
from pipelines.desk import (
    Desk,
    Desks,
    Opened,
    Version,
    desks_for,
    failed,
    golden_unusable,
    may_be_gpu,
    process_died,
    subject_of_file,
    work_of,
    written,
)
from pipelines.ingest.identifiers import DEFAULT_PATTERNS, load_patterns
from pipelines.reading import Reading
from pipelines.reporting import report_id
from pipelines.run_folder import IndexEntry, OutdatedVersionError, OutputError, RunFolder, cannot_write
from pipelines.stages import Stages, Width
from pipelines.store import find
from pipelines.study import Rejection
from reports.bundle import Bundle, BundleError, load_bundle
from reports.files import clear_leftovers
from reports.formats import RunReports, check_formats, formats
from reports.lot.sampling import LotPlan
from reports.rules import DEFAULT_RULES, load_rules
from reports.texts import LANGUAGES, Language
from reports.writing import (
    FormatError,
    report_formats,
    run_formats,
    write_formats,
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
Heard = Callable[[ingest.Unit, "IndexEntry | Rejection"], None]  # of what came of a unit
UNDER_WAY_A_DESK: Final = 5  # units: of them some are read while desks open and write others


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What came of a run."""

    out: Path
    index: Path  # the HTML index over all reports of the folder
    formats: tuple[str, ...]  # of each report, that were asked for
    reported: Sequence[IndexEntry]  # each is read when it is asked for
    already_reported: Sequence[IndexEntry]  # finished by an earlier run, or the same content twice in this one
    rejected: tuple[Rejection, ...]
    left: int  # studies and pictures among those discovered that it did not get to
    passed_over: int  # files that are no inputs, and second names of files
    without_golden_sample: int  # pictures for which the folder of golden samples has none
    seconds: float
    first_report_seconds: float | None  # from the start of the run until the first report was on disk
    device_wait: float | None  # share of the time from the first reading to the end in which there was nothing to read
    files: dict[str, str] = field(default_factory=dict)  # format over the whole run -> file, relative to the folder
    errors: dict[str, str] = field(default_factory=dict)  # format over the whole run -> why it could not be written

    @property
    def complete(self) -> bool:
        """Every input has its report in every format that was asked for."""
        lacking = any(entry.errors.keys() & set(self.formats) for entry in self.reported)
        return not (self.rejected or self.left or self.errors or lacking)

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        lists = {name: [asdict(each) for each in plain[name]] for name in ("reported", "already_reported", "rejected")}
        return plain | lists | {"out": str(self.out), "index": str(self.index), "complete": self.complete}


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
        self._rules = load_rules(job.rules, self._model.own_types)
        self._patterns = load_patterns(job.identifiers)
        self._folder = RunFolder(job.out, member=member)
        self._member = member
        self._attempts: Attempts | None = None  # of `process`; of members the ledger counts them
        self._suspects: list[tuple[int, ingest.Unit, str, Heard | None]] = []  # for the end of the run
        self._finished = False
        self._desk: Desk | Desks = Desk(job)
        self._device = threading.Lock()  # one batch at a time
        self._changed = threading.Condition()  # guards the folder and all that is counted here
        self._places = 0  # units come in the summary as they were given
        self._reported: dict[int, str] = {}  # ids of reports
        self._already: dict[int, str] = {}
        self._in_flight: set[str] = set()  # the requests that are being read or written
        self._subjects: set[str] = set()  # what is being written about
        self._work = self._total_work = 0
        self._rejected: dict[Rejection, None] = {}  # what the header pass refuses is refused by its series, too
        self._passed_over = self._without_golden_sample = 0
        self._done = self._total = 0
        self.device_seconds = 0.0  # that the model spent on reading
        self._read_from = 0.0
        self._first_report: float | None = None
        self._stop = threading.Event()
        self._stages = Stages(self._read, self._drop, self._stop)
        self._at_work = 0  # threads in `process`; the folder is not let go while one may still write into it

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work)
        self._stages.close()
        self._desk.close()
        if isinstance(error, KeyboardInterrupt):  # what is done can be looked at
            with contextlib.suppress(OutputError):
                self._folder.write_html_index()
        if self._attempts:
            self._attempts.close(whole=self._finished)
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
        self._total, self._total_work = len(plan.units), work_of(plan.units)
        self._tell("report", 0, self._total)
        return plan.units

    def plan(self, inputs: Sequence[Path], *, named: bool = True) -> ingest.Plan:
        """What some inputs hold, without golden samples and what runs wrote. Puts nothing on record.

        `named` as for `ingest.plan`.
        """
        plan = ingest.plan(inputs, named=named, progress=functools.partial(self._tell, "look"))
        wrote = self._folder.wrote  # output and inputs may share a folder

        def without_ours(unit: ingest.Unit) -> ingest.Unit:
            documents = tuple(each for each in unit.documents if not wrote(each.path))
            return unit if documents == unit.documents else replace(unit, documents=documents)

        return replace(
            plan,
            units=tuple(
                without_ours(unit)
                for unit in plan.units
                if not wrote(unit.files[0].path) and not self._references.has(unit)
            ),
            rejections=tuple(each for each in plan.rejections if not wrote(each.path)),
            passed_over=tuple(each for each in plan.passed_over if not wrote(each.path)),
        )

    def start(self, inputs: Sequence[Path], rejections: Sequence[Rejection]) -> None:
        """Put on record what is refused of some inputs, in place of what was refused of them earlier."""
        self._folder.start(inputs, rejections)

    def process(self, units: Sequence[ingest.Unit], heard: Heard | None = None, *, place: int | None = None) -> None:
        """Report each unit or put it on record as rejected; `heard` is told of each, in any thread.

        `place` is where the first of them comes in the summary, by default behind those given before. While the model
        reads some units, the next ones are decoded and the reports of former ones are written. Several threads may be
        in here at a time.
        """
        with self._changed:
            if self._stop.is_set():
                return
            first = self._places if place is None else place
            self._places = max(self._places, first + len(units))
            try:
                self._get_ready(units)
            except OSError as error:
                raise OutputError(f"The processes that decode cannot be started ({error.strerror}).") from None
            if self._attempts is None and not self._member:
                self._attempts = Attempts(self.job.out)
            self._at_work += 1
        twice: list[tuple[int, ingest.Unit]] = []

        def open_one(place: int, unit: ingest.Unit) -> Opened | None:
            begun = ""

            def begin(request: str) -> bool:
                nonlocal begun
                if self._deaths(request):
                    with self._changed:
                        self._suspects.append((place, unit, request, heard))
                    return False
                self._begin(begun := request)
                return True

            prepared = self._prepare(unit, begin)
            if prepared is None:
                return None
            if isinstance(prepared, Opened):
                if self._claims(prepared):
                    return prepared
                self._desk.clear(prepared)  # its pixels are not kept until then
                twice.append((place, unit))
            else:
                self._say(self.conclude(prepared, place), unit, heard)
            self._end(begun)
            return None

        def write_one(place: int, opened: Opened, read: tuple[Reading | Exception, float]) -> None:
            self._say(self._conclude_read(opened, *read, place), opened.unit, heard)

        try:
            self._stages.run(enumerate(units, first), open_one, write_one)
            for number, unit in twice:
                if self._stop.is_set():
                    break
                self._say(self.conclude(self.prepare(unit), number), unit, heard)
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    def _deaths(self, request: str) -> int:
        return self._attempts.deaths(request) if self._attempts and request else 0

    def _begin(self, request: str) -> None:
        if self._attempts and request:
            try:
                self._attempts.begin(request)
            except OSError as error:
                raise cannot_write(error) from None

    def _end(self, request: str) -> None:
        if self._attempts and request:
            self._attempts.end(request)

    def _try_suspects(self) -> None:
        """Do what was under way when a former run died, each by itself: so that one dies of it only that has to."""
        while self._suspects and not self._stop.is_set():
            place, unit, request, heard = self._suspects.pop(0)
            if self._deaths(request) >= MOST_DEATHS:
                why = process_died(unit.path)
                remedy = f"{why.remedy} To have it tried again, remove {UNDER_WAY} from the output folder."
                with self._changed:
                    outcome: IndexEntry | Rejection = self._settle(self._reject(replace(why, remedy=remedy)))
            else:
                self._begin(request)
                outcome = self.conclude(self.prepare(unit), place)
                self._end(request)
            self._say(outcome, unit, heard)

    def _get_ready(self, units: Sequence[ingest.Unit]) -> None:
        """Threads and desks as the work and the device are worth them."""
        self._work += work_of(units)
        gpu = may_be_gpu(self.job.device)
        desks = desks_for(max(self._work, self._total_work)) if gpu else 0
        if isinstance(self._desk, Desk) and desks:
            self._desk = Desks(self.job, desks, self._desk)
        if not gpu:  # model and desk share the cores: one thread of each keeps them busy, and reports come one by one
            width = Width(under_way=3, openers=1, together=1, writers=1)
        elif isinstance(self._desk, Desk):
            width = Width(under_way=132, openers=4, together=64, writers=2)
        else:  # a thread for each unit that waits for its desk: with fewer, those of one desk would keep others idle
            most = UNDER_WAY_A_DESK * self._desk.count
            width = Width(under_way=most, openers=most, together=64, writers=most)
        self._stages.widen(width)

    def _claims(self, opened: Opened) -> bool:
        """Whether nobody in this run has reported that content, or is about to; from then on this one is."""
        with self._changed:
            known = opened.request in self._in_flight or self._folder.finished(opened.request, self._formats)
            if opened.request and known:
                return False
            self._in_flight.add(opened.request)
            return True

    def _read(self, opened: Sequence[Opened]) -> list[tuple[Reading | Exception, float]]:
        """What the model says of each, and the seconds that it took."""
        if not opened:
            return []
        with self._device:
            reader = load_reader(self.job.model, self.job.device)
            started = time.perf_counter()
            readings = reader.read_many([each.sight for each in opened])
            self._read_from = self._read_from or started
            seconds = time.perf_counter() - started
            self.device_seconds += seconds
        return [(reading, seconds / len(opened)) for reading in readings]

    def _say(self, outcome: IndexEntry | Rejection, unit: ingest.Unit, heard: Heard | None) -> None:
        if heard is not None:
            heard(unit, outcome)

    def finish(self) -> RunSummary:
        """Write what is over the whole folder, the HTML index last, and say what came of the run.

        Before that, what was under way when a former run died is done.
        """
        self._try_suspects()
        self._finished = not self._stop.is_set()
        files, errors = write_over_run(self._folder, self.job.formats, self.job.lot, self.job.language)
        index = self._folder.write_html_index()
        return RunSummary(
            out=self.job.out,
            index=index,
            formats=tuple(self._formats),
            reported=self._folder.some(self._reported[place] for place in sorted(self._reported)),
            already_reported=self._folder.some(self._already[place] for place in sorted(self._already)),
            rejected=tuple(self._rejected),
            left=max(0, self._total - self._done),
            passed_over=self._passed_over,
            without_golden_sample=self._without_golden_sample,
            seconds=time.perf_counter() - self._started,
            first_report_seconds=self._first_report,
            device_wait=self.device_wait,
            files=files,
            errors=errors,
        )

    @property
    def device_wait(self) -> float | None:
        """The share of the time since the first reading in which the device had nothing to read."""
        if not self._read_from:
            return None
        return max(0.0, 1 - self.device_seconds / (time.perf_counter() - self._read_from))

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

    def settled(
        self, unit: ingest.Unit, request: str, place: int, *, already: bool = False, whole: bool = False
    ) -> bool:
        """Count a unit whose report another session has written; False where it is not there.

        `place` is where it comes in the summary. `already`: as one that was there before this unit's turn. With `whole`
        it must have all formats of the job; without, its errors say why it lacks some.
        """
        entry = self._folder.finished(request, self._formats) if whole else self._folder.known(request)
        if entry is None:
            return False
        with self._changed:
            (self._already if already else self._reported)[place] = entry.id
            if already:
                self.met(unit, request)
                self._reject_missing(unit, entry)
            self._rejected |= dict.fromkeys(entry.refused)
            self._count()
        return True

    def met(self, unit: ingest.Unit, request: str) -> None:
        """Note where content lies on which there is a report, so that it keeps one when its first name is used anew."""
        if request and unit.kind != "series":  # a series is known by its UID, wherever it lies
            self._folder.met(request, unit.files[0], subject_of_file(unit))

    def refused(self, rejection: Rejection) -> None:
        """Count a unit that another session of this run has put on record as refused."""
        self._rejected[rejection] = None
        self._count()

    def refresh(self) -> None:
        """Take note of what other sessions have written into the output folder."""
        with self._changed:
            self._folder.refresh()

    def prepare(self, unit: ingest.Unit) -> Prepared:
        """Decode a unit and its golden sample, unless its report is there: that is known from the bytes alone.

        Puts nothing on record; `conclude` does.  Safe in another thread.
        """
        prepared = self._prepare(unit, lambda request: True)
        assert prepared is not None
        return prepared

    def _prepare(self, unit: ingest.Unit, begin: Callable[[str], bool]) -> Prepared | None:
        """The same; None where `begin`, which is asked before anything is decoded, says no."""
        golden = self._references.of(unit)
        request = "" if isinstance(golden, Rejection) else self._request(unit, golden)
        if done := self._folder.finished(request, self._formats):
            return _Already(unit, done)
        if known := self._folder.known(request):
            with contextlib.suppress(BundleError):  # what is damaged is made again from its source
                return _Stored(unit, known, load_bundle(self.job.out / known.id))
        if isinstance(golden, Rejection):
            return golden_unusable(unit, golden)
        return self._desk.open(unit, golden, request) if begin(request) else None

    def conclude(self, prepared: Prepared, place: int | None = None) -> IndexEntry | Rejection:
        """Report what was prepared, or put it on record as refused or done before; says which. Raises OutputError.

        `place` is where it comes in the summary, by default at the end.
        """
        if place is None:
            with self._changed:
                place, self._places = self._places, self._places + 1
        if isinstance(prepared, Opened):
            with self._changed:
                self._changed.wait_for(lambda: prepared.request not in self._in_flight)
                if done := self._folder.finished(prepared.request, self._formats):  # the same content twice in a run
                    self._desk.clear(prepared)
                    return self._settle(self._note_done(prepared.unit, done, place))
                self._in_flight.add(prepared.request)
            try:
                [(reading, seconds)] = self._read([prepared])
            except BaseException:  # the model does not load
                self._drop(prepared)
                raise
            return self._conclude_read(prepared, reading, seconds, place)
        with self._changed:
            if isinstance(prepared, Rejection):
                return self._settle(self._reject(prepared))
            if self._folder.known(prepared.entry.request):
                if isinstance(prepared, _Already):
                    return self._settle(self._note_done(prepared.unit, prepared.entry, place))
                return self._settle(self._complete(prepared, place))
        return self.conclude(self.prepare(prepared.unit), place)  # it was superseded meanwhile

    def _conclude_read(
        self, opened: Opened, reading: Reading | Exception, seconds: float, place: int
    ) -> IndexEntry | Rejection:
        """Write the report on what was read, and note it as done."""
        try:
            outcome = (
                failed(opened.unit, reading)
                if isinstance(reading, Exception)
                else self._report(opened, reading, seconds)
            )
            with self._changed:
                for missing in opened.refused:
                    self._reject(missing)
                if isinstance(outcome, Rejection):
                    return self._settle(self._reject(outcome))
                self._reported[place] = outcome.id
                if self._first_report is None:
                    self._first_report = time.perf_counter() - self._started
                if self._told is not None:
                    self._told(outcome)
                return self._settle(outcome)
        finally:
            self._drop(opened)

    def _report(self, opened: Opened, reading: Reading, seconds: float) -> IndexEntry | Rejection:
        """Write a report as the next version of what the folder holds on its subject."""
        model = load_reader(self.job.model, self.job.device).info
        digest, language = self._rules.digest, self.job.language
        known_as = report_id(opened.identity, opened.reference_key, model, self.job.kind, digest, language)
        with self._changed:
            self._changed.wait_for(lambda: opened.subject not in self._subjects)
            self._subjects.add(opened.subject)
        try:
            while True:
                with self._changed:
                    version = version_of(known_as, self._folder, opened.request, opened.subject)
                outcome = self._desk.report(opened, reading, model, version, seconds)
                if isinstance(outcome, Rejection):
                    return outcome
                added = None
                with contextlib.suppress(OutdatedVersionError), self._changed:  # another came first: once more
                    if version == version_of(known_as, self._folder, opened.request, opened.subject):
                        added = self._folder.add(outcome, sync=False)
                if added:
                    self._folder.sync()  # beside all others: they share what the disk takes for it
                    return added
        finally:
            with self._changed:
                self._subjects.discard(opened.subject)
                self._changed.notify_all()

    def _drop(self, opened: Opened) -> None:
        """Let go of what was claimed."""
        self._desk.clear(opened)
        self._end(opened.request)
        with self._changed:
            self._in_flight.discard(opened.request)
            self._changed.notify_all()

    def _settle(self, outcome: IndexEntry | Rejection) -> IndexEntry | Rejection:
        if self._told is not None and isinstance(outcome, Rejection):
            self._told(outcome)
        self._count()
        return outcome

    def _count(self) -> None:
        self._done += 1
        self._tell("report", self._done, self._total)

    def _note_done(self, unit: ingest.Unit, entry: IndexEntry, place: int) -> IndexEntry:
        """The report is there."""
        self._already[place] = entry.id
        self.met(unit, entry.request)
        self._reject_missing(unit, entry)
        return entry

    def _complete(self, stored: _Stored, place: int) -> IndexEntry:
        """The report is there, in other formats than the job's: write those that it lacks."""
        entry, out = stored.entry, self.job.out
        here = {name for name, file in entry.formats.items() if (out / file).is_file()}
        lacking = [name for name in self._formats if name not in here]
        files, errors = written(out, write_formats, out / entry.id, stored.bundle, lacking)
        errors = {name: why for name, why in entry.errors.items() if name not in self._formats} | errors
        entry = self._folder.add(replace(entry, formats=files, errors=errors))
        self._reported[place] = entry.id
        self._reject_missing(stored.unit, entry)
        return entry

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
                parts.append([each.page, each.image, each.frames, *sorted(ingest.digests(each.files))])
                parts.append([document.sha256() for document in each.documents])
        except Exception:  # what is wrong with the file is for `ingest.load` to say
            return ""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _reject(self, rejection: Rejection) -> Rejection:
        self._rejected[rejection] = None
        self._folder.reject(rejection)
        return rejection

    def _tell(self, stage: Literal["look", "report"], done: int, total: int) -> None:
        if self._listener is not None:
            self._listener(Progress(stage, done, total))


@dataclass(frozen=True, slots=True)
class _Already:
    unit: ingest.Unit
    entry: IndexEntry


@dataclass(frozen=True, slots=True)
class _Stored:
    unit: ingest.Unit
    entry: IndexEntry
    bundle: Bundle


Prepared = Opened | _Already | _Stored | Rejection  # what `Session.prepare` hands to `Session.conclude`


def write_over_run(
    folder: RunFolder, names: Sequence[str], lot: LotPlan, language: Language
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes the formats among `names` that are over all current reports of a folder.

    Returns their first files, relative to the folder, and why those that are missing could not be written.  Raises
    OutputError when the disk fails.
    """
    names = run_formats(names)
    errors: dict[str, str] = {}
    try:
        clear_leftovers(folder.path)
        files = write_run_formats(RunReports(folder.path, folder.current_ids if names else (), lot, language), names)
    except FormatError as error:
        files, errors = error.written, error.errors
    except OSError as error:
        raise cannot_write(error) from None
    return {name: path.name for name, path in files.items()}, errors


def version_of(report_id: str, folder: RunFolder, request: str, subject: str) -> Version:
    """Which version a report is of what the folder holds on its subject.

    A report on something new is version 1. One that was made on the same request is the former again, so that it keeps
    its id and version. Any other supersedes the former, unless the content of that lies elsewhere, too.
    """
    former = folder.current(subject)
    if former and former.request != request and former.elsewhere and folder.follow(former):
        former = folder.current(subject)
    if former and former.request == request:
        return Version(former.id, former.version, former.supersedes)
    taken = folder.entry(report_id)
    # The same content was reported before something else, or on another request: a new report all the same.
    if taken and (taken.superseded_by or taken.request != request):
        parts = [report_id, subject, former.id if former else ""]
        report_id = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return Version(report_id, former.version + 1, former.id) if former else Version(report_id)


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
        archive = f"{ingest.FileRef(str(path)).name}!"
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
    check_inputs(job.inputs)
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


def check_inputs(paths: Sequence[Path]) -> None:
    """One missing path among others is a refused input; when nothing is there, the command is wrong: UsageError."""
    faults = [fault for fault in map(_out_of_reach, paths) if fault]
    if len(faults) == len(paths):
        raise UsageError(faults[0])


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


def device_key(device: str) -> str:
    """By what a device is told from all others of this machine, whatever a process calls it. Imports torch."""
    import torch

    place = torch.device(device)
    if place.type != "cuda" or (place.index or 0) >= torch.cuda.device_count():
        return device
    return f"GPU-{torch.cuda.get_device_properties(place).uuid}"


def _shared_ending(one: str, other: str) -> int:
    """How many characters at their ends two names share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _stem(unit: ingest.Unit) -> str:
    return Path(unit.files[0].basename).stem
