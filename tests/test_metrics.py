"""The figures: hand-worked examples, agreement with scikit-learn and pycocotools, and intervals over groups."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import f1_score, roc_auc_score

from pipelines.evaluation import detection
from pipelines.evaluation.predictions import PredictedFinding
from pipelines.evaluation.statistics import (
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
from pipelines.manifest import BoxLabel

TYPES = ("crack", "fray", "break")


def ones(n: int) -> np.ndarray:
    return np.ones(n)


def found(type_: str, bbox: tuple[float, float, float, float], confidence: float) -> PredictedFinding:
    return PredictedFinding(type_, bbox, confidence, reported=True)


# Statistics


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): .9>.5, .9>.1, .5=.5 counts half, .5>.1 -> 3.5 of 4.
    assert auroc([True, True, False, False], [0.9, 0.5, 0.5, 0.1])(ones(4)) == 3.5 / 4
    assert np.isnan(auroc([True, True], [0.9, 0.5])(ones(2)))


def test_calibration_error_by_hand() -> None:
    # Bin 13 (.9, .92): mean confidence .91, half right, gap .41, two of four. Bin 3 (.2, .22): gap .21, none right.
    statistic = calibration_error([0.9, 0.92, 0.2, 0.22], [True, False, False, False], np.arange(4))
    assert statistic(ones(4)) == pytest.approx(0.5 * 0.41 + 0.5 * 0.21)
    assert calibration_error([1.0, 0.0], [True, False], np.arange(2))(ones(2)) == 0


def test_f1_by_hand() -> None:
    # One hit, one miss, one false alarm.
    assert f1([True, True, False], [True, False, True])(ones(3)) == 0.5
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"])(ones(3)) == pytest.approx(2 / 3)


def test_a_weight_counts_a_case_that_often() -> None:
    assert accuracy([True, False])(np.array([3.0, 1.0])) == 0.75


def test_mean_leaves_out_what_is_undefined() -> None:
    assert mean_of([lambda _: 1.0, lambda _: float("nan")])(ones(1)) == 1
    assert np.isnan(mean_of([])(ones(1)))


def test_majority_of_a_tie_is_the_first_in_the_alphabet() -> None:
    assert majority(["b", "a", "b", "a", "c"]) == "a"


@pytest.mark.parametrize("seed", range(20))
def test_weighted_statistics_agree_with_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = 60
    truth, score = random.random(n) < 0.4, np.round(random.random(n), 1)
    wanted, answer = random.choice(["a", "b", "c"], n).tolist(), random.choice(["a", "b", "c", "d"], n).tolist()
    weights = random.integers(0, 4, n).astype(float)
    assert auroc(truth, score)(weights) == pytest.approx(roc_auc_score(truth, score, sample_weight=weights))
    assert f1(truth, score > 0.5)(weights) == pytest.approx(f1_score(truth, score > 0.5, sample_weight=weights))
    expected = f1_score(wanted, answer, labels=["a", "b", "c"], average="macro", sample_weight=weights)
    assert macro_f1(wanted, answer)(weights) == pytest.approx(expected)


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
        assert statistic(matches, 0.5)(weights.astype(float)) == pytest.approx(
            statistic(again, 0.5)(ones(len(repeated)))
        )
    mean = detection.mean_average_precision
    assert mean(matches, [0.33, 0.5])(weights.astype(float)) == pytest.approx(
        mean(again, [0.33, 0.5])(ones(len(repeated)))
    )


# Intervals


def test_resamples_keep_groups_together() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    samples = list(resample_groups(groups, 50, seed=1))
    assert len(samples) == 50
    for weights in samples:
        assert weights[0] == weights[2] == weights[5]
        assert weights[1] == weights[4]
        assert weights[0] + weights[1] + weights[3] == 3  # as many groups as there are
    again = list(resample_groups(groups, 50, seed=1))
    assert all((a == b).all() for a, b in zip(samples, again, strict=True))
    assert any((a != b).any() for a, b in zip(samples, resample_groups(groups, 50, seed=2), strict=True))


def test_an_interval_over_groups_is_wider_than_one_over_images() -> None:
    """Twenty copies of each of ten images hold no more information than the ten."""
    correct = np.repeat(np.arange(10) % 2 == 0, 20)
    statistic = accuracy(correct)
    grouped = interval_95([statistic(w) for w in resample_groups(np.repeat(np.arange(10), 20).tolist(), 300, 0)])
    alone = interval_95([statistic(w) for w in resample_groups(list(range(200)), 300, 0)])
    assert grouped is not None
    assert alone is not None
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


def test_an_interval_of_something_mostly_undefined_is_none() -> None:
    nan = float("nan")
    assert interval_95([1.0, nan, nan]) is None
    assert interval_95([]) is None
    assert interval_95([0.0, 1.0, nan]) == (0.025, 0.975)
