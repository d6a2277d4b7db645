"""When what lies in a watched folder is complete: files that no longer change, CT studies with all their slices.

Pure bookkeeping: the watcher tells what it sees (`look`, `gone`), and asks what can be taken (`ready`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pydicom
from pydicom.dataset import FileDataset

from flows.ledger import Seen
from pipelines.ingest.dicom import check_deflated
from pipelines.ingest.files import DOCUMENT_SUFFIXES, HEAD_BYTES, FileRef, first_slice, sniff

_TEMPORARY_ENDINGS: Final = (
    *(".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".filepart", ".opdownload", ".swp", ".!ut"),
    "~",
)
_TEMPORARY_BEGINNINGS: Final = (".", "~")
MOST_AT_ONCE: Final = 64  # files of a drop; a study is never divided
_HEADER: Final = [
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AcquisitionNumber"),
    *("NumberOfStudyRelatedInstances", "NumberOfSeriesRelatedInstances", "ImagesInAcquisition"),
]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the watcher waits for what is still coming. Seconds."""

    interval: float = 0.5  # between two looks at a file
    looks: int = 3  # that must find it unchanged
    quiet: float = 30.0  # without news until a study without a known count is complete
    cap: float = 600.0  # until a study is taken as it is, however much is still coming
    refuse_after: float = 60.0  # without change until a file that does not open is refused


@dataclass(frozen=True, slots=True)
class Drop:
    """What is complete: the files to plan together, those among them that are new, and the study's key or ""."""

    inputs: tuple[Path, ...]
    new: tuple[str, ...]
    study: str


@dataclass(slots=True)
class _File:
    size: int
    stamp: int
    changed: float  # when it last changed, or came
    looked: float
    looks: int = 1
    kind: Literal["", "dicom", "document", "other"] = ""  # "" before its content was looked at
    study: str = ""
    instance: str = ""  # of a slice
    archive: bool = False  # of slices; what it holds has come with it
    taken: bool = False
    later: float = 0.0  # not before then


@dataclass(slots=True)
class _Study:
    files: set[str] = field(default_factory=set)
    began: float = 0.0  # when the first file came that is not taken
    instances: int = 0  # by NumberOfStudyRelatedInstances
    by_series: dict[str, dict[str, int]] = field(default_factory=dict)  # series -> acquisition -> expected images
    whole_series: dict[str, int] = field(default_factory=dict)  # by NumberOfSeriesRelatedInstances
    series_of: dict[str, str] = field(default_factory=dict)  # instance -> series


def is_temporary_name(name: str) -> bool:
    """Whether programs give such names to files that they are still writing, or want to hide."""
    saved_by_an_editor = name.startswith("#") and name.endswith("#")
    return name.startswith(_TEMPORARY_BEGINNINGS) or name.lower().endswith(_TEMPORARY_ENDINGS) or saved_by_an_editor


class Settling:
    """The files of a watched folder. Times come from the caller."""

    def __init__(self, patience: Patience, seen: Iterable[Seen] = ()) -> None:
        self._patience = patience
        self._files: dict[str, _File] = {}
        self._studies: dict[str, _Study] = defaultdict(_Study)
        self._folders: dict[str, set[str]] = defaultdict(set)
        self._open: set[str] = set()  # files that are not taken
        for each in seen:
            file = _File(each.size, each.stamp, 0.0, 0.0, patience.looks, study=each.study, instance=each.instance)
            file.taken = True
            self._keep(each.path, file)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, path: str) -> bool:
        return path in self._files

    @property
    def open(self) -> frozenset[str]:
        """The files that are not taken yet."""
        return frozenset(self._open)

    def paths(self) -> list[str]:
        """All files that are known."""
        return list(self._files)

    def look(self, path: str, size: int, stamp: int, now: float, arrived: float) -> None:
        """A file as it is now: one with another size or stamp than before is another one, or is still being written.

        `arrived` is when it came, for one that is met the first time.
        """
        file = self._files.get(path)
        if file is None:
            self._keep(path, _File(size, stamp, min(arrived, now), now))
        elif (file.size, file.stamp) != (size, stamp):
            self.gone(path)
            self._keep(path, _File(size, stamp, now, now))
        elif not file.taken and now - file.looked >= self._patience.interval * 0.9:
            file.looks += 1
            file.looked = now
            if file.looks >= self._patience.looks and not file.kind:
                self._recognise(path, file)

    def turned_back(self, seconds: float) -> None:
        """The clock was turned back."""
        for path in self._open:
            file = self._files[path]
            file.changed, file.looked, file.later = file.changed - seconds, file.looked - seconds, file.later - seconds
        for study in self._studies.values():
            study.began -= seconds

    def gone(self, path: str) -> None:
        """A file is no longer there."""
        file = self._files.pop(path, None)
        if file is None:
            return
        self._open.discard(path)
        folder = os.path.dirname(path)
        self._folders[folder].discard(path)
        if not self._folders[folder]:
            del self._folders[folder]
        if file.study:
            self._studies[file.study].files.discard(path)
            if not self._studies[file.study].files:
                del self._studies[file.study]

    def take(self, paths: Iterable[str]) -> list[Seen]:
        """The content of files is on record: what to remember of them."""
        seen = []
        for path in paths:
            if file := self._files.get(path):
                file.taken = True
                self._open.discard(path)
                seen.append(Seen(path, file.size, file.stamp, file.study, file.instance))
        return seen

    def again(self, paths: Iterable[str], at: float) -> None:
        """Files are to be taken later, or once more; never by themselves where `at` is infinite."""
        for path in paths:
            if file := self._files.get(path):
                file.later = at
                if file.taken:
                    file.taken, file.changed, file.looks = False, at, 0
                    self._open.add(path)

    def is_taken(self, path: str) -> bool:
        """Whether the content of a file is on record."""
        return path in self._files and self._files[path].taken

    def changed(self, path: str) -> float:
        """When a file last changed."""
        return self._files[path].changed if path in self._files else 0.0

    def unsettled(self) -> bool:
        """Whether a file may still be changing."""
        return any(self._files[path].looks < self._patience.looks for path in self._open)

    def ready(self, now: float) -> Drop | None:
        """The next complete thing: of the pictures in a folder up to `MOST_AT_ONCE`, or one study."""
        by_folder: dict[str, list[str]] = defaultdict(list)
        studies: dict[str, None] = {}
        for path in sorted(self._open):
            file = self._files[path]
            if file.study:
                studies[file.study] = None
            elif self._settled(file, now):
                by_folder[os.path.dirname(path)].append(path)
        for folder, paths in by_folder.items():
            if drop := self._pictures(folder, paths, now):
                return drop
        for study in studies:
            if drop := self._study(study, now):
                return drop
        return None

    def _settled(self, file: _File, now: float) -> bool:
        return file.looks >= self._patience.looks and file.kind != "" and file.later <= now

    def _pictures(self, folder: str, new: list[str], now: float) -> Drop | None:
        """New files that are no slices, with the documents beside them. A document is waited for while it grows, but
        not longer than until a file that does not open would be refused."""
        here = sorted(path for path in self._folders[folder])
        documents = {path for path in here if self._is_document(path)}
        growing = [path for path in documents if path in self._open and self._files[path].looks < self._patience.looks]
        waited_for = [*growing, max(new, key=self.changed)] if growing else []
        if waited_for and all(now - self.changed(path) < self._patience.refuse_after for path in waited_for):
            return None
        slices = {self._files[path].study for path in here if self._files[path].study}
        arrived = [path for path in new if path in documents]
        if arrived and slices:  # they belong to studies: those are looked at again, with them
            for study in slices:
                self._reopen(study, now)
        # What a new document says may belong to any picture of its folder.
        others = here if arrived else new
        chosen = [path for path in others if path not in documents and not self._files[path].study]
        chosen = chosen if arrived else chosen[:MOST_AT_ONCE]
        strangers = {os.path.basename(path) for path in here if path not in documents} - {
            os.path.basename(path) for path in chosen
        }
        theirs = strangers | {os.path.splitext(name)[0] for name in strangers}
        mine = {os.path.basename(path) for path in chosen}
        mine |= {os.path.splitext(name)[0] for name in mine}
        beside = [path for path in documents - set(growing) if (stem := _stem(path)) in mine or stem not in theirs]
        inputs = sorted({*chosen, *beside, *arrived})
        if slices and not chosen:  # documents of studies only: planned with those
            return Drop((), tuple(arrived), "") if arrived else None
        return Drop(tuple(map(Path, inputs)), tuple(path for path in inputs if path in self._open), "")

    def _is_document(self, path: str) -> bool:
        file = self._files[path]
        return file.kind == "document" or (file.kind == "" and path.lower().endswith((*DOCUMENT_SUFFIXES, ".pdf")))

    def _reopen(self, study: str, now: float) -> None:
        """Let a study be planned again without waiting for more of it."""
        for path in self._studies[study].files:
            file = self._files[path]
            if file.later == math.inf:  # it is at work without what has come
                file.changed = now
            if file.taken or file.later == math.inf:
                file.taken, file.later = False, now
                self._open.add(path)

    def _study(self, key: str, now: float) -> Drop | None:
        study = self._studies[key]
        files = {path: self._files[path] for path in sorted(study.files)}
        new = [path for path, file in files.items() if not file.taken]
        if any(files[path].later > now for path in new):
            return None
        folders = {os.path.dirname(path) for path in files}
        beside = [path for folder in folders for path in self._folders[folder]]
        unknown = any(self._files[path].kind == "" and path in self._open for path in beside)  # may belong to it
        settled = not unknown and all(files[path].looks >= self._patience.looks for path in new)
        late = now - study.began >= self._patience.cap
        quiet = now - max(file.changed for file in files.values()) >= self._patience.quiet
        whole = quiet or all(files[path].archive for path in new) or self._counted(study, files)
        if not late and not (settled and whole):
            return None
        inputs = [path for path, file in files.items() if file.looks >= self._patience.looks]
        documents = [
            path for path in beside if self._is_document(path) and self._files[path].looks >= self._patience.looks
        ]
        chosen = tuple(path for path in new if path in inputs)
        return Drop(tuple(map(Path, sorted({*inputs, *documents}))), chosen, key) if chosen else None

    def _counted(self, study: _Study, files: dict[str, _File]) -> bool:
        """Whether the study has as many images as its headers say."""
        have = {file.instance for file in files.values() if file.instance}
        if study.instances:
            return len(have) >= study.instances
        count: dict[str, int] = defaultdict(int)
        for instance in have:
            count[study.series_of.get(instance, "")] += 1
        return all(
            count[series] >= expected > 0
            for series in count
            for expected in [study.whole_series.get(series) or sum(study.by_series.get(series, {}).values())]
        )

    def _keep(self, path: str, file: _File) -> None:
        self._files[path] = file
        self._folders[os.path.dirname(path)].add(path)
        if not file.taken:
            self._open.add(path)
        if file.study:
            self._studies[file.study].files.add(path)

    def _recognise(self, path: str, file: _File) -> None:
        """What kind of file it is, of a slice or a zip archive of slices which study it belongs to, and how many slices
        that has."""
        try:
            with open(path, "rb") as stream:
                kind = sniff(stream.read(HEAD_BYTES))
        except OSError:
            file.kind = "other"  # for the plan to say what is wrong
            return
        file.kind = "dicom" if kind == "dicom" else "document" if kind == "pdf" else "other"
        if kind is None and path.lower().endswith(DOCUMENT_SUFFIXES):
            file.kind = "document"
        if kind not in ("dicom", "zip"):
            return
        try:
            ref = first_slice(Path(path)) if kind == "zip" else FileRef(path)
            if ref is None:
                return
            with ref.open() as stream:
                check_deflated(stream)
                header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(_HEADER))
            uid = str(header.get("StudyInstanceUID") or "")
            if not uid:
                return
            file.study, file.archive = _key(uid), kind == "zip"
            study = self._studies[file.study]
            if not any(path in self._open for path in study.files):
                study.began = file.changed
            study.files.add(path)
            if not file.archive:
                file.instance = _key(str(header.get("SOPInstanceUID") or path))
                _expect(study, file.instance, header)
        except Exception:  # pydicom meets damaged bytes with errors of many types; the plan says what is wrong
            return


def _expect(study: _Study, instance: str, header: FileDataset) -> None:
    """Note how many images the header says there are. The series' number counts for all of its acquisitions."""
    series = _key(str(header.get("SeriesInstanceUID") or ""))
    study.series_of[instance] = series
    study.instances = max(study.instances, _number(header, "NumberOfStudyRelatedInstances"))
    if whole := _number(header, "NumberOfSeriesRelatedInstances"):
        study.whole_series[series] = max(whole, study.whole_series.get(series, 0))
    if images := _number(header, "ImagesInAcquisition"):
        of_series = study.by_series.setdefault(series, {})
        acquisition = str(header.get("AcquisitionNumber") or "")
        of_series[acquisition] = max(images, of_series.get(acquisition, 0))


def _number(header: FileDataset, keyword: str) -> int:
    try:
        return max(int(header.get(keyword) or 0), 0)
    except (TypeError, ValueError):
        return 0


def _key(uid: str) -> str:
    """A hash by which a UID is known here: what is kept says nothing about a patient."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
