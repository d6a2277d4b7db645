"""Trains the vision encoder: dense evidence on the defect pictures, class maps and fields on the CT images.

On a GPU a whole step (augmentation, forward, backward, optimiser, average) is captured once as a CUDA graph and
replayed: the step is many small kernels, and launching them costs more than running them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders import EvidenceEncoder
from pipelines.model import ModelConfig
from pipelines.training.augment import Augmentation, Batch, augmentation, draw, join
from pipelines.training.losses import evidence_loss, field_loss, type_loss
from pipelines.training.run import Ema, Run, capture, cosine, parameter_groups
from pipelines.training.streams import Stream, load_streams


class Mixture:
    """Draws batches with a fixed number of pictures from each stream, defects first."""

    def __init__(self, streams: list[Stream], tables: dict[str, dict[str, Any]], side: int) -> None:
        known = {stream.name: stream for stream in streams}
        missing = sorted(set(tables) - set(known))
        if missing:
            raise ValueError(f"the recipe names data sets that are not there: {', '.join(missing)}")
        self.side = side
        self.parts: list[tuple[Stream, int, Augmentation]] = []
        for name, table in sorted(tables.items(), key=lambda item: known[item[0]].line == "ct"):
            self.parts.append((known[name], table["batch"], augmentation(table)))
        self.defects = sum(n for stream, n, _ in self.parts if stream.line != "ct")

    def draw(self, *, mosaic: bool) -> Batch:
        return join([draw(stream, n, self.side, how, mosaic=mosaic) for stream, n, how in self.parts])


def train_evidence(run: Run, data: Path, device: torch.device) -> EvidenceEncoder:
    """Runs the recipe and returns the averaged encoder. Raises `DivergedError`, ValueError or `ManifestError`."""
    recipe = run.recipe
    torch.manual_seed(recipe["seed"])
    streams = [stream.to(device) for stream in load_streams(data, "train")]
    mixture = Mixture(streams, recipe["streams"], recipe["side"])
    encoder = EvidenceEncoder(
        ModelConfig.default(backbone=recipe["backbone"]).encoder, via_timm=True, pretrained=recipe["pretrained"]
    )
    encoder.to(device).to(memory_format=torch.channels_last)
    encoder.train()
    average = Ema(encoder, recipe["ema"])
    rate = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    groups = parameter_groups(encoder, recipe["weight_decay"])
    optimiser = torch.optim.AdamW(groups, lr=rate if on_gpu else 0.0, fused=on_gpu, capturable=on_gpu)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    def step(mosaic: bool) -> Tensor:
        batch = mixture.draw(mosaic=mosaic)
        x = batch.x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            output = encoder(x, boxes=mixture.defects)
        n = mixture.defects
        losses = torch.stack(
            (
                evidence_loss(output, batch.labels[:n], batch.boxes[:n], batch.valid[:n]) * recipe["loss"]["evidence"],
                field_loss(output.fields, batch.fields) * recipe["loss"]["fields"],
                type_loss(output.maps_BTHW.mean((2, 3)), batch.types) * recipe["loss"]["types"],
            )
        )
        optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), recipe["clip"], foreach=True)
        optimiser.step()
        average.update()
        return losses.detach()

    parts = {"encoder": encoder, "average": average.model, "optimiser": optimiser}
    first = run.resume(parts, device)
    for group in optimiser.param_groups if on_gpu else ():
        group["lr"] = rate  # a checkpoint brings a tensor of its own, which the schedule would not reach
    steps, plain_from = recipe["steps"], round(recipe["steps"] * (1 - recipe["plain_share"]))
    replay = {mosaic: capture(functools.partial(step, mosaic)) for mosaic in (True, False)} if on_gpu else {}
    for i in range(first, steps):
        now = recipe["learning_rate"] * cosine(i, steps, recipe["warmup"])
        if on_gpu:
            rate.fill_(now)
            graph, losses = replay[i < plain_from]
            graph.replay()
        else:
            for group in optimiser.param_groups:
                group["lr"] = now
            losses = step(i < plain_from)
        if (i + 1) % 100 == 0 or i + 1 == steps:
            run.check(losses.sum(), i + 1)
            evidence, fields, types = losses.tolist()
            run.log(step=i + 1, evidence=evidence, fields=fields, types=types, rate=now)
        if (i + 1) % recipe["checkpoint_every"] == 0 or i + 1 == steps:
            run.save(i + 1, parts)
    return average.model
