"""How an adapted detector looks at its owner's product line.

Shapes: B pictures, T types of the line, K items.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from encoders import Detector
from encoders.adapter import presence_maps
from encoders.flips import look_from_all_sides
from encoders.select import Items, select_boxes, select_regions
from pipelines.own_line import OwnLine


@torch.no_grad()
def evidence(detector: Detector, line: OwnLine, x_B3HW: Tensor) -> Items:
    """The evidence on pictures framed at `line.longest`: boxes, and a region for each type without boxes."""
    dense = look_from_all_sides(detector, x_B3HW) if line.mirrored else detector(x_B3HW)
    boxes = select_boxes(dense, presence=line.presence)
    if not line.weak:
        return boxes
    weak = torch.tensor([line.types.index(name) for name in line.weak], device=x_B3HW.device)
    found = boxes.scores * ~torch.isin(boxes.types, weak)
    regions = select_regions(presence_maps(detector, x_B3HW)[:, weak], (x_B3HW.shape[2], x_B3HW.shape[3]))
    types_BT = weak[regions.types]
    shown = dense.presence_BT.float().sigmoid().gather(1, types_BT)
    scores_BK, order = torch.cat((found, shown), 1).sort(1, descending=True)
    return replace(
        boxes,
        boxes=torch.cat((boxes.boxes, regions.boxes), 1).gather(1, order[..., None].expand(-1, -1, 4)),
        types=torch.cat((boxes.types, types_BT), 1).gather(1, order),
        scores=scores_BK,
    )
