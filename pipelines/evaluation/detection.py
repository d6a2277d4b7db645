"""Detections against labelled boxes: matching by pycocotools, then AP and F1 for any weighting of the images.

Matching within an image does not depend on which other images are in the sample, so it is done once; a bootstrap
resample only weights the matched detections. With weights of one, AP is what pycocotools' `accumulate` gives.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.evaluation.predictions import PredictedFinding
from pipelines.evaluation.statistics import Floats, Statistic, mean_of, ratio
from pipelines.manifest import BoxLabel

COCO_IOUS: Final = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
IOUS: Final = (0.33, *COCO_IOUS)
MAX_DETECTIONS: Final = 100  # per image and type, COCO's own limit
RECALLS: Final = np.linspace(0.0, 1.0, 101)  # COCO's 101-point interpolation


@dataclass(frozen=True, slots=True)
class Matches:
    """The D detections of one type over all N images, by falling confidence, at each of the T thresholds in `IOUS`."""

    image: NDArray[np.int64]  # [D] index of the detection's image
    confidence: Floats  # [D]
    raw: Floats  # [D] before calibration; NaN where the model does not give it
    hit: NDArray[np.bool_]  # [T, D] the detection has a labelled box to itself
    labels: Floats  # [N] labelled boxes of this type in each image


def match(labels: Sequence[Sequence[BoxLabel]], found: Sequence[Sequence[PredictedFinding]]) -> dict[str, Matches]:
    """COCO's greedy matching, within a type and best confidence first, of image n's `found[n]` with its `labels[n]`."""
    types = sorted({i.type for of_image in labels for i in of_image} | {i.type for of_image in found for i in of_image})
    if not types:
        return {}
    raw = [item.raw_confidence for of_image in found for item in of_image]
    raw_A = np.array([np.nan if score is None else score for score in raw], dtype=np.float64)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_coco(labels, types), _coco(found, types), iouType="bbox")
        evaluation.params.iouThrs = np.array(IOUS)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    return {
        name: _matches(evaluation.evalImgs[index * len(labels) : (index + 1) * len(labels)], raw_A)
        for index, name in enumerate(types)
    }


def precision_at_recalls(matches: Matches, iou: float) -> Callable[[Floats], Floats]:
    """Interpolated precision `[R, 101]` of one type at COCO's 101 recalls, for weights `[R, N]` of the images."""
    hit_D = matches.hit[IOUS.index(iou)]

    def precision(weights: Floats) -> Floats:
        labelled_R = weights @ matches.labels
        weights_RD = weights[:, matches.image]
        true_RD, found_RD = np.cumsum(weights_RD * hit_D, axis=1), np.cumsum(weights_RD, axis=1)
        precision_RD = true_RD / np.maximum(found_RD, 1)
        envelope_RD = np.maximum.accumulate(precision_RD[:, ::-1], axis=1)[:, ::-1]
        envelope_RD = np.pad(envelope_RD, ((0, 0), (0, 1)))  # no precision beyond the last recall
        recall_RD = ratio(true_RD, np.broadcast_to(labelled_R[:, None], true_RD.shape))
        first_RC = np.array([np.searchsorted(recall, RECALLS) for recall in recall_RD]).reshape(-1, len(RECALLS))
        return np.take_along_axis(envelope_RD, first_RC, axis=1)

    return precision


def average_precision(matches: Matches, iou: float) -> Statistic:
    """AP of one type: mean interpolated precision at 101 recalls (COCO). NaN where no box is labelled."""
    precision = precision_at_recalls(matches, iou)
    return lambda weights: np.where(weights @ matches.labels > 0, precision(weights).mean(1), np.nan)


def mean_average_precision(matches: dict[str, Matches], ious: Sequence[float]) -> Statistic:
    """Mean over thresholds of the mean AP over the types that have labelled boxes."""
    return mean_of([mean_of([average_precision(each, iou) for each in matches.values()]) for iou in ious])


def detection_f1(matches: dict[str, Matches], iou: float) -> Statistic:
    """F1 over all types pooled, every detection counted."""
    curve = _f1_curve(matches, iou)
    return lambda weights: curve(weights)[:, -1]


def best_f1(matches: dict[str, Matches], iou: float) -> Statistic:
    """F1 over all types pooled at the confidence threshold that makes it highest on these very cases."""
    curve = _f1_curve(matches, iou)
    return lambda weights: curve(weights).max(1)


def _f1_curve(matches: dict[str, Matches], iou: float) -> Callable[[Floats], Floats]:
    """F1 `[R, thresholds]` when no detection counts, then with the threshold at each distinct confidence, falling."""
    row, each = IOUS.index(iou), matches.values()
    confidence_D = np.concatenate([np.empty(0), *(m.confidence for m in each)])
    order = np.argsort(-confidence_D, kind="stable")
    image_D = np.concatenate([np.empty(0, np.int64), *(m.image for m in each)])[order]
    hit_D = np.concatenate([np.empty(0, np.bool_), *(m.hit[row] for m in each)])[order]
    labels_N = np.sum([m.labels for m in each], axis=0)
    last_of_equal = np.flatnonzero(np.diff(confidence_D[order], append=-np.inf))

    def curve(weights: Floats) -> Floats:
        weights_RD = weights[:, image_D]
        true = np.pad(np.cumsum(weights_RD * hit_D, axis=1)[:, last_of_equal], ((0, 0), (1, 0)))
        found = np.pad(np.cumsum(weights_RD, axis=1)[:, last_of_equal], ((0, 0), (1, 0)))
        return ratio(2 * true, found + (weights @ labels_N)[:, None])  # undefined: nothing labelled, nothing found

    return curve


def _coco(items: Sequence[Sequence[BoxLabel | PredictedFinding]], types: Sequence[str]) -> COCO:
    annotations: list[dict[str, Any]] = []
    for image, of_image in enumerate(items):
        for item in of_image:
            x0, y0, x1, y1 = item.bbox
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes 0 for "no match"
                    "image_id": image,
                    "category_id": types.index(item.type),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "score": getattr(item, "confidence", 1.0),
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(items))],
        "categories": [{"id": index, "name": name} for index, name in enumerate(types)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _matches(images: Sequence[dict[str, Any] | None], raw_A: Floats) -> Matches:
    """One type's `evalImgs` (None: the image has neither labels nor detections of it), sorted as COCO sorts them."""
    present = [(index, image) for index, image in enumerate(images) if image is not None]
    labels = np.zeros(len(images))
    for index, image in present:
        labels[index] = len(image["gtIds"])
    confidence = np.concatenate([np.asarray(image["dtScores"], float) for _, image in present] or [np.empty(0)])
    raw = np.concatenate([raw_A[np.asarray(image["dtIds"], int) - 1] for _, image in present] or [np.empty(0)])
    order = np.argsort(-confidence, kind="mergesort")
    index_D = np.repeat([index for index, _ in present], [len(image["dtScores"]) for _, image in present])
    hits = [np.asarray(image["dtMatches"]) > 0 for _, image in present] or [np.empty((len(IOUS), 0), bool)]
    hit_TD = np.concatenate(hits, axis=1)
    return Matches(index_D.astype(np.int64)[order], confidence[order], raw[order], hit_TD[:, order], labels)
