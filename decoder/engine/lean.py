"""A step of the decoder in few operators, for single positions on a CPU.

With few rows a step is bound by how many operators there are and how fast weights are read, not by what is computed.
The layers' own code takes 72 operators a layer for one row beside views of tensors, this takes 44. For grouped-query
attention and a mixture of experts: `fits` says which decoders that is. Results are the layers', but for the order of
sums.
Shapes: B rows, D width, J key/value heads, G query heads of one, d width of a head, E experts, K experts of a token, I
hidden width of an expert; R rows of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoder.attention import FullAttention, FullAttentionConfig
from decoder.cache import Cache
from decoder.layers import READING, add_product, product, stepping
from decoder.model import Decoder
from decoder.moe import MixtureOfExperts, Router


def fits(decoder: Decoder) -> bool:
    """Whether the decoder is made of what this and `decoder.engine.fused` know."""
    attention, experts = decoder.config.attention, decoder.config.experts
    return (
        isinstance(attention, FullAttentionConfig)
        and attention.qk_norm != "width"
        and attention.clip_qkv is None
        and not attention.bias
        and not attention.rope.interleaved
        and all(type(layer.attention) is FullAttention for layer in decoder.layers)
        and all(type(layer.feed_forward) is MixtureOfExperts for layer in decoder.layers)
        and experts is not None
        and experts.groups == 1
        and not experts.threshold
        and not experts.cooperation
    )


class Norm:
    """The root mean square norm of rows `[R, D]` in four operators."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps_11, self.mean_D1 = torch.full((1, 1), eps), torch.full((width, 1), 1 / width)

    def __call__(self, x_RD: Tensor, gain_D: Tensor) -> Tensor:
        return self.unweighted(x_RD).mul_(gain_D)

    def unweighted(self, x_RD: Tensor) -> Tensor:
        """Without the gain."""
        return x_RD * torch.addmm(self.eps_11, x_RD.square(), self.mean_D1).rsqrt_()


class Lean:
    """`hidden` of a decoder in fp32 that `fits`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, config = decoder, decoder.config
        assert isinstance(config.attention, FullAttentionConfig)
        self.config = config.attention
        self.norm = Norm(config.width, config.norm_eps)
        self.head_norm = Norm(config.attention.head_dim, config.norm_eps)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.add_product = _add_linear
        # Looking a weight up in its module takes as long as a small operator.
        self.layers = [self._weights(layer) for layer in decoder.layers]

    def _weights(self, layer: Any) -> tuple[Any, ...]:
        attention, mixture = layer.attention, layer.feed_forward
        gains = (attention.q_norm.weight, attention.k_norm.weight) if self.config.qk_norm else ()
        return (
            (layer.attention_norm.weight, attention.qkv.weight, gains, attention.out.weight),
            (layer.feed_forward_norm.weight, mixture, mixture.experts.w13_E2ID, mixture.experts.w2_EDI),
        )

    def hidden(self, x_BTD: Tensor, cache: Cache, counts_B: Tensor | None = None) -> Tensor:
        """As `Decoder.hidden` into a cache."""
        if x_BTD.shape[1] > 1 or counts_B is not None:
            return self.decoder.hidden(x_BTD, cache, counts_B)
        reading = READING.get() and stepping(x_BTD)
        self.product, self.add_product = (product, add_product) if reading else (F.linear, _add_linear)
        position_B1, reach = cache.open(1)
        cos, sin = self.decoder.rotary(position_B1)
        turn = torch.cat((cos, cos), -1)[:, 0], torch.cat((-sin, sin), -1)[:, 0]
        mask = None
        if int(position_B1.min()) + 1 < reach:  # rows of different lengths
            mask = self.config.masks(position_B1, reach, x_BTD.dtype)
        x_BD = x_BTD[:, 0]
        for (attention, experts), stored in zip(self.layers, cache.layers, strict=True):
            x_BD = self._attention(x_BD, attention, stored, cache, position_B1, reach, turn, mask)
            x_BD = self._experts(x_BD, *experts)
        cache.close(1)
        return self.decoder.norm(x_BD)[:, None]

    def _attention(
        self,
        x_BD: Tensor,
        weights: tuple[Any, ...],
        stored: Any,
        cache: Cache,
        position_B1: Tensor,
        reach: int,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        (gain, qkv, gains, out), config, (keys, values) = weights, self.config, stored
        batch, heads, kv_heads, dim = x_BD.shape[0], config.heads, config.kv_heads, config.head_dim
        qkv_BHd = self.product(self.norm(x_BD, gain), qkv).view(batch, -1, dim)
        qk, v = qkv_BHd.split((heads + kv_heads, kv_heads), 1)
        if gains:
            qk = self.head_norm.unweighted(qk.reshape(-1, dim)).view(qk.shape)
            qk[:, :heads].mul_(gains[0])
            qk[:, heads:].mul_(gains[1])
        first, second = qk.chunk(2, -1)
        qk = (qk * turn[0]).addcmul_(torch.cat((second, first), -1), turn[1])
        q, k = qk.split((heads, kv_heads), 1)
        if mask is None:
            keys[:, :, reach - 1], values[:, :, reach - 1] = k, v
        else:
            keys[cache.rows_B1, :, position_B1], values[cache.rows_B1, :, position_B1] = k[:, None], v[:, None]
        k, v = keys.flatten(0, 1)[:, :reach], values.flatten(0, 1)[:, :reach]
        scores = torch.bmm(q.reshape(len(k), -1, dim), k.mT).mul_(dim**-0.5)
        if mask is not None:
            scores.view(batch, -1, reach).add_(mask)
        mixed = torch.bmm(scores.softmax(-1), v)
        return x_BD + self.product(mixed.view(batch, -1), out)

    def _experts(self, x_BD: Tensor, gain_D: Tensor, mixture: Any, w13_E2ID: Tensor, w2_EDI: Tensor) -> Tensor:
        normed_BD = self.norm(x_BD, gain_D)
        if x_BD.shape[0] == 1:
            weights = _chosen(mixture.router, normed_BD)
            gate_KI, up_KI = torch.cat([self.product(normed_BD, w13_E2ID[each]) for each in weights]).chunk(2, 1)
            for (each, weight), hidden_1I in zip(weights.items(), F.silu(gate_KI).mul_(up_KI).split(1), strict=True):
                self.add_product(x_BD, hidden_1I, w2_EDI[each], weight)
        else:
            chosen_BK, weight_BK = mixture.router(normed_BD)
            x_BD = torch.baddbmm(x_BD[:, None], weight_BK[:, None], mixture.experts(normed_BD, chosen_BK))[:, 0]
        return x_BD if mixture.shared is None else x_BD + mixture.shared(normed_BD)


def _chosen(router: Router, x_1D: Tensor) -> dict[int, float]:
    """What `router` chooses for one token, and its weights: for so few numbers Python is quicker than operators."""
    config = router.config
    logits_1E = F.linear(x_1D, router.weight)
    score_1E = logits_1E.sigmoid() if config.score == "sigmoid" else logits_1E.softmax(-1)
    scores = score_1E[0].tolist()
    choices = (score_1E[0] + router.balance_E).tolist() if config.balanced else scores
    chosen = sorted(range(len(choices)), key=choices.__getitem__, reverse=True)[: config.active]
    scale = config.scale / (sum(scores[each] for each in chosen) + 1e-20) if config.normalised else config.scale
    return {each: scores[each] * scale for each in chosen}


def _add_linear(to_1O: Tensor, x_1D: Tensor, weight_OD: Tensor, scale: float) -> None:
    """Adds a product of one row, times a number, in place."""
    to_1O.addmm_(x_1D, weight_OD.t(), alpha=scale)
