"""Lots: the plans of ISO 2859-1, the switching rules, the p-chart by hand, the verdicts, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from report_strategies import plain_report

from reports.formats import CannotCarryError, RunReports
from reports.lot.lots import GRID, LotReport, lot_report, p_chart
from reports.lot.page import render_html, render_json, write
from reports.lot.sampling import AQLS, LEVELS, LotPlan, Switching, code_letter, plan_for, table_cell
from reports.schema import Evidence, Finding, Report, Source, SourceInput
from reports.texts import words

# The standard's tables


@pytest.mark.parametrize(
    ("lot_size", "level", "letter"),
    [
        (2, "II", "A"),
        (8, "III", "B"),
        (9, "II", "B"),
        (50, "S-2", "B"),
        (51, "II", "E"),
        (150, "I", "D"),
        (151, "II", "G"),
        (500, "S-3", "D"),
        (501, "S-1", "C"),
        (1000, "II", "J"),
        (1200, "III", "K"),
        (1201, "S-4", "G"),
        (3201, "I", "J"),
        (10_000, "II", "L"),
        (10_001, "S-4", "H"),
        (35_001, "II", "N"),
        (150_001, "I", "M"),
        (500_000, "III", "Q"),
        (500_001, "S-1", "D"),
        (2_000_000, "III", "R"),
    ],
)
def test_code_letters(lot_size: int, level: str, letter: str) -> None:
    assert code_letter(lot_size, level) == letter


# Letter and AQL of the table's entry, then letter, n and Ac of the plan that stands there or to which its arrow leads.
NORMAL = """
A 6.5 A 2 0 | A 0.010 Q 1250 0 | A 10 C 5 1 | A 1000 A 2 30 | B 1000 B 3 44 | C 1000 B 3 44 | D 400 D 8 44
E 250 E 13 44 | E 2.5 F 20 1 | F 65 F 20 21 | F 100 E 13 21 | G 1.0 H 50 1 | G 2.5 G 32 2 | H 0.40 G 32 0
J 0.15 J 80 0 | J 0.25 H 50 0 | J 0.40 K 125 1 | J 0.65 J 80 1 | J 1.0 J 80 2 | J 2.5 J 80 5 | J 4.0 J 80 7
J 15 J 80 21 | J 25 H 50 21 | K 0.10 K 125 0 | K 1.0 K 125 3 | K 6.5 K 125 14 | L 1.5 L 200 7 | M 0.40 M 315 3
N 0.65 N 500 7 | P 0.10 P 800 2 | Q 0.010 Q 1250 0 | Q 0.025 R 2000 1 | R 0.010 Q 1250 0 | R 0.015 P 800 0
R 0.65 R 2000 21 | R 1.0 Q 1250 21
"""
TIGHTENED = """
A 10 A 2 0 | A 15 C 5 1 | A 40 A 2 1 | A 1000 A 2 27 | B 1000 B 3 41 | E 250 E 13 41 | F 65 F 20 18 | G 2.5 G 32 1
H 1.5 H 50 1 | J 0.40 L 200 1 | J 0.65 K 125 1 | J 1.0 J 80 1 | J 1.5 J 80 2 | J 2.5 J 80 3 | J 6.5 J 80 8
K 1.0 K 125 2 | K 2.5 K 125 5 | L 4.0 L 200 12 | P 1.5 P 800 18 | Q 0.025 S 3150 1 | R 0.010 R 2000 0
R 0.015 Q 1250 0 | R 0.025 S 3150 1 | R 0.65 R 2000 18
"""
REDUCED = """
A 25 A 2 1 | A 1000 A 2 30
B 25 B 2 1 | B 150 B 2 7 | B 1000 B 2 30 | C 100 C 2 6 | C 150 C 2 8 | C 650 C 2 21 | D 10 D 3 1
E 250 E 5 21 | F 65 F 8 10 | F 100 E 5 10 | G 2.5 G 13 1 | H 0.40 G 13 0 | J 0.15 J 32 0 | J 0.65 K 50 1 | J 1.0 J 32 1
J 1.5 J 32 2 | J 2.5 J 32 3 | J 4.0 J 32 5 | K 1.0 K 50 2 | K 1.5 K 50 3 | K 6.5 K 50 8 | L 1.5 L 80 5 | M 6.5 L 80 10
P 0.040 R 800 1 | Q 0.010 Q 500 0 | Q 0.025 N 200 0 | R 0.025 N 200 0 | R 0.040 R 800 1 | R 0.65 R 800 10
"""


@pytest.mark.parametrize(
    ("inspection", "published"), [("normal", NORMAL), ("tightened", TIGHTENED), ("reduced", REDUCED)]
)
def test_plans_agree_with_the_published_tables(inspection: str, published: str) -> None:
    for cell in published.replace("\n", "|").split("|"):
        if cell.strip():
            letter, aql, *expected = cell.split()
            found = table_cell(letter, float(aql), inspection)
            assert [*map(str, found)] == expected, f"{inspection} {cell}"


@given(
    size=st.integers(2, 10**7),
    level=st.sampled_from(LEVELS),
    aql=st.sampled_from(AQLS),
    inspection=st.sampled_from(["normal", "tightened", "reduced"]),
)
def test_every_lot_has_a_plan(size: int, level: str, aql: float, inspection: str) -> None:
    plan = plan_for(size, level, aql, inspection)
    assert 1 <= plan.n <= size
    assert plan.all_items == (plan.n == size)
    assert plan.reject == plan.accept + 1
    letters = [code_letter(size, each) for each in ("I", "II", "III")]
    assert letters == sorted(letters)


def test_a_plan_is_named_in_full() -> None:
    named = "n=80, Ac=5, Re=6, code letter J, level II, AQL 2.5, normal"
    assert plan_for(1000, "II", 2.5).name == named
    assert plan_for(40, "II", 1.0).name == "n=13, Ac=0, Re=1, code letter E, level II, AQL 1, normal"
    assert plan_for(10, "II", 0.65).name.startswith("n=10 (every item), Ac=0")


def test_an_aql_or_level_that_the_standard_has_not_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"no AQL 3; it has 0\.01"):
        LotPlan(aql=3)
    with pytest.raises(ValidationError, match="inspection_level"):
        LotPlan.model_validate({"inspection_level": "IV"})


# Switching


def switched(plan: LotPlan, *found: int, size: int = 1000) -> list[str]:
    """The inspection after each lot with so many nonconforming items."""
    rules, seen = Switching(plan, plan.start), []
    for each in found:
        if rules.inspection != "discontinued":
            rules.note(plan_for(size, plan.inspection_level, plan.aql, rules.inspection), each)
        seen.append(rules.inspection)
    return seen


def test_two_of_five_lots_not_accepted_tighten_and_five_accepted_lead_back() -> None:
    plan = LotPlan(aql=1.0)  # n=80, Ac 2; tightened Ac 1
    assert switched(plan, 3, 0, 0, 0, 3)[-1] == "tightened"
    assert switched(plan, 3, 0, 0, 0, 0, 3)[-1] == "normal"
    assert switched(plan, 3, 3, 1, 1, 1, 1, 1)[1:] == ["tightened"] * 5 + ["normal"]
    assert switched(plan, 3, 3, 1, 1, 2, 1, 1, 1, 1)[-1] == "tightened"  # four in a row


def test_five_lots_not_accepted_on_tightened_inspection_end_acceptance() -> None:
    assert switched(LotPlan(start="tightened"), 2, 0, 2, 2, 0, 0, 2, 0, 2)[-2:] == ["tightened", "discontinued"]


def test_reduced_inspection_by_the_switching_score() -> None:
    plan = LotPlan(aql=1.0, reduced=True)
    # Ac is 2, and 1 with the AQL one step tighter: three for each lot with at most 1, from 0 again after one with 2.
    assert switched(plan, *[1] * 10)[-2:] == ["normal", "reduced"]
    assert switched(plan, *[1] * 9, 2, *[1] * 9)[-1] == "normal"
    assert switched(plan, *[1] * 10, 1, 2)[-2:] == ["reduced", "normal"]
    assert switched(LotPlan(aql=1.0), *[0] * 30)[-1] == "normal"
    small = LotPlan(aql=0.65, reduced=True)  # Ac is 1: two for each
    assert switched(small, *[1] * 15)[-2:] == ["normal", "reduced"]


@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from(AQLS), st.booleans())
def test_the_switching_rules_never_get_stuck(found: list[int], aql: float, reduced: bool) -> None:
    seen = switched(LotPlan(aql=aql, reduced=reduced), *found)
    for before, after in pairwise(seen):
        assert (before, after) not in {("tightened", "reduced"), ("reduced", "tightened"), ("normal", "discontinued")}
        assert before != "discontinued" or after == "discontinued"


# The p-chart


def test_p_chart_limits_of_a_hand_worked_example() -> None:
    # 15 of 500 items: p̄ = 0.03; σ = √(0.03 · 0.97 / 100) = 0.017059; UCL = 0.03 + 3 · 0.017059 = 0.081176.
    mean, points = p_chart({"a": (100, 2), "b": (100, 0), "c": (100, 9), "d": (200, 4)})
    assert mean == pytest.approx(0.03)
    assert points[0].upper == pytest.approx(0.0811760, abs=1e-6)
    assert points[0].lower == 0
    # n = 200: σ = √(0.03 · 0.97 / 200) = 0.012062; UCL = 0.03 + 0.036187 = 0.066187.
    assert points[3].upper == pytest.approx(0.0661867, abs=1e-6)
    assert [point.in_control for point in points] == [True, True, False, True]


@given(
    st.dictionaries(
        st.text(max_size=3), st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
    )
)
def test_p_chart_limits_hold_the_mean(counts: dict[str, tuple[int, int]]) -> None:
    mean, points = p_chart(counts)
    for point in points:
        assert 0 <= point.lower <= mean + 1e-12
        assert mean - 1e-12 <= point.upper <= 1
    if points:
        total = sum(point.n * point.p for point in points)
        assert math.isclose(total, mean * sum(point.n for point in points), abs_tol=1e-9)


# Lots


def inspected(
    number: int, disposition: str, *, lot: str | None = "L1", types: tuple[str, ...] = (), **more: str
) -> Report:
    findings = tuple(
        Finding(
            id=f"F{i}",
            type=name,
            description="",
            confidence=0.9,
            evidence=(Evidence(input_index=0, slice_index=0, bbox=(50, 30, 60, 40), localisation="box"),),
        )
        for i, name in enumerate(types, 1)
    )
    source = SourceInput(name=f"in/batch-7/{number}.png", sha256="a" * 64, media_type="image/png")
    base = plain_report(id=f"{number:016x}", disposition=disposition, findings=findings)
    return base.model_copy(
        update={
            "source": Source(inputs=(source,), lot=lot, **more),
            "created": base.created + timedelta(minutes=number),
        }
    )


def judged(reports: list[Report], **plan: object) -> LotReport:
    return lot_report(reports, LotPlan.model_validate(plan))


def test_the_verdict_counts_the_nonconforming_items_of_the_sample() -> None:
    reports = [inspected(n, "reject" if n < 6 else "accept") for n in range(80)]
    [verdict] = judged(reports, aql=2.5, size=1000).verdicts
    assert (verdict.verdict, verdict.found, verdict.plan.name) == ("not accepted", 6, plan_for(1000, "II", 2.5).name)
    [verdict] = judged([*reports[1:], inspected(99, "accept")], aql=2.5, size=1000).verdicts
    assert (verdict.verdict, verdict.found) == ("accepted", 5)
    assert judged(reports, aql=2.5, sizes={"L1": 4000}).verdicts[0].plan.n == 200


def test_what_is_held_or_not_inspected_leaves_the_verdict_open_only_where_it_can_decide() -> None:
    held = [inspected(n, "hold" if n < 2 else "accept") for n in range(80)]
    assert judged(held, aql=2.5, size=1000).verdicts[0].verdict == "accepted"
    assert judged(held, aql=0.65, size=1000).verdicts[0].verdict == "pending"
    too_few = [inspected(n, "reject" if n < 3 else "accept") for n in range(40)]
    assert judged(too_few, aql=2.5, size=1000).verdicts[0].verdict == "pending"
    assert judged(too_few, aql=1.0, size=1000).verdicts[0].verdict == "not accepted"


def test_a_larger_inspection_is_sampled_the_same_way_each_time() -> None:
    reports = [inspected(n, "reject" if n % 10 == 0 else "accept") for n in range(500)]
    first, second = (judged(order, aql=1.0).verdicts[0] for order in (reports, reports[::-1]))
    assert (first.sampled, first.found) == (second.sampled, second.found)
    assert first.sampled == first.plan.n == 50
    assert first.inspected == 500


def test_lots_are_named_by_the_source_or_the_folder_and_items_by_their_serial() -> None:
    found = judged(
        [
            inspected(1, "accept", lot=None),
            inspected(2, "accept", lot="B", serial="7"),
            inspected(3, "reject", lot="B", serial="7"),
            inspected(4, "accept", lot="B"),
        ]
    )
    assert [(v.lot, v.inspected, v.nonconforming) for v in found.verdicts] == [("in/batch-7", 1, 0), ("B", 2, 1)]
    assert (found.pictures, found.items) == (4, 3)


def test_above_an_aql_of_10_nonconformities_are_counted() -> None:
    reports = [inspected(n, "reject", types=("crack",) * 5) for n in range(5)]
    [verdict] = judged(reports, aql=100.0, size=20).verdicts
    assert (verdict.plan.n, verdict.found) == (5, 25)


def test_lots_in_a_row_switch_the_inspection() -> None:
    bad = [
        inspected(100 * lot + n, "reject" if n < 3 else "accept", lot=f"L{lot}") for lot in range(3) for n in range(80)
    ]
    verdicts = judged(bad, aql=1.0, size=1000).verdicts
    assert [v.plan.inspection for v in verdicts] == ["normal", "normal", "tightened"]
    assert [v.next_inspection for v in verdicts] == [None, "tightened", None]


def test_subgroups_by_day() -> None:
    found = judged([inspected(n * 1440, "accept") for n in range(3)], subgroup="day")
    assert [point.label for point in found.chart] == ["2026-01-02", "2026-01-03", "2026-01-04"]


def test_pareto_and_map_count_all_findings() -> None:
    found = judged(
        [inspected(1, "reject", types=("crack", "crack", "break")), inspected(2, "accept", types=("crack",))]
    )
    assert [(bar.type, bar.count, bar.cumulative) for bar in found.pareto] == [("crack", 3, 0.75), ("break", 1, 1.0)]
    [chart] = found.maps
    assert chart.cells[int(GRID * 35 / 40)][int(GRID * 55 / 60)] == 4
    assert chart.findings == 4


# The page


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_the_page_states_plans_verdicts_and_counts(language: str) -> None:
    lots = ["<script>alert(1)</script>", "=1+1", "批次 \u202e7"]
    reports = [
        inspected(100 * i + n, "reject" if n < 4 * i else "accept", lot=lot, types=("crack",) if n < 4 * i else ())
        for i, lot in enumerate(lots)
        for n in range(20)
    ]
    found = judged(reports, aql=2.5, size=90)
    say = words(language)  # type: ignore[arg-type]
    html = render_html(found, say)
    text = unescape(re.sub("<[^>]*>", " ", html[html.index("<body>") :]))
    assert "<script" not in html
    assert "\u202e" not in html
    assert "=1+1" in text and lots[0] in text
    verdicts = [verdict.verdict for verdict in found.verdicts]
    assert verdicts == ["accepted", "not accepted", "not accepted"]
    for verdict in found.verdicts:
        assert say.term("lot", verdict.verdict).lower() in text.lower()
        assert f"n={verdict.plan.n}" in text
    assert "{" not in text.replace("{}", "")
    told = json.loads(render_json(found))
    assert [each["verdict"] for each in told["verdicts"]] == verdicts
    assert told["verdicts"][0]["plan"]["name"] == found.verdicts[0].plan.name


def test_a_run_without_inspections_has_no_lot_report(tmp_path: Path) -> None:
    report = plain_report(kind="ct")
    (tmp_path / report.id).mkdir()
    (tmp_path / report.id / "report.json").write_text(report.model_dump_json())
    with pytest.raises(CannotCarryError, match="no inspection report"):
        write(RunReports(tmp_path, (report.id,)), tmp_path)
