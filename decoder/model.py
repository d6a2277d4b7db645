"""The decoder: pre-normalised transformer layers with rotary positions and a mixture of experts.

Shapes: B batch, T positions, D width, H heads, d width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.moe import MixtureOfExperts


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes of the decoder, with what they cost."""

    vocabulary: int
    width: int = 192
    layers: int = 3
    heads: int = 6
    experts: int = 16
    active: int = 2
    expert_hidden: int = 96
    shared_hidden: int = 192
    length: int = 320  # positions of the cache: prompt and report

    @property
    def parameters(self) -> int:
        """Number of weights."""
        moe = self.experts * 3 * self.expert_hidden * self.width + self.experts * self.width
        layer = 4 * self.width**2 + moe + 3 * self.shared_hidden * self.width + 2 * self.width
        return self.vocabulary * self.width + self.layers * layer + self.width

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds times two of one decoded token, attention over the cache left out."""
        active = (self.active * 3 * self.expert_hidden + 3 * self.shared_hidden + self.experts) * self.width
        return 2 * (self.layers * (4 * self.width**2 + active) + self.vocabulary * self.width)

    def cache_bytes(self, batch: int) -> int:
        """Bytes of the fp32 key/value cache."""
        return 2 * self.layers * batch * self.length * self.width * 4


class KeyValueCache:
    """Keys and values of every layer, `[L, 2, B, H, length, d]`, filled up to `used`."""

    def __init__(self, config: DecoderConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        head = config.width // config.heads
        self.data = torch.zeros(config.layers, 2, batch, config.heads, config.length, head, device=device, dtype=dtype)
        self.used = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new positions behind those in use; returns all keys and values up to them."""
        end = self.used + keys.shape[2]
        self.data[layer, 0, :, :, self.used : end] = keys
        self.data[layer, 1, :, :, self.used : end] = values
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


def rotate(x_BHTd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary position embedding, halves split."""
    first, second = x_BHTd.chunk(2, -1)
    return x_BHTd * cos_Td + torch.cat((-second, first), -1) * sin_Td


class Layer(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention, self.norm_experts = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.experts = MixtureOfExperts(
            config.width, config.experts, config.active, config.expert_hidden, config.shared_hidden
        )

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor, cache: KeyValueCache | None, index: int) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_attention(x_BTD)).chunk(3, -1)
        )
        q, k = rotate(q, cos_Td, sin_Td).to(v.dtype), rotate(k, cos_Td, sin_Td).to(v.dtype)
        fresh = cache is None or cache.used == 0
        if cache is not None:
            k, v = cache.extend(index, k, v)
        # With a filled cache one new position may see everything before it, so that no mask is needed.
        assert fresh or q.shape[2] == 1
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=fresh)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.experts(self.norm_experts(x_BTD).flatten(0, 1)).view_as(x_BTD)


class Decoder(nn.Module):
    """Embeddings `[B, T, D]` -> logits `[B, T, V]`; the embedding table is also the output matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        head = config.width // config.heads
        angle = torch.arange(config.length)[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((angle.sin(), angle.sin()), -1), persistent=False)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """With a cache the positions continue behind those in use: many at first, then one at a time."""
        start = cache.used if cache else 0
        end = start + x_BTD.shape[1]
        if end > self.config.length:
            raise ValueError(f"{end} positions do not fit a decoder of length {self.config.length}")
        cos, sin = self.cos[start:end], self.sin[start:end]
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, cos, sin, cache, i)
        if cache is not None:
            cache.used = end
        return F.linear(self.norm(x_BTD), self.embedding.weight) * self.config.width**-0.5

    def rebalance(self, rate: float) -> None:
        """See `MixtureOfExperts.rebalance`."""
        for layer in self.layers:
            layer.experts.rebalance(rate)  # type: ignore[operator,union-attr]
