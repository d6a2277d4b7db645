"""The figures themselves: statistics that can be computed for any weighting of the cases, and their intervals.

A `Statistic` prepares its arrays once and is then called with a weight for every case: ones give the figure, the draw
counts of a bootstrap resample give the figure on that resample. NaN means undefined there (AUROC with one class).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]

ECE_BINS = 15


def accuracy(correct: ArrayLike) -> Statistic:
    """Share of cases that are correct. `correct`: bool [N]."""
    right = np.asarray(correct, dtype=np.float64)
    return lambda weights: _ratio(weights @ right, weights.sum())


def auroc(truth: ArrayLike, score: ArrayLike) -> Statistic:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    `truth`: bool [N], `score`: float [N]. All pairs are compared once, which is what makes resampling cheap.
    """
    positive, value = np.asarray(truth, dtype=bool), np.asarray(score, dtype=np.float64)
    high, low = value[positive][:, None], value[~positive][None, :]
    wins_PN = (high > low) + 0.5 * (high == low)

    def statistic(weights: Floats) -> float:
        wanted, rest = weights[positive], weights[~positive]
        return _ratio(wanted @ wins_PN @ rest, wanted.sum() * rest.sum())

    return statistic


def f1(truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """F1 of one class. `truth`, `predicted`: bool [N]."""
    wanted, found = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    hit, sizes = (wanted & found).astype(np.float64), wanted.astype(np.float64) + found
    return lambda weights: _ratio(2 * (weights @ hit), weights @ sizes)


def macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> Statistic:
    """Mean F1 over the classes that occur in the (resampled) truth."""
    classes = sorted(set(truth))
    wanted = {name: np.array([value == name for value in truth]) for name in classes}
    per_class = {name: f1(wanted[name], [value == name for value in predicted]) for name in classes}

    def statistic(weights: Floats) -> float:
        scores = [per_class[name](weights) for name in classes if weights[wanted[name]].any()]
        return float(np.mean(scores)) if scores else float("nan")

    return statistic


def calibration_error(confidence: ArrayLike, correct: ArrayLike, case: NDArray[np.int64]) -> Statistic:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    `confidence`: float [K] in 0..1, `correct`: bool [K], `case`: int [K], the case that each statement is about.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    gap = confidence - np.asarray(correct, dtype=np.float64)
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)

    def statistic(weights: Floats) -> float:
        weights = weights[case]
        return _ratio(np.abs(np.bincount(bins, weights * gap, ECE_BINS)).sum(), weights.sum())

    return statistic


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of those that are defined."""

    def statistic(weights: Floats) -> float:
        values = np.array([each(weights) for each in statistics])
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")

    return statistic


def on_cases(statistic: Statistic, cases: Sequence[int]) -> Statistic:
    """`statistic`, which counts only the given cases, as one of the weights of all cases."""
    index = np.asarray(cases, dtype=np.int64)
    return lambda weights: statistic(weights[index])


def majority(values: Sequence[str]) -> str:
    """The most frequent value; of equally frequent ones the first in the alphabet."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def resample_groups(groups: Sequence[Hashable], resamples: int, seed: int) -> Iterator[Floats]:
    """Weights [N] of bootstrap resamples that draw whole groups, so that related cases stay together."""
    index_of = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    member = np.array([index_of[group] for group in groups], dtype=np.int64)
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        draws = np.bincount(random.integers(len(index_of), size=len(index_of)), minlength=len(index_of))
        yield draws[member].astype(np.float64)


def interval_95(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile interval; None when the statistic is undefined on more than half of the resamples."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    if 2 * len(defined) < max(len(values), 1):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole > 0 else float("nan")
