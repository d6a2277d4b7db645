"""Figures of inspection photos: boxes, and which defect the image as a whole shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pipelines.evaluation import detection
from pipelines.evaluation.calibration import Statement, Statements
from pipelines.evaluation.figures import DEFECT_FREE, Figure, Pair, equal, image_type, over, reported, top_type
from pipelines.evaluation.predictions import PredictedFinding
from pipelines.evaluation.statistics import accuracy, auroc, difference, macro_f1, mean_of
from pipelines.manifest import Case
from reports.taxonomy import DEFECT_TYPES

MATCH_IOU: Final = 0.5  # a detection that overlaps a label of its type this much is right, for F1 and calibration


def defects(pairs: Sequence[Pair]) -> list[Pair]:
    """The inspection photos whose findings are labelled."""
    return [pair for pair in pairs if pair.case.kind == "defect" and pair.case.finding_types is not None]


def match(pairs: Sequence[Pair]) -> dict[str, detection.Matches]:
    """All findings, reported or not, against the labelled boxes."""
    return _match(pairs, [pair.answer.findings for pair in pairs])


def detection_figures(pairs: Sequence[Pair], matches: dict[str, detection.Matches]) -> Iterator[Figure]:
    """Average precision of all findings, F1 of those in the report."""
    n = len(defects(pairs))
    if not any(each.labels.any() for each in matches.values()):
        return
    yield Figure("map_33", detection.mean_average_precision(matches, [0.33]), n)
    yield Figure("map_50", detection.mean_average_precision(matches, [0.5]), n)
    yield Figure("map_50_95", detection.mean_average_precision(matches, detection.COCO_IOUS), n)
    in_report = detection.detection_f1(_match(pairs, [reported(pair.answer) for pair in pairs]), MATCH_IOU)
    best = detection.best_f1(matches, MATCH_IOU)
    yield Figure("f1_reported", in_report, n)
    yield Figure("f1_best", best, n)
    yield Figure("f1_reported_minus_best", difference(in_report, best), n)


def statements(matches: dict[str, detection.Matches]) -> Statements:
    """Every detection states that a defect of its type is there."""
    row = detection.IOUS.index(MATCH_IOU)
    return Statements.of(
        "detections",
        (
            Statement(int(image), float(confidence), bool(hit), float(raw))
            for each in matches.values()
            for image, confidence, hit, raw in zip(each.image, each.confidence, each.hit[row], each.raw, strict=True)
        ),
    )


def image_type_figures(pairs: Sequence[Pair]) -> Iterator[Figure]:
    """What kind of defect the image as a whole shows, and whether there is any."""
    labelled = defects(pairs)
    if not has_image_types([pair.case for pair in labelled]):
        return
    truth = [image_type(pair.case) for pair in labelled]
    answer = [top_type(reported(pair.answer)) for pair in labelled]
    yield over("image_type_accuracy", labelled, accuracy(equal(answer, truth)))
    yield over("image_type_macro_f1", labelled, macro_f1(truth, answer))

    # Which defect, given that there is one: also candidates below the line answer this.
    defective = [pair for pair in labelled if pair.case.boxes]
    best = [top_type(pair.answer.findings) for pair in defective]
    right = equal(best, [image_type(pair.case) for pair in defective])
    yield over("defect_type_accuracy", defective, accuracy(right))

    present = [bool(pair.case.boxes) for pair in labelled]
    if any(present) and not all(present):
        top = [max((f.confidence for f in pair.answer.findings), default=0.0) for pair in labelled]
        yield over("presence_auroc", labelled, auroc(present, top))


def has_image_types(cases: Sequence[Case]) -> bool:
    """Whether most images show one type at most; where most show several, an image has no type of its own."""
    return 2 * sum(len(case.finding_types or ()) <= 1 for case in cases) >= len(cases)


def image_type_confusion(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """True and reported type of each image; none where images have no type of their own."""
    labelled = defects(pairs)
    if not has_image_types([pair.case for pair in labelled]):
        return []
    return [(image_type(pair.case), top_type(reported(pair.answer))) for pair in labelled]


def image_types(confusion: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The types that occur, in the order of tables: the taxonomy's, an owner's own, none."""
    own = sorted({name for row in confusion for name in row} - {*DEFECT_TYPES, DEFECT_FREE})
    return (*DEFECT_TYPES, *own, DEFECT_FREE)


def per_type(matches: dict[str, detection.Matches]) -> dict[str, dict[str, Any]]:
    """Boxes and statistics of each defect type that is labelled."""
    return {
        name: {
            "boxes": int(matches[name].labels.sum()),
            "ap_33": detection.average_precision(matches[name], 0.33),
            "ap_50": detection.average_precision(matches[name], 0.5),
            "ap_50_95": mean_of([detection.average_precision(matches[name], iou) for iou in detection.COCO_IOUS]),
        }
        for name in (*DEFECT_TYPES, *sorted(set(matches) - set(DEFECT_TYPES)))
        if name in matches and matches[name].labels.any()
    }


def _match(pairs: Sequence[Pair], found: Sequence[Sequence[PredictedFinding]]) -> dict[str, detection.Matches]:
    """`found` (for each pair) against the labelled boxes; images that are not labelled count as empty on both sides."""
    labelled = {pair.index for pair in defects(pairs)}
    return detection.match(
        [pair.case.boxes if pair.index in labelled else () for pair in pairs],
        [findings if pair.index in labelled else () for pair, findings in zip(pairs, found, strict=True)],
    )
