"""The figures: hand-worked examples, agreement with scikit-learn and pycocotools, and intervals over groups."""

from __future__ import annotations

import contextlib
import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import f1_score, roc_auc_score

from pipelines.evaluation import detection
from pipelines.evaluation.predictions import PredictedFinding
from pipelines.evaluation.statistics import (
    Statistic,
    accuracy,
    auroc,
    calibration_error,
    f1,
    interval_95,
    macro_f1,
    majority,
    mean_of,
    resample_groups,
)
from pipelines.evaluation.text import bleu_4, rouge_l
from pipelines.manifest import BoxLabel

TYPES = ("crack", "fray", "break")


def ones(n: int) -> np.ndarray:
    return np.ones((1, n))


def at(statistic: Statistic, *weights: float) -> float:
    """The statistic at one weighting of the cases."""
    return float(statistic(np.array([weights]))[0])


def found(type_: str, bbox: tuple[float, float, float, float], confidence: float) -> PredictedFinding:
    return PredictedFinding(type_, bbox, confidence, reported=True)


# Statistics


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): .9>.5, .9>.1, .5=.5 counts half, .5>.1 -> 3.5 of 4.
    assert auroc([True, True, False, False], [0.9, 0.5, 0.5, 0.1])(ones(4)) == 3.5 / 4
    assert np.isnan(auroc([True, True], [0.9, 0.5])(ones(2)))
    assert np.isnan(auroc([], [])(ones(0)))


def test_calibration_error_by_hand() -> None:
    # Bin 13 (.9, .92): mean confidence .91, half right, gap .41, two of four. Bin 3 (.2, .22): gap .21, none right.
    statistic = calibration_error([0.9, 0.92, 0.2, 0.22], [True, False, False, False], np.arange(4))
    assert statistic(ones(4)) == pytest.approx(0.5 * 0.41 + 0.5 * 0.21)
    assert calibration_error([1.0, 0.0], [True, False], np.arange(2))(ones(2)) == 0


def test_adaptive_bins_hold_equally_many_statements() -> None:
    # 30 statements between .90 and .93 share one bin of equal width, where errors of both signs cancel; two and two
    # they do not: .9 and .901 are both wrong, .902 and .903 both right, ...
    confidence = 0.9 + np.arange(30) / 1000
    correct = np.arange(30) // 2 % 2 == 1
    expected = np.mean(np.abs((confidence - correct).reshape(15, 2).mean(1)))
    assert at(calibration_error(confidence, correct, np.arange(30), adaptive=True), *[1] * 30) == pytest.approx(
        expected
    )
    plain = at(calibration_error(confidence, correct, np.arange(30)), *[1] * 30)
    assert plain == pytest.approx(abs((confidence - correct).mean()))
    assert plain < expected


def test_f1_by_hand() -> None:
    # One hit, one miss, one false alarm.
    assert f1([True, True, False], [True, False, True])(ones(3)) == 0.5
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"])(ones(3)) == pytest.approx(2 / 3)


def test_a_weight_counts_a_case_that_often() -> None:
    assert at(accuracy([True, False]), 3, 1) == 0.75
    assert accuracy([True, False])(np.array([[3.0, 1.0], [0.0, 0.0]])).tolist() == pytest.approx(
        [0.75, np.nan], nan_ok=True
    )


def test_mean_leaves_out_what_is_undefined() -> None:
    assert at(mean_of([lambda w: w[:, 0], lambda w: w[:, 0] * np.nan]), 1) == 1
    assert np.isnan(at(mean_of([]), 1))


def test_majority_of_a_tie_is_the_first_in_the_alphabet() -> None:
    assert majority(["b", "a", "b", "a", "c"]) == "a"


@pytest.mark.parametrize("seed", range(20))
def test_weighted_statistics_agree_with_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = 60
    truth, score = random.random(n) < 0.4, np.round(random.random(n), 1)
    wanted, answer = random.choice(["a", "b", "c"], n).tolist(), random.choice(["a", "b", "c", "d"], n).tolist()
    weights = random.integers(0, 4, n).astype(float)
    assert at(auroc(truth, score), *weights) == pytest.approx(roc_auc_score(truth, score, sample_weight=weights))
    assert at(f1(truth, score > 0.5), *weights) == pytest.approx(f1_score(truth, score > 0.5, sample_weight=weights))
    expected = f1_score(wanted, answer, labels=["a", "b", "c"], average="macro", sample_weight=weights)
    assert at(macro_f1(wanted, answer), *weights) == pytest.approx(expected)


# Text


def test_rouge_l_by_hand() -> None:
    # "cat ... the mat" in order: 5 of 6 words each ("the cat _ on the mat").
    assert at(rouge_l(["the cat sat on the mat"], ["The cat lay on the mat."]), 1) == pytest.approx(5 / 6)
    assert at(rouge_l(["mat the"], ["the mat"]), 1) == 0.5  # order counts
    assert at(rouge_l(["", "same words"], ["anything", "same words"]), 1, 3) == 0.75


def test_bleu_4_by_hand() -> None:
    text, reference = "the the cat sat on the mat", "the cat sat on a mat"
    # Runs shared, clipped: "the" once, cat, sat, on, mat: 5 of 7; the-cat, cat-sat, sat-on: 3 of 6; 2 of 5; 1 of 4.
    assert at(bleu_4([text], [reference]), 1) == pytest.approx((5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    # The same text four words short of its reference: precisions 1, penalty exp(1 - 8/4).
    assert at(bleu_4(["a b c d"], ["a b c d e f g h"]), 1) == pytest.approx(np.exp(-1))
    assert at(bleu_4(["", "a b c"], ["a b", "a b c"]), 1, 1) == 0  # no run of four words
    # Of the corpus, not a mean of sentences.
    assert at(bleu_4(["a b c d", "x"], ["a b c d", "y"]), 1, 1) == pytest.approx((4 / 5) ** 0.25)


WORDS = st.lists(st.sampled_from(["left", "right", "no", "mass"]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_text_figures_lie_between_0_and_1_and_know_the_same_text(one: str, other: str) -> None:
    for figure in (rouge_l, bleu_4):
        assert 0 <= at(figure([one], [other]), 1) <= 1 + 1e-12
    words, others = one.split(), other.split()
    common = max(
        size
        for size in range(len(words) + 1)
        for chosen in combinations(words, size)
        if any(chosen == found for found in combinations(others, size))
    )
    expected = 2 * common / (len(words) + len(others)) if common else 0
    assert at(rouge_l([one], [other]), 1) == pytest.approx(expected)
    if len(words) >= 4:
        assert at(bleu_4([one], [one]), 1) == pytest.approx(1)


# Detection


def test_average_precision_by_hand() -> None:
    # Ranked: hit, miss, hit, with 3 boxes. Recall up to 1/3 at precision 1 (34 of the 101 recalls 0, .01 .. .33),
    # up to 2/3 at precision 2/3 (the 33 recalls .34 .. .66), none beyond.
    labels = [
        [BoxLabel("crack", (0, 0, 10, 10)), BoxLabel("crack", (20, 20, 30, 30)), BoxLabel("crack", (50, 50, 60, 60))]
    ]
    answers = [
        [
            found("crack", (0, 0, 10, 10), 0.9),
            found("crack", (70, 70, 80, 80), 0.8),
            found("crack", (20, 20, 30, 30), 0.7),
        ]
    ]
    matches = detection.match(labels, answers)
    assert detection.average_precision(matches["crack"], 0.5)(ones(1)) == pytest.approx((34 + 33 * 2 / 3) / 101)
    # All three counted: 2 hits, 3 found, 3 labelled; the best threshold keeps all three as well (1 hit alone: 2/4).
    assert detection.detection_f1(matches, 0.5)(ones(1)) == pytest.approx(4 / 6)
    assert detection.best_f1(matches, 0.5)(ones(1)) == pytest.approx(4 / 6)


def test_overlap_decides_and_a_box_is_matched_once() -> None:
    labels = [[BoxLabel("crack", (0, 0, 10, 10))]]
    loose = detection.match(labels, [[found("crack", (0, 0, 10, 4), 0.9)]])  # IoU 0.4
    assert detection.average_precision(loose["crack"], 0.33)(ones(1)) == 1
    assert detection.average_precision(loose["crack"], 0.5)(ones(1)) == 0
    twice = detection.match(labels, [[found("crack", (0, 0, 10, 10), 0.9), found("crack", (0, 0, 10, 10), 0.8)]])
    assert detection.detection_f1(twice, 0.5)(ones(1)) == pytest.approx(2 / 3)
    assert detection.best_f1(twice, 0.5)(ones(1)) == 1


def test_equally_confident_detections_share_a_threshold() -> None:
    answers = [[found("crack", (0, 0, 10, 10), 0.5), found("crack", (40, 40, 50, 50), 0.5)]]
    matches = detection.match([[BoxLabel("crack", (0, 0, 10, 10))]], answers)
    assert detection.best_f1(matches, 0.5)(ones(1)) == pytest.approx(2 / 3)


def test_types_without_a_label_lower_f1_but_have_no_average_precision() -> None:
    labels = [[BoxLabel("crack", (0, 0, 10, 10))]]
    matches = detection.match(labels, [[found("crack", (0, 0, 10, 10), 0.9), found("fray", (0, 0, 10, 10), 0.8)]])
    assert detection.mean_average_precision(matches, [0.5])(ones(1)) == 1
    assert detection.detection_f1(matches, 0.5)(ones(1)) == pytest.approx(2 / 3)


def test_nothing_found_and_nothing_labelled() -> None:
    assert detection.match([[], []], [[], []]) == {}
    missed = detection.match([[BoxLabel("crack", (0, 0, 10, 10))]], [[]])
    assert detection.mean_average_precision(missed, [0.5])(ones(1)) == 0
    assert detection.detection_f1(missed, 0.5)(ones(1)) == detection.best_f1(missed, 0.5)(ones(1)) == 0
    false_alarm = detection.match([[]], [[found("crack", (0, 0, 10, 10), 0.9)]])
    assert np.isnan(detection.mean_average_precision(false_alarm, [0.5])(ones(1)))


def random_case(random: np.random.Generator) -> tuple[list[BoxLabel], list[PredictedFinding]]:
    """Labels, and detections that are shifted copies of them or noise; coarse confidences make ties."""

    def anywhere() -> tuple[float, float, float, float]:
        x, y, w, h = random.integers(1, 40, 4)
        return float(x), float(y), float(x + w), float(y + h)

    labels = [BoxLabel(str(random.choice(TYPES)), anywhere()) for _ in range(random.integers(0, 6))]
    answers = []
    for label in labels:
        for _ in range(random.integers(0, 3)):
            x0, y0, x1, y1 = np.array(label.bbox) + random.integers(-3, 4, 4) / 2
            bbox = (float(x0), float(y0), float(max(x1, x0 + 1)), float(max(y1, y0 + 1)))
            answers.append(found(label.type, bbox, round(random.random(), 1)))
    answers += [found(str(random.choice(TYPES)), anywhere(), round(random.random(), 1)) for _ in range(3)]
    return labels, answers


def coco_precision(labels: list[list[BoxLabel]], answers: list[list[PredictedFinding]]) -> np.ndarray:
    """pycocotools' own mean AP per overlap threshold, [T]."""
    types = sorted({i.type for items in labels for i in items} | {i.type for items in answers for i in items})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(detection._coco(labels, types), detection._coco(answers, types), "bbox")
        evaluation.params.iouThrs = np.array(detection.IOUS)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [T, R, K]
    present = (precision > -1).all(axis=(0, 1))
    return precision[:, :, present].mean(axis=(1, 2))


@pytest.mark.parametrize("seed", range(25))
def test_mean_average_precision_is_that_of_pycocotools(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, answers = map(list, zip(*(random_case(random) for _ in range(random.integers(2, 15))), strict=True))
    matches = detection.match(labels, answers)
    expected = coco_precision(labels, answers)
    for row, iou in enumerate(detection.IOUS):
        assert detection.mean_average_precision(matches, [iou])(ones(len(labels))) == pytest.approx(expected[row])
    assert detection.mean_average_precision(matches, detection.COCO_IOUS)(ones(len(labels))) == pytest.approx(
        expected[1:].mean()
    )


@pytest.mark.parametrize("seed", range(10))
def test_weighting_images_is_repeating_them(seed: int) -> None:
    """Confidences differ here: among equal ones the order is arbitrary, and repeating images would change it."""
    random = np.random.default_rng(seed)
    labels, answers = map(list, zip(*(random_case(random) for _ in range(8)), strict=True))
    answers = [[found(a.type, a.bbox, float(random.random())) for a in of_image] for of_image in answers]
    weights = random.integers(0, 4, 8)
    repeated = np.repeat(np.arange(8), weights)
    matches = detection.match(labels, answers)
    again = detection.match([labels[i] for i in repeated], [answers[i] for i in repeated])
    for statistic in (detection.detection_f1, detection.best_f1):
        assert at(statistic(matches, 0.5), *weights) == pytest.approx(at(statistic(again, 0.5), *[1] * len(repeated)))
    mean = detection.mean_average_precision
    expected = at(mean(again, [0.33, 0.5]), *[1] * len(repeated))
    assert at(mean(matches, [0.33, 0.5]), *weights) == pytest.approx(expected)


def test_many_weightings_at_once_are_each_of_them() -> None:
    random = np.random.default_rng(3)
    labels, answers = map(list, zip(*(random_case(random) for _ in range(8)), strict=True))
    weights = random.integers(0, 3, (20, 8)).astype(float)
    matches = detection.match(labels, answers)
    truth, score = random.random(8) < 0.5, np.round(random.random(8), 1)
    for statistic in (
        detection.mean_average_precision(matches, detection.IOUS),
        detection.best_f1(matches, 0.5),
        detection.detection_f1(matches, 0.5),
        auroc(truth, score),
        macro_f1(["a", "b"] * 4, ["a"] * 8),
        calibration_error(score, truth, np.arange(8)),
        bleu_4(["a b c d e"] * 8, ["a b c d f"] * 8),
    ):
        assert statistic(weights) == pytest.approx(np.array([at(statistic, *row) for row in weights]), nan_ok=True)


def test_raw_confidences_stay_with_their_detections() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    answers = [
        [PredictedFinding("crack", box, 0.2, True, 0.7), PredictedFinding("fray", box, 0.9, True, 0.8)],
        [PredictedFinding("crack", box, 0.6, True, 0.9), PredictedFinding("crack", box, 0.1, True)],
    ]
    matches = detection.match([[], []], answers)
    assert matches["crack"].raw.tolist() == pytest.approx([0.9, 0.7, np.nan], nan_ok=True)
    assert matches["fray"].raw.tolist() == [0.8]


# Intervals


def test_resamples_keep_groups_together() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    samples = resample_groups(groups, 50, seed=1)
    assert samples.shape == (50, 6)
    for weights in samples:
        assert weights[0] == weights[2] == weights[5]
        assert weights[1] == weights[4]
        assert weights[0] + weights[1] + weights[3] == 3  # as many groups as there are
    assert (samples == resample_groups(groups, 50, seed=1)).all()
    assert (samples != resample_groups(groups, 50, seed=2)).any()


def test_an_interval_over_groups_is_wider_than_one_over_images() -> None:
    """Twenty copies of each of ten images hold no more information than the ten."""
    correct = np.repeat(np.arange(10) % 2 == 0, 20)
    statistic = accuracy(correct)
    grouped = interval_95(statistic, resample_groups(np.repeat(np.arange(10), 20).tolist(), 300, 0))
    alone = interval_95(statistic, resample_groups(list(range(200)), 300, 0))
    assert grouped is not None
    assert alone is not None
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


def test_an_interval_of_something_mostly_undefined_is_none() -> None:
    def first(weights: np.ndarray) -> np.ndarray:
        return weights[:, 0]

    nan = float("nan")
    assert interval_95(first, np.array([[1.0], [nan], [nan]])) is None
    assert interval_95(first, np.empty((0, 1))) is None
    assert interval_95(first, np.array([[0.0], [1.0], [nan]])) == pytest.approx((0.025, 0.975))
