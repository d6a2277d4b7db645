"""How fast adaptive attention is on long texts, against full causal attention, and whether it finds a needle in them.

    .venv/bin/python -m benchmarks.attention_long --only time        # CPU, and the GPU where there is one
    .venv/bin/python -m benchmarks.attention_long --quick            # under a minute on two CPU cores
    .venv/bin/python -m benchmarks.attention_long --only needle --jobs 4    # minutes on a GPU; days without one

Time: one layer of the bundled decoder's width (192, 6 heads of 32), random weights; fp32 on a CPU, bf16 on a GPU.
"Attention" is what is between the projections, "layer" is end to end: projections, rotation, attention, output.
Prefill is a whole text at once (eight on a GPU); decode is one position of eight texts (64 on a GPU) behind a static
cache of that length. On a CPU that is a mean over the steps of a block, where each text ends at another place, through
layers with caches of their own: as in a decoder, a layer's cache has left the processor's by the next step, and a block
is pooled once in so many steps. On a GPU both kinds are CUDA graphs, so that neither is bound by launching kernels.
Full attention is torch's causal scaled_dot_product_attention, flash on a GPU. Both kinds run by turns; medians of the
runs, and the spread between quartiles.

Needle: a text of noise holds words that each stand for a key and a value; behind it stand the keys, each to be answered
with its value. Needles lie further back than the window reaches. Small decoders with either attention are trained
alike, on new texts at each step that grow from few words to the whole length: what to look for shows where there is
little else. A question takes one layer of attention, so that neither kind has to learn a detour first.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.racing import Call, captured, claim, machine, race
from decoder import AdaptiveAttentionConfig, AttentionConfig, Decoder, DecoderConfig, FullAttentionConfig
from decoder.attention import Places
from decoder.rotary import Rotary

WIDTHS = {192: (6, 32), 512: (8, 64)}  # heads and their width; the first is the bundled decoder's
TARGETS = {4096: 2.0, 8192: 4.0}
# Sequences at once
BATCH = {"cpu": {"prefill": 1, "decode": 8}, "cuda": {"prefill": 8, "decode": 64}}
STACK = 4  # layers through which steps on a CPU go


@dataclass(frozen=True)
class Needles:
    """A recall task and how long it is trained."""

    length: int
    needles: int  # in a text, each of which is asked for
    words: int = 16  # keys, values and noise words, each
    steps: int = 3000
    batch: int = 64
    seeds: int = 3
    window: int = 128
    stride: int = 16


FULL = Needles(length=1024, needles=8, steps=6000, batch=64, seeds=2, window=64, stride=8)
QUICK = Needles(length=512, needles=8, steps=20, batch=4, seeds=1, window=32, stride=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few lengths and steps; the needle is then not learned")
    parser.add_argument("--only", choices=("time", "needle"), help="one part; both where it is left out")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="all that are there where left out")
    parser.add_argument("--length", type=int, help="positions of a needle's text")
    parser.add_argument("--steps", type=int, help="training steps of the needle")
    parser.add_argument("--seeds", type=int, help="trainings of the needle")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once on one device")
    asked = parser.parse_args()
    devices = asked.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    claims: list[dict[str, object]] = []
    if asked.only != "needle":
        for device in devices:
            claims += timings(torch.device(device), quick=asked.quick)
    if asked.only != "time":
        task = QUICK if asked.quick else FULL
        given = {name: getattr(asked, name) for name in ("length", "steps", "seeds") if getattr(asked, name)}
        claims += needle(replace(task, **given), devices[-1], asked.jobs)
    print(json.dumps({"benchmark": "attention_long", "machine": machine(devices), "claims": claims}))


# Time


def timings(device: torch.device, *, quick: bool) -> list[dict[str, object]]:
    """Prints a table for one device; the claims are of the bundled decoder's width."""
    claims: list[dict[str, object]] = [agreement(device)]
    lengths = (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384)
    widths = list(WIDTHS) if device.type == "cuda" and not quick else [192]
    print(f"{device.type}: milliseconds, and full / adaptive")
    print(f"{'width':>5} {'':24} {'positions':>9} {'full':>9} {'spread':>7} {'adaptive':>9} {'spread':>7} {'ratio':>6}")
    for width in widths:
        for stage in ("prefill", "decode"):
            for length in lengths:
                for part, arms in cases(width, stage, length, device).items():
                    full, other = race([call for call, _ in arms], 5 if quick else 7, device)
                    full, other = (
                        [each / count for each in told] for told, (_, count) in zip((full, other), arms, strict=True)
                    )
                    ratio = full[0] / other[0]
                    name = f"{stage}, {part}"
                    print(
                        f"{width:5} {name:24} {length:9} {full[0]:9.3f} {full[1]:7.3f} {other[0]:9.3f} {other[1]:7.3f} "
                        f"{ratio:6.2f}",
                        flush=True,
                    )
                    if width == 192:
                        target = TARGETS.get(length) if part == "layer" else None
                        claims.append(
                            claim(f"{device.type}: {name}, {length} positions, full / adaptive", ratio, target)
                        )
    return claims


@torch.inference_mode()
def agreement(device: torch.device) -> dict[str, object]:
    """The largest difference of hidden states between a prompt as it is timed and the same one step by step."""
    torch.manual_seed(0)
    attention = AdaptiveAttentionConfig(heads=6, kv_heads=6, head_dim=32)
    config = DecoderConfig(vocabulary=8, length=700, attention=attention, experts=None, dense_hidden=384)
    decoder = Decoder(config).to(device)
    for layer in decoder.layers:
        nn.init.normal_(layer.attention.salience_Jd)  # type: ignore[union-attr,arg-type]
    x, cache = torch.randn(2, 700, config.width, device=device), decoder.new_cache(2)
    steps = [decoder.hidden(x[:, :500], cache)]
    step = x[:, :1].clone()
    saved = [(tensor, tensor.clone()) for tensor in (cache.used_B, *cache.buffers)]
    states: list[Tensor] = []
    run = captured(lambda: states.append(decoder.hidden(step, cache))) if device.type == "cuda" else None
    for tensor, kept in saved:  # capturing ran some steps
        tensor.copy_(kept)
    for t in range(500, 700):
        step.copy_(x[:, t : t + 1])
        if run is None:
            states.append(decoder.hidden(step, cache))
        else:
            run()
        steps.append(states[-1].clone())
    stepwise = torch.cat(steps, 1)
    apart = float((stepwise - decoder.hidden(x)).abs().max())
    print(f"{device.type}: prompt and steps differ by {apart:.1e}", end="")
    if device.type == "cuda":
        half = decoder.bfloat16().hidden(x.bfloat16()).float()  # by flash attention over windows
        print(
            f", in bfloat16 by {float((half - stepwise).abs().max()):.1e} of {float(stepwise.abs().max()):.1f}", end=""
        )
    print()
    return claim(
        f"{device.type}: largest difference of hidden states, prompt and steps", apart, 1e-3, unit="", most=True
    )


def cases(width: int, stage: str, length: int, device: torch.device) -> dict[str, list[tuple[Call, int]]]:
    """What is timed, and how many layers that is: for each part full attention first, then adaptive."""
    heads, dim = WIDTHS[width]
    sizes = {"heads": heads, "kv_heads": heads, "head_dim": dim}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = BATCH[device.type][stage]
    kinds: tuple[AttentionConfig, ...] = (FullAttentionConfig(**sizes), AdaptiveAttentionConfig(**sizes))
    found: dict[str, list[tuple[Call, int]]] = {"attention": [], "layer": []}
    block = AdaptiveAttentionConfig.stride if device.type == "cpu" and stage == "decode" else 1
    for config in kinds:
        torch.manual_seed(0)
        layers = [
            config.build(width, 1e-6).to(device, dtype).requires_grad_(False) for _ in range(STACK if block > 1 else 1)
        ]
        x = torch.randn(batch, length if stage == "prefill" else 1, width, device=device, dtype=dtype)
        steps = places(config, stage, length, batch, block, device, dtype)
        calls: dict[str, list[Call]] = {part: [] for part in found}
        for layer in layers:
            stored = None
            if stage == "decode":
                stored = tuple(torch.randn(batch, *each, device=device, dtype=dtype) for each in config.stored(length))
            for at in steps:
                calls["attention"].append(bind(layer.mix, x, *layer.project(x, at), at, stored))
                calls["layer"].append(bind(layer, x, at, stored))
        for part, each in calls.items():
            if device.type == "cuda":
                found[part].append((captured(each[0]), 1))
            else:
                # Step by step through all layers
                found[part].append((bind(run, [call for n in range(block) for call in each[n::block]]), len(each)))
    return found


def run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def bind(call: Callable[..., object], *arguments: object) -> Call:
    return lambda: call(*arguments)


def places(
    config: AttentionConfig,
    stage: str,
    length: int,
    batch: int,
    block: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Places]:
    """A whole text, or so many last positions behind a cache, each text's in another order."""
    rows = torch.arange(batch, device=device)[:, None]
    rotary = Rotary(config.rope, config.rotary_dim).to(device)
    if stage == "prefill":
        positions = torch.arange(length, device=device)[None]
        return [Places(positions, rows, None, *rotary(positions))]
    steps = [length - 1 - (step + 5 * rows) % block for step in range(block)]
    # Masks are made once for all layers of a decoder.
    return [
        Places(positions, rows, None, *rotary(positions), config.masks(positions, length, dtype)) for positions in steps
    ]


# Needle


def needle(task: Needles, device: str, jobs: int) -> list[dict[str, object]]:
    """Trains both kinds and compares what they find."""
    print(f"\nneedle: {task.needles} in {task.length} words, window {task.window}")
    runs = [(name, seed) for seed in range(task.seeds) for name in ("full", "adaptive")]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(recall, name, task, seed, device) for name, seed in runs]
            found = dict(zip(runs, [future.result() for future in futures], strict=True))
    else:
        found = {run: recall(run[0], task, run[1], device) for run in runs}
    means = {}
    for name in ("full", "adaptive"):
        each = [found[name, seed] for seed in range(task.seeds)]
        means[name] = statistics.mean(each)
        print(f"{name:9} {', '.join(f'{accuracy:.2%}' for accuracy in each)} found")
    claims = [claim(f"needle accuracy, {name}, mean of seeds", mean) for name, mean in means.items()]
    # With few steps nothing is learned, and there is nothing to compare.
    target = 0.0 if task.steps >= FULL.steps else None
    return [*claims, claim("needle accuracy, adaptive less full", means["adaptive"] - means["full"], target)]


def recall(name: str, task: Needles, seed: int, place: str) -> float:
    """The share of values told rightly after training on texts that grow from a few words to the whole length."""
    device, started = torch.device(place), time.perf_counter()
    torch.manual_seed(seed)
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": 32}
    kind: AttentionConfig = FullAttentionConfig(**sizes)
    if name == "adaptive":
        kind = AdaptiveAttentionConfig(**sizes, window=task.window, stride=task.stride)
    config = DecoderConfig(
        vocabulary=(2 + task.words) * task.words,
        width=128,
        layers=2,
        length=task.length,
        attention=kind,
        experts=None,
        dense_hidden=256,
    )
    decoder = Decoder(config).to(device)
    chance = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def told(length: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, values = texts(replace(task, length=length), task.batch, chance, device)
        with half:
            hidden = decoder.hidden(decoder.embed(ids))[:, -task.needles :]
            return ids, values, decoder.logits(hidden)[..., : task.words].float()

    for step in range(task.steps):
        rate = 2e-3 * min(1.0, (step + 1) / 100) * min(1.0, 4 * (task.steps - step) / task.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        _, values, logits = told(grown(task, step / task.steps))
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % max(1, task.steps // 5) == 0:
            seconds = time.perf_counter() - started
            print(f"  {name} {seed}, step {step + 1}: loss {float(loss.detach()):.3f}, {seconds:.0f} s", flush=True)
    decoder.eval()
    right, alone = [], []
    with torch.no_grad():
        for _ in range(16):
            ids, values, logits = told(task.length)
            right.append(logits.argmax(-1) == values)
            alone.append(by_itself(task, ids))
    found, single = torch.cat(right).double(), torch.cat(alone)
    parts = [float(found[kind].mean()) for kind in (single, ~single)]
    print(
        f"  {name} {seed}: {float(found.mean()):.2%} found, {parts[0]:.2%} of those alone in a block of {task.stride}, "
        f"{parts[1]:.2%} of the others ({float((~single).double().mean()):.1%})",
        flush=True,
    )
    return float(found.mean())


def by_itself(task: Needles, ids: Tensor) -> Tensor:
    """For each question whether the needle that it asks for shares its block with no other, `[B, needles]`."""
    needle = ids >= 2 * task.words
    others = F.pad(needle, (0, -task.length % task.stride)).unflatten(1, (-1, task.stride)).sum(-1)
    crowd = others.repeat_interleave(task.stride, 1)[:, : task.length]
    key = torch.where(needle, ids // task.words - 2, -1)
    asked = key[:, None] == ids[:, -task.needles :, None]
    return (crowd[:, None] * asked).sum(-1) == 1


def grown(task: Needles, share: float) -> int:
    """A text's length after a share of the training: what to look for is learned where there is little else."""
    shortest = min(task.length, 5 * task.needles)
    over = min(1.0, max(0.0, (share - 0.2) / 0.5))
    # In 16 steps: cuDNN plans attention anew for each length, which takes longer than training on it.
    return round(shortest * (task.length / shortest) ** (math.floor(16 * over) / 16))


def texts(task: Needles, batch: int, chance: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word ids `[B, length]`, a question about each needle at the end, and the values asked for `[B, needles]`.

    Words: questions (one for each key), then noise, then needles (one for each key and value).
    """
    keys, count = task.words, task.needles
    ids = torch.randint(keys, 2 * keys, (batch, task.length), generator=chance, device=device)
    key = torch.rand(batch, keys, generator=chance, device=device).argsort(1)[:, :count]
    value = torch.randint(keys, key.shape, generator=chance, device=device)
    # Needles lie where no window reaches from where they are asked for, in texts that are long enough.
    room = max(2 * count, task.length - count - 2 * task.window)
    place = torch.rand(batch, room, generator=chance, device=device).argsort(1)[:, :count]
    ids.scatter_(1, place, 2 * keys + keys * key + value)
    which = torch.rand(batch, count, generator=chance, device=device).argsort(1)
    ids[:, -count:] = key.gather(1, which)
    return ids, value.gather(1, which)


if __name__ == "__main__":
    main()
