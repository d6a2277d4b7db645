"""A narrative against the text that a person wrote for the same image: BLEU-4 and ROUGE-L, over lower-case words.

Both measure shared wording, not truth: a right sentence in other words scores low, and so does a report that rightly
says less than a caption which knows the patient's history. Read them beside the baselines, never alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from pipelines.evaluation.statistics import Floats, Statistic, mean, ratio

_ORDERS: Final = (1, 2, 3, 4)


def bleu_4(texts: Sequence[str], references: Sequence[str]) -> Statistic:
    """BLEU of the corpus (Papineni et al. 2002): geometric mean of the clipped precisions of runs of 1 to 4 words,
    times a penalty for being shorter than the references; no smoothing. 0 where no run of 4 words is shared.
    """
    pairs = [(_words(text), _words(reference)) for text, reference in zip(texts, references, strict=True)]
    shared_N4, said_N4 = np.zeros((len(pairs), 4)), np.zeros((len(pairs), 4))
    for row, (said, wanted) in enumerate(pairs):
        for column, order in enumerate(_ORDERS):
            mine, theirs = _runs(said, order), _runs(wanted, order)
            shared_N4[row, column], said_N4[row, column] = (mine & theirs).total(), mine.total()
    length_N = np.array([len(said) for said, _ in pairs], dtype=np.float64)
    wanted_N = np.array([len(wanted) for _, wanted in pairs], dtype=np.float64)

    def statistic(weights: Floats) -> Floats:
        precision_R4 = np.nan_to_num(ratio(weights @ shared_N4, weights @ said_N4))
        with np.errstate(divide="ignore"):
            geometric = np.exp(np.log(precision_R4).mean(1))
            penalty = np.exp(
                np.minimum(0.0, 1 - np.nan_to_num(ratio(weights @ wanted_N, weights @ length_N), nan=np.inf))
            )
        return np.where(weights.any(1), geometric * penalty, np.nan)

    return statistic


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> Statistic:
    """ROUGE-L (Lin 2004): mean over the cases of the F1 of the longest common subsequence of words."""
    scores = []
    for text, reference in zip(texts, references, strict=True):
        said, wanted = _words(text), _words(reference)
        scores.append(2 * _common(said, wanted) / (len(said) + len(wanted)) if said and wanted else 0.0)
    return mean(scores)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for word in one:
        before = 0  # best[j] of the row above
        for j, candidate in enumerate(other):
            above = best[j + 1]
            best[j + 1] = before + 1 if word == candidate else max(above, best[j])
            before = above
    return best[-1]
