"""Answers that any model must beat: the majority, "always normal", and the labels of the most similar training image.

Each is a list of predictions, scored just as a model's are. The two constant answers are learned on the training split,
on the cases scored themselves where a manifest has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from PIL import Image

from pipelines.evaluation.ct import caption
from pipelines.evaluation.figures import DEFECT_FREE, image_type
from pipelines.evaluation.pictures import grey, load
from pipelines.evaluation.predictions import PredictedFinding, Prediction
from pipelines.evaluation.statistics import Floats, majority
from pipelines.manifest import Box, Case
from pipelines.reading import FieldReading
from pipelines.store import home
from pipelines.study import Rejection
from reports.files import atomic_write
from reports.taxonomy import CT_FIELDS, CT_TYPES

SIDE: Final = 32  # of a thumbnail, in pixels
NORMAL: Final = "No abnormality is seen."


def constant_answers(cases: Sequence[Case], train: Sequence[Case]) -> dict[str, list[Prediction]]:
    """The answers "majority" and "normal" for all `cases`, whatever their images show."""
    learned = train or cases
    kinds = [case.kind for case in learned if case.kind]
    lines = [case.product_line for case in learned if case.product_line]
    usual = Prediction(
        "",
        kind=majority(kinds) if kinds else None,
        kind_confidence=1.0,
        product_line=majority(lines) if lines else None,
        fields=_usual_fields(learned),
        findings=(*_usual_defect(learned), *_usual_types(learned)),
        impression=majority([text for case in learned if (text := caption(case))] or [""]),
    )
    healthy = {name: reading for name, reading in usual.fields.items() if name != "covid19"}
    if "covid19" in usual.fields:
        healthy["covid19"] = FieldReading("false", {"false": 1.0, "true": 0.0})
    normal = replace(usual, fields=healthy, findings=(), impression=NORMAL)
    return {
        "majority": [replace(usual, id=case.id) for case in cases],
        "normal": [replace(normal, id=case.id) for case in cases],
    }


def nearest_answers(cases: Sequence[Case], train: Sequence[Case]) -> list[Prediction]:
    """For each case the labels of the training image whose thumbnail is most similar (cosine, grey levels less their
    mean); its boxes scaled to the case's image. Raises nothing: an image that cannot be read is similar to none.
    """
    known_M, sizes_M = _thumbnails(train)
    asked_N, sizes_N = _thumbnails(cases)
    similarity_NM = asked_N @ known_M.T
    place = {case.id: column for column, case in enumerate(train)}
    for row, case in enumerate(cases):
        if case.id in place:  # a training case that is scored itself
            similarity_NM[row, place[case.id]] = -np.inf
    answers = []
    for row, case in enumerate(cases):
        column = int(similarity_NM[row].argmax())
        likeness = float(np.clip(similarity_NM[row, column], 0, 1))
        answers.append(_as_answer(case.id, train[column], likeness, sizes_N[row] / sizes_M[column]))
    return answers


def _as_answer(case_id: str, case: Case, likeness: float, scale: Floats) -> Prediction:
    factors = np.tile(scale, 2)
    boxed = [PredictedFinding(b.type, _box(np.array(b.bbox) * factors), likeness, True) for b in case.boxes]
    whole = [name for name in case.finding_types or () if not any(box.type == name for box in case.boxes)]
    return Prediction(
        case_id,
        case.kind,
        likeness,
        case.product_line,
        {name: FieldReading(value, {value: 1.0}) for name, value in case.fields.items()},
        (*boxed, *(PredictedFinding(name, (0.0, 0.0, 1.0, 1.0), likeness, True) for name in whole)),
        impression=caption(case),
    )


def _usual_fields(learned: Sequence[Case]) -> dict[str, FieldReading]:
    fields = {}
    for name, values in CT_FIELDS.items():
        known = [case.fields[name] for case in learned if name in case.fields]
        if known:
            shares = {value: known.count(value) / len(known) for value in values}
            fields[name] = FieldReading(majority(known), shares)
    return fields


def _usual_defect(learned: Sequence[Case]) -> list[PredictedFinding]:
    """The most frequent defect at its usual place, reported where it is more frequent than having none."""
    types = [image_type(case) for case in learned if case.kind == "defect" and case.finding_types is not None]
    defective = [name for name in types if name != DEFECT_FREE]
    if not defective:
        return []
    usual = majority(defective)
    boxes = np.array([box.bbox for case in learned for box in case.boxes if box.type == usual])
    share = types.count(usual) / len(types)
    return [PredictedFinding(usual, _box(np.median(boxes, axis=0)), share, majority(types) == usual)]


def _usual_types(learned: Sequence[Case]) -> list[PredictedFinding]:
    """Every CT type as likely as it is frequent."""
    labelled = [case for case in learned if case.kind == "ct" and case.finding_types is not None]
    counts = Counter(name for case in labelled for name in case.finding_types or ())
    shares = {name: counts[name] / len(labelled) for name in CT_TYPES if counts[name]}
    return [PredictedFinding(name, (0.0, 0.0, 1.0, 1.0), share, share >= 0.5) for name, share in shares.items()]


def _box(values: Floats) -> Box:
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1


def _thumbnails(cases: Sequence[Case]) -> tuple[Floats, Floats]:
    """Unit vectors `[N, 1024]` of the images and their widths and heights `[N, 2]`; kept in the state folder."""
    key = hashlib.sha256(repr([SIDE, *map(_identity, cases)]).encode()).hexdigest()
    kept = home() / "cache" / f"thumbnails-{key[:32]}.npz"
    try:
        with np.load(kept) as arrays:
            return arrays["thumbnails"], arrays["sizes"]
    except (OSError, ValueError, KeyError):
        pass  # not there yet, or not whole
    made = [_thumbnail(case) for case in cases]
    thumbnails, sizes = np.array([each for each, _ in made]), np.array([size for _, size in made])
    data = io.BytesIO()
    np.savez(data, thumbnails=thumbnails, sizes=sizes)
    with contextlib.suppress(OSError):  # it only saves time
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, data.getvalue())
    return thumbnails, sizes


def _identity(case: Case) -> tuple[str, int, int]:
    try:
        stat = case.image.stat()
        return str(case.image.resolve()), stat.st_size, stat.st_mtime_ns
    except OSError:
        return str(case.image), 0, 0


def _thumbnail(case: Case) -> tuple[Floats, tuple[int, int]]:
    study = load(case.image)
    if isinstance(study, Rejection):
        return np.zeros(SIDE * SIDE), (1, 1)
    picture = Image.fromarray(grey(study))
    vector = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64).ravel()
    vector -= vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-9), picture.size
