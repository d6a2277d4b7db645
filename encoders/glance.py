"""The glance: what a picture is, from one look at the whole of it.

One backbone, and three things read off its last features: field logits (product line, region, plane, ...), CT class
maps (class activation maps: the mean of a map is its finding's logit), and the visual tokens that the bridge reads.

Shapes: B batch, C channels, H W pixels, T types, N tokens.
Source: CAM (arXiv 1512.04150).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.resnet import WIDTHS, ResNet18D


@dataclass(frozen=True, slots=True)
class GlanceConfig:
    """Sizes of the network. `fields` maps a field to its number of values."""

    map_types: int
    fields: dict[str, int] = field(default_factory=dict)
    backbone: str = "resnet18d"
    dropout: float = 0.3
    last_stage: int = 512  # width of resnet18d's last stage; other backbones have widths of their own


class Glance(NamedTuple):
    """What one forward pass gives."""

    visual_BNC: Tensor  # visual tokens: the stride-32 features, row by row
    fields: dict[str, Tensor]  # field -> logits [B, values]
    maps_BTHW: Tensor  # CT class maps at stride 32
    features: list[Tensor]  # of strides 8, 16 and 32


class GlanceNet(nn.Module):
    """`[B, 3, H, W]` pictures (image, reference, difference; H and W multiples of 32) -> `Glance`."""

    def __init__(self, config: GlanceConfig, *, via_timm: bool = False, pretrained: bool = False) -> None:
        """`via_timm` builds the backbone through timm: needed for any backbone but resnet18d, and for its weights.

        Raises ValueError for a last stage that timm's network does not have.
        """
        super().__init__()
        self.config = config
        if via_timm or config.backbone != "resnet18d":
            from encoders.timm_backbone import timm_features

            self.backbone: nn.Module = timm_features(config.backbone, pretrained=pretrained)
        else:
            self.backbone = ResNet18D((*WIDTHS[:3], config.last_stage))
        width = int(self.backbone.channels[-1])  # type: ignore[index]
        if config.backbone == "resnet18d" and width != config.last_stage:
            raise ValueError(f"timm's resnet18d has a last stage of {width}, not of {config.last_stage}")
        self.maps = nn.Conv2d(width, config.map_types, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.fields = nn.ModuleDict({name: nn.Linear(3 * width, n) for name, n in config.fields.items()})

    @property
    def width(self) -> int:
        """C, the width of a visual token."""
        return self.maps.in_channels

    def forward(self, x_B3HW: Tensor) -> Glance:
        features = self.backbone(x_B3HW)
        top = features[-1]
        half = top.shape[-1] // 2
        # Left, right and whole: laterality is lost in a plain average.
        pooled = torch.cat((top.mean((2, 3)), top[..., :half].mean((2, 3)), top[..., half:].mean((2, 3))), 1)
        pooled = self.dropout(pooled)
        fields = {name: head(pooled) for name, head in self.fields.items()}
        maps = self.maps(F.dropout(top, self.config.dropout, self.training))
        return Glance(top.flatten(2).transpose(1, 2), fields, maps, features)

    def fuse(self) -> GlanceNet:
        """Folds every batch norm of a ResNet18D, for evaluation."""
        self.eval()
        if isinstance(self.backbone, ResNet18D):
            self.backbone.fuse()
        return self
