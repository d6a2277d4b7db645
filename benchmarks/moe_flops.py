"""What the mixture of experts costs and is worth, against a dense decoder of as many parameters.

    .venv/bin/python -m benchmarks.moe_flops                          # CPU, and the GPU where there is one
    .venv/bin/python -m benchmarks.moe_flops --quick                  # under a minute on two CPU cores
    .venv/bin/python -m benchmarks.moe_flops --train-data text.npy    # text as token ids, uint8 or uint16

FLOPs of a forward pass are counted, always of the full sizes, by torch's FlopCounterMode with the formulas of
`decoder.flops`, and checked against what the configuration says. Arms: dense; the mixture; with cooperation of the
experts (low-rank attention over their results); with a number of experts that varies from token to token; and dense
with as many FLOPs as the mixture. All are trained alike, as language models, on the same tokens in the same order, each
at the better of two learning rates; the loss is the mean over validation tokens that no arm was trained on, the last
twentieth of the text. Without --train-data the text is the source of Python's standard library, as bytes.
Wall clock: forward passes of both decoders over T new tokens, by turns in one process; as CUDA graphs on a GPU, where
also the experts are timed with gathered weights and with the grouped product.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import decoder.flops
import decoder.moe
from benchmarks.racing import Call, captured, claim, machine, race
from decoder import Decoder, DecoderConfig, ExpertsConfig, FullAttentionConfig
from decoder.moe import Experts

RATIO, WORSE = 0.35, 1.01  # FLOPs, loss: at most so many times the dense decoder's
DENSE, THIN = "dense", "dense of equal FLOPs"
MOE, COOPERATING = "mixture", "mixture, cooperating"
# A number of experts that varies: those stay whose score is at least so much of the best one's.
VARYING = {"mixture, from 0.5": 0.5, "mixture, from 0.8": 0.8}
ARMS = (DENSE, MOE, COOPERATING, *VARYING, THIN)
VALIDATION = 20  # one part of so many


@dataclass(frozen=True)
class Sizes:
    """A decoder and how it is trained."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 512
    experts: ExpertsConfig = ExpertsConfig(count=32, active=4, hidden=128, shared_hidden=256)  # noqa: RUF009 (frozen)
    cooperation: int = 32
    steps: int = 500
    batch: int = 24
    rates: tuple[float, ...] = (2e-3, 4e-3)
    seeds: int = 2
    balance: float = 1e-3

    def arm(self, name: str, vocabulary: int) -> DecoderConfig:
        """The decoder of an arm."""
        attention = FullAttentionConfig(heads=self.heads, kv_heads=self.heads, head_dim=self.width // self.heads)
        config = DecoderConfig(
            vocabulary=vocabulary,
            width=self.width,
            layers=self.layers,
            length=max(self.length, 8192),
            attention=attention,
            experts=self.experts,
        )
        if name == COOPERATING:
            return replace(config, experts=replace(self.experts, cooperation=self.cooperation))
        if name in VARYING:
            # Half as many experts more at most, so that as many as before may be left on average.
            active = self.experts.active + self.experts.active // 2
            return replace(config, experts=replace(self.experts, active=active, threshold=VARYING[name]))
        if name in (DENSE, THIN):
            experts = self.experts.parameters(self.width) if name == DENSE else self.experts.flops(self.width) // 2
            hidden = experts // (3 * self.width) // 8 * 8
            return replace(config, experts=None, dense_hidden=hidden)
        return config


FULL = Sizes()
QUICK = Sizes(
    width=64,
    layers=2,
    heads=2,
    length=128,
    experts=ExpertsConfig(count=16, active=2, hidden=32, shared_hidden=64),
    cooperation=8,
    steps=12,
    batch=4,
    rates=(2e-3,),
    seeds=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="losses of a small decoder and few steps, which say little"
    )
    parser.add_argument("--only", choices=("cost", "train"), help="one part; both where it is left out")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="all that are there where left out")
    parser.add_argument("--train-data", type=Path, help="token ids, a .npy file of uint8 or uint16 in one dimension")
    parser.add_argument("--steps", type=int, help="training steps of each arm")
    parser.add_argument("--seeds", type=int, help="trainings of dense and mixture at each learning rate")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once on one device")
    asked = parser.parse_args()
    given = {name: getattr(asked, name) for name in ("steps", "seeds") if getattr(asked, name)}
    sizes = replace(QUICK if asked.quick else FULL, **given)
    devices = asked.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    claims: list[dict[str, object]] = []
    if asked.only != "train":
        claims += counted(FULL)
        for device in devices:
            claims += timed(sizes, torch.device(device), quick=asked.quick)
        if "cuda" in devices:
            gathered(sizes)
    if asked.only != "cost":
        claims += trained(sizes, devices[-1], asked.train_data, asked.jobs)
    print(json.dumps({"benchmark": "moe_flops", "machine": machine(devices), "claims": claims}))


# FLOPs


def counted(sizes: Sizes) -> list[dict[str, object]]:
    """FLOPs a token of each arm, as counted and as the configuration says."""
    print(f"{'arm':24} {'parameters':>11} {'active':>11} {'FLOPs a token':>14} {'configuration':>14} {'of dense':>9}")
    claims, counts = [], {}
    for name in ARMS:
        config = sizes.arm(name, 256)
        model = Decoder(config).eval().requires_grad_(False)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, sizes.length, dtype=torch.long))
        counts[name] = counter.get_total_flops() / sizes.length
        expected = config.flops_per_token(sizes.length)
        if not math.isclose(counts[name], expected, rel_tol=0.01):
            raise SystemExit(f"{name}: {counts[name]:.0f} FLOPs a token are counted, {expected} expected")
        of_dense = counts[name] / counts[DENSE]
        print(
            f"{name:24} {config.parameters:11,} {config.active_parameters:11,} {counts[name]:14,.0f} {expected:14,} "
            f"{of_dense:9.3f}"
        )
        if name in (MOE, COOPERATING):
            claims.append(claim(f"FLOPs a token, {name} / dense of equal parameters", of_dense, RATIO, most=True))
    return claims


# Wall clock


def timed(sizes: Sizes, device: torch.device, *, quick: bool) -> list[dict[str, object]]:
    """Forward passes of the dense decoder and of the mixture over T new tokens."""
    print(f"\n{device.type}: milliseconds of a forward pass")
    print(f"{'T':>6} {'dense':>9} {'spread':>7} {'mixture':>9} {'spread':>7} {'dense / mixture':>16}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    claims = []
    for count in (1, 256) if quick else (1, 256, 8192):
        arms: list[Call] = []
        for name in (DENSE, MOE):
            torch.manual_seed(0)
            model = Decoder(sizes.arm(name, 256)).to(device, dtype).eval().requires_grad_(False)
            rows = max(1, count // 1024)
            ids = torch.randint(256, (rows, count // rows), device=device)
            arms.append(captured(lambda m=model, i=ids: m(i)) if device.type == "cuda" else lambda m=model, i=ids: m(i))
        dense, mixture = race(arms, 5 if quick else 7, device)
        ratio = dense[0] / mixture[0]
        print(
            f"{count:6} {dense[0]:9.3f} {dense[1]:7.3f} {mixture[0]:9.3f} {mixture[1]:7.3f} {ratio:16.2f}", flush=True
        )
        claims.append(claim(f"{device.type}: wall clock of {count} tokens, dense / mixture", ratio))
    return claims


def gathered(sizes: Sizes) -> None:
    """Where gathering the experts' weights stops to pay on a GPU."""
    device = torch.device("cuda")
    print("\ncuda: microseconds of a layer's experts in a CUDA graph")
    print(f"{'tokens':>6} {'pairs':>6} {'gathered':>9} {'sorted':>9}")
    for width, config in ((sizes.width, sizes.experts), (1024, ExpertsConfig(count=32, active=4, hidden=256))):
        layer = Experts(width, config).to(device, torch.bfloat16).requires_grad_(False)
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
            chosen = torch.rand(tokens, config.count, device=device).topk(config.active).indices
            arms = []
            for limit in (1 << 30, 0):
                decoder.moe.GATHERED = limit  # type: ignore[misc]
                arms.append(captured(lambda m=layer, x=x, c=chosen: m(x, c)))
            (by_gather, _), (by_sort, _) = race(arms, 7, device)
            print(f"{tokens:6} {chosen.numel():6} {by_gather * 1000:9.1f} {by_sort * 1000:9.1f}", flush=True)


# Training


def corpus(file: Path | None) -> np.ndarray:
    """Token ids in one dimension."""
    if file is not None:
        return np.load(file)
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [p for p in sorted(folder.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(p.parts)]
    return np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)


def trained(sizes: Sizes, device: str, file: Path | None, jobs: int) -> list[dict[str, object]]:
    """Trains every arm and compares what is left of the loss."""
    tokens = len(corpus(file))
    seen = sizes.steps * sizes.batch * sizes.length
    print(f"\ntraining on {device}: {tokens:,} tokens of text, {seen:,} in each training", flush=True)
    # Options and the thin decoder in one seed: they bear on no target.
    seeds = {name: range(sizes.seeds if name in (DENSE, MOE) else 1) for name in ARMS}
    runs = [(name, rate, seed) for name in ARMS for rate in sizes.rates for seed in seeds[name]]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train, sizes, *run, device, file) for run in runs]
            results = [future.result() for future in futures]
    else:
        results = [train(sizes, *run, device, file) for run in runs]
    found = dict(zip(runs, results, strict=True))
    print(
        f"{'arm':24} {'rate':>6} {'loss, mean':>10} {'lowest':>8} {'highest':>8} {'experts':>8} {'busiest':>8} {'s':>5}"
    )
    best: dict[str, float] = {}
    experts: dict[str, float] = {}
    for name in ARMS:
        for rate in sizes.rates:
            these = [found[name, rate, seed] for seed in seeds[name]]
            losses, mean = [each.loss for each in these], statistics.mean(each.loss for each in these)
            if mean < best.get(name, math.inf):
                best[name], experts[name] = mean, statistics.mean(each.experts for each in these)
            print(
                f"{name:24} {rate:6.4f} {mean:8.4f} {min(losses):8.4f} {max(losses):8.4f} {these[0].experts:8.2f} "
                f"{these[0].busiest:8.2f} {statistics.mean(each.seconds for each in these):5.0f}"
            )
    target = WORSE if sizes.steps >= FULL.steps else None
    claims = [claim(f"validation loss, {MOE} / {DENSE}, equal tokens", best[MOE] / best[DENSE], target, most=True)]
    for name in ARMS[2:]:
        claims.append(claim(f"validation loss, {name} / {DENSE}, equal tokens", best[name] / best[DENSE]))
    claims += [claim(f"experts a token, {name}", experts[name], unit="experts") for name in VARYING]
    return claims


@dataclass(frozen=True)
class Trained:
    """What became of a training."""

    loss: float  # nats a token, on validation text
    experts: float  # a token and layer, on average
    busiest: float  # tokens of the busiest expert over the mean, on average over layers
    seconds: float


def train(sizes: Sizes, name: str, rate: float, seed: int, device: str, file: Path | None) -> Trained:
    """Trains an arm."""
    if device == "cuda":
        torch.set_num_threads(1)
    data = torch.from_numpy(corpus(file).astype(np.int64)).to(device)
    cut = len(data) - len(data) // VALIDATION
    torch.manual_seed(seed)
    model = Decoder(sizes.arm(name, int(data.max()) + 1)).to(device).train()
    chance = torch.Generator().manual_seed(seed)
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")
    routers = [module for module in model.modules() if isinstance(module, decoder.moe.Router)]
    started, counts, busiest = time.perf_counter(), 0.0, 1.0
    for step in range(sizes.steps):
        warm, done = min(1.0, (step + 1) / 100), step / sizes.steps
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        loss = language_loss(model, windows(data[:cut], sizes, sizes.batch, chance))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if routers and step == sizes.steps - 1:
            loads = torch.stack([router.load_E for router in routers])
            counts = float(loads.sum()) / (len(routers) * sizes.batch * sizes.length)
            busiest = float((loads.amax(1) / loads.mean(1)).mean())
        model.rebalance(sizes.balance)
    model.eval()
    seconds, held = time.perf_counter() - started, torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [
            float(language_loss(model, windows(data[cut:], sizes, sizes.batch, held)))
            for _ in range(min(16, sizes.steps))
        ]
    loss = statistics.mean(losses)
    print(f"  {name}, rate {rate}, seed {seed}: {loss:.4f}, {counts:.2f} experts, {seconds:.0f} s", flush=True)
    return Trained(loss, counts, busiest, seconds)


def windows(data: Tensor, sizes: Sizes, batch: int, chance: torch.Generator) -> Tensor:
    """Random stretches of the text, `[B, length + 1]`."""
    first = torch.randint(len(data) - sizes.length - 1, (batch, 1), generator=chance).to(data.device)
    return data[first + torch.arange(sizes.length + 1, device=data.device)]


def language_loss(model: Decoder, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


if __name__ == "__main__":
    main()
