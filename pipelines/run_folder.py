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
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from pipelines.study import Rejection
from reports.bundle import REPORT, note_superseded
from reports.files import atomic_write, is_temporary
from reports.formats import own_files, run_file_links

INDEX: Final = "index.jsonl"
REJECTED: Final = "rejected.jsonl"
QUARANTINE: Final = "quarantine"
_LOCK: Final = ".scanscribe.lock"
_OWN_FILES: Final = (INDEX, REJECTED, "index.html", _LOCK)
_REPORT_ID: Final = re.compile("[0-9a-f]{16}")


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
    subject: str = ""  # hash of the part of a series or the file it is about: the next report on it supersedes this one


_FIELDS: Final = {f.name for f in fields(IndexEntry)}
_REQUIRED: Final = {f.name for f in fields(IndexEntry) if f.default is f.default_factory is MISSING}


class RunFolder:
    """An output folder opened for one run; a context manager that holds the folder's lock.

    With `member` it is opened beside the run that owns it, for lines only.  Raises OutputError when the folder cannot
    be made or written, or another run owns it.
    """

    def __init__(self, path: Path, *, member: bool = False) -> None:
        self.path, self._member = path, member
        self._entries: dict[str, IndexEntry] = {}
        self._by_request: dict[str, IndexEntry] = {}
        self._by_subject: dict[str, IndexEntry] = {}
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
                        self._index.replace(self._entries.values())
        self._close()

    def _close(self) -> None:
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
            anew, lines = self._index.news()
            if anew:
                self._entries, self._by_request, self._by_subject, self._untidy = {}, {}, {}, False
            for entry in _entries(lines):
                self._note(entry)
            anew, lines = self._refused.news()
            if anew:
                self._rejections = {}
            self._rejections |= dict.fromkeys(_rejections(lines))
            yield
        finally:
            fcntl.flock(self._lines_lock, fcntl.LOCK_UN)

    def refresh(self) -> None:
        """Take note of what others have appended. Raises OutputError."""
        with self._alone():
            pass

    @property
    def entries(self) -> tuple[IndexEntry, ...]:
        """Every report in the folder, in the order in which they were written."""
        return tuple(self._entries.values())

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Every input that was refused and has not succeeded since."""
        return tuple(self._rejections)

    def known(self, request: str) -> IndexEntry | None:
        """The current report that was made on `request`, whatever its formats."""
        return self._by_request.get(request) if request else None

    def finished(self, request: str, formats: Sequence[str]) -> IndexEntry | None:
        """The entry of the current report that was made on `request`, with all of `formats` in place, else None."""
        entry = self.known(request)
        if entry is None or any(name not in entry.formats for name in formats):
            return None
        files = (f"{entry.id}/{REPORT}", *entry.formats.values())
        return entry if all((self.path / file).is_file() for file in files) else None

    def current(self, subject: str) -> IndexEntry | None:
        """The current report about `subject`."""
        return self._by_subject.get(subject) if subject else None

    def entry(self, report_id: str) -> IndexEntry | None:
        """The line of a report."""
        return self._entries.get(report_id)

    def add(self, entry: IndexEntry) -> IndexEntry:
        """Record a report; returns its line. Call it when all of its files are in place.

        What an earlier run wrote on the same request in other formats stays part of it.  A report that it supersedes is
        marked so, in its line and in its folder.  Raises OutdatedVersionError when it supersedes what is not current.
        """
        with self._alone():
            former = self.current(entry.subject)
            if former and former.request != entry.request and former.id != entry.supersedes:
                raise OutdatedVersionError
            if (earlier := self._entries.get(entry.id)) and earlier.request == entry.request:
                kept = {
                    name: file
                    for name, file in earlier.formats.items()
                    if name not in entry.errors and (self.path / file).is_file()
                }
                entry = replace(entry, formats=kept | dict(entry.formats))
            former = self._entries.get(entry.supersedes or "")
            if former and former.superseded_by is None:
                try:
                    note_superseded(self.path / former.id, entry.id)
                except OSError as error:
                    raise cannot_write(error) from None
            self._index.append(entry)
            self._note(entry)
            if former and former.superseded_by is None:
                former = replace(former, superseded_by=entry.id)
                self._index.append(former)
                self._note(former)
        return entry

    def _note(self, entry: IndexEntry) -> None:
        self._untidy |= entry.id in self._entries
        self._entries[entry.id] = entry
        former = self._entries.get(entry.supersedes or "")
        if former and former.superseded_by is None:  # a run ended between the two lines
            self._note(replace(former, superseded_by=entry.id))
        if entry.superseded_by is None:
            self._by_request[entry.request] = entry
            self._by_subject[entry.subject] = entry
        else:
            self._forget(entry)

    def _forget(self, entry: IndexEntry) -> None:
        """A superseded report is not found by what it was made on, or about."""
        for known, key in ((self._by_request, entry.request), (self._by_subject, entry.subject)):
            if key in known and known[key].id == entry.id:
                del known[key]

    def drop(self, ids: Collection[str]) -> None:
        """Take superseded reports off the record, before their folders go. Current ones stay."""
        with self._alone():
            kept = [entry for entry in self.entries if entry.superseded_by is None or entry.id not in ids]
            self._index.replace(kept)
            self._entries = {entry.id: entry for entry in kept}
            self._untidy = False

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

    def wrote(self, path: str | Path) -> bool:
        """Whether `path` is something that a run writes into this folder. Whatever else lies there is the user's."""
        return written_by_runs(self.path, path)

    def write_html_index(self) -> Path:
        """Write `index.html` over the current reports and the refused inputs of the folder; returns its path."""
        from reports.index_page import write_index  # jinja2 is not needed before

        try:
            return write_index(
                self.path,
                _Current(self._entries.values()),
                [asdict(rejection) for rejection in self.rejections],
                formers={entry.id: _page(entry) for entry in self._entries.values() if entry.superseded_by},
                files=run_file_links(self.path),
            )
        except OSError as error:
            raise cannot_write(error) from None


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


def _entries(lines: Iterable[dict[str, Any]]) -> Iterator[IndexEntry]:
    for line in lines:
        if line.keys() >= _REQUIRED and line.keys() <= _FIELDS:
            several = {"inputs": tuple(line["inputs"]), "types": tuple(line["types"])}
            refused = tuple(Rejection(**each) for each in line.get("refused", ()))
            yield IndexEntry(**line | several | {"refused": refused})


def _rejections(lines: Iterable[dict[str, Any]]) -> Iterator[Rejection]:
    return (Rejection(**line) for line in lines if set(line) == {"path", "code", "reason", "remedy"})


class _Current(Collection[dict[str, Any]]):
    """The current ones of some entries as plain values, each made when it is asked for."""

    def __init__(self, entries: Collection[IndexEntry]) -> None:
        self._entries = entries
        self._size = sum(entry.superseded_by is None for entry in entries)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (asdict(entry) for entry in self._entries if entry.superseded_by is None)

    def __contains__(self, line: object) -> bool:
        return any(line == each for each in self)


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

    def news(self) -> tuple[bool, list[dict[str, Any]]]:
        """The JSON objects that others have appended; the flag says that they are all there are, in another file.

        A line that an interruption tore is dropped from the file.  Raises OutputError.
        """
        try:
            info = self._path.stat()
            mine = os.fstat(self._file.fileno()) if self._file else None
            anew = mine is None or (mine.st_dev, mine.st_ino) != (info.st_dev, info.st_ino) or info.st_size < self._read
            if not anew and info.st_size == self._read:
                return False, []
            if anew:
                self._open()
            assert self._file is not None
            self._file.seek(self._read)
            data = self._file.read()
        except FileNotFoundError:
            anew = self._file is not None
            self.close()
            return anew, []
        except OSError as error:
            raise OutputError(
                f"The output folder's {self._path.name} cannot be read ({error.strerror}): name another folder with "
                "--out."
            ) from None
        good = []
        for line in data.split(b"\n"):
            with contextlib.suppress(ValueError):
                value = json.loads(line.decode("utf-8", "replace"))
                if isinstance(value, dict):
                    good.append((line, value))
        whole = b"".join(line + b"\n" for line, _ in good)
        if whole == data:
            self._read += len(data)
        else:
            self._file.seek(0)
            self._write(self._file.read(self._read) + whole)
        return anew, [value for _, value in good]

    def append(self, record: IndexEntry | Rejection) -> None:
        """Raises OutputError; the file is then as it was."""
        data = f"{_line(record)}\n".encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), self._read)
                    raise
            if self._file is None:
                self._open()
            self._read += len(data)
        except OSError as error:
            raise cannot_write(error) from None

    def replace(self, records: Iterable[IndexEntry | Rejection]) -> None:
        """Raises OutputError."""
        self._write(b"".join(f"{_line(record)}\n".encode() for record in records))

    def _write(self, data: bytes) -> None:
        try:
            atomic_write(self._path, data)
            self._open()
        except OSError as error:
            raise cannot_write(error) from None
        self._read = len(data)

    def _open(self) -> None:
        self.close()
        self._file = self._path.open("rb")


def _line(record: IndexEntry | Rejection) -> str:
    line = json.dumps(asdict(record), ensure_ascii=False)
    return line if line.isprintable() else json.dumps(asdict(record))  # control and undecodable characters are escaped


def cannot_write(error: OSError) -> OutputError:
    """What to tell a person when the disk fails in the middle of a run."""
    return OutputError(
        f"The output folder cannot be written ({error.strerror}): free some space or name another one with --out; "
        "the same command then goes on where it stopped."
    )
