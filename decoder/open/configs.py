"""The families: `config.json` to the decoder's configuration.

A family is one function and one line in `FAMILIES`; keys are those of `config.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from decoder.attention import FullAttentionConfig
from decoder.config import DecoderConfig
from decoder.latent import LatentAttentionConfig
from decoder.moe import ExpertsConfig
from decoder.open.errors import CheckpointError
from decoder.open.settings import LONGEST, Settings

# Far above any published model: a damaged file must not ask for millions of modules.
MOST_LAYERS: Final = 512
MOST_EXPERTS: Final = 2048


@dataclass(frozen=True, kw_only=True)
class OpenConfig(DecoderConfig):
    """The configuration of a model folder."""

    model_type: str
    draft_layers: int = 0  # of DeepSeek-V3, behind the others, to draft further tokens: their tensors are passed over


def _shared(read: Settings) -> dict[str, Any]:
    """The fields that every family has, from keys of one name."""
    read.refuse_unsupported()
    found = {
        "model_type": read.get("model_type"),
        "vocabulary": read.size("vocab_size", most=LONGEST),
        "width": read.size("hidden_size"),
        "layers": read.size("num_hidden_layers", most=MOST_LAYERS),
        "dense_hidden": read.size("intermediate_size"),
        "length": read.size("max_position_embeddings", most=LONGEST),
        "tied": read.flag("tie_word_embeddings", False),
        "logit_scale": 1.0,
        "end_tokens": read.whole_numbers("eos_token_id"),
    }
    # The grouped matrix product wants rows of whole 16 bytes in bfloat16.
    read.fits(found["width"] % 8 == 0, '"hidden_size" a multiple of 8')
    return found


def _experts(read: Settings) -> int:
    """The number of experts, which transformers 5 saves under another name."""
    key = "num_local_experts" if read.get("num_experts", None) is None else "num_experts"
    return int(read.size(key, most=MOST_EXPERTS))


def _fit_experts(read: Settings, experts: int, active: int, intermediate: int) -> None:
    read.fits(active <= experts, f'"num_experts_per_tok" at most the {experts} experts')
    read.fits(intermediate % 8 == 0, "the experts' intermediate size a multiple of 8")


def deepseek(read: Settings) -> OpenConfig:
    """DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, groups of experts."""
    shared = _shared(read)
    v3 = shared["model_type"] == "deepseek_v3"
    experts, active = read.size("n_routed_experts", most=MOST_EXPERTS), read.size("num_experts_per_tok")
    intermediate = read.size("moe_intermediate_size")
    _fit_experts(read, experts, active, intermediate)
    read.one_of("moe_layer_freq", (1,), 1)
    read.one_of("mlp_bias", (False,), False)
    heads = read.size("num_attention_heads")
    read.fits(read.size("num_key_value_heads", heads) == heads, f'"num_key_value_heads" to be {heads}, as queries have')
    if v3:
        read.one_of("scoring_func", ("sigmoid",), "sigmoid")
        method = read.one_of("topk_method", ("noaux_tc",), "noaux_tc")
    else:
        read.one_of("scoring_func", ("softmax",), "softmax")
        method = read.one_of("topk_method", ("greedy", "group_limited_greedy"), "greedy")
        # The published code and its successors disagree on what V2 does with it; no published V2 sets it.
        read.one_of("norm_topk_prob", (False,), False)
    grouped = method != "greedy"
    groups, best_groups = (read.size("n_group", 1), read.size("topk_group", 1)) if grouped else (1, 1)
    read.fits(experts % groups == 0 and best_groups <= groups, '"n_group" to divide the experts, "topk_group" of them')
    read.fits(active <= best_groups * experts // groups, '"num_experts_per_tok" experts in "topk_group" groups')
    read.fits(not v3 or experts // groups >= 2, "two experts or more in each group")
    rotary = read.size("qk_rope_head_dim")
    return OpenConfig(
        **shared,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        attention=LatentAttentionConfig(
            heads=heads,
            latent=read.size("kv_lora_rank"),
            rotary=rotary,
            plain=read.size("qk_nope_head_dim"),
            value=read.size("v_head_dim"),
            query_latent=read.size("q_lora_rank", None),
            bias=read.flag("attention_bias", False),
            # V2 has neighbouring pairs always, V3 unless it says otherwise.
            rope=read.rope(rotary, interleaved=not v3 or read.flag("rope_interleave", True)),
        ),
        experts=ExpertsConfig(
            count=experts,
            active=active,
            hidden=intermediate,
            shared_hidden=intermediate * read.size("n_shared_experts", 0, least=0),
            score="sigmoid" if v3 else "softmax",
            balanced=v3,
            groups=groups,
            best_groups=best_groups,
            normalised=v3 and read.flag("norm_topk_prob", True),
            scale=read.number("routed_scaling_factor", 2.5 if v3 else 1.0),
        ),
        dense_layers=tuple(range(read.size("first_k_dense_replace", 3 if v3 else 0, least=0))),
        draft_layers=read.size("num_nextn_predict_layers", 0, least=0),
    )


def _grouped_query(
    read: Settings, width: int, qk_norm: Literal["head", "width"], clip_qkv: float | None = None
) -> FullAttentionConfig:
    heads = read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", heads)
    read.fits(heads % kv_heads == 0, '"num_attention_heads" a multiple of "num_key_value_heads"')
    head_dim = read.size("head_dim", None)
    if head_dim is None:
        read.fits(width % heads == 0, '"hidden_size" a multiple of "num_attention_heads"')
        head_dim = width // heads
    return FullAttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
        bias=read.flag("attention_bias", False),
        rope=read.rope(head_dim),
    )


def _softmax_experts(read: Settings, hidden: int) -> ExpertsConfig:
    experts, active = _experts(read), read.size("num_experts_per_tok")
    _fit_experts(read, experts, active, hidden)
    return ExpertsConfig(
        count=experts,
        active=active,
        hidden=hidden,
        shared_hidden=0,
        score="softmax",
        balanced=False,
        normalised=read.flag("norm_topk_prob", False),
    )


def qwen3_moe(read: Settings) -> OpenConfig:
    """Qwen3-MoE (arXiv 2505.09388): queries and keys normalised a head, dense layers where the configuration says."""
    shared = _shared(read)
    step, dense = read.size("decoder_sparse_step", 1), read.whole_numbers("mlp_only_layers")
    return OpenConfig(
        **shared,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        attention=_grouped_query(read, shared["width"], "head"),
        experts=_softmax_experts(read, read.size("moe_intermediate_size")),
        dense_layers=tuple(i for i in range(shared["layers"]) if i in dense or (i + 1) % step),
    )


def olmoe(read: Settings) -> OpenConfig:
    """OLMoE (arXiv 2409.02060): queries and keys normalised over the whole width, experts in every layer."""
    shared = _shared(read)
    return OpenConfig(
        **shared,
        norm_eps=read.number("rms_norm_eps", 1e-5),
        attention=_grouped_query(read, shared["width"], "width", read.number("clip_qkv", None)),
        experts=_softmax_experts(read, shared["dense_hidden"]),
    )


FAMILIES: Final[dict[str, Callable[[Settings], OpenConfig]]] = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
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
    config = family(read)
    generation = folder / "generation_config.json"
    if generation.exists() and (eos := Settings.read(generation).whole_numbers("eos_token_id")):
        config = replace(config, end_tokens=eos)
    return config
