"""Figures of CT images: fields, findings of the whole image, and the narrative beside the caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from pipelines.evaluation.calibration import Statement, Statements
from pipelines.evaluation.figures import Figure, Pair, confidence_of, equal, field_value, over, reported
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.statistics import Statistic, accuracy, auroc, f1, mean_of, on_cases
from pipelines.evaluation.text import bleu_4, rouge_l
from pipelines.manifest import Case
from reports.taxonomy import CT_FIELDS, CT_TYPES, UNDETERMINED

MIN_POSITIVES: Final = 5  # a finding type with fewer positive cases has no AUROC worth averaging


def field_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """CT fields; "undetermined" is a wrong answer, save for the figure over answered cases."""
    for name in CT_FIELDS:
        labelled = [pair for pair in pairs if name in pair.case.fields]
        truth = [pair.case.fields[name] for pair in labelled]
        answer = [field_value(pair.answer, name) for pair in labelled]
        yield over(f"{name}_accuracy", labelled, accuracy(equal(answer, truth)))
        if name == "laterality":  # often not to be told from one image, so reports leave it open
            yield over(f"{name}_answered", labelled, accuracy([value != UNDETERMINED for value in answer]))
            clear = [i for i, value in enumerate(answer) if value != UNDETERMINED]
            right = accuracy([answer[i] == truth[i] for i in clear])
            yield over(f"{name}_accuracy_answered", [labelled[i] for i in clear], right)
        if name == "covid19":
            positive = [value == "true" for value in truth]
            likely = [probability(pair.answer, name, "true") for pair in labelled]
            yield over(f"{name}_auroc", labelled, auroc(positive, likely))
            yield over(f"{name}_f1", labelled, f1(positive, [value == "true" for value in answer]))


def field_statements(pairs: Sequence[Pair]) -> Statements:
    """Every field states its most probable value, also where the answer stays "undetermined"."""

    def said() -> Iterator[Statement]:
        for pair in pairs:
            for name, reading in pair.answer.fields.items():
                if name in pair.case.fields and reading.probabilities:
                    value = max(reading.probabilities, key=lambda each: reading.probabilities[each])
                    raw = reading.raw_probabilities.get(value, np.nan)
                    yield Statement(pair.index, reading.probabilities[value], value == pair.case.fields[name], raw)

    return Statements.of("fields", said())


def finding_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """Findings of the whole image, over the types with enough cases: how they rank, and those in the report."""
    labelled = _labelled(pairs)
    by_type = _common_types(labelled)
    if by_type:
        yield over("finding_auroc_macro", labelled, mean_of([_auroc(labelled, name) for name in by_type]))
        yield over("finding_f1_macro", labelled, mean_of([_f1(labelled, name) for name in by_type]))


def finding_statements(pairs: Sequence[Pair]) -> Statements:
    """Every type that an answer names, reported or not, states that the image shows it."""

    def said() -> Iterator[Statement]:
        for pair in _labelled(pairs):
            for name in CT_TYPES:
                found = [finding for finding in pair.answer.findings if finding.type == name]
                if found:
                    best = max(found, key=lambda finding: finding.confidence)
                    raw = np.nan if best.raw_confidence is None else best.raw_confidence
                    yield Statement(pair.index, best.confidence, name in (pair.case.finding_types or ()), raw)

    return Statements.of("findings", said())


def narrative_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """The impression against the caption, where there is one."""
    told = [pair for pair in pairs if caption(pair.case)]
    texts, references = [pair.answer.impression for pair in told], [caption(pair.case) for pair in told]
    yield over("narrative_bleu_4", told, bleu_4(texts, references))
    yield over("narrative_rouge_l", told, rouge_l(texts, references))


def caption(case: Case) -> str:
    """What a person wrote about this very image; empty where the manifest has nothing."""
    text = case.extra.get("caption")
    return text if isinstance(text, str) else ""


def per_type(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Positive cases and statistics of each CT type that has enough of them."""
    labelled = _labelled(pairs)
    index = [pair.index for pair in labelled]
    return {
        name: {
            "positives": positives,
            "auroc": on_cases(_auroc(labelled, name), index),
            "f1": on_cases(_f1(labelled, name), index),
        }
        for name, positives in _common_types(labelled).items()
    }


def _labelled(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.case.kind == "ct" and pair.case.finding_types is not None]


def _common_types(labelled: Sequence[Pair]) -> dict[str, int]:
    """The types with enough positive cases, and how many they have."""
    counts = {name: sum(_truth(labelled, name)) for name in CT_TYPES}
    return {name: count for name, count in counts.items() if count >= MIN_POSITIVES}


def _truth(labelled: Sequence[Pair], name: str) -> list[bool]:
    return [name in (pair.case.finding_types or ()) for pair in labelled]


def _auroc(labelled: Sequence[Pair], name: str) -> Statistic:
    return auroc(_truth(labelled, name), [confidence_of(pair.answer, name) for pair in labelled])


def _f1(labelled: Sequence[Pair], name: str) -> Statistic:
    said = [any(finding.type == name for finding in reported(pair.answer)) for pair in labelled]
    return f1(_truth(labelled, name), said)


def probability(answer: Prediction, name: str, value: str) -> float:
    """How likely the answer holds a field's `value` to be; 0 where it has none."""
    reading = answer.fields.get(name)
    return reading.probabilities.get(value, 0.0) if reading else 0.0
