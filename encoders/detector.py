"""The detector: dense evidence, boxes of defects on a picture that is seen at the size of inspection.

An anchor-free head over a PAN neck gives every anchor point a logit for each type and a distribution for each side's
distance ("DFL"); beside it, the pooled neck tells which types are on the picture at all. A box is as sure as its point
and the whole picture say together (`encoders.select`).

Shapes: B batch, C channels, H W pixels, A anchor points over all strides, T types, R bins of a distance.
Sources: PANet (arXiv 1803.01534), GFL/DFL (arXiv 2006.04388), TOOD (arXiv 2108.07755).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.resnet import ResNet18D, fold

STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """Sizes of the detector."""

    types: int
    # The last stage is half as wide as ResNet-18's: textures need no more, and it holds two thirds of the weights.
    widths: tuple[int, int, int, int] = (64, 128, 256, 256)
    neck: int = 128
    bins: int = 16  # a side's distance is at most (bins - 1) * stride pixels


class Dense(NamedTuple):
    """What one forward pass gives. Boxes and points are in pixels of the network's input."""

    types_BAT: Tensor  # logits
    distances_BA4R: Tensor  # logits over distance bins: left, top, right, bottom
    points_A2: Tensor  # anchor points (x, y)
    strides_A: Tensor
    presence_BT: Tensor  # logit of each type to be anywhere on the picture


class ConvBNAct(nn.Module):
    """Convolution, batch norm, SiLU. `conv` may be shared between levels that each have their own statistics."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, conv: nn.Conv2d | None = None):
        super().__init__()
        self.conv: nn.Module = conv or nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        """Folds the batch norm into the convolution (evaluation only)."""
        self.conv, self.bn = fold(self.conv, self.bn)


class Neck(nn.Module):
    """Path aggregation: top-down, then bottom-up, all levels `width` channels wide."""

    def __init__(self, inputs: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvBNAct(c, width, 1) for c in inputs)
        self.down = nn.ModuleList(ConvBNAct(width, width) for _ in inputs[:-1])
        self.stride = nn.ModuleList(ConvBNAct(width, width, 3, 2) for _ in inputs[:-1])
        self.up = nn.ModuleList(ConvBNAct(width, width) for _ in inputs[:-1])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = self.down[i](levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:]))
        for i in range(len(levels) - 1):
            levels[i + 1] = self.up[i](levels[i + 1] + self.stride[i](levels[i]))
        return levels


class BoxHead(nn.Module):
    """Decoupled head: per point, a logit for each type and a distribution for each side's distance."""

    def __init__(self, width: int, types: int, bins: int) -> None:
        super().__init__()
        self.bins = bins

        def branch() -> nn.ModuleList:
            shared = [nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2)]
            return nn.ModuleList(nn.Sequential(*(ConvBNAct(width, width, conv=c) for c in shared)) for _ in STRIDES)

        self.type_branch, self.box_branch = branch(), branch()
        self.types = nn.Conv2d(width, types, 1)
        self.distances = nn.Conv2d(width, 4 * bins, 1)
        assert self.types.bias is not None
        nn.init.constant_(self.types.bias, -4.6)  # a prior of 1%: most points are background

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        types, distances, points, strides = [], [], [], []
        for level, stride, type_branch, box_branch in zip(
            levels, STRIDES, self.type_branch, self.box_branch, strict=True
        ):
            batch, _, height, width = level.shape
            types.append(self.types(type_branch(level)).flatten(2).transpose(1, 2))
            sides = self.distances(box_branch(level)).flatten(2).transpose(1, 2)
            distances.append(sides.reshape(batch, height * width, 4, self.bins))
            ys = torch.arange(height, device=level.device) + 0.5
            xs = torch.arange(width, device=level.device) + 0.5
            grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
            points.append(torch.stack((grid_x, grid_y), -1).reshape(-1, 2) * stride)
            strides.append(torch.full((height * width,), float(stride), device=level.device))
        return torch.cat(types, 1), torch.cat(distances, 1), torch.cat(points), torch.cat(strides)


class Detector(nn.Module):
    """`[B, 3, H, W]` pictures (image, reference, difference; H and W multiples of 32) -> `Dense`."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet18D(config.widths)
        self.neck = Neck(self.backbone.channels, config.neck)
        self.boxes = BoxHead(config.neck, config.types, config.bins)
        self.presence = nn.Linear(2 * len(STRIDES) * config.neck, config.types)
        nn.init.constant_(self.presence.bias, -3.0)  # most types are on few pictures

    def forward(self, x_B3HW: Tensor) -> Dense:
        levels = self.neck(self.backbone(x_B3HW))
        pooled = torch.cat([pool for level in levels for pool in (level.mean((2, 3)), level.amax((2, 3)))], 1)
        types, distances, points, strides = self.boxes(levels)
        return Dense(types, distances, points, strides, self.presence(pooled))

    def fuse(self) -> Detector:
        """Folds every batch norm, for evaluation."""
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvBNAct | ResNet18D):
                module.fuse()
        return self


def decode_boxes(distances_BA4R: Tensor, points_A2: Tensor, strides_A: Tensor) -> Tensor:
    """Distance distributions -> boxes `[B, A, 4]` (x0, y0, x1, y1), pixels of the network's input."""
    bins = torch.arange(distances_BA4R.shape[-1], device=distances_BA4R.device, dtype=torch.float32)
    sides_BA4 = (distances_BA4R.float().softmax(-1) @ bins) * strides_A[:, None]
    return torch.cat((points_A2 - sides_BA4[..., :2], points_A2 + sides_BA4[..., 2:]), -1)
