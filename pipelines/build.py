"""From training runs to a model folder: weights together, calibration on validation data, settings.

    python -m pipelines.build --glance runs/glance/glance.safetensors --detector runs/detector/detector.safetensors \\
        --writer runs/writer/writer.safetensors --data data/ --fields-only covid-ct --name default --out models/default
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipelines import ingest
from pipelines.domain import fit_domain
from pipelines.evaluation.defects import has_image_types
from pipelines.evaluation.detection import IOUS, match
from pipelines.evaluation.figures import image_type, reported, top_type
from pipelines.evaluation.predictions import Prediction
from pipelines.look import Seen
from pipelines.manifest import Case, read_manifest
from pipelines.reader import Reader
from pipelines.reading import NotFiniteError, Reading
from pipelines.store import DOMAIN, WEIGHTS, Calibration, save_settings
from pipelines.study import ImageStudy
from pipelines.weights import load_config, packed
from reports.taxonomy import CT_FIELDS, CT_TYPES

HALF = IOUS.index(0.5)
SHARES = (0.0, 0.3, 0.6)  # tried for the decoder's word on an item
LEAST = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # probabilities tried; no report names what is under one in five
LATERALITY_ACCURACY, ANSWERED = 0.7, 0.3  # what answers about the side must reach, on at least that share of the cases
HEADER = 2**18  # bytes of a weights file that are kept free for the names of its tensors
TEMPERATURES = np.geomspace(0.5, 8, 33)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A validation case with its pixels."""

    case: Case
    study: ImageStudy
    reference: ImageStudy | None


def join_weights(
    glance: Path, detectors: Sequence[Path], writer: Path, out: Path, *, mebibytes: float = math.inf
) -> None:
    """One file of all parts, packed into so many MiB: tensors get the prefix that the whole network gives them.

    Raises ValueError where they do not fit.
    """
    tensors: dict[str, Tensor] = {}
    parts = [(path, f"detectors.{i}.") for i, path in enumerate(detectors)]
    for path, prefix in ((glance, "glance."), *parts, (writer, "")):
        with safe_open(path, framework="pt") as file:
            tensors |= {prefix + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    out.mkdir(parents=True, exist_ok=True)
    save_file(packed(tensors, mebibytes * 2**20 - HEADER), out / WEIGHTS)


def load_cases(data: Path, split: str) -> dict[str, list[Labelled]]:
    """The cases of each data set below `data`, decoded."""

    def picture(path: Path) -> ImageStudy:
        study = ingest.load(ingest.plan([path]).units[0])
        assert isinstance(study, ImageStudy), path
        return study

    found = {}
    for manifest in sorted(data.glob("*/manifest.jsonl")):
        cases = [case for case in read_manifest(manifest) if case.split == split]
        if cases:
            found[manifest.parent.name] = [
                Labelled(case, picture(case.image), picture(case.template) if case.template else None) for case in cases
            ]
    return found


def fit_evidence(hits: Sequence[bool], scores: Sequence[float]) -> tuple[float, float]:
    """Platt scaling on the scores' logits: `(a, b)`; `a` is kept positive so that no ranking changes."""
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    logits = np.log(clipped / (1 - clipped))
    if len(set(hits)) < 2:
        return 1.0, 0.0
    fitted = LogisticRegression(C=100).fit(logits[:, None], np.asarray(hits))
    return max(float(fitted.coef_[0, 0]), 0.05), float(fitted.intercept_[0])


def fit_temperature(probabilities: Sequence[dict[str, float]], truths: Sequence[str]) -> float:
    """The temperature with the least negative log-likelihood; 1 when there is nothing to fit."""
    if not truths:
        return 1.0
    log_p = np.log(np.clip([list(p.values()) for p in probabilities], 1e-9, 1))
    truth = [list(p).index(t) for p, t in zip(probabilities, truths, strict=True)]
    losses = []
    for t in TEMPERATURES:
        scaled = log_p / t
        scaled = (
            scaled
            - np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1, keepdims=True))
            - scaled.max(1, keepdims=True)
        )
        losses.append(-scaled[np.arange(len(truth)), truth].mean())
    return float(TEMPERATURES[int(np.argmin(losses))])


def fit_answer(probabilities: Sequence[dict[str, float]], truths: Sequence[str], temperature: float) -> float:
    """The least probability from which answers are right often enough; above 1 (never answer) when there is none."""
    rows = []
    for p, truth in zip(probabilities, truths, strict=True):
        scaled = {value: q ** (1 / temperature) for value, q in p.items()}
        best = max(scaled, key=lambda value: scaled[value])
        rows.append((scaled[best] / sum(scaled.values()), best == truth))
    for least in np.arange(0.3, 1.0, 0.05):
        answered = [right for probability, right in rows if probability >= least]
        if len(answered) < len(rows) * ANSWERED:
            break
        if np.mean(answered) >= LATERALITY_ACCURACY:
            return round(float(least), 2)
    return 1.01


def f1(cases: Sequence[Labelled], readings: Sequence[Reading]) -> float:
    """Micro F1 of the reported findings: boxes at IoU 0.5 (defects), or types (CT)."""
    good = wrong = labelled = 0
    if all(each.case.kind == "ct" for each in cases):
        for each, reading in zip(cases, readings, strict=True):
            truth = set(each.case.finding_types or ())
            said = {finding.type for finding in reading.findings if finding.reported}
            good, wrong, labelled = good + len(truth & said), wrong + len(said - truth), labelled + len(truth)
    else:
        answers = [Prediction.from_reading(c.case.id, r) for c, r in zip(cases, readings, strict=True)]
        found = [[f for f in answer.findings if f.reported] for answer in answers]
        for matches in match([c.case.boxes for c in cases], found).values():
            hits = int(matches.hit[HALF].sum())
            good, wrong, labelled = (
                good + hits,
                wrong + matches.hit.shape[1] - hits,
                labelled + int(matches.labels.sum()),
            )
    return 2 * good / max(1, good + wrong + labelled)


def right_types(cases: Sequence[Labelled], readings: Sequence[Reading]) -> float:
    """Share of the pictures whose type the report tells right; 0 where pictures have no type of their own."""
    labels = [each.case for each in cases]
    if any(case.kind == "ct" for case in labels) or not has_image_types(labels):
        return 0.0
    answers = [Prediction.from_reading(case.id, r) for case, r in zip(labels, readings, strict=True)]
    right = [top_type(reported(a)) == image_type(case) for a, case in zip(answers, labels, strict=True)]
    return sum(right) / len(right)


def _written(reader: Reader, views: Sequence[Seen]) -> list[Reading]:
    """The readings of what was seen. Raises NotFiniteError."""
    readings = []
    for reading in reader.write(views):
        if isinstance(reading, NotFiniteError):
            raise reading
        readings.append(reading)
    return readings


def calibrate(
    reader: Reader,
    sets: dict[str, list[Labelled]],
    fields_only: Sequence[str] = (),
    assessed: Mapping[str, Sequence[str]] | None = None,
) -> Calibration:
    """Fits every part of the calibration on labelled cases; `reader` must have none.

    Cases are pooled by product line. Of the data sets in `fields_only` the labelled findings are left out. `assessed`
    becomes part of the calibration as it stands.
    """
    known = dict(assessed or {})
    point: dict[str, float] = {}
    report: dict[str, float] = {}
    evidence: dict[str, tuple[float, float]] = {}
    pairs: dict[str, tuple[list[dict[str, float]], list[str]]] = defaultdict(lambda: ([], []))
    pooled: dict[str, list[tuple[Labelled, Seen]]] = defaultdict(list)
    for name, cases in sets.items():
        for each in cases:
            seen = reader.look(each.study, reference=each.reference)
            reading = _written(reader, [seen])[0]
            for field, truth in each.case.fields.items():
                if field in reading.fields:
                    pairs[field][0].append(reading.fields[field].probabilities)
                    pairs[field][1].append(truth)
            if name not in fields_only:
                pooled[each.case.product_line or "ct"].append((each, seen))
    for line, rows in pooled.items():
        cases, views = [each for each, _ in rows], [seen for _, seen in rows]
        readings = _written(reader, views)
        if line == "ct":
            found = [
                (finding.type in (each.case.finding_types or ()), finding.confidence)
                for each, reading in zip(cases, readings, strict=True)
                for finding in reading.findings
            ]
        else:
            answers = [Prediction.from_reading(c.case.id, r).findings for c, r in zip(cases, readings, strict=True)]
            matches = match([c.case.boxes for c in cases], answers).values()
            found = [pair for m in matches for pair in zip(m.hit[HALF].tolist(), m.confidence.tolist(), strict=True)]
        evidence[line] = fit_evidence(*zip(*found, strict=True)) if found else (1.0, 0.0)
        scores: dict[tuple[float, float], float] = {}
        for weight, least in product(SHARES, LEAST):
            reader.calibration = Calibration(
                evidence={line: evidence[line]}, point={line: weight}, report={line: least}, assessed=known
            )
            again = _written(reader, views)
            scores[weight, least] = f1(cases, again) + right_types(cases, again)
        reader.calibration = Calibration()
        point[line], report[line] = max(scores, key=lambda pair: scores[pair])  # of equals the least weight
        print(f"{line}: F1 and image type {scores[point[line], report[line]]:.3f} at {point[line]}, {report[line]}")
    temperature = {field: fit_temperature(*pairs[field]) for field in CT_FIELDS if field in pairs}
    answer = (
        {"laterality": fit_answer(*pairs["laterality"], temperature["laterality"])} if "laterality" in pairs else {}
    )
    return Calibration(evidence, temperature, point, report, answer, known)


def build(
    glance: Path,
    detectors: Sequence[Path],
    writer: Path,
    data: Path,
    out: Path,
    *,
    name: str,
    version: str,
    mebibytes: float = math.inf,
    fields_only: Sequence[str] = (),
    assessed: Sequence[str] | None = None,
) -> Calibration:
    """Makes a model folder and calibrates it on the `val` split of every data set below `data`.

    `assessed` are the CT finding types that it reports, by default all.
    """
    join_weights(glance, detectors, writer, out, mebibytes=mebibytes)
    config = load_config(writer) | {"detectors": len(detectors)}
    save_settings(out, name=name, version=version, config=config, calibration=Calibration())
    reader = Reader.load(out)
    fit_domain(reader.model.glance, data).save(out / DOMAIN)
    only = {} if assessed is None else {"ct": tuple(assessed)}
    calibration = calibrate(reader, load_cases(data, "val"), fields_only, only)
    save_settings(out, name=name, version=version, config=config, calibration=calibration)
    return calibration


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("glance", "writer", "data", "out"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--detector", type=Path, nargs="+", required=True, help="one, or several to be averaged")
    parser.add_argument("--name", default="default")
    parser.add_argument("--version", default="1.0")
    parser.add_argument(
        "--mebibytes",
        type=float,
        default=math.inf,
        help="size of the weights at most: large tensors get six bits a weight",
    )
    parser.add_argument(
        "--fields-only", nargs="*", default=(), metavar="SET", help="data sets with unsure finding labels"
    )
    parser.add_argument(
        "--assessed",
        nargs="*",
        choices=CT_TYPES,
        metavar="TYPE",
        help="CT finding types that are told from chance in cross-validation: others are never reported; default: all",
    )
    args = parser.parse_args()
    print(
        build(
            args.glance,
            args.detector,
            args.writer,
            args.data,
            args.out,
            name=args.name,
            version=args.version,
            mebibytes=args.mebibytes,
            fields_only=args.fields_only,
            assessed=args.assessed,
        )
    )
