"""One catalogue for two languages: it is complete, and a report in Chinese has no English left in it."""

from __future__ import annotations

import re
import string
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_strategies import reports
from test_reports_building import MODEL, ct, defect, found, photo, volume

from pipelines.reporting import build_report, report_images
from reports.bundle import Bundle
from reports.grammar import COUNTS, EXTENTS, SCATTERED, ZONES
from reports.html import render as render_html
from reports.page import page_of
from reports.schema import Report
from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES, LINES, UNDETERMINED
from reports.text import render_markdown, render_text
from reports.texts import CATALOGUE, LANGUAGES, number, percent, visible, worded, words

TABLES = {language: tomllib.loads((CATALOGUE / f"{language}.toml").read_text("utf-8")) for language in LANGUAGES}
# On a Chinese page, besides names: units and notations, codes, hashes and what the industry writes in Latin letters.
LATIN = {
    "CT",
    "HU",
    "px",
    "mm",
    "UID",
    "SHA",
    "LPS",
    "WL",
    "WW",
    "UTC",
    "ScanScribe",
    "rejected",
    "jsonl",
    "json",
    "reference",
    "SNOMED",
}
NAMES = {
    "gold",
    "small",
    "cpu",
    "png",
    "dcm",
    "series",
    "image",
    "application",
    "dicom",
    "scanscribe",
    "default",
    "SCT",
}


def leaves(table: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for key, value in table.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def test_only_what_is_certain_is_shown_as_certain() -> None:
    shown = [percent(value) for value in (0.0, 0.001, 0.005, 0.0051, 0.5, 0.9949, 0.995, 0.9999, 1.0)]
    assert shown == ["0%", "<1%", "<1%", "1%", "50%", "99%", ">99%", ">99%", "100%"]


def test_the_languages_have_the_same_keys_and_values_to_fill_in() -> None:
    english, chinese = leaves(TABLES["en"]), leaves(TABLES["zh-CN"])
    assert set(english) <= set(chinese)
    own = {path[0] for path in set(chinese) - set(english)}
    assert own <= {"measurement", "method", "segment", "window"}  # in English these read as their keys
    for path, sentence in english.items():
        fields = [
            {name for _, name, _, _ in string.Formatter().parse(each) if name} for each in (sentence, chinese[path])
        ]
        if path[0] not in ("unit", "measurement", "method"):
            assert fields[0] == fields[1], path


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_closed_term_has_its_word(language: str) -> None:
    tables = TABLES[language]
    terms = {
        "type": (*CT_TYPES, *DEFECT_TYPES),
        "noun": (*CT_TYPES, *DEFECT_TYPES),
        "line": LINES,
        "location": ZONES,
        "place": (*ZONES, SCATTERED),
        "extent": EXTENTS,
        "count": COUNTS,
        "field": tuple(CT_FIELDS),
        "severity": ("critical", "major", "minor"),
        "disposition": ("accept", "rework", "reject", "hold"),
    }
    terms |= {name: (*values, UNDETERMINED) for name, values in CT_FIELDS.items()}
    for domain, keys in terms.items():
        assert not [key for key in keys if not tables[domain].get(key)], domain


def built() -> list[Report]:
    """Reports of every kind, with each sort of finding, field and thing that was not assessed."""
    one, two = found("nodule", 30, 24, 40, 34, slice_index=4, localisation="weak"), found("cyst", 1, 1, 9, 9)
    odd = replace(
        volume(),
        units="display",
        quality_flags=tuple(TABLES["en"]["flag"]),
        geometry=replace(volume().geometry, spacing_mm=None),
    )
    boxes = [found(name, 10 * n % 150, 10, 10 * n % 150 + 30, 60) for n, name in enumerate(DEFECT_TYPES)]
    return [
        build_report(volume(), ct(one, two, region="chest", contrast="iv", covid19="true", laterality="left"), MODEL),
        build_report(odd, ct(*(found(t, 1, 1, 9, 9) for t in CT_TYPES), region="undetermined", covid19="false"), MODEL),
        build_report(volume(), ct(region="abdomen", plane="undetermined", contrast="undetermined"), MODEL),
        build_report(photo(), defect(*boxes, line="board"), MODEL),
        build_report(photo(), defect(line="tile"), MODEL, reference=photo(name="gold.png")),
        build_report(photo(), defect(line=None), MODEL),
    ]


@pytest.mark.parametrize("report", built(), ids=lambda report: report.title)
def test_no_english_is_left_on_a_chinese_page(report: Report) -> None:
    chinese = worded(report, "zh-CN")
    page = re.sub(r"(?s)<style>.*?</style>|<[^>]*>", " ", render_html(Bundle(chinese)).decode())
    texts = [page, render_text(Bundle(chinese)).decode(), render_markdown(Bundle(chinese)).decode()]
    codes = [
        *chinese.quality_flags,
        chinese.disposition_rule or "",
        *(f.code.meaning for f in chinese.findings if f.code),
    ]
    for text in texts:
        for code in codes:
            text = text.replace(code, " ")
        latin = re.findall(r"(?<![0-9a-f])[A-Za-z]{2,}", re.sub(r"\b[0-9a-f]{12,64}\b", " ", text.replace("\\", "")))
        assert not set(latin) - LATIN - NAMES


@pytest.mark.parametrize("report", built(), ids=lambda report: report.title)
def test_a_report_can_be_worded_in_the_other_language_and_back(report: Report) -> None:
    chinese = worded(report, "zh-CN")
    assert worded(chinese, "en") == report
    assert chinese.language == "zh-CN"
    for found_in_english, found_in_chinese in zip(report.findings, chinese.findings, strict=True):
        same = {"description"}
        assert found_in_english.model_dump(exclude=same) == found_in_chinese.model_dump(exclude=same)
    assert report.impression != chinese.impression


def test_a_report_built_in_chinese_is_the_report_worded_in_chinese() -> None:
    reading = ct(found("nodule", 30, 24, 40, 34, slice_index=4), region="chest", laterality="left")
    made = build_report(volume(), reading, MODEL, language="zh-CN")
    english = build_report(volume(), reading, MODEL)
    assert made.id != english.id  # both can lie in one folder
    assert made.model_copy(update={"id": english.id, "created": english.created}) == worded(english, "zh-CN")
    assert made.title == "胸部 CT，横断面 · series 3"
    assert made.findings[0].description == "图像右下部见结节，第 5 层（共 6 层）。"
    assert made.impression == "图像右下部可能有结节。"
    assert report_images(volume(), made).slices[4].shown_as == "WL −600 · WW 1500 HU"


def test_what_has_no_code_keeps_its_words() -> None:
    report = build_report(photo(), defect(), MODEL)
    item = report.not_assessed[0].model_copy(update={"code": "", "what": "the back", "reason": "not in the picture"})
    kept = worded(report.model_copy(update={"not_assessed": (item,)}), "zh-CN").not_assessed
    assert (kept[0].what, kept[0].reason) == ("the back", "not in the picture")


@given(reports())
def test_a_page_shows_nothing_that_cannot_be_seen(report: Report) -> None:
    page = repr(page_of(report))
    assert visible(page) == " ".join(page.split())


@given(st.text())
def test_visible_text_stays_as_it_is(text: str) -> None:
    assert visible(visible(text)) == visible(text)
    assert "\u202e" not in visible(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (1234.5, "1,234"), (99.96, "100"), (9.996, "10.0"), (-878.4, "−878"), (0.00123, "0.0012")],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


def test_nouns_have_plurals_in_english_only() -> None:
    assert words("en").noun("scratches", plural=True) == "scratches"
    assert words("en").noun("open", plural=True) == "open circuits"
    assert words("zh-CN").noun("open", plural=True) == "断路"
