"""Severity and disposition of defects by a written rule file (YAML); `default_rules.yaml` explains the format.

There is no ground truth for either, so the report names the file, its content hash and the rule that decided.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from reports.grammar import ZONES, zone_of
from reports.schema import Record
from reports.taxonomy import DEFECT_TYPES

DEFAULT_RULES: Final = Path(__file__).with_name("default_rules.yaml")
THROUGHOUT: Final = ZONES[-1]
NAMED_ZONES: Final = ZONES[:-1]

Severity = Literal["critical", "major", "minor"]
Disposition = Literal["accept", "rework", "reject", "hold"]
Percent = Annotated[float, Field(ge=0, le=100)]
Size = Annotated[float, Field(ge=0)]
Rectangle = tuple[Percent, Percent, Percent, Percent]  # left, top, right, bottom in per cent of the picture
WORST_FIRST: Final = ("critical", "major", "minor")


class RulesError(ValueError):
    """A rule file that cannot be used; the message names the file, the fault and what would mend it."""

    code = "bad-rules"


@dataclass(frozen=True, slots=True)
class Defect:
    """What the rules ask about one finding."""

    type: str
    bbox: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    image_size: tuple[int, int]  # width, height in pixels
    spacing_mm: tuple[float, float] | None  # between rows, between columns; None where the scale is not known
    confidence: float

    @property
    def sides_px(self) -> tuple[float, float]:
        return self.bbox[2] - self.bbox[0], self.bbox[3] - self.bbox[1]

    @property
    def sides_mm(self) -> tuple[float, float] | None:
        if self.spacing_mm is None:
            return None
        return self.sides_px[0] * self.spacing_mm[1], self.sides_px[1] * self.spacing_mm[0]

    def lies_in(self, zone: str, rectangles: Mapping[str, Rectangle]) -> bool:
        """Whether the box touches the rectangle of that name, or its centre lies in that ninth of the picture."""
        if (rectangle := rectangles.get(zone)) is None:
            return zone_of(self.bbox, *self.image_size) in (zone, THROUGHOUT)
        x0, y0, x1, y1 = (100 * value / side for value, side in zip(self.bbox, 2 * self.image_size, strict=True))
        left, top, right, bottom = rectangle
        return x0 < right and x1 > left and y0 < bottom and y1 > top


class SeverityRule(Record):
    rule: str
    types: tuple[str, ...] | None = None
    zones: tuple[str, ...] | None = None
    min_area_percent: Percent | None = None
    min_length_percent: Percent | None = None
    min_area_px: Size | None = None
    min_length_px: Size | None = None
    min_area_mm2: Size | None = None
    min_length_mm: Size | None = None
    severity: Severity

    def holds(self, defect: Defect, rectangles: Mapping[str, Rectangle]) -> bool | None:
        """Whether all conditions hold; None where that hangs on millimetres and the picture has no scale."""
        (wide, high), (width, height) = defect.sides_px, defect.image_size
        known = (
            self.types is None or defect.type in self.types,
            self.zones is None or any(defect.lies_in(zone, rectangles) for zone in self.zones),
            _reaches(100 * wide * high / (width * height), self.min_area_percent),
            _reaches(100 * max(wide, high) / max(width, height), self.min_length_percent),
            _reaches(wide * high, self.min_area_px),
            _reaches(max(wide, high), self.min_length_px),
        )
        if not all(known):
            return False
        if self.min_area_mm2 is None and self.min_length_mm is None:
            return True
        if (sides := defect.sides_mm) is None:
            return None
        return _reaches(sides[0] * sides[1], self.min_area_mm2) and _reaches(max(sides), self.min_length_mm)

    @property
    def unconditional(self) -> bool:
        return self.model_fields_set <= {"rule", "severity"}


class DispositionRule(Record):
    rule: str
    severity: Severity | None = None
    types: tuple[str, ...] | None = None
    zones: tuple[str, ...] | None = None
    min_count: Annotated[int, Field(ge=1)] | None = None
    max_confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    quality_flags: tuple[str, ...] | None = None
    disposition: Disposition

    def holds(
        self,
        defects: Sequence[tuple[Defect, Severity]],
        quality_flags: Collection[str],
        rectangles: Mapping[str, Rectangle],
    ) -> bool:
        if self.quality_flags is not None and not set(self.quality_flags) & set(quality_flags):
            return False
        counted = [
            defect
            for defect, severity in defects
            if (self.severity is None or severity == self.severity)
            and (self.types is None or defect.type in self.types)
            and (self.zones is None or any(defect.lies_in(zone, rectangles) for zone in self.zones))
            and (self.max_confidence is None or defect.confidence <= self.max_confidence)
        ]
        return len(counted) >= self._needed

    @property
    def _needed(self) -> int:
        if self.min_count is not None:
            return self.min_count
        return 0 if self.severity == self.types == self.zones == self.max_confidence is None else 1

    @property
    def unconditional(self) -> bool:
        return self._needed == 0 and self.quality_flags is None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rules say of a picture."""

    severities: tuple[Severity | None, ...]  # by defect; None where it hangs on a scale that is not known
    disposition: Disposition
    rule: str  # the rule that gave the disposition, as a report names it: in words of no language
    unassessed: tuple[str, ...] = ()  # the rules that ask for millimetres which the picture has not, where it matters


class Rules(Record):
    """A rule file. The last rule of each list has no condition, so there is always an answer."""

    name: str
    version: str
    zones: dict[str, Rectangle] = Field(default_factory=dict)
    severity: tuple[SeverityRule, ...]
    disposition: tuple[DispositionRule, ...]
    digest: str = Field(description="first 12 hex digits of the SHA-256 of the file")

    @model_validator(mode="after")
    def _known_terms(self, info: ValidationInfo) -> Rules:
        for kind, listed in (("severity", self.severity), ("disposition", self.disposition)):
            if not listed or not listed[-1].unconditional:
                raise ValueError(f"the last {kind} rule has a condition; add one that has none")
        rules: list[SeverityRule | DispositionRule] = [*self.severity, *self.disposition]
        types = dict.fromkeys((*DEFECT_TYPES, *(info.context or {}).get("types", ())))
        if unknown := {t for rule in rules for t in rule.types or ()} - set(types):
            raise ValueError(f"unknown defect type {', '.join(sorted(unknown))}; the types are {', '.join(types)}")
        if taken := self.zones.keys() & set(ZONES):
            raise ValueError(f"the zone {', '.join(sorted(taken))} is built in; give yours another name")
        if empty := [name for name, (x0, y0, x1, y1) in self.zones.items() if x0 >= x1 or y0 >= y1]:
            raise ValueError(f"the zone {', '.join(empty)} is empty; write [left, top, right, bottom] in per cent")
        known = {*NAMED_ZONES, *self.zones}
        if unknown := {zone for rule in rules for zone in rule.zones or ()} - known:
            raise ValueError(f"unknown zone {', '.join(sorted(unknown))}; the zones are {', '.join(sorted(known))}")
        return self

    def judge(self, defects: Sequence[Defect], quality_flags: Collection[str]) -> Judgement:
        """Severity of each defect, and the disposition of the picture.

        Where a rule hangs on a scale that is not known, the picture is judged both ways; it is held if they differ.
        """
        possible = [self._possible(defect) for defect in defects]
        severities = [sorted({rule.severity for rule in rules}, key=WORST_FIRST.index) for rules in possible]
        worst, best = (
            self._decide([(d, each[end]) for d, each in zip(defects, severities, strict=True)], quality_flags)
            for end in (0, -1)
        )
        open_rules = [r.rule for rules, s in zip(possible, severities, strict=True) if len(s) > 1 for r in rules[:-1]]
        unassessed = tuple(dict.fromkeys(open_rules))
        given = tuple(each[0] if len(each) == 1 else None for each in severities)
        if worst.disposition == best.disposition:
            return Judgement(given, worst.disposition, self._named(worst.rule), unassessed)
        return Judgement(given, "hold", self._named(f"{' / '.join(unassessed)}: mm?"), unassessed)

    def _possible(self, defect: Defect) -> list[SeverityRule]:
        """The rules that may decide: those that hang on an unknown scale, then the first that holds."""
        rules = []
        for rule in self.severity:
            holds = rule.holds(defect, self.zones)
            if holds is not False:
                rules.append(rule)
            if holds:
                break
        return rules

    def _decide(self, defects: Sequence[tuple[Defect, Severity]], quality_flags: Collection[str]) -> DispositionRule:
        return next(rule for rule in self.disposition if rule.holds(defects, quality_flags, self.zones))

    def _named(self, rule: str) -> str:
        return f"{rule} · {self.name} {self.version} · SHA-256 {self.digest}…"


def load_rules(path: Path = DEFAULT_RULES, types: Collection[str] = ()) -> Rules:
    """Reads and checks a rule file; `types` are an owner's own, which its rules may name. Raises RulesError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RulesError(f"{path}: cannot be read ({error.strerror}). Give the path of a rule file.") from error
    try:
        values = yaml.load(data.decode("utf-8"), _Loader)  # a safe loader
        if not isinstance(values, dict):
            raise ValueError("it holds no list of rules")
    except (ValueError, yaml.YAMLError) as error:
        fault = _conversion(data) or f"is not a rule file in YAML ({' '.join(str(error).split())})"
        raise RulesError(f"{path}: {fault}. Start from a copy of {DEFAULT_RULES}.") from error
    try:
        return Rules.model_validate(
            values | {"digest": hashlib.sha256(data).hexdigest()[:12]}, context={"types": types}
        )
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": Value error, ") for e in error.errors()
        )
        raise RulesError(f"{path}: {faults}. Its conditions are explained at the top of {DEFAULT_RULES}.") from error


def _conversion(data: bytes) -> str:
    """What to tell about a rule file in TOML, as they once were; empty for anything else."""
    try:
        tomllib.loads(data.decode("utf-8"))
    except ValueError:
        return ""
    return "is TOML, and rules are YAML now: `key = value` is `key: value`, each [[severity]] an item of a list"


class _Loader(yaml.SafeLoader):
    """Safe, and a key that stands twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(sorted(twice))} is given twice")
        return super().construct_mapping(node, deep)


def _reaches(value: float, least: float | None) -> bool:
    return least is None or value >= least
