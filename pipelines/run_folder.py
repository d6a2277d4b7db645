"""The output folder of a run: which reports are done (`index.jsonl`) and which inputs were refused (`rejected.jsonl`).

Both files are append-only while a run works, so that an interruption costs at most the line that was being written;
opening the folder again repairs that. Until the run ends, a later line replaces an earlier one of the same report. One
run at a time writes into a folder.

A later report on the same subject supersedes the former: both stay, and each line names the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from pipelines.study import Rejection
from reports.bundle import REPORT, note_superseded
from reports.files import atomic_write, is_temporary
from reports.formats import own_files, run_file_links

INDEX: Final = "index.jsonl"
REJECTED: Final = "rejected.jsonl"
QUARANTINE: Final = "quarantine"
_OWN_FILES: Final = (INDEX, REJECTED, "index.html")
_REPORT_ID: Final = re.compile("[0-9a-f]{16}")


class OutputError(Exception):
    """The output folder cannot be used. The message says what mends it; it may be logged, so it names no path."""

    code = "output-folder"


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

    Raises OutputError when the folder cannot be made or written, or another run is writing to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise OutputError(
                f"The output folder cannot be used ({error.strerror}): name one that can be written with --out."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise OutputError(
                "Another run is writing to the output folder: wait until it ends, or name another one with --out."
            ) from None
        self._entries = {entry.id: entry for entry in _entries(path / INDEX)}
        current = [entry for entry in self._entries.values() if entry.superseded_by is None]
        self._by_request = {entry.request: entry for entry in current}
        self._by_subject = {entry.subject: entry for entry in current}
        self._untidy = False  # whether a report has several lines
        self._rejections = dict.fromkeys(_rejections(path / REJECTED))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._untidy:
            with contextlib.suppress(OutputError):  # the last line of a report counts until the folder is tidied
                _write_lines(self.path / INDEX, self._entries.values())
        os.close(self._lock)

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
        marked so, in its line and in its folder.
        """
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
        self._put(entry)
        if former and former.superseded_by is None:
            self._put(replace(former, superseded_by=entry.id))
        return entry

    def _put(self, entry: IndexEntry) -> None:
        self._untidy |= entry.id in self._entries
        self._entries[entry.id] = entry
        if entry.superseded_by is None:
            self._by_request[entry.request] = entry
            self._by_subject[entry.subject] = entry
        else:
            self._forget(entry)
        _append_line(self.path / INDEX, entry)

    def _forget(self, entry: IndexEntry) -> None:
        """A superseded report is not found by what it was made on, or about."""
        for known, key in ((self._by_request, entry.request), (self._by_subject, entry.subject)):
            if key in known and known[key].id == entry.id:
                del known[key]

    def start(self, inputs: Iterable[Path], rejections: Iterable[Rejection]) -> None:
        """Begin a run over `inputs`: what was refused of them earlier is forgotten, `rejections` are recorded."""
        mine = tuple(os.path.abspath(path) for path in inputs)
        within = tuple(f"{path.rstrip('/')}{separator}" for path in mine for separator in "/!")
        others = [r for r in self._rejections if not f"{os.path.abspath(r.path)}/".startswith(within)]
        self._rejections = dict.fromkeys((*others, *rejections))
        _write_lines(self.path / REJECTED, self._rejections)

    def reject(self, rejection: Rejection) -> None:
        """Record a refused input."""
        if rejection not in self._rejections:
            self._rejections[rejection] = None
            _append_line(self.path / REJECTED, rejection)

    def wrote(self, path: str | Path) -> bool:
        """Whether `path` is something that a run writes into this folder. Whatever else lies there is the user's."""
        return written_by_runs(self.path, path)

    def write_html_index(self) -> Path:
        """Write `index.html` over the current reports and the refused inputs of the folder; returns its path."""
        from reports.index_page import write_index  # jinja2 is not needed before

        try:
            return write_index(
                self.path,
                [asdict(entry) for entry in self.entries if entry.superseded_by is None],
                [asdict(rejection) for rejection in self.rejections],
                formers={entry.id: _page(entry) for entry in self.entries if entry.superseded_by},
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


def _entries(path: Path) -> list[IndexEntry]:
    return [
        IndexEntry(
            **line
            | {
                "inputs": tuple(line["inputs"]),
                "types": tuple(line["types"]),
                "refused": tuple(Rejection(**each) for each in line.get("refused", ())),
            }
        )
        for line in _read_lines(path)
        if line.keys() >= _REQUIRED and line.keys() <= _FIELDS
    ]


def _rejections(path: Path) -> list[Rejection]:
    return [Rejection(**line) for line in _read_lines(path) if set(line) == {"path", "code", "reason", "remedy"}]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines. A line that an interruption tore is dropped from the file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"The output folder's {path.name} cannot be read ({error.strerror}): name another folder with --out."
        ) from None
    good: list[tuple[str, dict[str, Any]]] = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            good.append((line, value))
    whole = "".join(f"{line}\n" for line, _ in good)
    if whole != text:
        _write(path, whole)
    return [value for _, value in good]


def _append_line(path: Path, record: IndexEntry | Rejection) -> None:
    try:
        with path.open("ab") as file:
            file.write(f"{_line(record)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(error) from None


def _write_lines(path: Path, records: Iterable[IndexEntry | Rejection]) -> None:
    _write(path, "".join(f"{_line(record)}\n" for record in records))


def _write(path: Path, text: str) -> None:
    try:
        atomic_write(path, text)
    except OSError as error:
        raise cannot_write(error) from None


def _line(record: IndexEntry | Rejection) -> str:
    line = json.dumps(asdict(record), ensure_ascii=False)
    return line if line.isprintable() else json.dumps(asdict(record))  # control and undecodable characters are escaped


def cannot_write(error: OSError) -> OutputError:
    """What to tell a person when the disk fails in the middle of a run."""
    return OutputError(
        f"The output folder cannot be written ({error.strerror}): free some space or name another one with --out; "
        "the same command then goes on where it stopped."
    )
