"""The cross-modal attention bridge, and the plain control that it is measured against.

Learned queries attend over the visual tokens; each result becomes a distribution over the decoder's vocabulary, and
what the decoder reads is the mean embedding under it: a convex combination, so that images arrive in the space that
the decoder's own words live in.
Shapes: B batch, N visual tokens, Q queries, C visual width, D decoder width, V vocabulary.
Sources: Perceiver resampler (arXiv 2204.14198), ALIGN module of AlignVLM (arXiv 2502.01341).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """Sizes of a bridge."""

    visual_width: int  # C
    width: int  # D
    vocabulary: int  # V
    name: str = "align"
    queries: int = 32  # Q
    layers: int = 2
    heads: int = 6


def grid_code(tokens: int, width: int, device: torch.device) -> Tensor:
    """Sine and cosine of row and column for a square grid of visual tokens: `[N, width]`, unit scale."""
    side = round(tokens**0.5)
    index = torch.arange(tokens, device=device)
    place = torch.stack((index // side, index % side), 1).float() / max(side - 1, 1)
    frequency = torch.pi * 2 ** torch.arange(0, 6, device=device)
    angle = (place[:, :, None] * frequency).flatten(1)
    code = torch.cat((angle.sin(), angle.cos()), 1)
    return F.pad(code, (0, width - code.shape[1]))


class CrossAttention(nn.Module):
    """Queries attend over visual tokens, then an MLP; both residual and pre-normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BQD: Tensor, visual_BND: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys, values = self.kv(self.norm_kv(visual_BND)).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(split(self.q(self.norm_q(x_BQD))), split(keys), split(values))
        x_BQD = x_BQD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BQD + self.mlp(self.norm_mlp(x_BQD))


class AlignBridge(nn.Module):
    """`[B, N, C]` visual tokens and the embedding table `[V, D]` -> `[B, Q, D]`."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.visual_width, config.width)
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * 0.5)
        self.layers = nn.ModuleList(CrossAttention(config.width, config.heads) for _ in range(config.layers))
        self.hidden = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.words = nn.Linear(config.width, config.vocabulary)

    def forward(self, visual_BNC: Tensor, embedding_VD: Tensor) -> Tensor:
        visual = self.project(visual_BNC)
        visual = visual + grid_code(visual.shape[1], visual.shape[2], visual.device).to(visual.dtype)
        x_BQD = self.queries.expand(len(visual), -1, -1)
        for layer in self.layers:
            x_BQD = layer(x_BQD, visual)
        distribution_BQV = self.words(self.norm(self.hidden(x_BQD))).float().softmax(-1)
        return distribution_BQV.to(embedding_VD.dtype) @ embedding_VD


class MlpBridge(nn.Module):
    """The control: every visual token through an MLP, concatenated in front of the text. `[B, N, C] -> [B, N, D]`."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(config.visual_width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )

    def forward(self, visual_BNC: Tensor, embedding_VD: Tensor) -> Tensor:
        x = self.mlp(visual_BNC)
        return x + grid_code(x.shape[1], x.shape[2], x.device).to(x.dtype)


BRIDGES: dict[str, type[AlignBridge] | type[MlpBridge]] = {"align": AlignBridge, "mlp": MlpBridge}


def build_bridge(config: BridgeConfig) -> AlignBridge | MlpBridge:
    """The bridge called `config.name`. Raises KeyError for an unknown name."""
    return BRIDGES[config.name](config)
