"""The output folder of a run: which reports are done (`index.jsonl`) and which inputs were refused (`rejected.jsonl`).

Both files are append-only while a run works, so that an interruption costs at most the line that was being written;
the next line repairs that. Until the run ends, a later line replaces an earlier one of the same report. One run at a
time owns a folder; workers that it hands units to are its members, and append lines beside it.

A later report on the same subject supersedes the former: both stay, and each line names the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import operator
import os
import re
import sqlite3
import threading
import weakref
from array import array
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, overload

from pipelines.attempts import UNDER_WAY
from pipelines.ingest.files import FileRef
from pipelines.reading import OUT_OF_DOMAIN
from pipelines.study import Rejection
from reports.bundle import REPORT, note_superseded
from reports.files import atomic_write, is_temporary, plain
from reports.formats import own_files, run_file_links
from reports.rules import WORST_FIRST
from reports.schema import Report

INDEX: Final = "index.jsonl"
REJECTED: Final = "rejected.jsonl"
QUARANTINE: Final = "quarantine"
_LOCK: Final = ".scanscribe.lock"
_OWN_FILES: Final = (INDEX, REJECTED, "index.html", _LOCK, UNDER_WAY)
_REPORT_ID: Final = re.compile("[0-9a-f]{16}")
READ_BYTES: Final = 4096  # at a time, of a line
MOST_ELSEWHERE: Final = 16  # files of the same content that a line names


class OutputError(Exception):
    """The output folder cannot be used. The message says what mends it; it may be logged, so it names no path."""

    code = "output-folder"


class OutdatedVersionError(Exception):
    """Another process has meanwhile reported the same subject: decide anew which version this report is."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of `index.jsonl`: a report all of whose files are in place."""

    id: str
    request: str  # SHA-256 over content, golden sample, model, settings: by it a later run knows what is done
    kind: str  # "ct" | "defect"
    title: str
    inputs: tuple[Mapping[str, str], ...]  # path, sha256
    findings: int
    types: tuple[str, ...]
    disposition: str | None
    confidence: float | None  # of the surest finding; None when there is none
    formats: Mapping[str, str]  # format -> path, relative to the folder
    model: str  # name and version
    seconds: float
    thumbnail: str | None = None  # path, relative to the folder
    errors: Mapping[str, str] = field(default_factory=dict)  # format -> why it could not be written
    refused: tuple[Rejection, ...] = ()  # files of the series that the report had to do without
    status: str = "done"
    version: int = 1
    supersedes: str | None = None  # the id of the report that this one replaces
    superseded_by: str | None = None
    severity: str | None = None  # of the worst finding, where the rules say one
    assessed: bool = True  # else the study is unlike those that the model was made for
    subject: str = ""  # hash of the part of a series or the file it is about: the next report on it supersedes this one
    elsewhere: tuple[Mapping[str, str], ...] = ()  # path, member, subject: other files that held the same content


def figures_of(report: Report) -> dict[str, Any]:
    """What a report's line says of its content."""
    severities = {finding.severity for finding in report.findings}
    return {
        "title": report.title,
        "findings": len(report.findings),
        "types": tuple(dict.fromkeys(finding.type for finding in report.findings)),
        "severity": next((severity for severity in WORST_FIRST if severity in severities), None),
        "disposition": report.disposition,
        "confidence": max((finding.confidence for finding in report.findings), default=None),
        "assessed": OUT_OF_DOMAIN not in report.quality_flags,
    }


_FIELDS: Final = {f.name for f in fields(IndexEntry)}
_REQUIRED: Final = {f.name for f in fields(IndexEntry) if f.default is f.default_factory is MISSING}
# Where the last line of each report stands, in the order in which they were first written.
_TABLE: Final = """
    create table reports
        (number integer primary key, id text unique, request text, subject text, current int, place int);
    create index of_request on reports (request);
    create index of_subject on reports (subject);
    pragma journal_mode = off;
"""


class RunFolder:
    """An output folder opened for one run; a context manager that holds the folder's lock.

    What it knows of the reports is where their lines are, in a table that moves to the disk when it is large: of many
    reports only those that are asked for are in memory.

    With `member` it is opened beside the run that owns it, for lines only.  Raises OutputError when the folder cannot
    be made or written, or another run owns it.
    """

    def __init__(self, path: Path, *, member: bool = False) -> None:
        self.path, self._member = path, member
        # One connection for all threads. Without a name the data base is private, and goes with the process.
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._table.executescript(_TABLE)
        self._asking = threading.RLock()  # what the table says holds for the index that is open
        self._untidy = False  # whether a report has several lines
        self._rejections: dict[Rejection, None] = {}
        self._index, self._refused = _Lines(path / INDEX), _Lines(path / REJECTED)
        self._lines_lock: int | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise OutputError(
                f"The output folder cannot be used ({error.strerror}): name one that can be written with --out."
            ) from None
        try:
            if not member:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._close()
            raise OutputError(
                "Another run is writing to the output folder: wait until it ends, or name another one with --out."
            ) from None
        try:
            if any(os.path.lexists(path / name) for name in (INDEX, REJECTED)):
                self.refresh()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OutputError):  # the last line of a report counts until the folder is tidied
            if not self._member and self._lines_lock is not None:
                with self._alone():
                    if self._untidy:
                        self._index.replace(self.entries)
        self._close()

    def _close(self) -> None:
        self._table.close()
        self._index.close()
        self._refused.close()
        os.close(self._lock)
        if self._lines_lock is not None:
            os.close(self._lines_lock)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What others have appended is known, and nobody else appends, for as long as the block runs."""
        try:
            if self._lines_lock is None:
                self._lines_lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._lines_lock, fcntl.LOCK_EX)
        except OSError as error:
            raise cannot_write(error) from None
        try:
            self._take_note()
            for news in self._refused.news():
                if news is None:
                    self._rejections = {}
                elif rejection := _rejection(news[1]):
                    self._rejections[rejection] = None
            yield
        finally:
            fcntl.flock(self._lines_lock, fcntl.LOCK_UN)

    def _take_note(self) -> None:
        """Of what others have appended to the index."""
        replaced: dict[str, str] = {}
        with self._asking:
            for news in self._index.news():
                if news is None:
                    self._ask("delete from reports")
                    self._untidy = False
                elif entry := _entry(news[1]):
                    self._note(entry, news[0])
                    replaced |= {entry.supersedes: entry.id} if entry.supersedes else {}
        for former, by in replaced.items():
            if (entry := self.entry(former)) and entry.superseded_by is None:  # a run ended between the two lines
                self._append(replace(entry, superseded_by=by))

    def _note(self, entry: IndexEntry, place: int) -> None:
        current = entry.superseded_by is None
        known = self._ask(
            "update reports set request = ?, subject = ?, current = ?, place = ? where id = ? returning id",
            *(entry.request, entry.subject, current, place, entry.id),
        )
        self._untidy |= bool(known)
        if not known:
            values = entry.id, entry.request, entry.subject, current, place
            self._ask("insert into reports (id, request, subject, current, place) values (?, ?, ?, ?, ?)", *values)

    def _append(self, entry: IndexEntry) -> None:
        self._note(entry, self._index.append(entry))

    def _ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._asking:
                return self._table.execute(question, values).fetchall()
        except sqlite3.OperationalError as error:  # it is large, and the disk for temporary files is full
            raise OutputError(
                f"There is no space for temporary files ({error}): free some, or set TMPDIR to a folder that has some."
            ) from None

    def _find(self, question: str, *values: object) -> Entries:
        """The lines of reports, by `where` and what follows it."""
        with self._asking:
            rows = self._ask(f"select place from reports {question}", *values)
            return Entries(self._index.descriptor, (place for (place,) in rows))

    def refresh(self) -> None:
        """Take note of what others have appended. Raises OutputError."""
        with self._alone():
            pass

    @property
    def entries(self) -> Entries:
        """Every report in the folder, in the order in which they were first written."""
        return self._find("order by number")

    @property
    def current_ids(self) -> tuple[str, ...]:
        """The ids of those of them that are not superseded."""
        return tuple(name for (name,) in self._ask("select id from reports where current order by number"))

    def some(self, ids: Iterable[str]) -> Entries:
        """The reports with those ids, in that order."""
        with self._asking:
            rows = (self._ask("select place from reports where id = ?", each) for each in ids)
            return Entries(self._index.descriptor, (place for found in rows for (place,) in found))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Every input that was refused and has not succeeded since."""
        return tuple(self._rejections)

    def known(self, request: str) -> IndexEntry | None:
        """The current report that was made on `request`, whatever its formats."""
        return self._last("where request = ? and current", request)

    def finished(self, request: str, formats: Sequence[str]) -> IndexEntry | None:
        """The entry of the current report that was made on `request`, with all of `formats` in place, else None."""
        entry = self.known(request)
        if entry is None or any(name not in entry.formats for name in formats):
            return None
        files = (f"{entry.id}/{REPORT}", *entry.formats.values())
        return entry if all((self.path / file).is_file() for file in files) else None

    def current(self, subject: str) -> IndexEntry | None:
        """The current report about `subject`."""
        return self._last("where subject = ? and current", subject)

    def entry(self, report_id: str) -> IndexEntry | None:
        """The line of a report."""
        return self._last("where id = ?", report_id)

    def _last(self, question: str, key: str) -> IndexEntry | None:
        with self._asking:
            rows = self._ask(f"select place from reports {question} order by number desc limit 1", key) if key else []
            return _entry_at(self._index.descriptor, rows[0][0]) if rows else None

    def add(self, entry: IndexEntry, *, sync: bool = True) -> IndexEntry:
        """Record a report; returns its line. Call it when all of its files are in place.

        Without `sync`, which keeps others waiting for the disk, it is for good when the method of that name returned.

        What an earlier run wrote on the same request in other formats stays part of it.  A report that it supersedes is
        marked so, in its line and in its folder.  Raises OutdatedVersionError when it supersedes what is not current.
        """
        with self._alone():
            former, replaced = self.current(entry.subject), self.entry(entry.supersedes or "")
            if former and former.request != entry.request and former.id != entry.supersedes:
                raise OutdatedVersionError
            if replaced and replaced.superseded_by is None and (former is None or former.id != replaced.id):
                raise OutdatedVersionError  # it is about another file by now
            if (earlier := self.entry(entry.id)) and earlier.request == entry.request:
                kept = {
                    name: file
                    for name, file in earlier.formats.items()
                    if name not in entry.errors and (self.path / file).is_file()
                }
                entry = replace(entry, formats=kept | dict(entry.formats), elsewhere=earlier.elsewhere)
            self._append_in_place_of(replaced, entry)
            if sync:
                self._index.sync()
        return entry

    def sync(self) -> None:
        """Wait until all that was added is on the disk; in any thread, beside other calls. Raises OutputError."""
        with self._asking:
            index = self._index.descriptor
            copy = None if index is None else os.dup(index)  # it may be closed meanwhile
        if copy is not None:
            try:
                _sync(copy)
            finally:
                os.close(copy)

    def _append_in_place_of(self, former: IndexEntry | None, entry: IndexEntry) -> None:
        """Append the line of a report, and that of the one that it supersedes, if that is current."""
        current = former if former and former.superseded_by is None else None
        if current:
            try:
                note_superseded(self.path / current.id, entry.id)
            except OSError as error:
                raise cannot_write(error) from None
        self._append(entry)
        if current:
            self._append(replace(current, superseded_by=entry.id))

    def met(self, request: str, file: FileRef, subject: str) -> None:
        """Note that the content of the current report on `request` lies in that file, too."""
        entry = self.known(request)
        if entry is None or subject in (entry.subject, *(each["subject"] for each in entry.elsewhere)):
            return
        with self._alone():
            if (entry := self.known(request)) is None:
                return
            others = entry.elsewhere
            if len(others) >= MOST_ELSEWHERE:
                others = tuple(each for each in others if os.path.exists(each["path"]))
            if len(others) < MOST_ELSEWHERE:
                place = {"path": os.path.abspath(file.place), "member": file.member or "", "subject": subject}
                self._append(replace(entry, elsewhere=(*others, place)))
                self._index.sync()

    def follow(self, entry: IndexEntry) -> bool:
        """Let a report be about another file that holds its content still, as its own holds something else now.

        False where there is none.
        """
        content = entry.inputs[0]["sha256"] if len(entry.inputs) == 1 else ""
        for number, other in enumerate(entry.elsewhere):
            file = FileRef(other["path"], other["member"] or None)
            try:
                if file.sha256() != content:
                    continue
            except Exception:  # it is gone; damaged archives answer with errors of many types
                continue
            with self._alone():
                if (latest := self.entry(entry.id)) is None or latest.subject != entry.subject:
                    return latest is not None  # another process was first
                inputs = ({"path": file.name, "sha256": content},)
                moved = replace(
                    latest, subject=other["subject"], inputs=inputs, elsewhere=latest.elsewhere[number + 1 :]
                )
                self._append_in_place_of(self.current(moved.subject), moved)
                self._index.sync()
            return True
        return False

    def drop(self, ids: Collection[str]) -> None:
        """Take superseded reports off the record, before their folders go. Current ones stay."""
        with self._alone():
            entries = self.entries
            self._index.replace(e for e in entries if e.superseded_by is None or e.id not in ids)
            self._index.close()  # all of it is news now
            self._take_note()

    def start(self, inputs: Iterable[Path], rejections: Iterable[Rejection]) -> None:
        """Begin a run over `inputs`: what was refused of them earlier is forgotten, `rejections` are recorded."""
        mine = tuple(os.path.abspath(path) for path in inputs)
        within = tuple(f"{path.rstrip('/')}{separator}" for path in mine for separator in "/!")
        with self._alone():
            others = [r for r in self._rejections if not f"{os.path.abspath(r.path)}/".startswith(within)]
            self._rejections = dict.fromkeys((*others, *rejections))
            self._refused.replace(self._rejections)

    def reject(self, rejection: Rejection) -> None:
        """Record a refused input."""
        with self._alone():
            if rejection not in self._rejections:
                self._rejections[rejection] = None
                self._refused.append(rejection)
                self._refused.sync()

    def wrote(self, path: str | Path) -> bool:
        """Whether `path` is something that a run writes into this folder. Whatever else lies there is the user's."""
        return written_by_runs(self.path, path)

    def write_html_index(self) -> Path:
        """Write `index.html` over the current reports and the refused inputs of the folder; returns its path."""
        from reports.index_page import write_index  # jinja2 is not needed before

        try:
            return write_index(
                self.path,
                _Plain(self._find("where current order by number")),
                list(map(plain, self.rejections)),
                formers={entry.id: _page(entry) for entry in self._find("where not current order by number")},
                files=run_file_links(self.path),
            )
        except OSError as error:
            raise cannot_write(error) from None


class Entries(Sequence[IndexEntry]):
    """Lines of an index, each read when it is asked for. They stay as they are, whatever becomes of the file."""

    def __init__(self, file: int | None, places: Iterable[int]) -> None:
        """`file` is the descriptor of an index; the places are in bytes."""
        self._places = array("Q", places)
        self._file = None if file is None else os.dup(file)
        if self._file is not None:
            weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> IndexEntry: ...

    @overload
    def __getitem__(self, place: slice) -> Entries: ...

    def __getitem__(self, place: int | slice) -> IndexEntry | Entries:
        """Raises OutputError."""
        if isinstance(place, slice):
            return Entries(self._file, self._places[place])
        return _entry_at(self._file, self._places[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class _Plain(Collection[dict[str, Any]]):
    """Entries as plain values, each made when it is asked for."""

    def __init__(self, entries: Sequence[IndexEntry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(plain, self._entries)

    def __contains__(self, line: object) -> bool:
        return any(line == each for each in self)


def written_by_runs(folder: Path, path: str | Path) -> bool:
    """Whether `path` is something that runs write into the output folder `folder`."""
    # `resolve` fails on a loop of links, `realpath` does not.
    real, here = Path(os.path.realpath(path)), os.path.realpath(folder)
    if not real.is_relative_to(here) or real == Path(here):
        return False
    parts = real.relative_to(here).parts
    if is_temporary(parts[0]) or parts[0] == QUARANTINE:
        return True
    if len(parts) == 1:
        return parts[0] in _OWN_FILES or parts[0] in own_files()
    return _REPORT_ID.fullmatch(parts[0]) is not None


def _page(entry: IndexEntry) -> str:
    """What to open of a report: its HTML, or the first of its formats."""
    return entry.formats.get("html") or next(iter(entry.formats.values()), entry.id)


def _entry_at(file: int | None, place: int) -> IndexEntry:
    """The entry whose line begins there. Raises OutputError."""
    assert file is not None
    data = b""
    try:
        while b"\n" not in data and (more := os.pread(file, READ_BYTES, place + len(data))):
            data += more
    except OSError as error:
        raise _cannot_read(INDEX, error) from None
    value = _value(data.partition(b"\n")[0])
    entry = value and _entry(value)
    if not entry:
        raise OutputError(f"The output folder's {INDEX} was changed by another program: run again.")
    return entry


def _entry(line: dict[str, Any]) -> IndexEntry | None:
    if not _REQUIRED <= line.keys() <= _FIELDS:
        return None
    several = {name: tuple(line.get(name, ())) for name in ("inputs", "types", "elsewhere")}
    refused = tuple(Rejection(**each) for each in line.get("refused", ()))
    return IndexEntry(**line | several | {"refused": refused})


def _rejection(line: dict[str, Any]) -> Rejection | None:
    return Rejection(**line) if line.keys() == {"path", "code", "reason", "remedy"} else None


class _Lines:
    """A file of JSON lines to which several processes append; call all of it under the folder's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # kept open: while it is, no other file can have its inode
        self._read = 0  # bytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._read = None, 0

    @property
    def descriptor(self) -> int | None:
        """Of the file that is open."""
        return self._file.fileno() if self._file else None

    def news(self) -> Iterator[tuple[int, dict[str, Any]] | None]:
        """The JSON objects that others have appended, each with its place; None: the file is another one, forget it.

        A line that an interruption tore is dropped from the file.  Raises OutputError.
        """
        try:
            info = self._path.stat()
            mine = os.fstat(self._file.fileno()) if self._file else None
            anew = mine is None or (mine.st_dev, mine.st_ino) != (info.st_dev, info.st_ino) or info.st_size < self._read
            if not anew and info.st_size == self._read:
                return
            if anew:
                self._open()
                yield None
            torn = yield from self._read_on()
            if torn:
                self._write(line for line in self._all() if _value(line) is not None)
                self._read = 0
                yield None
                yield from self._read_on()
        except FileNotFoundError:
            if self._file is not None:
                self.close()
                yield None
        except OSError as error:
            raise _cannot_read(self._path.name, error) from None

    def _read_on(self) -> Generator[tuple[int, dict[str, Any]], None, bool]:
        """What stands behind what was read; returns whether a line of it is torn."""
        torn = False
        for line in self._all(self._read):
            value = _value(line)
            torn |= value is None or not line.endswith(b"\n")
            if value is not None:
                yield self._read, value
            self._read += len(line)
        return torn

    def _all(self, start: int = 0) -> Iterator[bytes]:
        assert self._file is not None
        self._file.seek(start)
        return iter(self._file)

    def append(self, record: IndexEntry | Rejection) -> int:
        """Returns its place; it outlives this process, and a power cut after `sync`.

        Raises OutputError; the file is then as it was.
        """
        place, data = self._read, f"{_line(record)}\n".encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), place)
                    raise
            if self._file is None:
                self._open()
            self._read = place + len(data)
        except OSError as error:
            raise cannot_write(error) from None
        return place

    def sync(self) -> None:
        """Wait until all that was appended is on the disk. Raises OutputError."""
        assert self._file is not None
        _sync(self._file.fileno())

    def replace(self, records: Iterable[IndexEntry | Rejection]) -> None:
        """Raises OutputError."""
        self._write(f"{_line(record)}\n".encode() for record in records)
        self._read = self._path.stat().st_size

    def _write(self, lines: Iterable[bytes]) -> None:
        try:
            atomic_write(self._path, (line if line.endswith(b"\n") else line + b"\n" for line in lines))
            self._open()
        except OSError as error:
            raise cannot_write(error) from None

    def _open(self) -> None:
        self.close()
        self._file = self._path.open("rb")


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise cannot_write(error) from None


def _value(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, if it holds one."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _line(record: IndexEntry | Rejection) -> str:
    line = json.dumps(record, ensure_ascii=False, default=plain)
    return line if line.isprintable() else json.dumps(record, default=plain)  # with control characters


def cannot_write(error: OSError) -> OutputError:
    """What to tell a person when the disk fails in the middle of a run."""
    mend = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "let this user write there"
    return OutputError(
        f"The output folder cannot be written ({error.strerror}): {mend} or name another one with --out; the same "
        "command then goes on where it stopped."
    )


def _cannot_read(name: str, error: OSError) -> OutputError:
    return OutputError(f"The output folder's {name} cannot be read ({error.strerror}): name another folder with --out.")
