"""What a grammar costs a step, and what it saves: on whatever device there is.

    .venv/bin/python -m benchmarks.grammar_cost
    .venv/bin/python -m benchmarks.grammar_cost --quick           # fewer repeats, small batches

A step of the 30M model of `benchmarks.decode_gpu` (hidden states, logits, choice; on a GPU in bfloat16 as one CUDA
graph) is timed with the report's automaton and without, on its own vocabulary and on one of 128,000 tokens, in turns.
Both choose one token; what else the grammar forces is left out there. Then the bundled model reads the pictures in
examples/ and its decided steps are counted beside the tokens that it writes (on machines with all of ScanScribe).
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.decoding import MODELS
from benchmarks.racing import Call, captured, claim, machine, race
from decoder import Decoder, DecoderConfig, ExpertsConfig, FullAttentionConfig
from decoder.engine import Completion, Engine, Grammar, Request
from decoder.engine.rows import DeviceGrammar, Rows
from decoder.engine.runner import Runner
from reports.grammar import TOKENS, compile_grammar

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT = 256  # positions in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, small batches")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = (1, 32, 256) if device.type == "cuda" else (1, 8)
    print(machine([device.type]), flush=True)
    print(f"{'vocabulary':>10} {'batch':>5} {'without':>10} {'with':>10} {'cost':>14}")
    claims = []
    for vocabulary in (len(TOKENS), 128_000):
        decoder, grammar = make_decoder(vocabulary, device), wide_grammar(vocabulary)
        for batch in batches[: 2 if asked.quick else None]:
            arms = [step(decoder, batch, None), step(decoder, batch, grammar)]
            if device.type == "cuda":
                arms = [captured(arm) for arm in arms]
            (without, spread), (with_, _) = race(arms, 11 if asked.quick else 41, device)
            cost = with_ / without - 1
            print(
                f"{vocabulary:10,} {batch:5} {without:7.3f} ms {with_:7.3f} ms {cost:7.2%}  (quartiles of a step "
                f"{spread / without:.1%} apart)",
                flush=True,
            )
            what = f"{vocabulary:,} tokens, batch {batch}: the automaton, of a step"
            claims.append(claim(what, cost, 0.02, unit="share", most=True))
        del decoder
    try:
        claims.append(decided_steps())
    except ImportError as error:
        print(f"decided steps are not counted here: {error}")
    print(json.dumps({"benchmark": "grammar_cost", "machine": machine([device.type]), "claims": claims}))


def make_decoder(vocabulary: int, device: torch.device) -> Decoder:
    """The 30M model of another vocabulary, with random weights."""
    sizes = MODELS["30M"]
    heads = {"heads": sizes["num_attention_heads"], "kv_heads": sizes["num_key_value_heads"]}
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(
            vocabulary=vocabulary,
            width=sizes["hidden_size"],
            layers=sizes["num_hidden_layers"],
            length=CONTEXT + 64,
            attention=FullAttentionConfig(head_dim=sizes["head_dim"], qk_norm="head", **heads),
            experts=ExpertsConfig(
                count=sizes["num_experts"],
                active=sizes["num_experts_per_tok"],
                hidden=sizes["moe_intermediate_size"],
                shared_hidden=0,
                score="softmax",
                balanced=False,
            ),
        )
    )
    decoder = decoder.eval().requires_grad_(False).to(device)
    return decoder.bfloat16() if device.type == "cuda" else decoder


def wide_grammar(vocabulary: int) -> Grammar:
    """The report's grammar; tokens beyond the report's own are more ways to write those."""
    report = Grammar.from_table(compile_grammar())
    more = np.random.default_rng(0).choice(report.class_V, vocabulary - report.vocabulary)
    return Grammar(report.next_SC, np.concatenate((report.class_V, more)))


def step(decoder: Decoder, batch: int, grammar: Grammar | None) -> Call:
    """One step of a batch in the middle of its reports, again and again from the same state."""
    runner = Runner(decoder, batch, CONTEXT + 32, None, None, 0, graphs=False, compile=False)
    states = len(grammar.next_SC) if grammar else 0
    device = runner.device
    rows = Rows.zeros(batch, decoder.config.vocabulary, 1, states, 0, device)
    tables = None
    if grammar is not None:
        rules = grammar.rules_of()
        rows = replace(
            rows,
            only_BS=torch.from_numpy(rules.only_S).to(device).expand(batch, -1).contiguous(),
            ways_BS=torch.from_numpy(rules.ways_S).to(device).expand(batch, -1).contiguous(),
        )
        tables = DeviceGrammar.of(grammar, device)
        # States with a choice
        inner = np.flatnonzero((rules.only_S < 0) & (rules.ways_S > 0) & (rules.ways_S < 1000))
        start_B = torch.from_numpy(np.resize(inner, batch).astype(np.int32)).to(device)
    else:
        start_B = torch.zeros(batch, dtype=torch.int32, device=device)
    runner.grammar = tables
    # The same tokens in both arms, and different ones in each row: what they are decides how many experts are read.
    tokens_B1 = torch.randint(decoder.config.vocabulary, (batch, 1), generator=torch.Generator().manual_seed(1)).to(
        device
    )

    def once() -> None:
        rows.tokens_BW.copy_(tokens_B1)
        rows.left_B.fill_(1 << 20)
        rows.state_B.copy_(start_B)
        runner.cache.used_B.fill_(CONTEXT)
        runner._step(rows, runner.cache, 1, sampling=False, forbidding=False)

    return once


def decided_steps() -> dict[str, object]:
    """Forwards that chose a token, of the tokens that the bundled model writes about the pictures in examples/."""
    from pipelines.ingest import load, plan  # all of ScanScribe
    from pipelines.reader import Reader
    from pipelines.study import Rejection

    reader = Reader.load(device="cpu")
    done: list[Completion] = []
    studies = [load(unit) for unit in plan([EXAMPLES / each for each in ("board", "steel", "tile", "ct")]).units]
    for study in studies:
        assert not isinstance(study, Rejection)
        reader.read(study)
        engine = reader._engine
        assert engine is not None
        if not done:
            reader._engine = Counted(engine, done)  # type: ignore[assignment]
            reader.read(study)
    decisions, tokens = sum(each.decisions for each in done), sum(len(each.ids) for each in done)
    print(f"bundled model, {len(done)} pictures: {decisions} decided steps for {tokens} tokens")
    return claim("bundled model on examples/: decided steps a token", decisions / tokens, 0.6, most=True)


class Counted:
    """An engine whose completions are kept."""

    def __init__(self, engine: Engine, done: list[Completion]) -> None:
        self.engine, self.done = engine, done

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """As the engine's."""
        completions = self.engine.generate(requests)
        self.done.extend(completions)
        return completions


if __name__ == "__main__":
    main()
