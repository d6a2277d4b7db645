"""Multi-head latent attention: keys and values of all heads are products of one latent, which is what is cached.

Shapes: B batch, T new positions, S positions in the cache, D width, H heads, C latent, R rotary and P plain width of a
key, U width of a value, W = C + R.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decoder.attention import AttentionConfig, Places, Stored, attend
from decoder.layers import Linear, RMSNorm

EPS = 1e-6  # of the norms inside, whatever the model's own is


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(AttentionConfig):
    """Every position sees all before it through one latent a position."""

    name: str = "latent"
    heads: int = 6
    latent: int = 64
    rotary: int = 16
    plain: int = 32
    value: int = 32
    query_latent: int | None = None  # None: queries come from the hidden state in one product
    bias: bool = False

    @property
    def rotary_dim(self) -> int:
        return self.rotary

    @property
    def scale(self) -> float:
        """Scale of the scores; YaRN sharpens them by `mscale_all_dim` for queries and keys each."""
        yarn = self.rope.yarn
        mscale = yarn.temperature(yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1.0
        return (self.plain + self.rotary) ** -0.5 * mscale**2

    def build(self, width: int, norm_eps: float) -> nn.Module:
        return LatentAttention(self, width)

    def stored(self, length: int) -> tuple[tuple[int, ...], ...]:
        return ((1, length, self.latent + self.rotary),)

    def parameters(self, width: int) -> int:
        queries, cached, r = self.heads * (self.plain + self.rotary), self.latent + self.rotary, self.query_latent
        q = width * queries if r is None else r * (width + 1 + queries)
        kv = width * cached + self.latent * (1 + self.heads * (self.plain + self.value))
        return q + kv + self.heads * self.value * width + self.bias * (width + cached + (r or 0))

    def flops(self, context: int) -> int:
        return 2 * self.heads * (2 * self.latent + self.rotary) * context


class LatentAttention(nn.Module):
    """A prompt expands its latents once; from then on the expansion is absorbed into queries and results."""

    def __init__(self, config: LatentAttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = (config.plain, config.rotary)
        self.cached = (config.latent, config.rotary)
        self.expanded = (config.plain, config.value)
        queries = config.heads * sum(self.query)
        if config.query_latent is None:
            self.q = Linear(width, queries, bias=False)
        else:
            self.q_down = Linear(width, config.query_latent, bias=config.bias)
            self.q_norm = RMSNorm(config.query_latent, eps=EPS)
            self.q_up = Linear(config.query_latent, queries, bias=False)
        self.kv_down = Linear(width, sum(self.cached), bias=config.bias)
        self.kv_norm = RMSNorm(config.latent, eps=EPS)
        self.kv_up = Linear(config.latent, config.heads * sum(self.expanded), bias=False)
        self.out = Linear(config.heads * config.value, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor:
        config, heads = self.config, (self.config.heads, -1)
        q = self.q(x_BTD) if config.query_latent is None else self.q_up(self.q_norm(self.q_down(x_BTD)))
        q_BTHP, q_BTHR = q.unflatten(-1, heads).split(self.query, -1)
        q_BTHR = config.rope.rotate(q_BTHR, at.cos_BT1r, at.sin_BT1r)
        latent_BTC, k_BTR = self.kv_down(x_BTD).split(self.cached, -1)
        latent_BTC = self.kv_norm(latent_BTC)
        k_BT1R = config.rope.rotate(k_BTR[:, :, None], at.cos_BT1r, at.sin_BT1r)
        if stored is not None:
            stored[0][at.rows_B1, 0, at.positions_BT] = torch.cat((latent_BTC, k_BT1R[:, :, 0]), -1)
        if at.masks is None:
            # Nothing was cached before: each latent is expanded once, and scores are over P + R values.
            k_BTHP, v_BTHU = self.kv_up(latent_BTC).unflatten(-1, heads).split(self.expanded, -1)
            k_BTHX = torch.cat((k_BTHP, k_BT1R.expand(-1, -1, config.heads, -1)), -1)
            q_BTHX = torch.cat((q_BTHP, q_BTHR), -1)
            out_BTHU = attend(q_BTHX, k_BTHX.transpose(1, 2), v_BTHU.transpose(1, 2), None, config.scale)
        else:
            assert stored is not None
            entry_B1SW = stored[0][:, :, : at.masks.shape[-1]]
            k_HPC, v_HUC = self.kv_up.weight.unflatten(0, heads).split(self.expanded, 1)
            q_BTHW = torch.cat((torch.einsum("bthp,hpc->bthc", q_BTHP, k_HPC), q_BTHR), -1)
            out_BTHC = attend(q_BTHW, entry_B1SW, entry_B1SW[..., : config.latent], at.masks, config.scale)
            out_BTHU = torch.einsum("bthc,huc->bthu", out_BTHC, v_HUC)
        return self.out(out_BTHU.flatten(2))
