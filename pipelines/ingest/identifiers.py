"""Accession, lot, part and serial numbers, found by patterns in documents and in the names of files and folders.

The patterns are the user's to change: `default_identifiers.toml` explains them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import regex

from pipelines.ingest.files import FileRef
from pipelines.study import Document

DEFAULT_PATTERNS: Final = Path(__file__).with_name("default_identifiers.toml")
IDENTIFIERS: Final = ("accession", "lot", "part", "serial")
PLACES: Final = ("document", "name")
FOLDERS_ABOVE: Final = 3
MAX_LINE: Final = 500  # characters of a line, or of a name, that are searched
MAX_VALUE: Final = 64
SECONDS_A_SEARCH: Final = 0.25  # a pattern can take for ever on a short text; `regex` can be told to give up
_PROBES: Final = ("a" * MAX_LINE, "1" * MAX_LINE, " " * MAX_LINE, "a1-" * 160 + "!", "lot: " * 100)


class PatternError(ValueError):
    """A file of patterns that cannot be used. The message says what to mend."""

    code = "identifiers"


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: each number, where it stood, and whether something disagreed or could not be searched."""

    values: Mapping[str, str]
    places: Mapping[str, str]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patterns:
    """Compiled patterns by place and number. `digest` is the SHA-256 (hex) of the file that they are from."""

    digest: str
    by_place: Mapping[str, Mapping[str, tuple[regex.Pattern[str], ...]]]

    def search(self, documents: Sequence[Document], files: Sequence[FileRef]) -> Found:
        """The numbers of a study that these documents belong to and that was read from these files."""
        met: dict[str, dict[str, str]] = {name: {} for name in IDENTIFIERS}  # number -> value -> first place
        flags = set()
        sources = ("document", _lines(documents)), ("name", _names(files))
        for (place, texts), name in itertools.product(sources, IDENTIFIERS):
            for where, text in texts:
                try:
                    values = self._values(place, name, text)
                except TimeoutError:
                    flags.add("identifier-search-cut")
                    break
                met[name] |= {value: where for value in values if value not in met[name]}
                if place == "name" and values:
                    break  # the nearest name counts
        if any(len(values) > 1 for values in met.values()):
            flags.add("conflicting-identifiers")
        sure = {name: next(iter(values.items())) for name, values in met.items() if len(values) == 1}
        return Found(
            {name: value for name, (value, _) in sure.items()},
            {name: where for name, (_, where) in sure.items()},
            tuple(sorted(flags)),
        )

    def _values(self, place: str, name: str, text: str) -> list[str]:
        matches = (
            match["value"].strip(" .,;:/-")[:MAX_VALUE]
            for pattern in self.by_place[place].get(name, ())
            for match in pattern.finditer(text[:MAX_LINE], timeout=SECONDS_A_SEARCH)
        )
        return [value for value in matches if value]


@functools.cache
def default_patterns() -> Patterns:
    """The patterns in force where the user gives none."""
    return load_patterns(DEFAULT_PATTERNS)


def load_patterns(path: Path) -> Patterns:
    """Reads a file of patterns. Raises PatternError for one that cannot be used, which says what to mend."""
    try:
        data = path.read_bytes()
        places = tomllib.loads(data.decode())
    except OSError as error:
        raise PatternError(f"The patterns {path} cannot be read ({error.strerror}): check --identifiers.") from None
    except ValueError as error:
        raise PatternError(f"{path} is not valid TOML ({error}): mend it.") from None
    by_place: dict[str, dict[str, tuple[regex.Pattern[str], ...]]] = {place: {} for place in PLACES}
    for place, names in places.items():
        if place not in PLACES or not isinstance(names, dict):
            raise PatternError(f"{path}: [{place}] is no place to look in; there are {', '.join(PLACES)}.")
        for name, patterns in names.items():
            if name not in IDENTIFIERS or not isinstance(patterns, list):
                known = ", ".join(IDENTIFIERS)
                raise PatternError(f"{path}: {place}.{name} must be a list of patterns for one of {known}.")
            by_place[place][name] = tuple(_compile(pattern, f"{path}: {place}.{name}") for pattern in patterns)
    return Patterns(hashlib.sha256(data).hexdigest(), by_place)


def _compile(pattern: object, where: str) -> regex.Pattern[str]:
    if not isinstance(pattern, str):
        raise PatternError(f"{where}: a pattern is text in quotes.")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise PatternError(f"{where}: {pattern!r} is no regular expression ({error}).") from None
    if "value" not in compiled.groupindex:
        raise PatternError(f"{where}: {pattern!r} lacks a group (?P<value>...) for the number itself.")
    try:
        for probe in _PROBES:
            compiled.search(probe, timeout=SECONDS_A_SEARCH)
    except TimeoutError:
        raise PatternError(
            f"{where}: {pattern!r} takes too long on a line of {MAX_LINE} characters: avoid repeats inside repeats."
        ) from None
    return compiled


def _lines(documents: Iterable[Document]) -> list[tuple[str, str]]:
    lines = []
    for document in documents:
        if document.kind == "prior-report":
            continue
        name = PurePosixPath(document.source.path.rpartition("!")[2]).name
        where = name if document.source.page is None else f"{name} p. {document.source.page + 1}"
        lines += [(where, line) for line in document.text.split("\n")]
    return lines


def _names(files: Sequence[FileRef]) -> list[tuple[str, str]]:
    """The name of the file, where there is only one, then those of the folders above it, nearest first."""
    names = []
    first = files[0]
    if len(files) == 1:
        names.append((first.basename, PurePosixPath(first.basename).stem))
    folders = [part for part in PurePosixPath(first.parent.replace("!", "/")).parts if part != "/"]
    return names + [(f"{folder}/", folder) for folder in reversed(folders[-FOLDERS_ABOVE:])]
