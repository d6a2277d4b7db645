"""Sizes of a decoder, with what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Final

import torch

from decoder.adaptive import AdaptiveAttentionConfig
from decoder.attention import AttentionConfig, FullAttentionConfig
from decoder.latent import LatentAttentionConfig
from decoder.moe import ExpertsConfig, swiglu_parameters
from decoder.rotary import Rope, Yarn

ATTENTIONS: Final[dict[str, type[AttentionConfig]]] = {
    "full": FullAttentionConfig,
    "latent": LatentAttentionConfig,
    "adaptive": AdaptiveAttentionConfig,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of any kind; as it stands, the one that is bundled."""

    vocabulary: int
    width: int = 192
    layers: int = 3
    length: int = 320  # the context: positions of prompt and answer together
    attention: AttentionConfig = field(default_factory=FullAttentionConfig)
    experts: ExpertsConfig | None = field(default_factory=ExpertsConfig)
    dense_layers: tuple[int, ...] = ()  # these have one feed-forward and no experts; without `experts` all have
    dense_hidden: int = 0
    tied: bool = True  # the embedding table is also the output matrix
    logit_scale: float | None = None  # None: width ** -0.5
    norm_eps: float = 2.0**-23
    end_tokens: tuple[int, ...] = ()  # which end an answer where nothing else is said

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer not in self.dense_layers

    @property
    def sparse_layers(self) -> int:
        """Number of layers with experts."""
        return sum(map(self.is_sparse, range(self.layers)))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        sparse = self.experts.parameters(self.width) if self.experts else 0
        dense = swiglu_parameters(self.width, self.dense_hidden)
        layers = self.layers * (self.attention.parameters(self.width) + 2 * self.width)
        layers += self.sparse_layers * sparse + (self.layers - self.sparse_layers) * dense
        return layers + self.width + self.vocabulary * self.width * (2 - self.tied)

    @property
    def active_parameters(self) -> int:
        """Weights that take part in one token, with the whole embedding table and the output matrix."""
        return self.parameters - self.sparse_layers * (self.experts.idle_parameters(self.width) if self.experts else 0)

    def flops_per_token(self, context: int = 0) -> int:
        """Multiply-adds times two of one decoded token with so many positions before it."""
        sparse = self.experts.flops(self.width) if self.experts else 0
        dense = 2 * swiglu_parameters(self.width, self.dense_hidden)
        attention = 2 * self.attention.parameters(self.width) + self.attention.flops(context)
        feed_forward = self.sparse_layers * sparse + (self.layers - self.sparse_layers) * dense
        return self.layers * attention + feed_forward + 2 * self.vocabulary * self.width

    def cache_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of cache that one sequence of up to `length` positions takes."""
        return self.layers * sum(map(prod, self.attention.stored(length))) * dtype.itemsize

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """The inverse of `to_dict`."""
        attention = dict(values["attention"])
        rope = dict(attention.pop("rope"))
        yarn = rope.pop("yarn")
        attention["rope"] = Rope(**rope, yarn=Yarn(**yarn) if yarn else None)
        experts = values["experts"]
        changed = {
            "attention": ATTENTIONS[attention["name"]](**attention),
            "experts": ExpertsConfig(**experts) if experts else None,
            "dense_layers": tuple(values["dense_layers"]),
            "end_tokens": tuple(values["end_tokens"]),
        }
        return cls(**values | changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
