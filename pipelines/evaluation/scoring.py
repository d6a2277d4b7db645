"""Predictions and labels to figures: which statistics a data set's labels allow, each beside trivial baselines.

Only labels decide what is counted: a case whose image could not be read stays in every figure, as a wrong answer with
no finding. `score` is pure; the same saved predictions always give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pipelines.evaluation import ct, defects
from pipelines.evaluation.figures import Figure, Pair, field_value, over, reported
from pipelines.evaluation.predictions import Prediction, PredictionsError
from pipelines.evaluation.statistics import Floats, accuracy, interval_95, resample_groups, value_of
from pipelines.manifest import Case
from reports.taxonomy import CT_FIELDS, UNDETERMINED

MIN_GROUPS: Final = 5  # with fewer, resampling groups says nothing about how far a figure can be trusted
RESAMPLES: Final = 1000


def score(
    cases: Sequence[Case],
    predictions: Sequence[Prediction],
    *,
    baselines: Mapping[str, Sequence[Prediction]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of `predictions` for `cases`.

    `metrics`: `{name: {value, ci95, baselines: {name: value}, n}}`; `ci95` is the percentile interval of a bootstrap
    over groups, null with fewer than 5 groups or where it is mostly undefined. `baselines` are the same figures of
    other answers (`pipelines.evaluation.baselines`). `per_type`: figures of single finding types. `calibration`:
    reliability of each sort of statement. `confusion`: `{what: {truth, answer, counts}}`.

    Raises `PredictionsError` when a case has no prediction or more than one.
    """
    pairs = pair_up(cases, predictions)
    matches = defects.match(pairs)
    said = [defects.statements(matches), ct.field_statements(pairs), ct.finding_statements(pairs)]
    said = [statements for statements in said if len(statements.case)]
    trivial: dict[str, dict[str, float]] = {}
    for name, answers in (baselines or {}).items():
        for figure in _figures(pair_up(cases, answers)):
            trivial.setdefault(figure.name, {})[name] = value_of(figure.statistic, len(cases))
    samples = group_samples([case.group for case in cases], resamples, seed)
    figures = [
        *_figures(pairs),
        *_language_figures(pairs),
        *(figure for statements in said for figure in statements.figures()),
    ]
    return {
        "metrics": {
            figure.name: measured(figure, len(cases), samples)
            | {"baselines": {name: number(value) for name, value in trivial.get(figure.name, {}).items()}}
            for figure in figures
        },
        "per_type": {
            name: {key: number(value_of(v, len(cases))) if callable(v) else v for key, v in row.items()}
            for name, row in (defects.per_type(matches) | ct.per_type(pairs)).items()
        },
        "calibration": {statements.name: statements.reliability() for statements in said},
        "confusion": _confusion(pairs),
    }


def pair_up(cases: Sequence[Case], predictions: Sequence[Prediction]) -> list[Pair]:
    """Each case with its answer. Raises `PredictionsError` when a case has none, or more than one."""
    answers = {prediction.id: prediction for prediction in predictions}
    missing = sum(case.id not in answers for case in cases)
    if missing or len(answers) != len(predictions):
        problem = f"{missing} case(s) of the manifest have none" if missing else "some ids occur twice"
        raise PredictionsError(f"predictions do not fit the manifest: {problem}; evaluate again to write them anew")
    return [Pair(index, case, answers[case.id]) for index, case in enumerate(cases)]


def group_samples(groups: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> Floats | None:
    """Bootstrap weights; None with too few groups."""
    return resample_groups(groups, resamples, seed) if len(set(groups)) >= MIN_GROUPS else None


def measured(figure: Figure, cases: int, samples: Floats | None) -> dict[str, Any]:
    """A figure's value, interval and number of cases."""
    interval = None if samples is None else interval_95(figure.statistic, samples)
    return {
        "value": number(value_of(figure.statistic, cases)),
        "ci95": None if interval is None else [number(bound) for bound in interval],
        "n": figure.n,
    }


def number(value: float) -> float | None:
    """JSON has no NaN: an undefined figure is null."""
    return None if math.isnan(value) else float(value)


def _figures(pairs: Sequence[Pair]) -> list[Figure]:
    """All that can be asked of any answers, a model's or a baseline's, given the labels."""
    figures = [
        *_kind_figures(pairs),
        *defects.detection_figures(pairs, defects.match(pairs)),
        *defects.image_type_figures(pairs),
        *ct.field_figures(pairs),
        *ct.finding_figures(pairs),
        *ct.narrative_figures(pairs),
        *_report_figures(pairs),
    ]
    return [figure for figure in figures if figure.n]


def _kind_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    known = [pair for pair in pairs if pair.case.kind]
    yield over("kind_accuracy", known, accuracy([p.answer.kind == p.case.kind for p in known]))
    lines = [pair for pair in pairs if pair.case.product_line]
    right = [p.answer.product_line == p.case.product_line for p in lines]
    yield over("product_line_accuracy", lines, accuracy(right))


def _report_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """The report as a whole: just the labelled finding types, and every labelled field right."""
    labelled = [pair for pair in pairs if pair.case.finding_types is not None]
    types = [{f.type for f in reported(pair.answer)} == set(pair.case.finding_types or ()) for pair in labelled]
    types = [same and pair.answer.error is None for same, pair in zip(types, labelled, strict=True)]
    fields = [all(field_value(pair.answer, name) == v for name, v in pair.case.fields.items()) for pair in labelled]
    yield over("report_types_match", labelled, accuracy(types))
    yield over("report_exact_match", labelled, accuracy([a and b for a, b in zip(types, fields, strict=True)]))


def _language_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """How often the decoder contradicts the findings, and how often that is still so in what is reported."""
    said = [pair for pair in pairs if pair.answer.contradicted is not None]
    if said:
        yield over("decoder_contradicts_findings", said, accuracy([bool(pair.answer.refused) for pair in said]))
        yield over("report_contradicts_findings", said, accuracy([bool(pair.answer.contradicted) for pair in said]))


def _confusion(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    confusion = defects.image_type_confusion(pairs)
    tables = {"image type": (confusion, defects.image_types(confusion))}
    for name, values in CT_FIELDS.items():
        labelled = [pair for pair in pairs if name in pair.case.fields]
        pairs_of = [(pair.case.fields[name], field_value(pair.answer, name)) for pair in labelled]
        tables[name] = (pairs_of, (*values, UNDETERMINED))
    return {what: _counts(rows, order) for what, (rows, order) in tables.items() if rows}


def _counts(rows: Sequence[tuple[str, str]], order: Sequence[str]) -> dict[str, Any]:
    truth = [name for name in order if any(name == wanted for wanted, _ in rows)]
    answer = [name for name in order if any(name in row for row in rows)]
    return {"truth": truth, "answer": answer, "counts": [[rows.count((t, a)) for a in answer] for t in truth]}
