"""The vision encoder: one backbone, and three things read off it.

- dense evidence: boxes of defects (anchor-free head over a PAN neck; distances as distributions, "DFL"),
- CT class maps (class activation maps: the mean of a map is its finding's logit),
- field logits (product line, region, plane, ...), and the visual tokens that the bridge reads.

Shapes: B batch, C channels, H W pixels, A anchor points over all strides, T types, R bins of a distance, N tokens,
D token width.
Sources: PANet (arXiv 1803.01534), GFL/DFL (arXiv 2006.04388), TOOD (arXiv 2108.07755), CAM (arXiv 1512.04150).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.resnet import ResNet18D, fold

STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes of the encoder. `fields` maps a field to its number of values."""

    box_types: int
    map_types: int
    fields: dict[str, int] = field(default_factory=dict)
    backbone: str = "resnet18d"
    neck: int = 128
    bins: int = 16  # a side's distance is at most (bins - 1) * stride pixels
    dropout: float = 0.3


class EncoderOutput(NamedTuple):
    """What one forward pass gives. Boxes and points are in pixels of the network's input."""

    visual_BND: Tensor  # visual tokens: the stride-32 features, row by row
    fields: dict[str, Tensor]  # field -> logits [B, values]
    maps_BTHW: Tensor  # CT class maps at stride 32
    types_BAT: Tensor | None  # evidence logits; None when boxes were not asked for
    distances_BA4R: Tensor | None  # logits over distance bins: left, top, right, bottom
    points_A2: Tensor | None  # anchor points (x, y)
    strides_A: Tensor | None


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


class EvidenceEncoder(nn.Module):
    """`[B, 3, H, W]` pictures (image, reference, difference; H and W multiples of 32) -> `EncoderOutput`."""

    def __init__(self, config: EncoderConfig, *, via_timm: bool = False, pretrained: bool = False) -> None:
        """`via_timm` builds the backbone through timm: needed for any backbone but resnet18d, and for its weights."""
        super().__init__()
        self.config = config
        if via_timm or config.backbone != "resnet18d":
            from encoders.timm_backbone import timm_features

            self.backbone: nn.Module = timm_features(config.backbone, pretrained=pretrained)
        else:
            self.backbone = ResNet18D()
        channels = tuple(self.backbone.channels)  # type: ignore[arg-type]
        self.neck = Neck(channels, config.neck)
        self.boxes = BoxHead(config.neck, config.box_types, config.bins)
        self.maps = nn.Conv2d(channels[-1], config.map_types, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.fields = nn.ModuleDict({name: nn.Linear(3 * channels[-1], n) for name, n in config.fields.items()})

    @property
    def width(self) -> int:
        """D, the width of a visual token."""
        return self.maps.in_channels

    def forward(self, x_B3HW: Tensor, *, boxes: bool | int = True) -> EncoderOutput:
        """`boxes=False` leaves the neck and the box head out; a number runs them on the first so many of the batch."""
        features = self.backbone(x_B3HW)
        top = features[-1]
        half = top.shape[-1] // 2
        # Left, right and whole: laterality is lost in a plain average.
        pooled = torch.cat((top.mean((2, 3)), top[..., :half].mean((2, 3)), top[..., half:].mean((2, 3))), 1)
        pooled = self.dropout(pooled)
        fields = {name: head(pooled) for name, head in self.fields.items()}
        maps = self.maps(F.dropout(top, self.config.dropout, self.training))
        visual = top.flatten(2).transpose(1, 2)
        if boxes is False:
            return EncoderOutput(visual, fields, maps, None, None, None, None)
        first = len(x_B3HW) if boxes is True else boxes
        return EncoderOutput(visual, fields, maps, *self.boxes(self.neck([f[:first] for f in features])))

    def fuse(self) -> EvidenceEncoder:
        """Folds every batch norm of the neck and head, and of a ResNet18D, for evaluation."""
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
