"""An evaluation from end to end: manifests -> ingest -> reader -> answers -> figures, the way a user's images go."""

from __future__ import annotations

import contextlib
import errno
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any, Final

from pipelines import ingest
from pipelines.evaluation.baselines import constant_answers, nearest_answers
from pipelines.evaluation.outside import outside_figures
from pipelines.evaluation.page import Section, render_page
from pipelines.evaluation.pictures import load
from pipelines.evaluation.predictions import (
    Prediction,
    PredictionsError,
    read_predictions,
    resume_predictions,
    signature,
    to_json_lines,
)
from pipelines.evaluation.scoring import pair_up, score
from pipelines.manifest import (
    Case,
    Fault,
    ManifestError,
    ManifestWarning,
    groups_in_several_splits,
    read_data_sets,
    read_manifest,
)
from pipelines.store import find
from pipelines.study import ImageStudy, Rejection
from reports.files import atomic_write
from reports.taxonomy import PRODUCT_LINES, ProductLine

if TYPE_CHECKING:
    from pipelines.reader import Reader

Listener = Callable[[int, int], None]  # images done, images in all
OUTSIDE: Final = "outside"  # name of the predictions file for images of other kinds


@dataclass(frozen=True, slots=True)
class DataSet:
    """One manifest, and where what comes of it is written."""

    name: str
    manifest: Path
    split: str | None
    every: list[Case]
    cases: list[Case]  # of the split
    out: Path | None
    predictions: Path | None

    @property
    def train(self) -> list[Case]:
        return [case for case in self.every if case.split == "train"]


@dataclass(frozen=True, slots=True)
class Item:
    """An image that the model is asked about."""

    id: str
    study: Callable[[], ImageStudy | Rejection]
    reference: Callable[[], ImageStudy | Rejection] | None = None


def evaluate(
    data: Path,
    *,
    split: str | None = None,
    model: str | Path = "default",
    device: str = "auto",
    out: Path | None = None,
    predictions: Path | None = None,
    html: Path | None = None,
    outside: Path | None = None,
    resume: bool = False,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Read every case of `data` (of one `split` if given) with the model and score the answers.

    `data` is a manifest, or a folder of data sets (`*/manifest.jsonl`). Of a manifest, returns and writes to `out` as
    JSON: `{"name", "manifest", "split", "splits", "n", "groups", "groups_in_several_splits", "failed", "model",
    "metrics", "per_type", "calibration", "confusion", "outside"}`; `scoring.score` and `outside.outside_figures`
    describe the last ones. `predictions` gets one JSON line a case in the manifest's order, those whose image cannot be
    read included, each written when it is known: with `resume` an interrupted evaluation goes on there. Of a folder,
    returns `{"sets": {name: ...}, "means": ...}` (see `means`), and `out` and `predictions` are folders with a file for
    each data set.

    `html` gets a page with tables, diagrams and the worst cases. `outside` is a manifest or a folder of images of other
    kinds than the model knows; they are only used to measure whether it notices.

    Raises `ManifestError`, `PredictionsError`, `ModelError` for a model that cannot be used, and OSError.
    """
    if resume and predictions is None:
        raise PredictionsError("there is nothing to go on with: --resume needs the --predictions of the first run")
    sets = _open_sets(data, split, out, predictions, find(model).lines)
    strange = _outside_items(outside) if outside else []
    _make_folders(html, *(path for each in sets for path in (each.out, each.predictions)))

    from pipelines.reader import Reader  # torch: not for those who only score

    reader = Reader.load(model, device)
    work = _Work(reader, resume, sum(len(each.cases) for each in sets) + len(strange), progress)
    beside = None if predictions is None else _beside(predictions, data)
    outside_answers = work.answers(strange, beside) if strange else []
    answers = [work.answers([_item(case) for case in each.cases], each.predictions) for each in sets]
    return _finish(data, sets, answers, outside_answers, asdict(reader.info), html)


def rescore(
    manifest: Path,
    predictions: Path,
    *,
    split: str | None = None,
    out: Path | None = None,
    html: Path | None = None,
    lines: Sequence[ProductLine] = PRODUCT_LINES,
) -> dict[str, Any]:
    """Score saved `predictions` again, without a model. Returns and writes what `evaluate` does, with no "model".

    `lines` are those that the model knew (`StoredModel.lines`).

    Raises `ManifestError`, `PredictionsError` and OSError.
    """
    sets = [_open_set(manifest, split, out, None, lines)]
    _make_folders(out, html)
    wanted = {case.id for case in sets[0].cases}
    answers = [answer for answer in read_predictions(predictions) if answer.id in wanted]
    return _finish(manifest, sets, [answers], [], None, html)


def _open_sets(
    data: Path, split: str | None, out: Path | None, predictions: Path | None, lines: Sequence[ProductLine]
) -> list[DataSet]:
    """What a manifest line has wrong is warned of and costs that line only."""
    if not data.is_dir():
        return [_open_set(data, split, out, predictions, lines)]
    sets = []
    for name, every in read_data_sets(data, lenient=True, lines=lines).items():
        cases = [case for case in every if split is None or case.split == split]
        figures, answers = out and out / f"{name}.json", predictions and predictions / f"{name}.jsonl"
        sets.append(DataSet(name, data / name / "manifest.jsonl", split, every, cases, figures, answers))
    if not any(each.cases for each in sets):
        raise ManifestError(data, [Fault(0, f"has no data set with a case in split {split!r}")])
    return sets


def _open_set(
    manifest: Path, split: str | None, out: Path | None, predictions: Path | None, lines: Sequence[ProductLine]
) -> DataSet:
    every = read_manifest(manifest, lenient=True, lines=lines)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ManifestWarning)  # told already
        cases = every if split is None else read_manifest(manifest, split=split, lenient=True, lines=lines)
    return DataSet(manifest.resolve().parent.name, manifest, split, every, cases, out, predictions)


def _item(case: Case) -> Item:
    return Item(case.id, partial(load, case.image), partial(load, case.template) if case.template else None)


def _outside_items(outside: Path) -> list[Item]:
    """Every image of a manifest, or of a folder (a DICOM series is one)."""
    if outside.is_file() and outside.suffix in (".jsonl", ".json"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ManifestWarning)  # its labels play no part
            return [_item(case) for case in read_manifest(outside, lenient=True)]
    plan = ingest.plan([outside])
    if not plan.units:
        raise ManifestError(outside, [Fault(0, "has no image that can be read; give a manifest or a folder of images")])
    return [Item(f"{i}:{unit.name}", partial(ingest.load, unit)) for i, unit in enumerate(plan.units)]


class _Work:
    """The reader at work on the images of all data sets."""

    def __init__(self, reader: Reader, resume: bool, total: int, progress: Listener | None) -> None:
        self.reader, self.resume, self.total, self.progress = reader, resume, total, progress
        self.model = signature(reader.info)
        self.done = 0

    def answers(self, items: Sequence[Item], path: Path | None) -> list[Prediction]:
        """An answer for each item, each appended to the file `path` as soon as it is there."""
        known = {answer.id: answer for answer in resume_predictions(path, self.model)} if self.resume and path else {}
        answers = []
        with _appending(path, fresh=not self.resume) as file:
            for item in items:
                answer = known.get(item.id)
                if answer is None:
                    answer = self._read(item)
                    if file is not None:
                        file.write(to_json_lines([answer]))
                        file.flush()
                answers.append(answer)
                self.done += 1
                if self.progress is not None:
                    self.progress(self.done, self.total)
        return answers

    def _read(self, item: Item) -> Prediction:
        study = item.study()
        reference = item.reference() if item.reference else None
        if isinstance(study, Rejection):
            return Prediction(item.id, model=self.model, error=f"{study.code}: {study.reason}")
        if isinstance(reference, Rejection):
            reason = f"{reference.code}: its golden sample cannot be used: {reference.reason}"
            return Prediction(item.id, model=self.model, error=reason)
        try:
            return Prediction.from_reading(item.id, self.reader.read(study, reference=reference), self.model)
        except Exception as error:  # whatever one image does to the model, the others are still scored
            return Prediction(item.id, model=self.model, error=f"model-failed: {type(error).__name__}")


@contextlib.contextmanager
def _appending(path: Path | None, *, fresh: bool) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    with path.open("w" if fresh else "a", encoding="utf-8") as file:
        yield file


def _finish(
    data: Path,
    sets: Sequence[DataSet],
    answers: Sequence[Sequence[Prediction]],
    outside: Sequence[Prediction],
    model: dict[str, Any] | None,
    html: Path | None,
) -> dict[str, Any]:
    summaries, sections = {}, []
    for each, of_set in zip(sets, answers, strict=True):
        summary = _summary(each, of_set, outside, model)
        if each.out is not None:
            atomic_write(each.out, json.dumps(summary, indent=1) + "\n")
        summaries[each.name] = summary
        if each.cases:
            sections.append(Section(summary, pair_up(each.cases, of_set)))
    mean = means(list(summaries.values()))
    if html is not None:
        atomic_write(html, render_page(sections, mean))
    if not data.is_dir():
        return summaries[sets[0].name]
    return {"sets": summaries, "means": mean}


def means(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each figure that several data sets have, the mean over them, whatever their sizes: `{name: {value, n}}`."""
    values: dict[str, list[float]] = {}
    for summary in summaries:
        for name, metric in summary["metrics"].items():
            if metric["value"] is not None:
                values.setdefault(name, []).append(metric["value"])
    return {name: {"value": fmean(each), "n": len(each)} for name, each in values.items() if len(each) > 1}


def _summary(
    data_set: DataSet, answers: Sequence[Prediction], outside: Sequence[Prediction], model: dict[str, Any] | None
) -> dict[str, Any]:
    cases, train = data_set.cases, data_set.train
    baselines = constant_answers(cases, train) if cases else {}
    if cases and train:
        baselines["nearest"] = nearest_answers(cases, train)
    splits = [case.split or "none" for case in data_set.every]
    return {
        "name": data_set.name,
        "manifest": f"{data_set.name}/{data_set.manifest.name}",
        "split": data_set.split,
        "splits": {name: splits.count(name) for name in dict.fromkeys(splits)},
        "n": len(cases),
        "groups": len({case.group for case in cases}),
        "groups_in_several_splits": groups_in_several_splits(data_set.every),
        "failed": sum(answer.error is not None for answer in answers),
        "model": model,
        **score(cases, answers, baselines=baselines),
        "outside": outside_figures(cases, answers, outside) if outside else None,
    }


def _beside(predictions: Path, data: Path) -> Path:
    """The file for the answers about images of other kinds."""
    return predictions / f"{OUTSIDE}.jsonl" if data.is_dir() else predictions.with_suffix(f".{OUTSIDE}.jsonl")


def _make_folders(*files: Path | None) -> None:
    """Before the work, not after it: a place that cannot be written should cost no evaluation."""
    for path in files:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder, give a file", str(path))
