"""Lot acceptance by single sampling for attributes, ISO 2859-1:1999: tables 1 and 2-A to 2-C, and the switching rules.

The tables are regular: a cell depends on the place of its letter plus the place of its AQL only, so that each table is
one row of acceptance numbers along that diagonal.  A cell that has none leads by its arrow to the next in its column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from reports.schema import Record

Inspection = Literal["normal", "tightened", "reduced", "discontinued"]
Level = Literal["S-1", "S-2", "S-3", "S-4", "I", "II", "III"]
Disposition = Literal["accept", "rework", "reject", "hold"]

LEVELS: Final = ("S-1", "S-2", "S-3", "S-4", "I", "II", "III")
AQLS: Final = (
    *(0.010, 0.015, 0.025, 0.040, 0.065, 0.10, 0.15, 0.25, 0.40, 0.65, 1.0, 1.5, 2.5, 4.0, 6.5, 10.0),
    *(15.0, 25.0, 40.0, 65.0, 100.0, 150.0, 250.0, 400.0, 650.0, 1000.0),
)
ITEMS_UP_TO: Final = 10.0  # above, an AQL is in nonconformities per 100 items, not in per cent of items (5.2)

# Table 1: the largest lot of each row, then the letters for LEVELS.
_LETTER_ROWS: Final = (
    (8, "AAAAAAB"),
    (15, "AAAAABC"),
    (25, "AABBBCD"),
    (50, "ABBCCDE"),
    (90, "BBCCCEF"),
    (150, "BBCDDFG"),
    (280, "BCDEEGH"),
    (500, "BCDEFHJ"),
    (1_200, "CCEFGJK"),
    (3_200, "CDEGHKL"),
    (10_000, "CDFGJLM"),
    (35_000, "CDFHKMN"),
    (150_000, "DEGJLNP"),
    (500_000, "DEGJMPQ"),
    (None, "DEHKNQR"),
)
_LETTERS: Final = "ABCDEFGHJKLMNPQRS"  # S is a row of table 2-B only
_FULL: Final = (2, 3, 5, 8, 13, 20, 32, 50, 80, 125, 200, 315, 500, 800, 1250, 2000, 3150)
_SMALL: Final = (2, 2, 2, 3, 5, 8, 13, 20, 32, 50, 80, 125, 200, 315, 500, 800)


@dataclass(frozen=True, slots=True)
class _Table:
    """One of the tables 2-A to 2-C: `numbers` by letter's place plus AQL's place."""

    title: str
    sizes: tuple[int, ...]
    numbers: Mapping[int, int]
    few: Mapping[int, int]  # further ones, of the letters A to E
    up: int | None  # the place whose arrow points up although smaller numbers stand below
    special: Mapping[int, Mapping[int, int]] = field(default_factory=dict)  # letters with a row of their own

    def number(self, letter: int, aql: int) -> int | None:
        if letter in self.special:
            return self.special[letter].get(letter + aql)
        if letter == len(_LETTERS) - 1:  # S has one plan
            return self.numbers[letter + aql] if AQLS[aql] == 0.025 else None
        known = {**self.numbers, **self.few} if letter <= 4 else self.numbers
        return known.get(letter + aql)


_NORMAL_ROW: Final = {14: 0, 17: 1, 18: 2, 19: 3, 20: 5, 21: 7, 22: 10, 23: 14, 24: 21}
_TABLES: Final = {
    "normal": _Table("2-A", _FULL[:-1], _NORMAL_ROW, {25: 30, 26: 44}, up=15),
    "tightened": _Table(
        "2-B", _FULL, {15: 0, 18: 1, 19: 2, 20: 3, 21: 5, 22: 8, 23: 12, 24: 18}, {25: 27, 26: 41}, up=None
    ),
    "reduced": _Table(
        "2-C",
        _SMALL,
        {14: 0, 18: 1, 19: 2, 20: 3, 21: 5, 22: 6, 23: 8, 24: 10},
        {25: 14, 26: 21},
        up=15,
        special={
            0: {**_NORMAL_ROW, 25: 30},
            1: {14: 0, 18: 1, 19: 2, 20: 3, 21: 5, 22: 7, 23: 10, 24: 14, 25: 21, 26: 30},
        },
    ),
}


class LotPlan(Record):
    """How lots are judged, as the responsible authority laid it down: the settings `[lot]`."""

    aql: float = 1.0
    inspection_level: Level = "II"
    size: Annotated[int, Field(ge=1)] | None = None  # items in a lot; None: all are pictured
    sizes: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)  # by lot, where they differ
    start: Literal["normal", "tightened", "reduced"] = "normal"
    reduced: bool = False  # whether the authority allows reduced inspection (9.3.3.1)
    nonconforming: tuple[Disposition, ...] = ("reject", "rework")
    subgroup: Literal["lot", "day"] = "lot"  # of the p-chart

    @field_validator("aql")
    @classmethod
    def _preferred(cls, value: float) -> float:
        if value not in AQLS:
            raise ValueError(f"ISO 2859-1 has no AQL {value:g}; it has {', '.join(f'{a:g}' for a in AQLS)}")
        return value

    @property
    def counts_items(self) -> bool:
        """Whether nonconforming items are counted; else nonconformities (5.2)."""
        return self.aql <= ITEMS_UP_TO


@dataclass(frozen=True, slots=True)
class Plan:
    """A single sampling plan: accept the lot with at most `accept` in a sample of `n`."""

    letter: str
    n: int
    accept: int
    aql: float
    level: str
    inspection: str
    all_items: bool  # the sample would be as large as the lot: every item is inspected

    @property
    def reject(self) -> int:
        return self.accept + 1

    @property
    def name(self) -> str:
        """The plan in words, as a report names it."""
        size = f"n={self.n}{' (every item)' if self.all_items else ''}"
        plan = f"{size}, Ac={self.accept}, Re={self.reject}, code letter {self.letter}"
        return f"{plan}, level {self.level}, AQL {self.aql:g}, {self.inspection}"


def code_letter(lot_size: int, level: str) -> str:
    """The sample size code letter of table 1. A lot of one item is treated as the smallest that the table has."""
    return next(
        letters[LEVELS.index(level)] for largest, letters in _LETTER_ROWS if largest is None or lot_size <= largest
    )


def plan_for(lot_size: int, level: str, aql: float, inspection: str = "normal") -> Plan:
    """The plan of tables 2-A, 2-B or 2-C, arrows followed."""
    letter, n, accept = table_cell(code_letter(lot_size, level), aql, inspection)
    return Plan(letter, min(n, lot_size), accept, aql, level, inspection, n >= lot_size)


def table_cell(letter: str, aql: float, inspection: str) -> tuple[str, int, int]:
    """Letter, sample size and acceptance number that stand in a cell of the tables or where its arrow leads."""
    table, column, row = _TABLES[inspection], AQLS.index(aql), _LETTERS.index(letter)
    above = range(row, -1, -1)
    below = range(row, len(table.sizes))
    place = row + column
    upward = place == table.up or place > max(table.numbers)
    for way in (above, below) if upward else (below, above):
        for candidate in way:
            if (accept := table.number(candidate, column)) is not None:
                return _LETTERS[candidate], table.sizes[candidate], accept
    raise AssertionError("every column of the tables has a plan")


@dataclass(slots=True)
class Switching:
    """The switching rules (9.3) over a sequence of lots on original inspection."""

    plan: LotPlan
    inspection: Inspection = "normal"
    score: int = 0  # the switching score of 9.3.3.2
    recent: list[bool] = field(default_factory=list)  # accepted or not, since this inspection began
    refused_tightened: int = 0

    def note(self, plan: Plan, found: int) -> Inspection | None:
        """Takes note of a lot that was judged; returns the inspection that the next lots get, when it changes."""
        accepted = found <= plan.accept
        self.recent.append(accepted)
        if self.inspection == "normal":
            self._score(plan, found)
            if self.recent[-5:].count(False) >= 2:  # 9.3.1
                return self._switch("tightened")
            if self.plan.reduced and self.score >= 30:  # 9.3.3
                return self._switch("reduced")
        elif self.inspection == "tightened":
            self.refused_tightened += not accepted
            if self.refused_tightened >= 5:  # 9.4
                return self._switch("discontinued")
            if self.recent[-5:] == [True] * 5:  # 9.3.2
                return self._switch("normal")
        elif self.inspection == "reduced" and not accepted:  # 9.3.4
            return self._switch("normal")
        return None

    def _score(self, plan: Plan, found: int) -> None:
        """9.3.3.2: 3 when it had been accepted with the AQL one step tighter, or 2 where Ac is 0 or 1; else from 0."""
        if plan.accept >= 2:
            limit, gain = table_cell(plan.letter, AQLS[AQLS.index(plan.aql) - 1], "normal")[2], 3
        else:
            limit, gain = plan.accept, 2
        self.score = self.score + gain if found <= limit else 0

    def _switch(self, inspection: Inspection) -> Inspection:
        self.inspection, self.score, self.recent, self.refused_tightened = inspection, 0, [], 0
        return inspection
