"""Sentences are held against the findings: what contradicts them is refused, what is true of them stands."""

from __future__ import annotations

import random

import pytest

from benchmarks.language_check import draw, of_catalogue, true_of, untrue_of
from reports.grammar import Draft, DraftFinding
from reports.language import Sentence, agreeing, contradictions
from reports.mentions import clauses
from reports.schema import Report
from reports.texts import LANGUAGES, worded

STEEL = Draft(
    "defect",
    "steel",
    findings=(
        DraftFinding(0, "scratches", "upper left", "large"),
        DraftFinding(1, "scratches", "upper left", "small"),
        DraftFinding(2, "inclusion", "centre", "small"),
    ),
)
CT = Draft(
    "ct",
    fields={"plane": "axial", "laterality": "left", "covid19": "false"},
    findings=(DraftFinding(0, "mass-or-lesion", "middle right", word="lesion"), DraftFinding(1, "cyst", "centre")),
)


def drawn(count: int) -> list[tuple[random.Random, Report]]:
    chances = [random.Random(seed) for seed in range(count)]
    return [(chance, draw(chance)) for chance in chances]


def codes(draft: Draft, text: str | Sentence, *, assessed: bool = True) -> list[str]:
    return [each.code for each in contradictions(draft, [text], assessed=assessed)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_catalogue_says_of_a_report_stands(language: str) -> None:
    for _, report in drawn(150):
        texts = list(of_catalogue(worded(report, language)))  # type: ignore[arg-type]
        assert contradictions(report, texts) == []


def test_true_sentences_stand_and_altered_ones_are_refused() -> None:
    for chance, report in drawn(80):
        for finding in report.findings:
            for text in true_of(report, finding, chance):
                assert contradictions(report, [text]) == [], text
            for how, text in untrue_of(report, finding, chance):
                assert contradictions(report, [text]), (how, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two scratches in the upper left and a small inclusion in the centre of the image.", []),
        ("No crazing and no patches were found.", []),
        ("Three scratches, in the upper left of the image.", ["count"]),
        ("Two scratches, in the lower left of the image.", ["place"]),
        ("A crack runs across the strip.", ["not-found"]),
        ("No scratches are visible.", ["negated"]),
        ("Scratches were not detected.", ["negated"]),
        ("No mouse bites were found.", ["cleared"]),  # of another product line
        ("The surface is otherwise normal.", ["cleared"]),
        ("No defect of the assessed types was found.", ["cleared"]),
        ("A large inclusion in the centre.", ["size"]),
        ("A scratch of 12.5 mm.", ["number"]),
        ("A severe scratch.", ["severity"]),
        ("The strip should be rejected.", ["disposition"]),
        ("Corrosion is seen.", ["not-found"]),
        ("Neither crazing nor pitting was seen; in the centre sits a small inclusion.", []),
        ("It does not show any scratching.", ["negated"]),
        ("Scratch-free surface.", ["negated"]),
        ("Scratches: none.", ["negated"]),
        ("The part passes inspection.", ["disposition"]),
    ],
)
def test_sentences_about_a_defect(text: str, expected: list[str]) -> None:
    assert codes(STEEL, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Possible lesion, in the middle right of the image. Possible cyst, in the centre of the image.", []),
        ("A left-sided lesion is seen; hemorrhage cannot be excluded.", []),
        ("The lesion could be a cyst.", []),
        ("A right-sided lesion is seen.", ["side"]),
        ("A mass in the left lung.", ["word"]),
        ("No pleural effusion.", ["cleared"]),
        ("The other organs are unremarkable.", ["cleared"]),
        ("Findings are typical of COVID-19.", ["not-found"]),
        ("No evidence of COVID-19.", []),
        ("Pneumonia of the left lung.", ["not-found"]),
        ("No acute cardiopulmonary process.", ["cleared"]),
        ("Clinical correlation is recommended. Other findings are not excluded.", []),
        ("Coronal view of a cyst.", ["technique"]),
        ("图像中央可能有囊肿。", []),
        ("图像左上部可能有囊肿。", ["place"]),
        ("图像中央可能有结石。", ["not-found"]),
        ("未见囊肿。", ["negated"]),
    ],
)
def test_sentences_about_a_ct_image(text: str, expected: list[str]) -> None:
    assert codes(CT, text) == expected


def test_a_sentence_of_one_finding_may_not_speak_of_another() -> None:
    assert codes(STEEL, Sentence("A small inclusion in the centre of the image.", "F3")) == []
    assert codes(STEEL, Sentence("A small inclusion in the centre of the image.", "F1")) == ["not-found"]
    assert codes(STEEL, Sentence("It lies in the lower right of the image.", "F1")) == ["place"]


def test_nothing_can_be_denied_of_what_was_not_assessed() -> None:
    nothing = Draft("defect", "steel")
    assert codes(nothing, "No defect of the assessed types was found.") == []
    assert codes(nothing, "No defect of the assessed types was found.", assessed=False) == ["cleared"]
    assert codes(nothing, "No scratches were found.", assessed=False) == ["cleared"]
    assert codes(Draft("defect", None), "No scratches were found.") == ["cleared"]


def test_a_language_models_text_keeps_the_sentences_that_agree() -> None:
    report = next(report for _, report in drawn(50) if report.kind == "defect" and report.findings)
    first = worded(report, "en").findings[0].description.split(". ")[0].rstrip(".") + "."
    text, refused = agreeing(report, f"{first} Everything else is flawless. The strip measures 1234.5 mm.")
    assert text == first
    assert [each.code for each in refused] == ["cleared", "number"]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("No mass, nodule or effusion is seen.", "denied"),
        ("There is no effusion, but a nodule of 4 mm is seen.", "asserted"),
        ("No effusion is seen, and there is a nodule in the left lung.", "asserted"),
        ("Nodules were not observed in either lung.", "denied"),
        ("A nodule cannot be excluded.", "open"),
        ("The lungs are free of nodules.", "denied"),
        ("Without effusion; nodules are present.", "asserted"),
    ],
)
def test_naming_and_denying_are_told_apart(text: str, status: str) -> None:
    found = [m.status for clause in clauses(text, {"nodule": r"\bnodules?\b"}) for m in clause.mentions]
    assert found == [status]
