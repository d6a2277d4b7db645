"""Test-time augmentation: the dense evidence of a picture and of its mirror images, averaged.

Shapes as in `encoders.detector`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encoders.detector import STRIDES, Dense, Detector

SIDES: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))  # axes of a picture that are mirrored: 1 rows, 2 columns


def _mirror_points(x_BAX: Tensor, size: tuple[int, int], dims: Sequence[int]) -> Tensor:
    """Mirrors values at anchor points, level by level. `dims`: 1 rows, 2 columns."""
    height, width = size
    levels = x_BAX.split([(height // s) * (width // s) for s in STRIDES], 1)
    grids = [level.unflatten(1, (height // s, width // s)) for level, s in zip(levels, STRIDES, strict=True)]
    return torch.cat([grid.flip(tuple(dims)).flatten(1, 2) for grid in grids], 1)


def look_from_all_sides(detectors: Sequence[Detector], x_B3HW: Tensor, *, each: bool = False) -> Dense:
    """The picture as it is, mirrored left-right, upside down, and both, averaged. Costs four passes instead of one.

    Several detectors take turns, so that they cost no more than one; with `each`, every one sees every side.
    """
    looks = [(dims, network) for dims in SIDES for network in detectors]
    if not each:
        looks = [(dims, detectors[n % len(detectors)]) for n, dims in enumerate(SIDES)]
    size = (x_B3HW.shape[2], x_B3HW.shape[3])
    types = distances = presence = x_B3HW.new_zeros(())
    for dims, network in looks:
        seen = network(x_B3HW.flip([dim + 1 for dim in dims]))
        sides = [2 if 2 in dims else 0, 3 if 1 in dims else 1, 0 if 2 in dims else 2, 1 if 1 in dims else 3]
        types = types + _mirror_points(seen.types_BAT.float().sigmoid(), size, dims)
        distances = distances + _mirror_points(seen.distances_BA4R.float().softmax(-1)[:, :, sides], size, dims)
        presence = presence + seen.presence_BT.float().sigmoid()
    count = len(looks)
    return seen._replace(
        types_BAT=torch.logit((types / count).clamp(1e-6, 1 - 1e-6)),
        distances_BA4R=(distances / count).clamp(min=1e-9).log(),
        presence_BT=torch.logit((presence / count).clamp(1e-6, 1 - 1e-6)),
    )
