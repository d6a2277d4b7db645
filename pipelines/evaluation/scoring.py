"""Predictions and labels to figures: which statistics a data set's labels allow, each beside its trivial baseline.

Only labels decide what is counted: a case whose image could not be read stays in every figure, as a wrong answer with
no finding. `score` is pure; the same saved predictions always give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipelines.evaluation import detection
from pipelines.evaluation.predictions import PredictedFinding, Prediction, PredictionsError
from pipelines.evaluation.statistics import (
    Floats,
    Statistic,
    accuracy,
    auroc,
    calibration_error,
    f1,
    interval_95,
    macro_f1,
    majority,
    mean_of,
    on_cases,
    resample_groups,
)
from pipelines.manifest import Case
from pipelines.reading import FieldReading
from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES, KINDS, LINES, UNDETERMINED

DEFECT_FREE: Final = "defect-free"
MIN_POSITIVES: Final = 5  # a finding type with fewer positive cases has no AUROC worth averaging
MIN_GROUPS: Final = 5  # with fewer, resampling groups says nothing about how far a figure can be trusted
MATCH_IOU: Final = 0.5  # a detection that overlaps a label of its type this much is right, for F1 and calibration


@dataclass(frozen=True, slots=True)
class Pair:
    """A labelled case with the model's answer; `index` is its place among all cases scored."""

    index: int
    case: Case
    answer: Prediction


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure before it is computed. `baseline` is what an answer that ignores the image reaches."""

    name: str
    statistic: Statistic
    n: int  # cases counted
    baseline: float | None


def score(
    cases: Sequence[Case],
    predictions: Sequence[Prediction],
    *,
    train: Sequence[Case] = (),
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of `predictions` for `cases`: `{"metrics": {name: {value, ci95, baseline, n}}, "per_type": {type: {}}}`.

    Majority baselines are learned on the cases of `train` that carry the label, else on `cases` themselves. `ci95` is
    the percentile interval of a bootstrap over groups, null with fewer than 5 groups or where it is mostly undefined.
    Raises `PredictionsError` when a case has no prediction or more than one.
    """
    answers = {prediction.id: prediction for prediction in predictions}
    missing = sum(case.id not in answers for case in cases)
    if missing or len(answers) != len(predictions):
        problem = f"{missing} case(s) of the manifest have none" if missing else "some ids occur twice"
        raise PredictionsError(f"predictions do not fit the manifest: {problem}; evaluate again to write them anew")
    pairs = [Pair(index, case, answers[case.id]) for index, case in enumerate(cases)]

    matches = _match(pairs, [pair.answer.findings for pair in pairs])
    figures = [
        figure
        for figure in (
            *_kind_figures(pairs),
            *_detection_figures(pairs, matches),
            *_image_type_figures(pairs, train),
            *_field_figures(pairs, train),
            *_finding_figures(pairs),
        )
        if figure.n
    ]
    ones = np.ones(len(cases))
    groups = [case.group for case in cases]
    samples = list(resample_groups(groups, resamples, seed)) if len(set(groups)) >= MIN_GROUPS else []
    return {
        "metrics": {figure.name: _computed(figure, ones, samples) for figure in figures},
        "per_type": {**_per_defect_type(matches, ones), **_per_ct_type(pairs, ones)},
    }


def image_type(case: Case) -> str:
    """The type of a whole image: the most frequent type of its boxes, of equally frequent ones that with the larger
    total area. Only boxes count: file names of some data sets name another type than their boxes do.
    """
    if not case.boxes:
        return DEFECT_FREE
    size: dict[str, tuple[int, float]] = {}
    for label in case.boxes:
        count, area = size.get(label.type, (0, 0.0))
        x0, y0, x1, y1 = label.bbox
        size[label.type] = (count + 1, area + (x1 - x0) * (y1 - y0))
    return max(sorted(size), key=lambda name: size[name])


def _computed(figure: Figure, ones: Floats, samples: Sequence[Floats]) -> dict[str, Any]:
    interval = interval_95([figure.statistic(weights) for weights in samples])
    return {
        "value": _number(figure.statistic(ones)),
        "ci95": None if interval is None else [_number(bound) for bound in interval],
        "baseline": None if figure.baseline is None else _number(figure.baseline),
        "n": figure.n,
    }


def _kind_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """A data set mostly has one kind, so a majority would be always right: the baseline is a guess among all kinds."""
    known = [pair for pair in pairs if pair.case.kind]
    yield _over("kind_accuracy", known, accuracy([p.answer.kind == p.case.kind for p in known]), 1 / len(KINDS))
    lines = [pair for pair in pairs if pair.case.product_line]
    right = [p.answer.product_line == p.case.product_line for p in lines]
    yield _over("product_line_accuracy", lines, accuracy(right), 1 / len(LINES))


def _defects(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.case.kind == "defect" and pair.case.finding_types is not None]


def _match(pairs: Sequence[Pair], found: Sequence[Sequence[PredictedFinding]]) -> dict[str, detection.Matches]:
    """`found` (for each pair) against the labelled boxes; images that are not labelled count as empty on both sides."""
    labelled = {pair.index for pair in _defects(pairs)}
    return detection.match(
        [pair.case.boxes if pair.index in labelled else () for pair in pairs],
        [findings if pair.index in labelled else () for pair, findings in zip(pairs, found, strict=True)],
    )


def _detection_figures(pairs: Sequence[Pair], matches: dict[str, detection.Matches]) -> Iterator[Figure]:
    """Boxes. Answering "defect-free" for every image scores 0 in all but calibration."""
    n = len(_defects(pairs))
    if not any(each.labels.any() for each in matches.values()):
        return
    yield Figure("map_33", detection.mean_average_precision(matches, [0.33]), n, 0.0)
    yield Figure("map_50", detection.mean_average_precision(matches, [0.5]), n, 0.0)
    yield Figure("map_50_95", detection.mean_average_precision(matches, detection.COCO_IOUS), n, 0.0)
    reported = _match(pairs, [_reported(pair.answer) for pair in pairs])
    yield Figure("f1_reported", detection.detection_f1(reported, MATCH_IOU), n, 0.0)
    yield Figure("f1_best", detection.best_f1(matches, MATCH_IOU), n, 0.0)
    row = detection.IOUS.index(MATCH_IOU)
    statements = [
        (int(image), float(confidence), bool(hit))
        for each in matches.values()
        for image, confidence, hit in zip(each.image, each.confidence, each.hit[row], strict=True)
    ]
    yield from _calibration_figure("ece_detections", statements)


def _image_type_figures(pairs: Sequence[Pair], train: Sequence[Case]) -> Iterator[Figure]:
    """What kind of defect the image as a whole shows. Left out where most images show several types at once."""
    labelled = _defects(pairs)
    if 2 * sum(len(pair.case.finding_types or ()) <= 1 for pair in labelled) < len(labelled):
        return
    truth = [image_type(pair.case) for pair in labelled]
    answer = [_top_type(_reported(pair.answer)) for pair in labelled]
    learned = [case for case in train if case.kind == "defect" and case.finding_types is not None]
    usual = _usual([image_type(case) for case in learned], truth)
    yield _over("image_type_accuracy", labelled, accuracy(_equal(answer, truth)), _share(usual, truth))
    constant = macro_f1(truth, [usual] * len(truth))(np.ones(len(truth)))
    yield _over("image_type_macro_f1", labelled, macro_f1(truth, answer), constant)

    # Which defect, given that there is one: also candidates below the line answer this.
    defective = [pair for pair in labelled if pair.case.boxes]
    types = [image_type(pair.case) for pair in defective]
    best = [_top_type(pair.answer.findings) for pair in defective]
    common = _usual([image_type(case) for case in learned if case.boxes], types)
    yield _over("defect_type_accuracy", defective, accuracy(_equal(best, types)), _share(common, types))

    present = [bool(pair.case.boxes) for pair in labelled]
    if any(present) and not all(present):
        top = [max((f.confidence for f in pair.answer.findings), default=0.0) for pair in labelled]
        yield _over("presence_auroc", labelled, auroc(present, top), 0.5)


def _field_figures(pairs: Sequence[Pair], train: Sequence[Case]) -> Iterator[Figure]:
    """CT fields; "undetermined" is a wrong answer, save for the figure over answered cases."""
    for name in CT_FIELDS:
        labelled = [pair for pair in pairs if name in pair.case.fields]
        truth = [pair.case.fields[name] for pair in labelled]
        answer = [pair.answer.fields[name].value if name in pair.answer.fields else UNDETERMINED for pair in labelled]
        usual = _usual([case.fields.get(name) for case in train], truth)
        yield _over(f"{name}_accuracy", labelled, accuracy(_equal(answer, truth)), _share(usual, truth))
        if name == "laterality":  # often not to be told from one image, so reports leave it open
            yield _over(f"{name}_answered", labelled, accuracy([value != UNDETERMINED for value in answer]), None)
            clear = [i for i, value in enumerate(answer) if value != UNDETERMINED]
            right, share = [answer[i] == truth[i] for i in clear], _share(usual, [truth[i] for i in clear])
            yield _over(f"{name}_accuracy_answered", [labelled[i] for i in clear], accuracy(right), share)
        if name == "covid19" and labelled:
            positive = [value == "true" for value in truth]
            probability = [_probability(pair.answer, name, "true") for pair in labelled]
            yield _over(f"{name}_auroc", labelled, auroc(positive, probability), 0.5)
            always = f1(positive, [True] * len(positive))(np.ones(len(positive)))
            yield _over(f"{name}_f1", labelled, f1(positive, [value == "true" for value in answer]), always)

    # Calibration is of the most probable value, also where the answer stays "undetermined".
    yield from _calibration_figure(
        "ece_fields",
        [
            (pair.index, *_likeliest(reading, pair.case.fields[name]))
            for pair in pairs
            for name, reading in pair.answer.fields.items()
            if name in pair.case.fields and reading.probabilities
        ],
    )


def _finding_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """CT findings of the whole image, each type by its most confident finding (0 where there is none)."""
    labelled = _ct_labelled(pairs)
    by_type = _ct_aurocs(labelled)
    if by_type:
        yield _over("finding_auroc_macro", labelled, mean_of([each for each, _ in by_type.values()]), 0.5)
    yield from _calibration_figure(
        "ece_findings",
        [
            (pair.index, confidence, name in (pair.case.finding_types or ()))
            for pair in labelled
            for name in CT_TYPES
            if (confidence := _confidence_of(pair.answer, name))
        ],
    )


def _per_defect_type(matches: dict[str, detection.Matches], ones: Floats) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "boxes": int(matches[name].labels.sum()),
            "ap_33": _number(detection.average_precision(matches[name], 0.33)(ones)),
            "ap_50": _number(detection.average_precision(matches[name], 0.5)(ones)),
            "ap_50_95": _number(
                mean_of([detection.average_precision(matches[name], iou) for iou in detection.COCO_IOUS])(ones)
            ),
        }
        for name in DEFECT_TYPES
        if name in matches and matches[name].labels.any()
    }


def _per_ct_type(pairs: Sequence[Pair], ones: Floats) -> dict[str, dict[str, Any]]:
    labelled = _ct_labelled(pairs)
    return {
        name: {"positives": positives, "auroc": _number(statistic(ones[: len(labelled)]))}
        for name, (statistic, positives) in _ct_aurocs(labelled).items()
    }


def _ct_labelled(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.case.kind == "ct" and pair.case.finding_types is not None]


def _ct_aurocs(labelled: Sequence[Pair]) -> dict[str, tuple[Statistic, int]]:
    """AUROC and number of positive cases of each type that has enough of them."""
    aurocs: dict[str, tuple[Statistic, int]] = {}
    for name in CT_TYPES:
        truth = [name in (pair.case.finding_types or ()) for pair in labelled]
        if sum(truth) >= MIN_POSITIVES:
            aurocs[name] = auroc(truth, [_confidence_of(pair.answer, name) for pair in labelled]), sum(truth)
    return aurocs


def _over(name: str, pairs: Sequence[Pair], statistic: Statistic, baseline: float | None) -> Figure:
    """A figure over some of the cases, whose statistic counts those alone."""
    return Figure(name, on_cases(statistic, [pair.index for pair in pairs]), len(pairs), baseline)


def _usual(learned: Sequence[str | None], truth: Sequence[str]) -> str:
    """The most frequent label in training, or among the cases scored when training has none."""
    known = [label for label in learned if label is not None] or truth
    return majority(known) if known else ""


def _calibration_figure(name: str, statements: Sequence[tuple[int, float, bool]]) -> Iterator[Figure]:
    """ECE over statements of (case, confidence, whether it is right); none without statements."""
    if statements:
        case, confidence, correct = (np.array(column) for column in zip(*statements, strict=True))
        yield Figure(name, calibration_error(confidence, correct, case), len(set(case.tolist())), None)


def _likeliest(reading: FieldReading, truth: str) -> tuple[float, bool]:
    """The probability of the most probable value, and whether that value is right."""
    value = max(reading.probabilities, key=lambda name: reading.probabilities[name])
    return reading.probabilities[value], value == truth


def _reported(answer: Prediction) -> tuple[PredictedFinding, ...]:
    return tuple(finding for finding in answer.findings if finding.reported)


def _top_type(findings: Sequence[PredictedFinding]) -> str:
    return max(findings, key=lambda finding: finding.confidence).type if findings else DEFECT_FREE


def _confidence_of(answer: Prediction, name: str) -> float:
    return max((finding.confidence for finding in answer.findings if finding.type == name), default=0.0)


def _probability(answer: Prediction, name: str, value: str) -> float:
    reading = answer.fields.get(name)
    return reading.probabilities.get(value, 0.0) if reading else 0.0


def _equal(answers: Sequence[str], truth: Sequence[str]) -> list[bool]:
    return [answer == wanted for answer, wanted in zip(answers, truth, strict=True)]


def _share(value: str, truth: Sequence[str]) -> float:
    return sum(wanted == value for wanted in truth) / len(truth) if truth else math.nan


def _number(value: float) -> float | None:
    """JSON has no NaN: an undefined figure is null."""
    return None if math.isnan(value) else float(value)
