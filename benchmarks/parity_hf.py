"""Whether the open decoder and Hugging Face transformers give the same logits and tokens, on tiny random models.

    uv pip install --python .venv/bin/python --group peers      # transformers
    .venv/bin/python benchmarks/parity_hf.py
    .venv/bin/python benchmarks/parity_hf.py --quick             # one seed
    .venv/bin/python benchmarks/parity_hf.py --record            # the files that tests compare with

For each configuration in tests/golden/open_weights/cases.json transformers makes a model and saves it; all its weights
are then drawn anew, the balancing bias and the norms too, so that no part of a model can be left out unseen, and it
saves that in shards. Both work in fp32 on one thread; transformers runs its reference attention and its loop over the
experts. Tokens are compared up to the first that is a draw by less than MARGIN.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from decoder.open import OpenDecoder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "open_weights"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
TOLERANCE = 1e-4
NEW_TOKENS = 24
PROMPT_TOKENS = (37, 20)
# Two tokens closer than this are a draw: a row alone and a row in a batch differ in the last bits.
MARGIN = 1e-3


@dataclass(frozen=True)
class Answer:
    """What a model says to the prompts: logits `[T, V]` and greedy tokens of each, up to the first that is a draw."""

    logits: list[Tensor]
    tokens: list[list[int]]
    lead: float  # the least by which one of the tokens was chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed for each configuration, not five")
    parser.add_argument(
        "--record", action="store_true", help="write what transformers says to tests/golden/open_weights"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.record:
        record()
        return
    import transformers

    print(f"{'configuration':18} {'seeds':>5} {'prefill':>9} {'decode':>9} {'equal tokens':>14} {'least lead':>10}")
    claims: list[dict[str, object]] = []
    for name in CASES:
        seeds = range(1 if asked.quick else 5)
        runs = [compare(name, seed) for seed in seeds]
        prefill, decode = (max(run[i] for run in runs) for i in (0, 1))
        equal, compared = (sum(run[i] for run in runs) for i in (2, 3))
        lead = min(run[4] for run in runs)
        print(f"{name:18} {len(runs):5} {prefill:9.1e} {decode:9.1e} {equal:7}/{compared:<6} {lead:10.4f}")
        for stage, value in (("prefill", prefill), ("one-token decode", decode)):
            claims.append(claim(f"{name}: largest difference of logits, {stage}", value, "logit", TOLERANCE))
        claims.append(
            {
                "claim": f"{name}: greedy tokens equal",
                "value": equal,
                "unit": "tokens",
                "target": compared,
                "met": equal == compared > 0,
            }
        )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{platform.machine()}, 1 thread, {versions}, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "parity_hf", "machine": machine, "claims": claims}))
    if not all(each["met"] for each in claims):
        sys.exit(1)


def compare(name: str, seed: int) -> tuple[float, float, int, int, float]:
    """Largest differences in prefill and decode, tokens that are equal and that were compared, and the least lead."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = ask_transformers(name, seed, Path(scratch))
        decoder = OpenDecoder.from_pretrained(Path(scratch), dtype=torch.float32)
    ids = prompts(name, seed)
    prefill = difference([decoder(torch.tensor([each]))[0] for each in ids], theirs.logits)
    decode = difference([step_by_step(decoder, each) for each in ids], theirs.logits)
    equal = compared = 0
    alone = [decoder.generate([each], NEW_TOKENS, eos=())[0].ids for each in ids]
    together = [each.ids for each in decoder.generate(ids, NEW_TOKENS, eos=())]
    for mine in (alone, together):
        for ours, other in zip(mine, theirs.tokens, strict=True):
            equal += sum(a == b for a, b in zip(ours, other, strict=False))
            compared += len(other)
    return prefill, decode, equal, compared, theirs.lead


def ask_transformers(name: str, seed: int, folder: Path) -> Answer:
    """transformers' answer; leaves the model in the folder as transformers saves it, in shards."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch)
        config = transformers.AutoConfig.for_model(**CASES[name])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(drawn)
        write_weights(drawn / "model.safetensors", shapes_in(drawn / "model.safetensors"), seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            drawn, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    model.save_pretrained(folder, max_shard_size="300KB")
    logits, tokens, leads = [], [], []
    with torch.inference_mode():
        for ids in prompts(name, seed):
            logits.append(model(torch.tensor([ids])).logits[0])
            written = model.generate(
                torch.tensor([ids]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(written.logits).topk(2).values
            lead = (best[:, 0] - best[:, 1]).tolist()
            clear = next((i for i, each in enumerate(lead) if each < MARGIN), len(lead))
            tokens.append(written.sequences[0, len(ids) :].tolist()[:clear])
            leads += lead[:clear]
    return Answer(logits, tokens, min(leads, default=0.0))


def prompts(name: str, seed: int) -> list[list[int]]:
    """The prompts of a case, of different lengths."""
    chance = np.random.RandomState(crc32(f"{name} {seed} prompts".encode()))
    return [chance.randint(2, CASES[name]["vocab_size"], count).tolist() for count in PROMPT_TOKENS]


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file."""
    with safe_open(file, "np") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a mapping)


def write_weights(file: Path, shapes: dict[str, list[int]], seed: int) -> None:
    """Random weights by name and seed, the same everywhere (numpy keeps this generator's stream as it is)."""
    tensors = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(crc32(f"{name} {seed}".encode())).standard_normal(shape)
        if "norm" in name:
            values = 1 + 0.2 * values
        else:
            # Gates further apart than weights, so that rounding does not decide which experts are chosen.
            values *= {"mlp.gate.weight": 0.3, "mlp.gate.e_score_correction_bias": 0.3}.get(
                name.split(".", 3)[-1], 0.08
            )
        tensors[name] = values.astype(np.float32)
    save_file(tensors, file)


def step_by_step(decoder: OpenDecoder, ids: list[int]) -> Tensor:
    """Logits `[T, V]` of a prompt whose second half is given one token at a time."""
    cache = decoder.new_cache(1, len(ids))
    half = len(ids) // 2
    parts = [ids[:half], *([token] for token in ids[half:])]
    return torch.cat([decoder(torch.tensor([part]), cache)[0] for part in parts])


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def claim(what: str, value: float, unit: str, target: float) -> dict[str, object]:
    return {"claim": what, "value": float(f"{value:.2g}"), "unit": unit, "target": target, "met": value <= target}


def record() -> None:
    """Writes tensor names, tokens and logits of transformers, so that tests can compare without it."""
    import transformers

    seed, recorded, logits = 0, {}, {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            answer = ask_transformers(name, seed, Path(scratch))
            shapes = {k: v for file in sorted(Path(scratch).glob("*.safetensors")) for k, v in shapes_in(file).items()}
        if any(len(each) < NEW_TOKENS for each in answer.tokens):
            raise SystemExit(f"{name}: two tokens are a draw; change the seed")
        recorded[name] = {"seed": seed, "tokens": answer.tokens, "tensors": shapes}
        # Every fourth position is enough: each depends on all before it.
        logits |= {f"{name}.{row}": each[3::4].contiguous().numpy() for row, each in enumerate(answer.logits)}
    made_by = {"made_by": "benchmarks/parity_hf.py --record", "transformers": transformers.__version__}
    save_file(logits, GOLDEN / "logits.safetensors", metadata=made_by)
    text = json.dumps({**made_by, "cases": recorded})
    (GOLDEN / "recorded.json").write_text(text.replace('"}', '"}\n').replace("]}}", "]}}\n") + "\n")


if __name__ == "__main__":
    main()
