"""Does the model know what it does not know? Images of other kinds than it was trained on, against those it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.figures import Figure
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.scoring import group_samples, measured
from pipelines.evaluation.statistics import accuracy, auroc, on_cases
from pipelines.manifest import Case
from pipelines.reading import OUT_OF_DOMAIN


def outside_figures(
    cases: Sequence[Case], answers: Sequence[Prediction], outside: Sequence[Prediction]
) -> dict[str, Any] | None:
    """How well `Prediction.in_domain` tells the `outside` images from `cases`, and what the shipped threshold does.

    `{n, refused, auroc, false_alarms, caught}`: false alarms are cases that are flagged, caught are outside images that
    are. Images that could not be read have no say. None where the model does not judge.
    """
    judged = {answer.id: answer for answer in answers if answer.in_domain is not None}
    inside = [case for case in cases if case.id in judged]
    strange = [answer for answer in outside if answer.in_domain is not None]
    if not inside or not strange:
        return None
    both = [*(judged[case.id] for case in inside), *strange]
    is_inside = np.arange(len(both)) < len(inside)
    likely_inside = np.array([answer.in_domain for answer in both], dtype=np.float64)
    flagged = np.array([OUT_OF_DOMAIN in answer.flags for answer in both])
    # Weights draw both sides: groups of the cases, and each outside image for itself.
    samples = group_samples([*(f"in {case.group}" for case in inside), *(f"out {a.id}" for a in strange)])
    figures = {
        "auroc": auroc(is_inside, likely_inside),
        "false_alarms": on_cases(accuracy(flagged[is_inside]), np.flatnonzero(is_inside).tolist()),
        "caught": on_cases(accuracy(flagged[~is_inside]), np.flatnonzero(~is_inside).tolist()),
    }
    return {
        "n": len(strange),
        "refused": sum(answer.error is not None for answer in outside),
        **{
            name: measured(Figure(name, statistic, len(both)), len(both), samples)
            for name, statistic in figures.items()
        },
    }
