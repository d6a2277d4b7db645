"""Severity and disposition follow the written rule file: type, size, count and zone, with and without a scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.reporting import build_report
from reports.grammar import ZONES
from reports.rules import DEFAULT_RULES, Defect, Judgement, RulesError, load_rules
from reports.taxonomy import DEFECT_TYPES
from reports.texts import words
from tests.test_reports_building import MODEL, defect, found, photo

SIDE = 100


def spot(kind: str, area_percent: float = 1, confidence: float = 0.9, at: tuple[float, float] = (0, 0)) -> Defect:
    """A square box on a picture of 100 x 100 pixels."""
    side = SIDE * (area_percent / 100) ** 0.5
    return Defect(kind, (at[0], at[1], at[0] + side, at[1] + side), (SIDE, SIDE), None, confidence)


def house(tmp_path: Path, severity: str, disposition: str = "", zones: str = "") -> Path:
    path = tmp_path / "house.yaml"
    path.write_text(
        f'name: house\nversion: "7"\n{zones}\nseverity:\n{severity}\n  - {{rule: rest, severity: minor}}\n'
        f"disposition:\n{disposition}\n  - {{rule: bad, severity: critical, disposition: reject}}\n"
        "  - {rule: fine, disposition: accept}\n"
    )
    return path


def judged(path: Path, *defects: Defect, flags: tuple[str, ...] = ()) -> Judgement:
    return load_rules(path).judge(defects, flags)


@pytest.mark.parametrize(
    ("defects", "flags", "severities", "disposition", "rule"),
    [
        ([], (), (), "accept", "otherwise-accept"),
        ([("open", 0.1, 0.9)], (), ("critical",), "reject", "critical-defect"),
        ([("patches", 20, 0.9)], (), ("major",), "rework", "major-defect"),
        ([("patches", 20, 0.9)] * 3, (), ("major",) * 3, "reject", "several-major-defects"),
        ([("patches", 1, 0.9)] * 4, (), ("minor",) * 4, "accept", "otherwise-accept"),
        ([("patches", 1, 0.9)] * 5, (), ("minor",) * 5, "rework", "many-minor-defects"),
        ([("patches", 1, 0.4)], (), ("minor",), "hold", "model-unsure"),
        ([], ("product-line-undetermined",), (), "hold", "not-fully-assessed"),
        ([("short", 1, 0.9)], ("no-reference",), ("critical",), "reject", "critical-defect"),
    ],
)
def test_default_rules(defects: list, flags: tuple, severities: tuple, disposition: str, rule: str) -> None:
    judgement = judged(DEFAULT_RULES, *(spot(*each) for each in defects), flags=flags)
    assert (judgement.severities, judgement.disposition) == (severities, disposition)
    assert judgement.rule.startswith(f"{rule} · scanscribe-default 2 · SHA-256 ")


def test_a_house_rule_file_replaces_the_default_and_is_named(tmp_path: Path) -> None:
    path = house(tmp_path, "  - {rule: all, severity: major}", "  - {rule: quarantine, disposition: hold}")
    report = build_report(photo(), defect(found("patches", 0, 0, 9, 9)), MODEL, rules=load_rules(path))
    assert (report.disposition, report.findings[0].severity) == ("hold", "major")
    assert "quarantine · house 7" in (report.disposition_rule or "")


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("types: [crack]", True),
        ("types: [break]", False),
        ("zones: [upper left]", True),
        ("zones: [lower right, centre]", False),
        ("zones: [pads]", False),
        ("zones: [rim]", True),
        ("min_area_px: 100", True),
        ("min_area_px: 101", False),
        ("min_length_px: 10", True),
        ("min_length_px: 10.1", False),
        ("min_length_percent: 10", True),
        ("min_area_percent: 1.1", False),
        ("min_length_mm: 5", True),
        ("min_length_mm: 5.1", False),
        ("min_area_mm2: 10", True),
        ("min_area_mm2: 10.1", False),
        ("types: [crack], zones: [rim], min_length_mm: 5", True),
    ],
)
def test_a_severity_rule_asks_for_type_size_and_zone(tmp_path: Path, condition: str, holds: bool) -> None:
    zones = "zones: {pads: [50, 50, 100, 100], rim: [0, 0, 2, 100]}"
    path = house(tmp_path, f"  - {{rule: asked, {condition}, severity: critical}}", zones=zones)
    crack = replace(spot("crack", at=(1, 0)), spacing_mm=(0.2, 0.5))  # 10 x 10 px: 5 mm wide, 2 mm high
    judgement = judged(path, crack)
    assert judgement.severities == ("critical" if holds else "minor",)
    assert judgement.disposition == ("reject" if holds else "accept")


def test_counts_are_by_type_severity_and_zone(tmp_path: Path) -> None:
    rule = "  - {rule: two-in-the-middle, types: [crack], zones: [centre], min_count: 2, disposition: rework}"
    path = house(tmp_path, "", rule)
    middle, corner, other = spot("crack", at=(45, 45)), spot("crack"), spot("break", at=(45, 45))
    assert judged(path, middle, middle).disposition == "rework"
    assert judged(path, middle, corner, other).disposition == "accept"


def test_a_finding_throughout_the_picture_lies_in_every_ninth(tmp_path: Path) -> None:
    path = house(tmp_path, "  - {rule: middle, zones: [lower left], severity: critical}")
    assert judged(path, spot("patches", 90)).disposition == "reject"


def test_without_a_scale_a_rule_in_millimetres_holds_the_picture_and_the_report_says_why(tmp_path: Path) -> None:
    path = house(tmp_path, "  - {rule: long-scratch, types: [scratches], min_length_mm: 2, severity: critical}")
    reading = defect(found("scratches", 0, 0, 9, 9))
    report = build_report(photo(), reading, MODEL, rules=load_rules(path))
    assert (report.disposition, report.findings[0].severity) == ("hold", None)
    assert "long-scratch" in (report.disposition_rule or "")
    [item] = [item for item in report.not_assessed if item.code == "rule-without-scale"]
    assert "long-scratch" in item.what and "how large a pixel is" in item.reason
    assert "long-scratch" in words("zh-CN").not_assessed(item).what

    other_type = build_report(photo(), defect(found("patches", 0, 0, 9, 9)), MODEL, rules=load_rules(path))
    assert (other_type.disposition, other_type.findings[0].severity) == ("accept", "minor")
    assert not any(item.code == "rule-without-scale" for item in other_type.not_assessed)


def test_without_a_scale_what_is_sure_either_way_still_decides(tmp_path: Path) -> None:
    rules = "  - {rule: long, types: [scratches], min_length_mm: 2, severity: critical}\n"
    path = house(tmp_path, rules + "  - {rule: cracked, types: [crack], severity: critical}")
    judgement = judged(path, spot("scratches"), spot("crack"))
    assert (judgement.severities, judgement.disposition) == ((None, "critical"), "reject")
    assert judgement.unassessed == ("long",)


defects = st.builds(
    spot,
    st.sampled_from(DEFECT_TYPES),
    st.floats(0.01, 100),
    st.floats(0, 1),
    st.tuples(st.floats(0, 99), st.floats(0, 99)),
)


@given(defects=st.lists(defects, max_size=6), flags=st.sets(st.sampled_from(["no-reference", "lossy-compression"])))
def test_the_default_always_answers_and_more_defects_never_make_it_milder(defects: list, flags: set) -> None:
    rules = load_rules()
    order = ("accept", "rework", "hold", "reject")
    whole = rules.judge(defects, flags)
    fewer = rules.judge(defects[1:], flags)
    assert order.index(whole.disposition) >= order.index(fewer.disposition)
    assert whole.severities[1:] == fewer.severities[: len(whole.severities[1:])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("severity:\n", "severity: [\n"), "is not a rule file in YAML"),
        (("mousebite", "mouse-bite"), "unknown defect type mouse-bite"),
        (("min_area_percent: 10", "min_area_percent: 900"), "less than or equal to 100"),
        (("min_count: 3", "min_kount: 3"), "min_kount"),
        (("min_count: 3", "zones: [nowhere]"), "unknown zone nowhere"),
        (("rule: anything-else", "rule: anything-else\n    min_area_px: 1"), "last severity rule has a condition"),
        (("severity: minor", "severity: minor\n    severity: major"), "severity is given twice"),
        (('version: "2"', 'version: "2"\nzones: {centre: [0, 0, 1, 1]}'), "centre is built in"),
        (('version: "2"', 'version: "2"\nzones: {a: [9, 0, 1, 1]}'), "zone a is empty"),
        (('version: "2"', "version: !!python/object/apply:os.getcwd []"), "is not a rule file in YAML"),
    ],
)
def test_a_faulty_rule_file_is_refused_with_what_would_mend_it(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = tmp_path / "rules.yaml"
    text = DEFAULT_RULES.read_text()
    path.write_text(text[: text.index("name:")] + text[text.index("name:") :].replace(*change))
    with pytest.raises(RulesError, match=message) as caught:
        load_rules(path)
    assert str(path) in str(caught.value)


def test_a_rule_file_of_the_former_kind_is_told_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('name = "house"\nversion = "7"\n[[severity]]\nrule = "s"\nseverity = "major"\n')
    with pytest.raises(RulesError, match="is TOML, and rules are YAML now"):
        load_rules(path)
    path.write_text("just words")
    with pytest.raises(RulesError, match="holds no list of rules"):
        load_rules(path)
    with pytest.raises(RulesError, match="cannot be read"):
        load_rules(tmp_path / "none.yaml")


def test_every_zone_is_explained_in_the_default_file() -> None:
    assert all(zone in DEFAULT_RULES.read_text() for zone in ZONES[:-1])
