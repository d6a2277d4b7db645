"""Trains an adapter: a detector's heads, and low-rank additions to it, on the few pictures of an owner's line.

Runs on a bare machine, as all training does; `pipelines.adapt` makes a model of what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoders import Detector
from encoders.adapter import AdapterConfig, adapted, adapter_state
from pipelines.inputs import GLANCE
from pipelines.training.augment import Batch
from pipelines.training.encoders import Mixture, fit
from pipelines.training.losses import evidence_loss, presence_loss
from pipelines.training.run import Run
from pipelines.training.streams import Stream
from reports.taxonomy import DEFECT_TYPES

STREAM = "own"  # the only stream of the recipe


def fitted(recipe: dict[str, Any], longest: int, *, whole: bool) -> dict[str, Any]:
    """The recipe with views that suit pictures of `longest` pixels; `whole` where labels are of whole pictures."""
    table, scale = dict(recipe["streams"][STREAM]), recipe["side"] / longest
    if whole:
        table |= {"whole": True, "mosaic": 0.0, "aim": 0.0, "zoom": [0.8 * scale, 1.15 * scale]}
    elif scale >= GLANCE / 320:  # larger pictures would lose their small defects in one view
        table["late"] = {"whole": True, "aim": 0.0, "zoom": [0.9 * scale, 1.15 * scale]}
    return recipe | {"streams": {STREAM: table}}


def train_adapter(
    run: Run, stream: Stream, base: Detector, types: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """Runs the recipe on `stream`, whose labels are places in `types`. `base` stays as it is.

    Returns what `encoders.adapter.load_adapter` takes. Raises `DivergedError`, and ValueError for a checkpoint of
    another run.
    """
    torch.manual_seed(run.recipe["seed"])
    network = adapted(base, AdapterConfig(len(types), run.recipe["rank"])).to(device)
    _start_from_known(network, base, types)
    return adapter_state(network, train_network(run, stream, network, device))


def train_network(run: Run, stream: Stream, network: Detector, device: torch.device) -> Detector:
    """Trains what has gradients in `network` on the one stream; returns the averaged weights."""
    weights = run.recipe["loss"]

    def losses(network: Detector, batch: Batch) -> dict[str, Tensor]:
        dense = network(batch.x)
        truth = batch.labels, batch.boxes, batch.valid, batch.types
        return {
            "boxes": evidence_loss(dense, *truth) * weights["boxes"],
            "presence": presence_loss(dense.presence_BT, batch.labels, batch.valid, batch.types) * weights["presence"],
        }

    mixture = Mixture([replace(stream, name=STREAM).to(device)], run.recipe)
    return fit(run, mixture.draw, network.to(memory_format=torch.channels_last), losses, device)


@torch.no_grad()
def _start_from_known(network: Detector, base: Detector, types: Sequence[str]) -> None:
    """Types that the base knows begin with its rows of the heads."""
    for mine, name in enumerate(types):
        if name in DEFECT_TYPES:
            row = DEFECT_TYPES.index(name)
            for own, known in ((network.boxes.types, base.boxes.types), (network.presence, base.presence)):
                own.weight[mine] = known.weight[row]
                own.bias[mine] = known.bias[row]  # type: ignore[index]
