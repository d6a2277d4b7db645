"""The training command; see `cli`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from encoders import EncoderConfig, EvidenceEncoder
from pipelines.manifest import ManifestError
from pipelines.training.evidence import train_evidence
from pipelines.training.run import DivergedError, Run, load_recipe
from pipelines.training.writer import train_writer
from pipelines.weights import load_config, load_into, save_weights


def cli(argv: list[str]) -> int:
    """Trains one recipe. Returns 0, or 2 after a message that names what to mend."""
    parser = argparse.ArgumentParser(
        prog="scanscribe train",
        description="Trains a recipe: `evidence` (the vision encoder), then `writer` (bridge and decoder on top).",
        epilog="example: scanscribe train --recipe evidence --data data/ --out runs/evidence --set steps=2000",
    )
    parser.add_argument("--recipe", required=True, help="a recipe's name, or a TOML file")
    parser.add_argument("--data", type=Path, required=True, help="folder of data-set folders, each with manifest.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder: recipe, log, checkpoint, weights")
    parser.add_argument("--encoder", type=Path, help="weights of the encoder (recipe `writer`)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe, args.set)
        if recipe["kind"] == "writer" and args.encoder is None:
            raise ValueError("the writer needs a trained encoder; give --encoder RUN/encoder.safetensors")
        run, device = Run(args.out, recipe, resume=args.resume), torch.device(args.device)
        if recipe["kind"] == "evidence":
            encoder = train_evidence(run, args.data, device)
            save_weights(args.out / "encoder.safetensors", encoder.state_dict(), asdict(encoder.config))
        else:
            encoder = EvidenceEncoder(EncoderConfig(**load_config(args.encoder)))
            load_into(encoder, args.encoder)
            model = train_writer(run, args.data, encoder, device)
            written = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
            save_weights(args.out / "writer.safetensors", written, model.config.to_dict())
    except (ManifestError, DivergedError, ValueError) as error:
        print(f"scanscribe train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
