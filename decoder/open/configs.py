"""The configurations of the families, read from `config.json`, and what a model of each costs.

Names are those of `config.json`. A family is one dataclass and one line in `FAMILIES`; the tensors follow from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from decoder.open.errors import CheckpointError
from decoder.open.rope import Rope
from decoder.open.settings import LONGEST, Settings

# Far above any published model: a damaged file must not ask for millions of modules.
MOST_LAYERS: Final = 512
MOST_EXPERTS: Final = 2048


@dataclass(frozen=True, slots=True)
class Gate:
    """How a token's experts are chosen and weighted."""

    score: Literal["sigmoid", "softmax"] = "softmax"
    correction_bias: bool = False  # tilts the choice, not the weights; then a group's score is the sum of its best two
    n_group: int = 1  # experts come from the best `topk_group` of so many groups
    topk_group: int = 1
    norm_topk_prob: bool = False  # weights sum to 1 before they are scaled
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OpenConfig(ABC):
    """What the families share."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # of a dense layer
    moe_intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of all shared experts of a layer together
    num_experts: int
    num_experts_per_tok: int
    gate: Gate
    rope: Rope
    rms_norm_eps: float
    max_position_embeddings: int  # the context: positions of prompt and answer together
    tie_word_embeddings: bool
    attention_bias: bool
    eos_token_id: tuple[int, ...]

    @classmethod
    @abstractmethod
    def from_settings(cls, read: Settings) -> OpenConfig:
        """Raises CheckpointError, which names the key."""

    @abstractmethod
    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Values that the cache keeps of a position in a layer."""

    @property
    @abstractmethod
    def attention_parameters(self) -> int:
        """Weights of the attention of one layer."""

    @property
    @abstractmethod
    def attention_flops(self) -> int:
        """FLOPs of one new token in one layer for each position that it attends to."""

    @property
    def sparse_layers(self) -> int:
        """Number of layers with experts."""
        return sum(map(self.is_sparse, range(self.num_hidden_layers)))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        expert = self._swiglu(self.moe_intermediate_size) + self.hidden_size + self.gate.correction_bias
        sparse = self.num_experts * expert + self._swiglu(self.shared_intermediate_size)
        dense_layers = self.num_hidden_layers - self.sparse_layers
        layers = self.num_hidden_layers * (self.attention_parameters + 2 * self.hidden_size)
        layers += self.sparse_layers * sparse + dense_layers * self._swiglu(self.intermediate_size)
        return layers + self.hidden_size + self.vocab_size * self.hidden_size * (2 - self.tie_word_embeddings)

    @property
    def active_parameters(self) -> int:
        """Weights that take part in one token, with the whole embedding table and the output matrix."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.parameters - self.sparse_layers * idle * self._swiglu(self.moe_intermediate_size)

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of cache that one token of one sequence takes."""
        return self.num_hidden_layers * self.cache_width * dtype.itemsize

    def flops_per_token(self, context: int = 0) -> int:
        """Multiply-adds times two of one decoded token with so many positions before it."""
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.attention_flops * context
        return 2 * (self.active_parameters - looked_up) + attention

    def _swiglu(self, intermediate: int) -> int:
        return 3 * self.hidden_size * intermediate


def _shared(read: Settings, **defaults: Any) -> dict[str, Any]:
    """The fields that every family has, from keys of one name."""
    read.refuse_unsupported()
    found = {
        "model_type": read.get("model_type"),
        "vocab_size": read.size("vocab_size", most=LONGEST),
        "hidden_size": read.size("hidden_size"),
        "num_hidden_layers": read.size("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": read.size("num_attention_heads"),
        "intermediate_size": read.size("intermediate_size"),
        "num_experts_per_tok": read.size("num_experts_per_tok"),
        "rms_norm_eps": read.number("rms_norm_eps", defaults["rms_norm_eps"]),
        "max_position_embeddings": read.size("max_position_embeddings", most=LONGEST),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "attention_bias": read.flag("attention_bias", False),
        "eos_token_id": read.whole_numbers("eos_token_id"),
    }
    # The grouped matrix product wants rows of whole 16 bytes in bfloat16.
    read.fits(found["hidden_size"] % 8 == 0, '"hidden_size" a multiple of 8')
    return found


def _experts(read: Settings) -> int:
    """The number of experts, which transformers 5 saves under another name."""
    key = "num_local_experts" if read.get("num_experts", None) is None else "num_experts"
    return int(read.size(key, most=MOST_EXPERTS))


def _fit_experts(read: Settings, experts: int, active: int, intermediate: int) -> None:
    read.fits(active <= experts, f'"num_experts_per_tok" at most the {experts} experts')
    read.fits(intermediate % 8 == 0, "the experts' intermediate size a multiple of 8")


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(OpenConfig):
    """DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, groups of experts."""

    q_lora_rank: int | None  # None: queries come from the hidden state in one product
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int  # of V3, for drafts: their tensors are passed over

    @classmethod
    def from_settings(cls, read: Settings) -> DeepseekConfig:
        shared = _shared(read, rms_norm_eps=1e-6)
        v3 = shared["model_type"] == "deepseek_v3"
        experts, active = read.size("n_routed_experts", most=MOST_EXPERTS), shared["num_experts_per_tok"]
        intermediate = read.size("moe_intermediate_size")
        _fit_experts(read, experts, active, intermediate)
        read.one_of("moe_layer_freq", (1,), 1)
        read.one_of("mlp_bias", (False,), False)
        heads = shared["num_attention_heads"]
        read.fits(
            read.size("num_key_value_heads", heads) == heads, f'"num_key_value_heads" to be {heads}, as queries have'
        )
        if v3:
            read.one_of("scoring_func", ("sigmoid",), "sigmoid")
            method = read.one_of("topk_method", ("noaux_tc",), "noaux_tc")
        else:
            read.one_of("scoring_func", ("softmax",), "softmax")
            method = read.one_of("topk_method", ("greedy", "group_limited_greedy"), "greedy")
            # The published code and its successors disagree on what V2 does with it; no published V2 sets it.
            read.one_of("norm_topk_prob", (False,), False)
        grouped = method != "greedy"
        n_group, topk_group = (read.size("n_group", 1), read.size("topk_group", 1)) if grouped else (1, 1)
        read.fits(
            experts % n_group == 0 and topk_group <= n_group, '"n_group" to divide the experts, "topk_group" of them'
        )
        read.fits(active <= topk_group * experts // n_group, '"num_experts_per_tok" experts in "topk_group" groups')
        read.fits(not v3 or experts // n_group >= 2, "two experts or more in each group")
        return cls(
            **shared,
            moe_intermediate_size=intermediate,
            shared_intermediate_size=intermediate * read.size("n_shared_experts", 0, least=0),
            num_experts=experts,
            gate=Gate(
                score="sigmoid" if v3 else "softmax",
                correction_bias=v3,
                n_group=n_group,
                topk_group=topk_group,
                norm_topk_prob=v3 and read.flag("norm_topk_prob", True),
                routed_scaling_factor=read.number("routed_scaling_factor", 2.5 if v3 else 1.0),
            ),
            # V2 has neighbouring pairs always, V3 unless it says otherwise.
            rope=read.rope(read.size("qk_rope_head_dim"), interleaved=not v3 or read.flag("rope_interleave", True)),
            q_lora_rank=read.size("q_lora_rank", None),
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=read.size("qk_nope_head_dim"),
            qk_rope_head_dim=read.size("qk_rope_head_dim"),
            v_head_dim=read.size("v_head_dim"),
            first_k_dense_replace=read.size("first_k_dense_replace", 3 if v3 else 0, least=0),
            num_nextn_predict_layers=read.size("num_nextn_predict_layers", 0, least=0),
        )

    def is_sparse(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Width of a query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the scores; YaRN sharpens them by `mscale_all_dim` for queries and keys each."""
        yarn = self.rope.yarn
        mscale = yarn.temperature(yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1.0
        return self.qk_head_dim**-0.5 * mscale**2

    @property
    def cache_width(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def attention_parameters(self) -> int:
        d, h, r = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        q = d * h * self.qk_head_dim if r is None else r * (d + 1 + h * self.qk_head_dim)
        kv = d * self.cache_width + self.kv_lora_rank * (1 + h * (self.qk_nope_head_dim + self.v_head_dim))
        bias = d + self.cache_width + (r or 0)
        return q + kv + h * self.v_head_dim * d + self.attention_bias * bias

    @property
    def attention_flops(self) -> int:
        return 2 * self.num_attention_heads * (self.cache_width + self.kv_lora_rank)


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(OpenConfig):
    """What families with grouped-query attention share."""

    num_key_value_heads: int
    head_dim: int
    qk_norm: Literal["head", "width"]  # over each head, or over all heads together
    clip_qkv: float | None = None

    @property
    def cache_width(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norms = 2 * self.head_dim if self.qk_norm == "head" else q + kv
        bias = q + 2 * kv + self.hidden_size
        return 2 * self.hidden_size * (q + kv) + norms + self.attention_bias * bias

    @property
    def attention_flops(self) -> int:
        return 4 * self.num_attention_heads * self.head_dim


def _grouped_query(read: Settings, **defaults: Any) -> dict[str, Any]:
    shared = _shared(read, **defaults)
    heads = shared["num_attention_heads"]
    key_value_heads = read.size("num_key_value_heads", heads)
    read.fits(heads % key_value_heads == 0, '"num_attention_heads" a multiple of "num_key_value_heads"')
    head_dim = read.size("head_dim", None)
    if head_dim is None:
        read.fits(shared["hidden_size"] % heads == 0, '"hidden_size" a multiple of "num_attention_heads"')
        head_dim = shared["hidden_size"] // heads
    return shared | {"num_key_value_heads": key_value_heads, "head_dim": head_dim, "rope": read.rope(head_dim)}


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GroupedQueryConfig):
    """Qwen3-MoE (arXiv 2505.09388): queries and keys normalised a head, dense layers where the configuration says."""

    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    @classmethod
    def from_settings(cls, read: Settings) -> Qwen3MoeConfig:
        shared = _grouped_query(read, rms_norm_eps=1e-6)
        experts = _experts(read)
        intermediate = read.size("moe_intermediate_size")
        _fit_experts(read, experts, shared["num_experts_per_tok"], intermediate)
        return cls(
            **shared,
            qk_norm="head",
            moe_intermediate_size=intermediate,
            num_experts=experts,
            gate=Gate(norm_topk_prob=read.flag("norm_topk_prob", False)),
            decoder_sparse_step=read.size("decoder_sparse_step", 1),
            mlp_only_layers=read.whole_numbers("mlp_only_layers"),
        )

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(GroupedQueryConfig):
    """OLMoE (arXiv 2409.02060): queries and keys normalised over the whole width, experts in every layer."""

    @classmethod
    def from_settings(cls, read: Settings) -> OlmoeConfig:
        shared = _grouped_query(read, rms_norm_eps=1e-5)
        experts = _experts(read)
        _fit_experts(read, experts, shared["num_experts_per_tok"], shared["intermediate_size"])
        return cls(
            **shared,
            qk_norm="width",
            moe_intermediate_size=shared["intermediate_size"],
            num_experts=experts,
            gate=Gate(norm_topk_prob=read.flag("norm_topk_prob", False)),
            clip_qkv=read.number("clip_qkv", None),
        )

    def is_sparse(self, layer: int) -> bool:
        return True


FAMILIES: Final[dict[str, type[OpenConfig]]] = {
    "deepseek_v2": DeepseekConfig,
    "deepseek_v3": DeepseekConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "olmoe": OlmoeConfig,
}


def read_config(folder: Path) -> OpenConfig:
    """The configuration in a model folder; what ends an answer comes from generation_config.json where it is there.

    Raises CheckpointError for an architecture or an option that is not implemented, and for values that do not fit.
    """
    read = Settings.read(folder / "config.json")
    family = FAMILIES.get(str(read.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(
            "unknown-architecture", read.file, f'"model_type" is {read.get("model_type")!r}; implemented: {known}'
        )
    config = family.from_settings(read)
    generation = folder / "generation_config.json"
    if generation.exists() and (eos := Settings.read(generation).whole_numbers("eos_token_id")):
        config = replace(config, eos_token_id=eos)
    return config
