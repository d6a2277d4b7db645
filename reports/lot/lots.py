"""The reports of a run as lots: the verdict on each, the p-chart, the Pareto by type, the map of where defects lie."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import Final, Literal

from reports.lot.sampling import Inspection, LotPlan, Plan, Switching, plan_for
from reports.schema import Report

GRID: Final = 24  # cells a side of the defect map
_WORST_FIRST: Final = ("reject", "rework", "hold", "accept")


@dataclass(slots=True)
class Item:
    """An inspected item: a picture, or all pictures with the same serial number, by the worst of them."""

    disposition: str
    nonconformities: int
    created: datetime

    def see(self, other: Item) -> None:
        self.disposition = min(self.disposition, other.disposition, key=_WORST_FIRST.index)
        self.nonconformities += other.nonconformities
        self.created = min(self.created, other.created)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one lot. `pending`: what is held or was not inspected can still decide it."""

    lot: str
    since: datetime
    lot_size: int
    inspected: int
    nonconforming: int  # of all inspected items
    held: int
    plan: Plan
    sampled: int
    found: int  # nonconforming items, or nonconformities, in the sample
    open: int  # as many more at most: of held items and of items that the sample lacks
    verdict: Literal["accepted", "not accepted", "pending", "discontinued"]
    next_inspection: Inspection | None  # of the lots after it, when it changes


@dataclass(frozen=True, slots=True)
class Subgroup:
    """A point of the p-chart with its control limits."""

    label: str
    n: int
    nonconforming: int
    p: float
    lower: float
    upper: float

    @property
    def in_control(self) -> bool:
        return self.lower <= self.p <= self.upper


@dataclass(frozen=True, slots=True)
class Bar:
    """A type of defect in the Pareto chart."""

    type: str
    count: int
    share: float
    cumulative: float


@dataclass(slots=True)
class DefectMap:
    """How many findings have their centre in each cell of a frame that every picture of a product is stretched to."""

    product_line: str
    aspect: float  # width over height of its first picture
    findings: int = 0
    cells: list[list[int]] = field(default_factory=lambda: [[0] * GRID for _ in range(GRID)])  # rows from the top

    def add(self, x: float, y: float) -> None:
        """`x` and `y` from 0 to 1."""
        column, row = (min(max(int(GRID * each), 0), GRID - 1) for each in (x, y))
        self.cells[row][column] += 1
        self.findings += 1


@dataclass(frozen=True, slots=True)
class LotReport:
    """All that the lot report states."""

    plan: LotPlan
    pictures: int
    items: int
    nonconforming: int
    held: int
    verdicts: tuple[Verdict, ...]
    mean_p: float
    chart: tuple[Subgroup, ...]
    pareto: tuple[Bar, ...]
    maps: tuple[DefectMap, ...]


def lot_report(reports: Iterable[Report], plan: LotPlan) -> LotReport:
    """Judges the inspection reports among `reports` by lots; an item, not a picture, is kept in memory."""
    lots: dict[str, dict[str, Item]] = {}
    types: Counter[str] = Counter()
    maps: dict[str, DefectMap] = {}
    pictures = 0
    for report in reports:
        if report.kind != "defect":
            continue
        pictures += 1
        items = lots.setdefault(_lot_of(report), {})
        item = Item(report.disposition or "hold", len(report.findings), report.created)
        key = report.source.serial or report.id
        if key in items:
            items[key].see(item)
        else:
            items[key] = item
        types.update(finding.type for finding in report.findings)
        _put_on_map(report, maps)
    everything = [item for items in lots.values() for item in items.values()]
    mean, chart = _p_chart(lots, plan)
    return LotReport(
        plan=plan,
        pictures=pictures,
        items=len(everything),
        nonconforming=sum(item.disposition in plan.nonconforming for item in everything),
        held=sum(_is_open(item, plan) for item in everything),
        verdicts=tuple(_verdicts(lots, plan)),
        mean_p=mean,
        chart=chart,
        pareto=tuple(_pareto(types)),
        maps=tuple(maps[line] for line in sorted(maps) if maps[line].findings),
    )


def _lot_of(report: Report) -> str:
    """The lot that the source names; else the folder in which the picture lay."""
    return report.source.lot or str(PurePath(report.source.inputs[0].name).parent)


def _is_open(item: Item, plan: LotPlan) -> bool:
    return item.disposition == "hold" and "hold" not in plan.nonconforming


def _verdicts(lots: dict[str, dict[str, Item]], plan: LotPlan) -> Iterable[Verdict]:
    """In the order in which the lots were begun, since the switching rules go by it."""
    switching = Switching(plan, plan.start)
    for name, items in sorted(lots.items(), key=lambda lot: (_since(lot[1].values()), lot[0])):
        size = max(plan.sizes.get(name) or plan.size or len(items), len(items))
        stage = switching.inspection
        scheme = plan_for(size, plan.inspection_level, plan.aql, "tightened" if stage == "discontinued" else stage)
        sample = _sample(items, scheme.n)
        found = sum(_count(item, plan) for item in sample if item.disposition in plan.nonconforming)
        unsure = sum(_count(item, plan) for item in sample if _is_open(item, plan)) + scheme.n - len(sample)
        verdict: Literal["accepted", "not accepted", "pending", "discontinued"]
        changed = None
        if stage == "discontinued":
            verdict = "discontinued"
        elif found > scheme.accept:
            verdict = "not accepted"
            changed = switching.note(scheme, found)
        elif found + unsure <= scheme.accept:
            verdict = "accepted"
            changed = switching.note(scheme, found + unsure)
        else:
            verdict = "pending"
        yield Verdict(
            lot=name,
            since=_since(items.values()),
            lot_size=size,
            inspected=len(items),
            nonconforming=sum(item.disposition in plan.nonconforming for item in items.values()),
            held=sum(_is_open(item, plan) for item in items.values()),
            plan=scheme,
            sampled=len(sample),
            found=found,
            open=unsure,
            verdict=verdict,
            next_inspection=changed,
        )


def _sample(items: dict[str, Item], n: int) -> Sequence[Item]:
    """`n` of the items, drawn by the hash of their names: at random, and yet the same each time."""
    drawn = sorted(items, key=lambda key: hashlib.sha256(key.encode()).digest())
    return [items[key] for key in drawn[:n]]


def _count(item: Item, plan: LotPlan) -> int:
    return 1 if plan.counts_items else max(item.nonconformities, 1)


def _since(items: Iterable[Item]) -> datetime:
    return min(item.created for item in items)


def _p_chart(lots: dict[str, dict[str, Item]], plan: LotPlan) -> tuple[float, tuple[Subgroup, ...]]:
    """Mean share of nonconforming items and each subgroup's point: limits at three sigma, p̄ ± 3 √(p̄ (1 − p̄) / n)."""
    groups: dict[str, list[Item]] = {}
    for name, items in sorted(lots.items(), key=lambda lot: (_since(lot[1].values()), lot[0])):
        for item in items.values():
            label = name if plan.subgroup == "lot" else item.created.date().isoformat()
            groups.setdefault(label, []).append(item)
    if plan.subgroup == "day":
        groups = dict(sorted(groups.items()))
    counts = {
        label: (len(items), sum(i.disposition in plan.nonconforming for i in items)) for label, items in groups.items()
    }
    return p_chart(counts)


def p_chart(counts: dict[str, tuple[int, int]]) -> tuple[float, tuple[Subgroup, ...]]:
    """The p-chart of subgroups: by label how many items, and how many of them are nonconforming."""
    total = sum(n for n, _ in counts.values())
    mean = sum(found for _, found in counts.values()) / total if total else 0.0
    points = []
    for label, (n, found) in counts.items():
        reach = 3 * math.sqrt(mean * (1 - mean) / n)
        points.append(Subgroup(label, n, found, found / n, max(mean - reach, 0.0), min(mean + reach, 1.0)))
    return mean, tuple(points)


def _pareto(types: Counter[str]) -> Iterable[Bar]:
    total, so_far = types.total(), 0
    for name, count in sorted(types.items(), key=lambda each: (-each[1], each[0])):
        so_far += count
        yield Bar(name, count, count / total, so_far / total)


def _put_on_map(report: Report, maps: dict[str, DefectMap]) -> None:
    width, height = report.technique.image_size_px
    line = report.technique.product_line or ""
    chart = maps.setdefault(line, DefectMap(line, width / height))
    for finding in report.findings:
        for evidence in finding.evidence:
            x0, y0, x1, y1 = evidence.bbox
            chart.add((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
