"""Trains the two vision networks: the glance (fields and CT class maps) and the detector (boxes of defects).

On a GPU a whole step (augmentation, forward, backward, optimiser, average) is captured once as a CUDA graph and
replayed: the step is many small kernels, and launching them costs more than running them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from encoders import Detector, GlanceNet
from pipelines.model import ModelConfig
from pipelines.training.augment import Augmentation, Batch, augmentation, draw, join
from pipelines.training.losses import evidence_loss, field_loss, presence_loss, type_loss
from pipelines.training.run import Ema, Run, capture, cosine, parameter_groups
from pipelines.training.streams import Stream, load_streams
from pipelines.weights import load_into

Network = TypeVar("Network", bound=nn.Module)
Drawn = TypeVar("Drawn")


class Mixture:
    """Draws batches with a fixed number of pictures from each stream, early or late in the run."""

    def __init__(self, streams: list[Stream], recipe: dict[str, Any]) -> None:
        known = {stream.name: stream for stream in streams}
        tables = {name: table for name, table in recipe["streams"].items() if table.get("batch") != 0}  # 0: left out
        if missing := sorted(set(tables) - set(known)):
            raise ValueError(f"the recipe names data sets that are not there: {', '.join(missing)}")
        self.side = recipe["side"]
        self.parts: list[tuple[Stream, int, Augmentation, Augmentation]] = []
        for name, table in tables.items():
            late = table.get("late", {})
            early = {key: value for key, value in table.items() if key != "late"}
            self.parts.append(
                (known[name], table["batch"], augmentation(early), augmentation(early | {"mosaic": 0.0} | late))
            )

    def draw(self, late: bool) -> Batch:
        batch = join([draw(stream, n, self.side, after if late else how) for stream, n, how, after in self.parts])
        batch.x = batch.x.contiguous(memory_format=torch.channels_last)
        return batch


def train_glance(run: Run, data: Path, device: torch.device, *, backbone: Path | None = None) -> GlanceNet:
    """Runs the recipe and returns the averaged network; `backbone` holds what the recipe `pretrain` wrote.

    Raises `DivergedError`, ValueError or `ManifestError`.
    """
    weights = run.recipe["loss"]

    def losses(network: GlanceNet, batch: Batch) -> dict[str, Tensor]:
        output = network(batch.x)
        return {
            "fields": field_loss(output.fields, batch.fields) * weights["fields"],
            "types": type_loss(output.maps_BTHW.mean((2, 3)), batch.types) * weights["types"],
        }

    def build() -> GlanceNet:
        config = ModelConfig.default(backbone=run.recipe["backbone"], last_stage=run.recipe["last_stage"]).glance
        network = GlanceNet(config, via_timm=run.recipe["pretrained"], pretrained=run.recipe["pretrained"])
        if backbone is not None:
            load_into(network.backbone, backbone)
            run.log(backbone=str(backbone))
        return network

    return _train(run, data, device, build, losses)


def train_detector(run: Run, data: Path, device: torch.device) -> Detector:
    """Runs the recipe and returns the averaged network. Raises as `train_glance` does."""
    weights = run.recipe["loss"]

    def losses(network: Detector, batch: Batch) -> dict[str, Tensor]:
        dense = network(batch.x)
        return {
            "boxes": evidence_loss(dense, batch.labels, batch.boxes, batch.valid) * weights["boxes"],
            "presence": presence_loss(dense.presence_BT, batch.labels, batch.valid) * weights["presence"],
        }

    return _train(run, data, device, lambda: Detector(ModelConfig.default().detector), losses)


def _train(
    run: Run,
    data: Path,
    device: torch.device,
    build: Callable[[], Network],
    losses: Callable[[Network, Batch], dict[str, Tensor]],
) -> Network:
    torch.manual_seed(run.recipe["seed"])
    streams = load_streams(data, "train", held_out=run.recipe["held_out"])
    mixture = Mixture([stream.to(device) for stream in streams], run.recipe)
    network = build().to(device).to(memory_format=torch.channels_last)
    network.train()
    return fit(run, mixture.draw, network, losses, device)


def fit(
    run: Run,
    draw: Callable[[bool], Drawn],
    network: Network,
    losses: Callable[[Network, Drawn], dict[str, Tensor]],
    device: torch.device,
) -> Network:
    """Trains what has gradients in `network`, which is on the device, and returns the averaged weights.

    `draw` is asked for early and for late batches.
    """
    recipe = run.recipe
    average = Ema(network, recipe["ema"])
    rate = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    groups = parameter_groups(network, recipe["weight_decay"])
    optimiser = torch.optim.AdamW(groups, lr=rate if on_gpu else 0.0, fused=on_gpu, capturable=on_gpu)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    names: list[str] = []

    def step(late: bool) -> Tensor:
        batch = draw(late)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            parts = losses(network, batch)
        names[:] = parts
        each = torch.stack(list(parts.values()))
        optimiser.zero_grad(set_to_none=True)
        each.sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe["clip"], foreach=True)
        optimiser.step()
        average.update()
        return each.detach()

    kept = {"network": network, "average": average.model, "optimiser": optimiser}
    first = run.resume(kept, device)
    for group in optimiser.param_groups if on_gpu else ():
        group["lr"] = rate  # a checkpoint brings a tensor of its own, which the schedule would not reach
    steps, late_from = recipe["steps"], 1 - recipe["late_share"]
    look_every = min(100, max(25, steps // 20))
    phases = (False, True) if recipe["late_share"] > 0 else (False,)
    replay = {late: capture(functools.partial(step, late)) for late in phases} if on_gpu else {}
    number, done = first, run.start(first)
    while done < 1:
        now = recipe["learning_rate"] * cosine(round(done * steps), steps, recipe["warmup"])
        if on_gpu:
            rate.fill_(now)
            graph, each = replay[done >= late_from]
            graph.replay()
        else:
            for group in optimiser.param_groups:
                group["lr"] = now
            each = step(done >= late_from)
        number += 1
        done = run.share(number)
        if number % look_every == 0 or done >= 1:
            run.check(each.sum(), number)
            run.log(step=number, **dict(zip(names, each.tolist(), strict=True)), rate=now)
        if number % recipe["checkpoint_every"] == 0 or done >= 1:
            run.save(number, kept)
    return average.model
