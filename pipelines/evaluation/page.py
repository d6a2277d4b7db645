"""The HTML page of an evaluation: one self-contained file (no script, no network) with tables, diagrams, worst cases.

All text goes through autoescape, and a content security policy forbids scripts anyway. Diagrams are SVG whose lines and
text take their colours from the page, so that they are read by day and by night.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from sklearn.metrics import average_precision_score, precision_recall_curve

from pipelines.evaluation import ct, defects, detection, names
from pipelines.evaluation.figures import Pair, confidence_of
from pipelines.evaluation.pictures import grey, load
from pipelines.evaluation.worst import Loss, worst_cases
from pipelines.study import Rejection
from reports.images import EncodedPicture, Picture, encode_picture
from reports.taxonomy import title

WORST: Final = 12  # cases shown of a data set
PICTURE_SIDE: Final = 480  # pixels of an embedded picture's longer side
PLOT: Final = 220  # side of a diagram's unit square
CURVES: Final = 12  # more in one diagram cannot be told apart


@dataclass(frozen=True, slots=True)
class Section:
    """One data set: its figures, and the cases with their answers."""

    summary: dict[str, Any]
    pairs: list[Pair]


@dataclass(frozen=True, slots=True)
class Curve:
    """Precision over recall of one type."""

    name: str
    average_precision: float
    points: str  # of an SVG polyline in the diagram's square


@dataclass(frozen=True, slots=True)
class Mark:
    """A box on a picture, in the picture's own pixels."""

    sort: str  # "right", "missed" or "wrong"
    words: str
    x: float
    y: float
    width: float
    height: float
    tag_x: float
    tag_y: float  # of the words' base line
    anchor: str  # the words grow towards the middle of the picture


@dataclass(frozen=True, slots=True)
class Shown:
    """A worst case with its picture; none when the image cannot be read."""

    loss: Loss
    picture: EncodedPicture | None
    marks: list[Mark]
    line: float = 0  # height of a mark's words, in the picture's own pixels


def render_page(sections: Sequence[Section], means: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the data sets, and of means over them."""
    return (
        _environment()
        .get_template("evaluation.html.j2")
        .render(
            sections=[
                {
                    "summary": section.summary,
                    "curves": _curves(section.pairs),
                    "worst": [_show(loss) for loss in worst_cases(section.pairs, WORST)],
                }
                for section in sections
            ],
            means=means,
            names=names,
            plot=PLOT,
        )
    )


def _environment() -> Environment:
    loader = ChoiceLoader([PackageLoader("pipelines.evaluation"), PackageLoader("reports")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"words": title, "number": number, "points": _points, "share": _share}
    return environment


def number(value: float | None) -> str:
    """A figure with three digits; a dash where it is undefined."""
    return "–" if value is None else f"{value:.3f}"


def _share(count: int, row: Sequence[int]) -> int:
    """A count as percent of its row."""
    return round(100 * count / max(1, sum(row)))


def _points(bins: Sequence[dict[str, float]]) -> str:
    return " ".join(f"{PLOT * b['confidence']:.1f},{PLOT * (1 - b['correct']):.1f}" for b in bins)


def _curves(pairs: Sequence[Pair]) -> list[Curve]:
    """Of boxes at IoU 0.5, of CT finding types with enough cases, and of COVID-19."""
    ones = np.ones((1, len(pairs)))
    curves = []
    matches = defects.match(pairs)
    for name in defects.per_type(matches):
        precision = detection.precision_at_recalls(matches[name], defects.MATCH_IOU)(ones)[0]
        ap = float(detection.average_precision(matches[name], defects.MATCH_IOU)(ones)[0])
        curves.append(_curve(name, ap, detection.RECALLS, precision))
    for name in ct.per_type(pairs):
        labelled = [pair for pair in pairs if pair.case.kind == "ct" and pair.case.finding_types is not None]
        truth = [name in (pair.case.finding_types or ()) for pair in labelled]
        curves.append(_ranked_curve(name, truth, [confidence_of(pair.answer, name) for pair in labelled]))
    told = [pair for pair in pairs if "covid19" in pair.case.fields]
    truth = [pair.case.fields["covid19"] == "true" for pair in told]
    if any(truth):
        score = [ct.probability(pair.answer, "covid19", "true") for pair in told]
        curves.append(_ranked_curve("COVID-19", truth, score))
    return sorted(curves, key=lambda curve: -curve.average_precision)[:CURVES]


def _ranked_curve(name: str, truth: Sequence[bool], score: Sequence[float]) -> Curve:
    precision, recall, _ = precision_recall_curve(truth, score)
    return _curve(name, float(average_precision_score(truth, score)), recall, precision)


def _curve(name: str, ap: float, recall: np.ndarray, precision: np.ndarray) -> Curve:
    points = " ".join(f"{PLOT * x:.1f},{PLOT * (1 - y):.1f}" for x, y in zip(recall, precision, strict=True))
    return Curve(title(name), ap, points)


def _show(loss: Loss) -> Shown:
    study = load(loss.pair.case.image)
    if isinstance(study, Rejection):
        return Shown(loss, None, [])
    picture = Picture(grey(study))
    line = 0.036 * max(picture.width, picture.height)
    boxes = [("right", "", finding.bbox) for finding in loss.right]
    boxes += [("missed", title(label.type), label.bbox) for label in loss.missed]
    boxes += [("wrong", f"{title(f.type)} {f.confidence:.0%}", f.bbox) for f in loss.wrong]
    marks = []
    for sort, words, (x0, y0, x1, y1) in boxes:
        right = x0 + x1 > picture.width
        tag_x, anchor = (x1 - line / 4, "end") if right else (x0 + line / 4, "start")
        above, below = y0 - 0.3 * line, y1 + line  # missed ones are named above, wrong ones below, where there is room
        tag_y = above if above > line and (sort == "missed" or below > picture.height) else below
        tag_y = tag_y if tag_y < picture.height else y0 + line
        marks.append(Mark(sort, words, x0, y0, x1 - x0, y1 - y0, tag_x, tag_y, anchor))
    return Shown(loss, encode_picture(picture, longest_side=PICTURE_SIDE), marks, line)
