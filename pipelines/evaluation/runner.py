"""An evaluation from end to end: manifest -> ingest -> reader -> predictions -> figures, the way a user's images go."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import ingest
from pipelines.evaluation.predictions import Prediction, read_predictions, to_json_lines
from pipelines.evaluation.scoring import score
from pipelines.manifest import Case, ManifestWarning, groups_in_several_splits, read_manifest
from pipelines.study import ImageStudy, Rejection

if TYPE_CHECKING:
    from pipelines.reader import Reader

Listener = Callable[[int, int], None]  # cases done, cases in all


def evaluate(
    manifest: Path,
    *,
    split: str | None = None,
    model: str | Path = "default",
    device: str = "auto",
    out: Path | None = None,
    predictions: Path | None = None,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Read every case of `manifest` (of one `split` if given) with the model and score the answers.

    Returns, and writes to `out` as JSON, `{"manifest", "split", "n", "groups", "groups_in_several_splits", "failed",
    "model", "metrics", "per_type"}`; `scoring.score` describes the last two. `predictions` gets one JSON line a case
    in the manifest's order, those whose image cannot be read included. Both files appear whole or not at all.

    Raises `ManifestError`, what the model store raises for a model that cannot be used, and OSError.
    """
    every, cases = _read_manifest(manifest, split)
    _make_folders(out, predictions)

    from pipelines.reader import Reader  # torch: not for those who only score

    reader = Reader.load(model, device)
    answers = list(_predict(cases, reader, progress))
    if predictions is not None:
        _write(predictions, to_json_lines(answers))
    return _summary(manifest, split, every, cases, answers, asdict(reader.info), out)


def rescore(manifest: Path, predictions: Path, *, split: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Score saved `predictions` again, without a model. Returns and writes what `evaluate` does, with no "model".

    Raises `ManifestError`, `PredictionsError` and OSError.
    """
    every, cases = _read_manifest(manifest, split)
    _make_folders(out)
    wanted = {case.id for case in cases}
    answers = [answer for answer in read_predictions(predictions) if answer.id in wanted]
    return _summary(manifest, split, every, cases, answers, None, out)


def _read_manifest(manifest: Path, split: str | None) -> tuple[list[Case], list[Case]]:
    """All cases, and those of the split. What a line has wrong costs that line only."""
    every = read_manifest(manifest, lenient=True)
    if split is None:
        return every, every
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ManifestWarning)  # told already
        return every, read_manifest(manifest, split=split, lenient=True)


def _predict(cases: Sequence[Case], reader: Reader, progress: Listener | None) -> Iterable[Prediction]:
    for done, case in enumerate(cases, start=1):
        yield _read(case, reader)
        if progress is not None:
            progress(done, len(cases))


def _read(case: Case, reader: Reader) -> Prediction:
    study = _load(case.image)
    reference = _load(case.template) if case.template else None
    if isinstance(study, Rejection):
        return Prediction(case.id, error=f"{study.code}: {study.reason}")
    if isinstance(reference, Rejection):
        return Prediction(case.id, error=f"{reference.code}: its golden sample cannot be used: {reference.reason}")
    try:
        return Prediction.from_reading(case.id, reader.read(study, reference=reference))
    except Exception as error:  # whatever one image does to the model, the others are still scored
        return Prediction(case.id, error=f"model-failed: {type(error).__name__}")


def _load(image: Path) -> ImageStudy | Rejection:
    plan = ingest.plan([image])
    if plan.rejections:
        return plan.rejections[0]
    if len(plan.units) != 1:
        reason = f"The file holds {len(plan.units)} images."
        return Rejection(str(image), "not-one-image", reason, "Give each case a file with one image.")
    return ingest.load(plan.units[0])


def _summary(
    manifest: Path,
    split: str | None,
    every: Sequence[Case],
    cases: Sequence[Case],
    answers: Sequence[Prediction],
    model: dict[str, Any] | None,
    out: Path | None,
) -> dict[str, Any]:
    train = [case for case in every if case.split == "train"]
    summary = {
        "manifest": str(manifest),
        "split": split,
        "n": len(cases),
        "groups": len({case.group for case in cases}),
        "groups_in_several_splits": groups_in_several_splits(every),
        "failed": sum(answer.error is not None for answer in answers),
        "model": model,
        **score(cases, answers, train=train),
    }
    if out is not None:
        _write(out, json.dumps(summary, indent=2) + "\n")
    return summary


def _make_folders(*files: Path | None) -> None:
    """Before the work, not after it: a place that cannot be written should cost no evaluation."""
    for path in files:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, text: str) -> None:
    from reports.files import atomic_write

    atomic_write(path, text)
