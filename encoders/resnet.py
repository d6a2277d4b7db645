"""ResNet-18-D, with timm's parameter names, for the reading path.

Training builds the backbone through timm. Importing timm (and with it torchvision and torch's compiler) costs a cold
process about five seconds, so that reading builds the same network from these few lines; a test holds the two equal.
Source: He et al., "Bag of Tricks for Image Classification" (arXiv 1812.01187), as timm's `resnet18d` builds it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WIDTHS = (64, 128, 256, 512)  # of ResNet-18's four stages


def fold(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution with its batch norm folded in, and nothing in the norm's place (evaluation only)."""
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a strided shortcut averages before its 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.conv2: nn.Module = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(width)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != width:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)

    def fuse(self) -> None:
        """Folds the batch norms (evaluation only)."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1)
        self.conv2, self.bn2 = fold(self.conv2, self.bn2)
        if self.downsample is not None:
            self.downsample[1], self.downsample[2] = fold(self.downsample[1], self.downsample[2])


class ResNet18D(nn.Module):
    """`[B, 3, H, W]` -> features of strides 8, 16 and 32: `[B, 128|256|512, H/s, W/s]`; `widths` of its four stages."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.channels = tuple(widths[1:])
        stem: list[nn.Module] = []
        for inputs, width, stride in ((3, 32, 2), (32, 32, 1)):
            stem += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.conv1 = nn.Sequential(*stem, nn.Conv2d(32, 64, 3, 1, 1, bias=False))
        self.bn1: nn.Module = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(inputs, width, stride), BasicBlock(width, width, 1))
            for inputs, width, stride in zip((64, *widths), widths, (1, 2, 2, 2), strict=False)
        )

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x_B3HW)))
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))
        features = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def fuse(self) -> None:
        """Folds every batch norm (evaluation only)."""
        for conv, norm in ((0, 1), (3, 4)):
            self.conv1[conv], self.conv1[norm] = fold(self.conv1[conv], self.conv1[norm])
        self.conv1[6], self.bn1 = fold(self.conv1[6], self.bn1)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.fuse()
