"""Attention behind one interface: a configuration that says what a kind costs and caches, and the layer it builds.

`FullAttention` is here (grouped queries; as many key/value heads as query heads is plain multi-head attention); its
siblings are in `decoder.latent` and `decoder.adaptive`.
Shapes: B batch, T new positions, S positions in the cache, D width, H query heads, J key/value heads, d width of a
head, u width of a value, r half the rotary width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.layers import Linear, RMSNorm
from decoder.rotary import Rope


@dataclass(frozen=True, slots=True)
class Places:
    """Where new positions stand in their sequences: made once for all layers."""

    positions_BT: Tensor  # long
    rows_B1: Tensor  # 0, 1, ...: indexes the cache together with positions
    counts_B: Tensor | None  # of each row only so many positions are new, those behind are padding; None: all
    cos_BT1r: Tensor
    sin_BT1r: Tensor
    masks: Any = None  # what `AttentionConfig.masks` gave; None: nothing is cached, positions see those before them


# The tensors of one layer's cache, `[B, ...]` each, as `AttentionConfig.stored` lists them.
Stored = tuple[Tensor, ...]


class Attention(Protocol):
    """A layer of attention: `[B, T, D] -> [B, T, D]`. With `stored` it first adds the new positions to it, in place."""

    def __call__(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ABC):
    """A kind of attention: sizes, costs, and how to build it."""

    name: str
    rope: Rope = field(default_factory=Rope)

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """Values of a head that the position rotates."""

    @abstractmethod
    def build(self, width: int, norm_eps: float) -> nn.Module:
        """The layer, an `Attention`."""

    @abstractmethod
    def stored(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the cache keeps of one sequence of up to `length` positions, in one layer."""

    @abstractmethod
    def parameters(self, width: int) -> int:
        """Weights of one layer."""

    @abstractmethod
    def flops(self, context: int) -> int:
        """FLOPs of one new token in one layer beyond those of its weights, with so many positions before it."""

    def masks(self, positions_BT: Tensor, reach: int, dtype: torch.dtype) -> Any:
        """What all layers add to their scores where something is cached; here `[B, T, reach]`, 0 or -inf."""
        hidden_BTS = torch.arange(reach, device=positions_BT.device) > positions_BT[..., None]
        return torch.zeros(hidden_BTS.shape, dtype=dtype, device=positions_BT.device).masked_fill_(
            hidden_BTS, float("-inf")
        )


def attend(q_BTHd: Tensor, k_BJSd: Tensor, v_BJSu: Tensor, mask_BTS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, `[B, T, H, u]`; without a mask keys are those of the queries' own positions, causally."""
    q_BHTd = q_BTHd.transpose(1, 2)
    if mask_BTS is None:
        grouped = q_BHTd.shape[1] != k_BJSd.shape[1]
        out = F.scaled_dot_product_attention(q_BHTd, k_BJSd, v_BJSu, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    # Queries that share a key head become more queries of that head, so that the cache is read once and not copied.
    batch, heads, count, _ = q_BHTd.shape
    shared = heads // k_BJSd.shape[1]
    mask = mask_BTS[:, None]
    if count > 1:
        mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).reshape(batch, 1, shared * count, -1)
    out = F.scaled_dot_product_attention(
        q_BHTd.reshape(batch, k_BJSd.shape[1], shared * count, -1), k_BJSd, v_BJSu, mask, scale=scale
    )
    return out.reshape(batch, heads, count, -1).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class FullAttentionConfig(AttentionConfig):
    """Every position sees all before it."""

    name: str = "full"
    heads: int = 6
    kv_heads: int = 6
    head_dim: int = 32
    qk_norm: Literal["head", "width"] | None = None  # over each head, or over all heads together
    clip_qkv: float | None = None
    bias: bool = False

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def split(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in the fused projection."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def build(self, width: int, norm_eps: float) -> nn.Module:
        return FullAttention(self, width, norm_eps)

    def stored(self, length: int) -> tuple[tuple[int, ...], ...]:
        return ((self.kv_heads, length, self.head_dim),) * 2

    def parameters(self, width: int) -> int:
        q, k, v = self.split
        norms = {None: 0, "head": 2 * self.head_dim, "width": q + k}[self.qk_norm]
        return width * (2 * q + k + v) + norms + self.bias * (q + k + v + width)

    def flops(self, context: int) -> int:
        return 4 * self.heads * self.head_dim * context


class FullAttention(nn.Module):
    """Query heads share key/value heads; queries and keys are normalised before the rotation where the model asks."""

    def __init__(self, config: FullAttentionConfig, width: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.qkv = Linear(width, sum(config.split), bias=config.bias)
        self.out = Linear(config.split[0], width, bias=config.bias)
        if config.qk_norm:
            q, k, _ = config.split if config.qk_norm == "width" else (config.head_dim,) * 3
            self.q_norm, self.k_norm = RMSNorm(q, eps=norm_eps), RMSNorm(k, eps=norm_eps)

    def project(self, x_BTD: Tensor, at: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, d]`, keys and values `[B, T, J, d]`, in their positions."""
        config, heads = self.config, (-1, self.config.head_dim)
        queries, keys, values = config.split
        qk, v = self.qkv(x_BTD).split((queries + keys, values), -1)  # queries and keys are rotated together
        if config.qk_norm == "head":
            q, k = (each.unflatten(-1, heads) for each in qk.split((queries, keys), -1))
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2).flatten(2)
        elif config.qk_norm == "width":
            q, k = qk.split((queries, keys), -1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), -1)
        if config.clip_qkv is not None:
            qk, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (qk, v))
        qk = config.rope.rotate(qk.unflatten(-1, heads), at.cos_BT1r, at.sin_BT1r)
        q, k = qk.split((config.heads, config.kv_heads), 2)
        return q, k, v.unflatten(-1, heads)

    def forward(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor:
        return self.out(self.mix(x_BTD, *self.project(x_BTD, at), at, stored).flatten(2))

    def mix(
        self, x_BTD: Tensor, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> Tensor:
        """What the heads make of values, `[B, T, H, d]`: all that is between the projections."""
        k_BJSd, v_BJSd = k_BTJd.transpose(1, 2), v_BTJd.transpose(1, 2)
        if stored is not None:
            keys, values = stored
            keys[at.rows_B1, :, at.positions_BT], values[at.rows_B1, :, at.positions_BT] = k_BTJd, v_BTJd
            if at.masks is not None:
                reach = at.masks.shape[-1]
                k_BJSd, v_BJSd = keys[:, :, :reach], values[:, :, :reach]
        return attend(q_BTHd, k_BJSd, v_BJSd, at.masks, self.config.head_dim**-0.5)
