"""The decoder: pre-normalised transformer layers with rotary positions and a mixture of experts.

One implementation for the bundled weights and for open ones; `DecoderConfig` says which attention and which experts.
Shapes: B batch, T new positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decoder.attention import Places, Stored
from decoder.cache import Cache
from decoder.config import DecoderConfig
from decoder.errors import PromptError
from decoder.layers import Linear, RMSNorm, linear
from decoder.moe import MixtureOfExperts, Router, SwiGLU
from decoder.rotary import Rotary

if TYPE_CHECKING:
    from decoder.engine import Completion


class Layer(nn.Module):
    """Attention, then the feed-forward, both pre-normalised and residual."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = config.attention.build(config.width, config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward: nn.Module
        if config.is_sparse(index):
            assert config.experts is not None
            self.feed_forward = MixtureOfExperts(config.width, config.experts)
        else:
            self.feed_forward = SwiGLU(config.width, config.dense_hidden)

    def forward(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), at, stored)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Decoder(nn.Module):
    """Token ids or embeddings to scores of the next token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = Linear(config.width, config.vocabulary, bias=False)
        self.rotary = Rotary(config.attention.rope, config.attention.rotary_dim)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token ids to embeddings `[B, T, D]`."""
        return self.embedding(ids_BT)

    def new_cache(self, slots: int, length: int | None = None) -> Cache:
        """An empty cache for so many sequences of up to `length` positions; None: the whole context."""
        weight, config = self.embedding.weight, self.config
        length = config.length if length is None else min(length, config.length)
        return Cache(config.attention, config.layers, slots, length, weight.device, weight.dtype)

    def hidden(self, x_BTD: Tensor, cache: Cache | None = None, counts_B: Tensor | None = None) -> Tensor:
        """Embeddings to the last hidden states, both `[B, T, D]`; with a cache positions go on behind those in use.

        `counts_B` (long): of each row only so many positions are new, and those behind are padding, of which the cache
        keeps nothing. Without a cache padding behind a row's end bears on nothing before it.
        Raises PromptError where the positions do not fit the context or the cache.
        """
        count, config = x_BTD.shape[1], self.config
        if count > config.length:
            raise PromptError("prompt-too-long", f"{count} positions do not fit: there is room for {config.length}")
        masks = None
        if cache is None:
            positions_BT = torch.arange(count, device=x_BTD.device)[None]
            rows_B1 = positions_BT[:, :1]
        else:
            # A step looks into the cache even where that is empty, so that steps are alike whatever was before them.
            looks = count == 1 or not cache.empty
            positions_BT, reach = cache.open(count, counts_B)
            rows_B1 = cache.rows_B1
            if looks:
                masks = config.attention.masks(positions_BT, reach, x_BTD.dtype)
        cos, sin = self.rotary(positions_BT)
        at = Places(positions_BT, rows_B1, counts_B, cos, sin, masks)
        for i, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, at, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.close(count if counts_B is None else counts_B)
        return self.norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores of the next token from hidden states, `[..., V]`."""
        scores = linear(x_BTD, self.embedding.weight if self.config.tied else self.head.weight)
        scale = self.config.width**-0.5 if self.config.logit_scale is None else self.config.logit_scale
        return scores if scale == 1.0 else scores * scale

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids `[B, T]` or embeddings `[B, T, D]` to logits `[B, T, V]`; see `hidden`."""
        return self.logits(self.hidden(x if x.is_floating_point() else self.embed(x), cache))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[Completion]:
        """Goes on from each prompt, a list of token ids; see `decoder.engine.generate`."""
        from decoder.engine import generate  # which knows decoders

        return generate(self, prompts, max_new_tokens, **options)

    def rebalance(self, rate: float) -> None:
        """See `Router.rebalance`; once per optimiser step."""
        for module in self.modules():
            if isinstance(module, Router):
                module.rebalance(rate)
