"""Severity and disposition of defects by a written rule file (TOML); `default_rules.toml` explains the format.

There is no ground truth for either, so the report names the file, its content hash and the rule that decided.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from reports.schema import Record
from reports.taxonomy import DEFECT_TYPES

DEFAULT_RULES: Final = Path(__file__).with_name("default_rules.toml")

Severity = Literal["critical", "major", "minor"]
Disposition = Literal["accept", "rework", "reject", "hold"]
Percent = Annotated[float, Field(ge=0, le=100)]


class RulesError(ValueError):
    """A rule file that cannot be used; the message names the file, the fault and what would mend it."""

    code = "bad-rules"


@dataclass(frozen=True, slots=True)
class Defect:
    """What the rules ask about one finding."""

    type: str
    area_percent: float  # share of the image that its box covers
    length_percent: float  # longer side of the box over the longer side of the image
    confidence: float


class SeverityRule(Record):
    rule: str
    types: tuple[str, ...] | None = None
    min_area_percent: Percent | None = None
    min_length_percent: Percent | None = None
    severity: Severity

    def holds(self, defect: Defect) -> bool:
        return (
            (self.types is None or defect.type in self.types)
            and (self.min_area_percent is None or defect.area_percent >= self.min_area_percent)
            and (self.min_length_percent is None or defect.length_percent >= self.min_length_percent)
        )

    @property
    def unconditional(self) -> bool:
        return self.types is None and self.min_area_percent is None and self.min_length_percent is None


class DispositionRule(Record):
    rule: str
    severity: Severity | None = None
    min_count: Annotated[int, Field(ge=1)] | None = None
    max_confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    quality_flags: tuple[str, ...] | None = None
    disposition: Disposition

    def holds(self, defects: Sequence[tuple[Defect, Severity]], quality_flags: Collection[str]) -> bool:
        if self.quality_flags is not None and not set(self.quality_flags) & set(quality_flags):
            return False
        counted = [
            defect
            for defect, severity in defects
            if (self.severity is None or severity == self.severity)
            and (self.max_confidence is None or defect.confidence <= self.max_confidence)
        ]
        return len(counted) >= self._needed

    @property
    def _needed(self) -> int:
        if self.min_count is not None:
            return self.min_count
        return 0 if self.severity is None and self.max_confidence is None else 1

    @property
    def unconditional(self) -> bool:
        return self._needed == 0 and self.quality_flags is None


class Rules(Record):
    """A rule file. The last rule of each list has no condition, so there is always an answer."""

    name: str
    version: str
    severity: tuple[SeverityRule, ...]
    disposition: tuple[DispositionRule, ...]
    digest: str = Field(description="first 12 hex digits of the SHA-256 of the file")

    def severity_of(self, defect: Defect) -> Severity:
        return next(rule for rule in self.severity if rule.holds(defect)).severity

    def decide(
        self, defects: Sequence[tuple[Defect, Severity]], quality_flags: Collection[str]
    ) -> tuple[Disposition, str]:
        """The disposition of a picture, and the name of the rule that decided, in words of no language."""
        rule = next(rule for rule in self.disposition if rule.holds(defects, quality_flags))
        return rule.disposition, f"{rule.rule} · {self.name} {self.version} · SHA-256 {self.digest}…"


def load_rules(path: Path = DEFAULT_RULES) -> Rules:
    """Reads and checks a rule file. Raises RulesError."""
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise RulesError(f"{path}: cannot be read ({error.strerror}). Give the path of a rule file.") from error
    except ValueError as error:
        raise RulesError(f"{path}: is not TOML ({error}). Start from a copy of {DEFAULT_RULES}.") from error
    try:
        rules = Rules.model_validate(values | {"digest": hashlib.sha256(data).hexdigest()[:12]})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RulesError(f"{path}: {faults}. Its conditions are explained at the top of {DEFAULT_RULES}.") from error
    for kind, listed in (("severity", rules.severity), ("disposition", rules.disposition)):
        if not listed or not listed[-1].unconditional:
            raise RulesError(f"{path}: the last [[{kind}]] rule has a condition. Add one that has none.")
    unknown = {t for rule in rules.severity for t in rule.types or ()} - set(DEFECT_TYPES)
    if unknown:
        known = ", ".join(DEFECT_TYPES)
        raise RulesError(f"{path}: unknown defect type {', '.join(sorted(unknown))}. The types are: {known}.")
    return rules
