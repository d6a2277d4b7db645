"""The figures themselves: statistics that can be computed for many weightings of the cases at once, and intervals.

A `Statistic` prepares its arrays once and is then called with weights `[R, N]`, a row for each of R weightings of the N
cases: a row of ones gives the figure, the draw counts of a bootstrap resample give the figure on that resample. It
returns `[R]`; NaN means undefined there (AUROC with one class).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

ECE_BINS = 15
BLOCK = 64  # resamples that are computed together: what bounds the memory of large data sets


def mean(amounts: ArrayLike) -> Statistic:
    """The mean of an amount of each case. `amounts`: float [N]."""
    amount = np.asarray(amounts, dtype=np.float64)
    return lambda weights: ratio(weights @ amount, weights.sum(1))


def accuracy(correct: ArrayLike) -> Statistic:
    """Share of cases that are correct. `correct`: bool [N]."""
    return mean(correct)


def auroc(truth: ArrayLike, score: ArrayLike) -> Statistic:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    `truth`: bool [N], `score`: float [N].
    """
    positive, value = np.asarray(truth, dtype=np.float64), np.asarray(score, dtype=np.float64)
    order = np.argsort(value, kind="stable")
    starts = np.flatnonzero(np.diff(value[order], prepend=-np.inf))  # of each run of equal scores

    def statistic(weights: Floats) -> Floats:
        if not len(starts):
            return np.full(len(weights), np.nan)
        sorted_RN = weights[:, order]
        wanted = np.add.reduceat(sorted_RN * positive[order], starts, axis=1)
        rest = np.add.reduceat(sorted_RN * (1 - positive[order]), starts, axis=1)
        wins = (wanted * (np.cumsum(rest, axis=1) - rest / 2)).sum(1)
        return ratio(wins, wanted.sum(1) * rest.sum(1))

    return statistic


def f1(truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """F1 of one class. `truth`, `predicted`: bool [N]."""
    wanted, found = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    hit, sizes = (wanted & found).astype(np.float64), wanted.astype(np.float64) + found
    return lambda weights: ratio(2 * (weights @ hit), weights @ sizes)


def macro_f1(truth: Sequence[str], predicted: Sequence[str]) -> Statistic:
    """Mean F1 over the classes that occur in the (resampled) truth."""
    classes = sorted(set(truth))
    wanted = {name: np.array([value == name for value in truth]) for name in classes}

    def of_class(name: str) -> Statistic:
        one = f1(wanted[name], [value == name for value in predicted])
        return lambda weights: np.where(weights[:, wanted[name]].any(1), one(weights), np.nan)

    return mean_of([of_class(name) for name in classes])


def calibration_error(
    confidence: ArrayLike, correct: ArrayLike, case: ArrayLike, *, adaptive: bool = False
) -> Statistic:
    """Expected calibration error over 15 bins: of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3), or with
    `adaptive` of equally many statements (Nguyen and O'Connor 2015, arXiv 1508.05154), which few statements near one
    end cannot empty.

    `confidence`: float [K] in 0..1, `correct`: bool [K], `case`: int [K], the case that each statement is about.
    """
    value, about = np.asarray(confidence, dtype=np.float64), np.asarray(case, dtype=np.int64)
    gap = value - np.asarray(correct, dtype=np.float64)
    bin_K = _equal_counts(value) if adaptive else equal_widths(value)

    def statistic(weights: Floats) -> Floats:
        # Statements of one case in one bin always come together: they are summed once, not for every resample.
        gap_NB = np.zeros((weights.shape[1], ECE_BINS))
        np.add.at(gap_NB, (about, bin_K), gap)
        statements_N = np.bincount(about, minlength=weights.shape[1]).astype(np.float64)
        return ratio(np.abs(weights @ gap_NB).sum(1), weights @ statements_N)

    return statistic


def equal_widths(confidence: Floats) -> NDArray[np.int64]:
    """The bin, of 15 with equal width, of each confidence."""
    return np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def _equal_counts(confidence: Floats) -> NDArray[np.int64]:
    edges = np.quantile(confidence, np.linspace(0, 1, ECE_BINS + 1)[1:-1]) if len(confidence) else np.empty(0)
    return np.searchsorted(edges, confidence, side="right").astype(np.int64)


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of those that are defined."""

    def statistic(weights: Floats) -> Floats:
        values_SR = np.array([each(weights) for each in statistics]).reshape(-1, len(weights))
        defined_SR = ~np.isnan(values_SR)
        return ratio(np.where(defined_SR, values_SR, 0).sum(0), defined_SR.sum(0))

    return statistic


def difference(one: Statistic, other: Statistic) -> Statistic:
    """How much higher `one` is, on the same resamples."""
    return lambda weights: one(weights) - other(weights)


def on_cases(statistic: Statistic, cases: Sequence[int]) -> Statistic:
    """`statistic`, which counts only the given cases, as one of the weights of all cases."""
    index = np.asarray(cases, dtype=np.int64)
    return lambda weights: statistic(weights[:, index])


def majority(values: Sequence[str]) -> str:
    """The most frequent value; of equally frequent ones the first in the alphabet."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def resample_groups(groups: Sequence[Hashable], resamples: int, seed: int) -> Floats:
    """Weights `[resamples, N]` of bootstrap resamples that draw whole groups, so that related cases stay together."""
    index_of = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    member = np.array([index_of[group] for group in groups], dtype=np.int64)
    draws = np.random.default_rng(seed).multinomial(len(index_of), np.full(len(index_of), 1 / len(index_of)), resamples)
    return draws[:, member].astype(np.float64)


def interval_95(statistic: Statistic, samples: Floats) -> tuple[float, float] | None:
    """Percentile interval over `samples` `[R, N]`; None when the statistic is undefined on more than half of them."""
    blocks = [statistic(samples[start : start + BLOCK]) for start in range(0, len(samples), BLOCK)]
    values = np.concatenate([np.empty(0), *blocks])
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < max(len(values), 1):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def value_of(statistic: Statistic, cases: int) -> float:
    """The figure itself: every one of the `cases` counts once."""
    return float(statistic(np.ones((1, cases)))[0])


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)
