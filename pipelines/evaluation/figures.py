"""What a figure is before it is computed, and the questions that every kind of figure asks of a case and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pipelines.evaluation.predictions import PredictedFinding, Prediction
from pipelines.evaluation.statistics import Statistic, on_cases
from pipelines.manifest import Case
from reports.taxonomy import UNDETERMINED

DEFECT_FREE: Final = "defect-free"


@dataclass(frozen=True, slots=True)
class Pair:
    """A labelled case with the answer for it; `index` is its place among all cases scored."""

    index: int
    case: Case
    answer: Prediction


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure before it is computed."""

    name: str
    statistic: Statistic
    n: int  # cases counted


def over(name: str, pairs: Sequence[Pair], statistic: Statistic) -> Figure:
    """A figure over some of the cases, whose statistic counts those alone."""
    return Figure(name, on_cases(statistic, [pair.index for pair in pairs]), len(pairs))


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


def reported(answer: Prediction) -> tuple[PredictedFinding, ...]:
    """The findings that stand in the report."""
    return tuple(finding for finding in answer.findings if finding.reported)


def top_type(findings: Sequence[PredictedFinding]) -> str:
    """The type of the surest finding."""
    return max(findings, key=lambda finding: finding.confidence).type if findings else DEFECT_FREE


def confidence_of(answer: Prediction, name: str) -> float:
    """How sure the answer is of the finding type `name`: its surest finding, 0 where there is none."""
    return max((finding.confidence for finding in answer.findings if finding.type == name), default=0.0)


def field_value(answer: Prediction, name: str) -> str:
    """The answer's value of a CT field."""
    return answer.fields[name].value if name in answer.fields else UNDETERMINED


def equal(answers: Sequence[str], truth: Sequence[str]) -> list[bool]:
    """Where answers are right."""
    return [answer == wanted for answer, wanted in zip(answers, truth, strict=True)]
