"""Tokens a second on a GPU against Hugging Face transformers, on the same weights: batch 1, 32 and 256, in bfloat16.

    .venv/bin/python -m benchmarks.decode_gpu
    .venv/bin/python -m benchmarks.decode_gpu --models 400M --batches 1 256   # where time is short: those with targets
    .venv/bin/python -m benchmarks.decode_gpu --quick             # one small model, fewer repeats; without a GPU: tiny
    .venv/bin/python -m benchmarks.decode_gpu --models 400M --batches 1 --peers none

Peers: `generate` as it comes; with a static cache, which transformers then compiles; with its grouped matrix product
pinned; both together; and `generate_batch`. The best of them is "the best of transformers". All sides get the same
prompts and write the same number of tokens; they take turns. In bfloat16 two implementations write different tokens
where rounding decides, more so with random weights, whose experts are close to each other; so tokens are compared with
what transformers writes in fp32: ours in bfloat16 as often equal as transformers' in bfloat16, and ours in fp32 equal
but for draws.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding import (
    EXPERTS_PINNED,
    MARGIN,
    Side,
    agreement,
    batching_side,
    claim,
    engine_side,
    exact_model,
    generate_side,
    machine,
    make_model,
    measure,
)
from decoder import Decoder
from decoder.open import OpenDecoder

PROMPT, NEW = 256, 96
COMPARED = 32  # prompts at least whose tokens are compared
TARGETS = {1: (15, 2), 256: (10, 1.5)}  # times the default, times the best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 30M model alone, two repeats, no compiled peers")
    parser.add_argument("--models", nargs="+", default=None, help="30M, 400M")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256, 32], help="in this order")
    parser.add_argument("--peers", choices=("all", "fast", "none"), default="all", help="fast: none that compiles")
    parser.add_argument("--variants", action="store_true", help="our engine in other ways, too: what each part gains")
    parser.add_argument("--profile", action="store_true", help="which kernels a step of ours spends its time in")
    asked = parser.parse_args()
    gpu = torch.cuda.is_available()
    names = asked.models or (["30M"] if asked.quick else ["30M", "400M"]) if gpu else ["tiny"]
    peers = "fast" if asked.quick and asked.peers == "all" else asked.peers
    bandwidth = measured_bandwidth() if gpu else float("nan")
    print(f"{machine()}; copies {bandwidth / 1e12:.2f} TB/s", flush=True)
    claims, started = [], time.perf_counter()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = make_model(name, Path(folder), torch.bfloat16, "cuda" if gpu else "cpu")
            mine = OpenDecoder.from_pretrained(folder, dtype=torch.float32, device="cuda" if gpu else "cpu")
        config = ours.config
        print(f"{name}: {config.parameters / 1e6:.0f}M parameters, {config.active_parameters / 1e6:.0f}M active")
        exact = exact_model(theirs)
        prompts_BT, new = torch.randint(2, config.vocabulary, (COMPARED, PROMPT if gpu else 8)), NEW if gpu else 4
        equal = agreement(theirs, exact, prompts_BT, engine_side("", mine, prompts_BT, new).run(prompts_BT, new)).draws
        print(f"fp32, batch {COMPARED}: greedy tokens as transformers in fp32, or a draw within {MARGIN}: {equal:.3%}")
        claims.append(claim(f"{name}, fp32: greedy tokens as transformers in fp32, or a draw", equal, "share", 0.999))
        del mine
        reset()
        for batch in asked.batches if gpu else [1, 2]:
            torch.manual_seed(batch)
            prompts_BT = torch.randint(2, config.vocabulary, (batch, PROMPT if gpu else 8))
            sides = [engine_side("engine", ours, prompts_BT, new)]
            if asked.variants:
                sides += variant_sides(ours, prompts_BT, new)
            sides += peer_sides(theirs, prompts_BT, new, peers)
            print(f"batch {batch}", flush=True)
            timings = measure(sides, prompts_BT, new, 2 if asked.quick else 5)
            best = max((t.rate for n, t in timings.items() if not n.startswith("engine")), default=float("nan"))
            context = prompts_BT.shape[1] + new / 2
            for side in sides:
                if side.failed:
                    continue
                timing = timings[side.name]
                share = batch_bytes(ours, batch, context) * timing.rate / batch / bandwidth
                print(
                    f"  {side.name:34} {timing.rate:11,.0f} tokens/s ({timing.least:,.0f} to {timing.most:,.0f})"
                    f"  {1e3 * batch / timing.rate:7.3f} ms a step  {share:6.1%} of bandwidth"
                    f"  first token {1e3 * timing.first:.1f} ms",
                    flush=True,
                )
            mine = timings["engine"].rate
            if asked.profile:
                profile(sides[0], prompts_BT, new)
            # Enough tokens that one of them does not decide, one batch after another
            more_BT = torch.randint(2, config.vocabulary, (max(0, COMPARED - batch), prompts_BT.shape[1]))
            compared_BT = torch.cat((prompts_BT, more_BT))
            told = agreement(theirs, exact, compared_BT, sides[0].run(compared_BT, new))
            print(
                f"  greedy tokens: {told.as_theirs:.2%} as transformers in bf16; as fp32 {told.as_exact:.2%} of ours, "
                f"{told.theirs_as_exact:.2%} of transformers'; behind fp32's by {told.behind:.4f}, "
                f"{told.theirs_behind:.4f} on average",
                flush=True,
            )
            for times, whose, rate in zip(
                TARGETS.get(batch, (None, None)),
                ("generate", "the best of transformers"),
                (timings["generate"].rate if "generate" in timings else float("nan"), best),
                strict=True,
            ):
                if rate == rate and times is not None:
                    claims.append(claim(f"{name}, batch {batch}: times {whose}", mine / rate, "x", times))
            as_exact = f"{name}, batch {batch}: greedy tokens that fp32 writes too, ours to transformers'"
            claims.append(claim(as_exact, told.as_exact / told.theirs_as_exact, "ratio", 0.99))
            del sides
            if peers != "none":
                theirs.destroy_cached_continuous_batching_manager()
            reset()
        del theirs, exact, ours
        reset()
    print(f"{time.perf_counter() - started:.0f} s in all")
    print(json.dumps({"benchmark": "decode_gpu", "machine": machine(), "claims": claims}))


def variant_sides(decoder: Decoder, prompts_BT: Tensor, new: int) -> list[Side]:
    """Our engine without graphs, with PyTorch's kernels, and with those that its compiler makes."""
    sides = [engine_side("engine, no graphs", decoder, prompts_BT, new, graphs=False)]
    plain = engine_side("engine, PyTorch's kernels", decoder, prompts_BT, new)
    assert plain.engine is not None
    plain.engine._runner.hidden = decoder.hidden
    return [*sides, plain, engine_side("engine, compiled", decoder, prompts_BT, new, compile=True)]


def profile(side: Side, prompts_BT: Tensor, new: int) -> None:
    """Prints the kernels that decoding takes most time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        side.run(prompts_BT, new)
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    print(f"  kernels, {total / 1e3:.1f} ms in all:")
    for row in rows[:16]:
        print(f"    {row.device_time_total / total:6.1%} {row.device_time:9.2f} us x {row.count:6}  {row.key[:80]}")


def peer_sides(model: Any, prompts_BT: Tensor, new: int, peers: str) -> list[Side]:
    """The ways that transformers offers. Pinned experts pay where many tokens share one, if anywhere."""
    if peers == "none":
        return []
    batch, length = prompts_BT.shape
    experts = EXPERTS_PINNED if batch > 32 else None
    sides = [generate_side("generate", model), batching_side("generate_batch", model, experts=experts)]
    if experts:
        sides.append(generate_side("generate, grouped", model, experts=experts))
    if peers == "all":
        name = "generate, static, compiled"
        sides.append(generate_side(name, model, static=length + new))
        if experts:
            sides.append(generate_side(f"{name}, grouped", model, experts=experts, static=length + new))
    return sides


def batch_bytes(decoder: Decoder, batch: int, context: float) -> float:
    """Bytes that a step has to read: weights, experts only where some token of the batch goes to them, and cache."""
    config = decoder.config
    assert config.experts is not None
    idle = config.parameters - config.active_parameters
    share = config.experts.active / config.experts.count
    routed = idle / (1 - share)
    used = routed * (1 - (1 - share) ** batch)
    embedding = config.vocabulary * config.width * (not config.tied)
    weights = config.parameters - routed - embedding + used
    return 2.0 * weights + batch * config.cache_bytes(int(context), torch.bfloat16)


def measured_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best


def reset() -> None:
    """Frees what a batch size took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
