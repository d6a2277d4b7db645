"""The training command; see `cli`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from encoders import Detector, DetectorConfig, GlanceConfig, GlanceNet
from pipelines.manifest import ManifestError
from pipelines.training.encoders import train_detector, train_glance
from pipelines.training.pretrain import train_backbone
from pipelines.training.run import DivergedError, Run, load_recipe
from pipelines.training.writer import Eyes, train_writer
from pipelines.weights import load_config, load_held_out, load_into, save_weights


def cli(argv: list[str]) -> int:
    """Trains one recipe. Returns 0, or 2 after a message that names what to mend."""
    parser = argparse.ArgumentParser(
        prog="scanscribe train",
        description="Trains a recipe: `pretrain` (a backbone, without labels), `glance` and `detector` (vision), then "
        "`writer` (bridge and decoder on top).",
        epilog="example: scanscribe train --recipe detector --data data/ --out runs/detector --set steps=2000",
    )
    parser.add_argument("--recipe", required=True, help="a recipe's name, or a TOML file")
    parser.add_argument("--data", type=Path, required=True, help="folder of data-set folders, each with manifest.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder: recipe, log, checkpoint, weights")
    parser.add_argument("--backbone", type=Path, help="what `pretrain` wrote, to start from (recipe `glance`)")
    parser.add_argument("--glance", type=Path, help="weights of the glance (recipe `writer`)")
    parser.add_argument(
        "--detector", type=Path, nargs="+", help="weights of the detector, or of several whose evidence is averaged"
    )
    parser.add_argument(
        "--stand-in-glance", type=Path, help="a glance trained with --set held_out=0.1 (recipe `writer`)"
    )
    parser.add_argument(
        "--stand-in-detector",
        type=Path,
        nargs="+",
        help="a detector trained with --set held_out=0.1, or several (recipe `writer`)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end within that time, with a shorter schedule if need be"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe's value; streams.NAME.batch=0 leaves a data set out",
    )
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe, args.set)
        if recipe["kind"] == "adapt":
            raise ValueError("an adapter needs a base and one line's pictures: run scanscribe adapt")
        if recipe["kind"] == "writer" and (args.glance is None or args.detector is None):
            raise ValueError(
                "the writer reads with trained networks: "
                "give --glance RUN/glance.safetensors --detector RUN/detector.safetensors"
            )
        if args.backbone is not None and recipe["kind"] != "glance":
            raise ValueError(f"--backbone is where the recipe glance starts from, not {recipe['kind']}")
        run = Run(args.out, recipe, resume=args.resume, minutes=args.minutes)
        device = torch.device(args.device)
        if recipe["kind"] == "writer":
            paths = args.glance, args.detector
            eyes = _eyes(*paths)
            theirs = args.stand_in_glance or args.glance, args.stand_in_detector or args.detector
            held_out = _held_out(theirs[0], *theirs[1])
            stand_ins = eyes if theirs == paths else _eyes(*theirs)
            model = train_writer(run, args.data, eyes, stand_ins, held_out, device)
            written = {k: v for k, v in model.state_dict().items() if not k.startswith(("glance.", "detectors."))}
            save_weights(args.out / "writer.safetensors", written, model.config.to_dict())
        elif recipe["kind"] == "pretrain":
            backbone = train_backbone(run, args.data, device)
            sizes = {"last_stage": backbone.channels[-1]}
            save_weights(args.out / "pretrain.safetensors", backbone.state_dict(), sizes)
        else:
            glancing = recipe["kind"] == "glance"
            network = (
                train_glance(run, args.data, device, backbone=args.backbone)
                if glancing
                else train_detector(run, args.data, device)
            )
            name = f"{recipe['kind']}.safetensors"
            sizes = asdict(network.config)
            save_weights(args.out / name, network.state_dict(), sizes, held_out=recipe["held_out"])
    except (ManifestError, DivergedError, ValueError) as error:
        print(f"scanscribe train: {error}", file=sys.stderr)
        return 2
    return 0


def _eyes(glance: Path, detectors: Sequence[Path]) -> Eyes:
    """Loads what looks at pictures for the writer. Raises ValueError."""
    glancing = GlanceNet(GlanceConfig(**load_config(glance)))
    load_into(glancing, glance)
    detecting = [Detector(DetectorConfig(**load_config(path))) for path in detectors]
    for detector, path in zip(detecting, detectors, strict=True):
        load_into(detector, path)
    return Eyes(glancing, detecting)


def _held_out(*paths: Path) -> float:
    """The share of the training groups that none of the networks has seen. Raises ValueError where there is none."""
    shares = {load_held_out(path) for path in paths}
    if len(shares) > 1 or 0 in shares:
        raise ValueError(
            "the writer learns how sure glance and detectors are of pictures that they do not know: train both once "
            "more with --set held_out=0.1, and give them as --stand-in-glance and --stand-in-detector"
        )
    return shares.pop()


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
