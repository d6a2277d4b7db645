"""Draws the loss curves of training runs: `python -m pipelines.training.curves OUT.svg LOG ...`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

NOT_LOSSES = ("seconds", "step", "rate")


def draw_curves(out: Path, logs: list[Path]) -> None:
    """One panel a run, its losses over the steps on a logarithmic scale. Raises OSError, ValueError."""
    figure = Figure(figsize=(4.2 * len(logs), 3.2), layout="constrained")
    for axes, log in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs, strict=True):
        rows = [row for row in map(json.loads, log.read_text("utf-8").splitlines()) if "step" in row]
        for name in (key for key in rows[0] if key not in NOT_LOSSES):
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, linewidth=1)
        axes.set(title=log.name.partition(".")[0], xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipelines.training.curves", description="Draws runs' loss curves.")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="log.jsonl of a run; its name is the title")
    args = parser.parse_args()
    draw_curves(args.out, args.logs)
