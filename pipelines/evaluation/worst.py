"""The cases in which confidence was most misplaced: what was missed, what is not there, which field is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from pipelines.evaluation.defects import MATCH_IOU
from pipelines.evaluation.figures import Pair, confidence_of, reported
from pipelines.evaluation.predictions import PredictedFinding
from pipelines.manifest import BoxLabel
from reports.taxonomy import CT_TYPES, UNDETERMINED, title


@dataclass(frozen=True, slots=True)
class Loss:
    """What one answer lost: the confidence that it did not have in what is so, and had in what is not."""

    pair: Pair
    amount: float
    reasons: tuple[str, ...]  # the costliest first
    missed: tuple[BoxLabel, ...]  # labelled boxes that no reported finding matches
    wrong: tuple[PredictedFinding, ...]  # reported, not labelled
    right: tuple[PredictedFinding, ...]  # reported and labelled


def worst_cases(pairs: Sequence[Pair], count: int) -> list[Loss]:
    """The `count` cases that lost most, most first; those that lost less than 0.5 are none."""
    losses = sorted((loss_of(pair) for pair in pairs), key=lambda loss: (-loss.amount, loss.pair.index))
    return [loss for loss in losses[:count] if loss.amount >= 0.5]


def loss_of(pair: Pair) -> Loss:
    """Sum over labelled findings of one less the confidence in them, over reported findings that are not labelled of
    their confidence, over labelled fields of one less the probability of the true value.
    """
    parts: list[tuple[float, str]] = []
    missed: list[BoxLabel] = []
    wrong: list[PredictedFinding] = []
    right: list[PredictedFinding] = []
    if pair.answer.error is not None:
        parts.append((1.0, f"no answer ({pair.answer.error.partition(':')[0]})"))
    if pair.case.finding_types is not None:
        said = pair.answer.findings
        match = match_boxes(pair.case.boxes, said)
        for label, found in zip(pair.case.boxes, match, strict=True):
            confidence = 0.0 if found is None else said[found].confidence
            in_report = found is not None and said[found].reported
            if not in_report:
                missed.append(label)
            parts.append((1 - confidence, f"{title(label.type)} {'doubted' if in_report else 'missed'}"))
        boxed = {label.type for label in pair.case.boxes}
        for name in pair.case.finding_types:
            if name not in boxed:
                in_report = any(finding.type == name for finding in reported(pair.answer))
                word = "doubted" if in_report else "missed"
                parts.append((1 - confidence_of(pair.answer, name), f"{title(name)} {word}"))
        for i, finding in enumerate(said):
            if not finding.reported:
                continue
            if i in match or (finding.type in CT_TYPES and finding.type in pair.case.finding_types):
                right.append(finding)
            else:
                wrong.append(finding)
                parts.append((finding.confidence, f"{title(finding.type)} at {finding.confidence:.0%} is not labelled"))
    for name, truth in pair.case.fields.items():
        if name in pair.answer.fields:
            reading = pair.answer.fields[name]
            said_value = reading.value if reading.value != UNDETERMINED else "left open"
            words = f"{name} {said_value}, not {truth}" if reading.value != truth else f"{name} {truth} doubted"
            parts.append((1 - reading.probabilities.get(truth, 0.0), words))
    parts.sort(key=lambda part: -part[0])
    counted = Counter(words for amount, words in parts if amount >= 0.25)
    reasons = tuple(words if times == 1 else f"{times} × {words}" for words, times in counted.items())
    return Loss(pair, sum(amount for amount, _ in parts), reasons, tuple(missed), tuple(wrong), tuple(right))


def match_boxes(labels: Sequence[BoxLabel], found: Sequence[PredictedFinding]) -> list[int | None]:
    """For each label the index of the finding that matches it: the surest first, within a type, at IoU 0.5."""
    matched: list[int | None] = [None] * len(labels)
    if not labels or not found:
        return matched
    overlap_FL = mask.iou(_xywh([f.bbox for f in found]), _xywh([label.bbox for label in labels]), [0] * len(labels))
    for i in sorted(range(len(found)), key=lambda i: -found[i].confidence):
        free = [
            j
            for j, label in enumerate(labels)
            if matched[j] is None and label.type == found[i].type and overlap_FL[i, j] >= MATCH_IOU
        ]
        if free:
            matched[max(free, key=lambda j: overlap_FL[i, j])] = i
    return matched


def _xywh(boxes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    corners = np.array(boxes, dtype=np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
