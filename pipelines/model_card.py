"""The model card: what the bundled model is, what it was trained on, and what was measured on validation data.

    python -m pipelines.model_card --model models/default --data data/

scores the model on the `val` split of every data set below DATA, keeps the figures as `evaluation/<set>.json` in the
model's folder, and writes `MODEL_CARD.md` from them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from pipelines.evaluation import evaluate
from pipelines.manifest import read_manifest
from pipelines.store import find

CARD: Final = """# Model card: {name} {version}

One network for CT images and three product lines of inspection photos (hot-rolled steel strip, ferrite magnetic tiles,
bare printed circuit boards). **Not for diagnosis, and not a release decision: every report is a draft for a qualified
person.**

## What it is

- Vision encoder: {backbone} with a path-aggregation neck and a dense evidence head (boxes of {box_types} defect types),
  class activation maps of {map_types} CT finding types, and heads for product line, region, plane, contrast, laterality
  and COVID-19. Trained from scratch.
- Bridge: {queries} learned queries attend over the visual tokens; each becomes a convex combination of the decoder's
  {vocabulary} token embeddings.
- Decoder: {layers} layers, width {width}, {experts} experts of which {active} are active for a token ({share:.1%}), and
  one shared expert; {decoder_parameters:,} parameters. It reads picture and evidence, decides which doubtful items the
  report points at, and writes types, places, sizes and impression under the report grammar. Where its words disagree
  with the evidence (type, place, size, fields) or with its own findings (impression), the evidence stands.
- Weights: {size:.1f} MiB; matrices in int8 with a scale for each output channel, the rest float16.
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

The recipes `evidence` and `writer` (`docs/training.md`), from scratch. Of the bundled model, the recipes as run on one
NVIDIA H200 and their logs are in `docs/training/`; the recipe files since state tiles at 320 px instead of 384 px, with
the zoom adapted, so that views have the same scale. {mirrored} are inspected in four mirror images.

## Measured on validation data

Figures with 95% intervals (bootstrap over groups, 500 resamples); the baseline is the trivial answer (majority, chance,
or nothing found). Validation sets are small and were used for calibration: expect less on new sources.

{figures}

Print them again: `scanscribe evaluate --data DATA/<set>/manifest.jsonl --split val --out figures.json`.

## Limits

- CT findings: the class maps are hardly better than chance for most types, so that few are reported; boxes of CT
  findings are regions of a class activation map, not outlines. Treat them as a hint where to look.
- Laterality is left undetermined where validation gave no probability at which answers are right often enough; contrast
  is guessed from one image.
- COVID-19 was learned from one public set of cropped figures, in which source and label are mixed.
- A picture of anything else is still read as the nearest known kind; low kind confidence is flagged in the report.
- A board without its golden sample is read with less certainty, and the report says so.
- Confidences are calibrated on the validation sets above and on nothing else.
"""


def _figure(row: dict[str, Any]) -> str:
    text = f"{row['value']:.3f}"
    if row["ci95"]:
        text += f" ({row['ci95'][0]:.3f} to {row['ci95'][1]:.3f})"
    return text


def _table(name: str, summary: dict[str, Any]) -> str:
    lines = [
        f"### {name} ({summary['n']} images)",
        "",
        "| figure | value (95% interval) | baseline | n |",
        "|---|---|---|---|",
    ]
    for metric, row in summary["metrics"].items():
        if row["value"] is not None:
            baseline = "" if row["baseline"] is None else f"{row['baseline']:.3f}"
            lines.append(f"| {metric.replace('_', ' ')} | {_figure(row)} | {baseline} | {row['n']} |")
    return "\n".join(lines)


def write_card(model: Path, data: Path) -> None:
    """Scores the model in the folder `model` and writes its card."""
    from pipelines.inputs import MIRRORED
    from pipelines.model import ModelConfig

    stored = find(model)
    config = ModelConfig.from_dict(stored.config)
    (model / "evaluation").mkdir(exist_ok=True)
    summaries, rows = {}, []
    for manifest in sorted(data.glob("*/manifest.jsonl")):
        cases = read_manifest(manifest)
        name, splits = manifest.parent.name, [case.split for case in cases]
        if "val" not in splits:
            rows.append(f"| `{name}` | {splits.count('train')} | 0 | none |")
            continue
        summary = evaluate(manifest, split="val", model=str(model))
        summary["manifest"] = f"{name}/manifest.jsonl"
        (model / "evaluation" / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
        summaries[name] = summary
        shared = summary["groups_in_several_splits"] or "none"
        rows.append(f"| `{name}` | {splits.count('train')} | {splits.count('val')} | {shared} |")
    decoder = config.decoder
    card = CARD.format(
        name=stored.name,
        version=stored.version,
        backbone=config.encoder.backbone,
        box_types=config.encoder.box_types,
        map_types=config.encoder.map_types,
        queries=config.bridge.queries,
        vocabulary=decoder.vocabulary,
        layers=decoder.layers,
        width=decoder.width,
        experts=decoder.experts,
        active=decoder.active,
        share=decoder.active / decoder.experts,
        decoder_parameters=decoder.parameters,
        size=stored.weights.stat().st_size / 2**20,
        sha=stored.weights_sha256,
        data_rows="\n".join(rows),
        mirrored=" and ".join(sorted(MIRRORED)).capitalize(),
        figures="\n\n".join(_table(name, summary) for name, summary in summaries.items()),
    )
    (model / "MODEL_CARD.md").write_text(card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    write_card(args.model, args.data)
