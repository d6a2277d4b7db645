"""Backbones by timm's names, as feature pyramids of strides 8, 16 and 32."""

from __future__ import annotations

import timm
from torch import nn


def timm_features(name: str, *, pretrained: bool) -> nn.Module:
    """The backbone called `name`, with its level widths in `.channels`.

    `pretrained` asks timm for weights: from its local cache, or over a network.
    """
    net = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(2, 3, 4))
    net.channels = tuple(net.feature_info.channels())  # type: ignore[assignment,operator,union-attr]
    return net
