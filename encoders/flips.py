"""Test-time augmentation: the dense evidence of a picture and of its mirror images, averaged over detectors.

Shapes as in `encoders.detector`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encoders.detector import STRIDES, Dense, Detector


def _mirror_points(x_BAX: Tensor, size: tuple[int, int], dims: Sequence[int]) -> Tensor:
    """Mirrors values at anchor points, level by level. `dims`: 1 rows, 2 columns."""
    height, width = size
    levels = x_BAX.split([(height // s) * (width // s) for s in STRIDES], 1)
    grids = [level.unflatten(1, (height // s, width // s)) for level, s in zip(levels, STRIDES, strict=True)]
    return torch.cat([grid.flip(tuple(dims)).flatten(1, 2) for grid in grids], 1)


def look_from_all_sides(detectors: Sequence[Detector], x_B3HW: Tensor) -> Dense:
    """The picture as it is, mirrored left-right, upside down, and both, as every detector sees them, averaged.

    Costs four passes a detector instead of one. On a GPU a detector sees all four together; on a CPU that gains nothing
    and takes four times the memory.
    """
    mirrored: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))
    views = [x_B3HW.flip([dim + 1 for dim in dims]) if dims else x_B3HW for dims in mirrored]
    looks: list[Dense] = []
    for detector in detectors:
        if x_B3HW.is_cuda:
            looks += _apart(detector(torch.cat(views).contiguous(memory_format=torch.channels_last)), len(views))
        else:
            looks += [detector(each) for each in views]
    size = (x_B3HW.shape[2], x_B3HW.shape[3])
    types, distances, presence = [], [], []
    for dims, seen in zip(mirrored * len(detectors), looks, strict=True):
        sides = [2 if 2 in dims else 0, 3 if 1 in dims else 1, 0 if 2 in dims else 2, 1 if 1 in dims else 3]
        types.append(_mirror_points(seen.types_BAT.float().sigmoid(), size, dims))
        distances.append(_mirror_points(seen.distances_BA4R.float().softmax(-1)[:, :, sides], size, dims))
        presence.append(seen.presence_BT.float().sigmoid())
    return looks[0]._replace(
        types_BAT=torch.logit(torch.stack(types).mean(0).clamp(1e-6, 1 - 1e-6)),
        distances_BA4R=torch.stack(distances).mean(0).clamp(min=1e-9).log(),
        presence_BT=torch.logit(torch.stack(presence).mean(0).clamp(1e-6, 1 - 1e-6)),
    )


def _apart(together: Dense, count: int) -> list[Dense]:
    """The parts of a batch that was `count` batches."""
    parts = (each.chunk(count) for each in (together.types_BAT, together.distances_BA4R, together.presence_BT))
    return [
        together._replace(types_BAT=types, distances_BA4R=distances, presence_BT=presence)
        for types, distances, presence in zip(*parts, strict=True)
    ]
