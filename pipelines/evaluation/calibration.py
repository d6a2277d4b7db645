"""Are confidences honest? Statements "this is so, with confidence p" against what is so: ECE and reliability."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.figures import Figure
from pipelines.evaluation.statistics import ECE_BINS, Floats, calibration_error, equal_widths


@dataclass(frozen=True, slots=True)
class Statement:
    """One thing that an answer says."""

    case: int  # index of the case that it is about
    confidence: float
    correct: bool
    raw: float = np.nan  # the confidence before calibration; NaN where the model does not give it


@dataclass(frozen=True, slots=True)
class Statements:
    """All K statements of one sort."""

    name: str
    case: NDArray[np.int64]  # [K]
    confidence: Floats  # [K]
    correct: NDArray[np.bool_]  # [K]
    raw: Floats | None  # [K]; None unless the model gives it for all

    @classmethod
    def of(cls, name: str, statements: Iterable[Statement]) -> Statements:
        rows = list(statements)
        raw = np.array([row.raw for row in rows], dtype=np.float64)
        return cls(
            name,
            np.array([row.case for row in rows], dtype=np.int64),
            np.array([row.confidence for row in rows], dtype=np.float64),
            np.array([row.correct for row in rows], dtype=np.bool_),
            None if np.isnan(raw).any() else raw,
        )

    def figures(self) -> Iterator[Figure]:
        """ECE over bins of equal width and of equally many statements, and as it was before calibration."""
        n = len(np.unique(self.case))
        yield Figure(f"ece_{self.name}", calibration_error(self.confidence, self.correct, self.case), n)
        adaptive = calibration_error(self.confidence, self.correct, self.case, adaptive=True)
        yield Figure(f"ece_{self.name}_adaptive", adaptive, n)
        if self.raw is not None:
            yield Figure(f"ece_{self.name}_uncalibrated", calibration_error(self.raw, self.correct, self.case), n)

    def reliability(self) -> dict[str, Any]:
        """For each bin that is not empty: mean confidence, share that is right, and how many statements."""
        raw = None if self.raw is None else _bins(self.raw, self.correct)
        return {"bins": _bins(self.confidence, self.correct), "uncalibrated": raw}


def _bins(confidence: Floats, correct: NDArray[np.bool_]) -> list[dict[str, float | int]]:
    bin_K = equal_widths(confidence)
    return [
        {
            "confidence": round(float(confidence[bin_K == b].mean()), 4),
            "correct": round(float(correct[bin_K == b].mean()), 4),
            "n": int((bin_K == b).sum()),
        }
        for b in range(ECE_BINS)
        if (bin_K == b).any()
    ]
