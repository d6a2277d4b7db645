"""Tokens a second on a CPU against Hugging Face transformers, on the same weights: batch 1, 8 and 32, in fp32.

    .venv/bin/python -m benchmarks.decode_cpu
    .venv/bin/python -m benchmarks.decode_cpu --quick             # fewer runs

The model is the one of about 30M parameters of `benchmarks.decode_gpu`. Peers: `generate` as it comes, the same with a
static cache, and with transformers' grouped matrix product pinned. All sides get the same prompts, write the same
number of tokens and take turns, each with the threads that torch starts with. Greedy tokens are compared with what
transformers would have written there.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.decoding import (
    EXPERTS_PINNED,
    agreement,
    claim,
    engine_side,
    generate_side,
    machine,
    make_model,
    measure,
)

PROMPT, NEW = 64, 33
TARGETS = {1: 2.5, 8: 1.6, 32: 1.3}  # times the best of transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of each side, batch 1 and 8")
    asked = parser.parse_args()
    print(f"{machine()}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = make_model("30M", Path(folder), torch.float32, "cpu")
    claims: list[dict[str, object]] = []
    for batch, target in TARGETS.items():
        if asked.quick and batch > 8:
            continue
        print(f"batch {batch}", flush=True)
        torch.manual_seed(batch)
        prompts_BT = torch.randint(2, ours.config.vocabulary, (batch, PROMPT))
        sides = [
            engine_side("engine", ours, prompts_BT, NEW),
            generate_side("generate", theirs),
            generate_side("generate, static", theirs, static=PROMPT + NEW),
            generate_side("generate, grouped", theirs, experts=EXPERTS_PINNED),
        ]
        timings = measure(sides, prompts_BT, NEW, 2 if asked.quick else 5)
        for name, timing in timings.items():
            print(
                f"  {name:20} {timing.rate:8,.1f} tokens/s ({timing.least:,.1f} to {timing.most:,.1f})"
                f"  {1e3 * batch / timing.rate:7.2f} ms a step  first token {1e3 * timing.first:.0f} ms",
                flush=True,
            )
        best = max(timing.rate for name, timing in timings.items() if name != "engine")
        told = agreement(theirs, theirs, prompts_BT, sides[0].run(prompts_BT, NEW))
        claims.append(
            claim(f"batch {batch}: times the best of transformers", timings["engine"].rate / best, "x", target)
        )
        claims.append(claim(f"batch {batch}: greedy tokens as transformers, or a draw", told.draws, "share", 0.999))
    print(json.dumps({"benchmark": "decode_cpu", "machine": machine(), "claims": claims}))


if __name__ == "__main__":
    main()
