"""An adapted model's own part: the detector that learned its owner's product line, and how it looks.

Shapes: B pictures, T types of the line, K items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from encoders import Detector
from encoders.adapter import AdapterConfig, load_adapter, presence_maps
from encoders.flips import look_from_all_sides
from encoders.select import Items, select_boxes, select_regions
from pipelines.own_line import OwnLine
from pipelines.store import StoredModel


@dataclass(frozen=True, slots=True)
class Adapted:
    """A detector for one product line of an owner."""

    line: OwnLine
    detector: Detector

    @classmethod
    def load(cls, stored: StoredModel, base: Detector, device: torch.device) -> Adapted:
        """The adapter of `stored` on its `base`, which stays as it is. Raises ValueError where it does not fit."""
        assert stored.own_line is not None
        try:
            state = {name: tensor.float() for name, tensor in load_file(stored.weights).items()}
            network = load_adapter(base, AdapterConfig(**stored.config), state)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{stored.weights} is not an adapter of its base ({error}); adapt again") from None
        return cls.ready(stored.own_line, network, device)

    @classmethod
    def ready(cls, line: OwnLine, network: Detector, device: torch.device) -> Adapted:
        """A merged `network`, made fit for reading."""
        network.eval().requires_grad_(False)
        network.fuse().to(device).to(memory_format=torch.channels_last)
        return cls(line, network)


@torch.no_grad()
def evidence(detector: Detector, line: OwnLine, x_B3HW: Tensor, *, mirrored: bool | None = None) -> Items:
    """The evidence on pictures framed at `line.longest`: boxes, and a region for each type without boxes.

    `mirrored` overrides whether the line's pictures are also seen in their mirror images.
    """
    from_all_sides = line.mirrored if mirrored is None else mirrored
    dense = look_from_all_sides([detector], x_B3HW) if from_all_sides else detector(x_B3HW)
    if not line.weak:
        return select_boxes(dense, presence=line.presence)
    weak = torch.tensor([line.types.index(name) for name in line.weak], device=x_B3HW.device)
    # Nothing was learned about where they are: their boxes must not take the places of others.
    points_BAT = dense.types_BAT.index_fill(2, weak, -torch.inf)
    boxes = select_boxes(dense._replace(types_BAT=points_BAT), presence=line.presence)
    regions = select_regions(presence_maps(detector, x_B3HW)[:, weak], (x_B3HW.shape[2], x_B3HW.shape[3]))
    types_BT = weak[regions.types]
    shown = dense.presence_BT.float().sigmoid().gather(1, types_BT)
    scores_BK, order = torch.cat((boxes.scores, shown), 1).sort(1, descending=True)
    return replace(
        boxes,
        boxes=torch.cat((boxes.boxes, regions.boxes), 1).gather(1, order[..., None].expand(-1, -1, 4)),
        types=torch.cat((boxes.types, types_BT), 1).gather(1, order),
        scores=scores_BK,
    )
