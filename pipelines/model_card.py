"""The model card: what a model is, what it was trained on, and what was measured on validation data.

    scanscribe evaluate --data data/ --split val --model models/default --out models/default/evaluation \\
        --predictions answers/ --outside pictures-of-other-things/
    python -m pipelines.model_card --model models/default

The second command writes `MODEL_CARD.md` from what the first one measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any, Final

from safetensors import safe_open

from pipelines.evaluation.names import (
    ABOUT_BASELINES,
    ABOUT_ECE,
    ABOUT_INTERVALS,
    ABOUT_TEXT,
    BASELINES,
    name_of,
)
from pipelines.store import ModelError, StoredModel, find

CARD: Final = """# Model card: {name} {version}

One model for CT images and three product lines of inspection photos (hot-rolled steel strip, ferrite magnetic tiles,
bare printed circuit boards). **Not for diagnosis, and not a release decision: every report is a draft for a qualified
person.**

## What it is

- Glance: {backbone} with class activation maps of {map_types} CT finding types, and heads for product line, region,
  plane, contrast, laterality and COVID-19. Trained from scratch.
- Detectors: {detectors}, each a ResNet-18-D with stages {widths} wide, a path-aggregation neck, a dense head (boxes of
  {box_types} defect types) and a head that tells which types are on the picture. Trained from scratch.
- Domain: a Gaussian of low rank for each product line and CT over the glance's channel statistics; a study that lies
  too far out is held, and nothing of it is reported.
- Bridge: {queries} learned queries attend over the visual tokens; each becomes a convex combination of the decoder's
  {vocabulary} token embeddings.
- Decoder: {layers} layers, width {width}, {experts} experts of which {active} are active for a token ({share:.1%}), and
  one shared expert; {decoder_parameters:,} parameters. It reads picture and evidence and writes which items to report,
  their types, places and sizes, and an impression, under the report grammar. How much its word counts beside the
  evidence's confidence was fitted on validation data (0 to 1): {say}.
  Types, places, sizes and fields are the evidence's; an impression that contradicts the findings is replaced.
- Weights: {size:.1f} MiB; matrices in int8 with a scale for each output channel{packed}, the rest float16.
  SHA-256 `{sha}`.

## Data

Trained on the `train` splits only; the `val` splits chose thresholds and calibration.

| data set | train | val | groups in several splits |
|---|---|---|---|
{data_rows}

A group is what must not be separated: a patient, a tile, a board. Where groups lie in both splits (`deep-pcb`: the
published split shares boards) the validation figures flatter the model.

Labels to be careful with: `medpix-ct` findings and laterality come from captions by rule and are noisy; severity and
disposition have no ground truth anywhere and are derived by the written rules of `reports/default_rules.yaml`.

## Recipe

The recipes `glance`, `detector` and `writer` (`docs/training.md`), from scratch. Of the bundled model, the recipes as
run on one NVIDIA H200 and their logs are in `docs/training/`: its glance is a part of an earlier joint network
(`evidence` there); its decoder read what both detectors see. {mirrored} are inspected in four mirror images, by every
detector; boards by the first.

## Measured on validation data

{about}

{figures}

## Calibration

{about_ece}

{calibration}

## Images of other kinds

{outside}

## Limits

- CT findings: the class maps are hardly better than chance for most types, so that few are reported; boxes of CT
  findings are regions of a class activation map, not outlines. Treat them as a hint where to look.
- Laterality is left undetermined where validation gave no probability at which answers are right often enough; contrast
  is guessed from one image.
- COVID-19 was learned from one public set of cropped figures, in which source and label are mixed.
- The domain flag knows what training pictures look like, not what is on them: another product of the same surface
  passes.
- A board without its golden sample is read with less certainty, and the report says so.
- Confidences are calibrated on the validation sets above and on nothing else.
{unproven}
"""


Summaries = Mapping[str, dict[str, Any]]  # by data set: what an evaluation wrote


def read_evaluations(stored: StoredModel) -> dict[str, dict[str, Any]]:
    """The evaluations in the model's folder. Raises `ModelError` when there is none, or one of other weights."""
    summaries = {}
    for path in sorted((stored.folder / "evaluation").glob("*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if (summary["model"] or {}).get("weights_sha256") != stored.weights_sha256 or "splits" not in summary:
            raise ModelError(f"{path} is of other weights or another version; run scanscribe evaluate again")
        summaries[path.stem] = summary
    if not summaries:
        raise ModelError(f"{stored.folder / 'evaluation'} is empty; run scanscribe evaluate with it as --out")
    return summaries


def write_card(model: Path) -> None:
    """Writes the card of the model in the folder `model` from its evaluations. Raises `ModelError`."""
    from pipelines.inputs import MIRRORED
    from pipelines.model import ModelConfig

    stored = find(model)
    config = ModelConfig.from_dict(stored.config)
    decoder, experts = config.decoder, config.decoder.experts
    assert experts is not None  # `ModelConfig.default` has them
    summaries = read_evaluations(stored)
    card = CARD.format(
        name=stored.name,
        version=stored.version,
        backbone=config.glance.backbone,
        detectors=config.detectors,
        widths=", ".join(map(str, config.detector.widths)),
        box_types=config.detector.types,
        map_types=config.glance.map_types,
        queries=config.bridge.queries,
        vocabulary=decoder.vocabulary,
        layers=decoder.layers,
        width=decoder.width,
        experts=experts.count,
        active=experts.active,
        share=experts.active / experts.count,
        decoder_parameters=decoder.parameters,
        say=", ".join(f"{line} {weight:g}" for line, weight in stored.calibration.point.items()),
        size=stored.weights.stat().st_size / 2**20,
        packed=f" ({six} large ones in six bits)" if (six := _packed(stored.weights)) else "",
        sha=stored.weights_sha256,
        mirrored=" and ".join(sorted(MIRRORED)).capitalize(),
        **measured_parts(summaries),
    )
    (model / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _packed(weights: Path) -> int:
    """How many tensors have six bits for a weight."""
    with safe_open(weights, framework="np") as file:
        return sum(name.endswith(".int6") for name in file.keys())  # noqa: SIM118


def measured_parts(summaries: Summaries) -> dict[str, str]:
    """The parts of the card that come from evaluations, as Markdown."""
    scored = {name: summary for name, summary in summaries.items() if summary["n"]}
    return {
        "data_rows": "\n".join(_data_row(name, summary) for name, summary in summaries.items()),
        "about": fill(f"{ABOUT_INTERVALS} {ABOUT_BASELINES} {ABOUT_TEXT} {_CAUTION}", 120),
        "figures": "\n\n".join(_figures(name, summary) for name, summary in scored.items()),
        "about_ece": fill(ABOUT_ECE, 120),
        "calibration": _calibration(scored),
        "outside": _outside(scored),
        "unproven": fill(f"- {_UNPROVEN}: {_unproven(scored)}.", 120, subsequent_indent="  ", break_on_hyphens=False),
    }


def _data_row(name: str, summary: dict[str, Any]) -> str:
    splits, shared = summary["splits"], summary["groups_in_several_splits"] or "none"
    return f"| `{name}` | {splits.get('train', 0)} | {splits.get('val', 0)} | {shared} |"


def _figures(name: str, summary: dict[str, Any]) -> str:
    rows = [
        [name_of(key), _interval(row), *(_number(row["baselines"].get(each)) for each in BASELINES), str(row["n"])]
        for key, row in summary["metrics"].items()
        if row["value"] is not None and not key.startswith("ece_")
    ]
    head = ["figure", "value (95 % interval)", *BASELINES.values(), "images"]
    return f"### {name} ({summary['n']} images in {summary['groups']} groups)\n\n{_table(head, rows)}"


def _calibration(scored: Summaries) -> str:
    rows = []
    for name, summary in scored.items():
        metrics = summary["metrics"]
        for what, reliability in summary["calibration"].items():
            ways = [metrics.get(f"ece_{what}{how}") for how in ("_uncalibrated", "", "_adaptive")]
            statements = sum(each["n"] for each in reliability["bins"])
            rows.append(
                [f"{name}, {what}", *("" if way is None else _interval(way) for way in ways), f"{statements:,}"]
            )
    return _table(["statements about", "before", "after calibration", "after, equally filled bins", "statements"], rows)


def _outside(scored: Summaries) -> str:
    rows = [
        [
            name,
            f"{outside['n']} + {outside['refused']}",
            *(_interval(outside[figure]) for figure in ("auroc", "caught", "false_alarms")),
        ]
        for name, summary in scored.items()
        if (outside := summary["outside"])
    ]
    if not rows:
        return "Not measured."
    words = (
        "How well the in-domain probability tells images of other kinds from the validation images of a data set, how "
        "many of them are flagged at the shipped threshold, and how many validation images are flagged by mistake. "
        "Images that were refused before the model saw them are only counted."
    )
    head = ["data set", "other images + refused", "AUROC", "flagged", "false alarms"]
    return f"{fill(words, 120)}\n\n{_table(head, rows)}"


def _unproven(scored: Summaries) -> str:
    """Figures whose interval does not lie above every baseline, where a baseline is not perfect itself."""
    weak = []
    for name, summary in scored.items():
        for key, row in summary["metrics"].items():
            best = max((value for value in row["baselines"].values() if value is not None), default=None)
            if key not in _NO_CONTEST and row["ci95"] and best is not None and row["ci95"][0] <= best < 1:
                weak.append(f"{name}: {name_of(key)}")
    return "; ".join(weak) or "none"


_CAUTION: Final = "Validation sets are small and were used for calibration: expect less on new sources."
_UNPROVEN: Final = "Not shown to be better than a trivial answer (the interval reaches the best baseline)"
_NO_CONTEST: Final = ("laterality_answered", "f1_reported_minus_best")  # more is not better


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(row: dict[str, Any]) -> str:
    text = _number(row["value"])
    return f"{text} ({row['ci95'][0]:.3f} to {row['ci95'][1]:.3f})" if row["ci95"] else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    try:
        write_card(parser.parse_args().model)
    except ModelError as error:
        sys.exit(f"model card: {error}")
