"""The layers that the families are made of; their weights have the names that checkpoints use.

Shapes: B batch, T new positions, S positions in the cache, N = B*T tokens, D width, H query heads, J key/value heads,
d width of a head, W values of a position in the cache, E experts, K experts of a token, I width of an expert.
Latent attention: C latent, R rotary and P plain width of a key, U width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.open.configs import DeepseekConfig, Gate, GroupedQueryConfig, OpenConfig


class Cache:
    """What attention keeps of each position: `[L, B, length, W]`, of which row b has `used_B[b]`.

    Grouped-query attention keeps keys and values, latent attention one latent and one rotary key for all heads.
    """

    def __init__(self, config: OpenConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, batch, length, config.cache_width)
        self.data_LBSW = torch.zeros(shape, device=device, dtype=dtype)
        self.used_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0  # an upper bound of `used_B` that costs no look at the device
        self._positions_BT = self._rows_B1 = self.used_B[:, None]

    @property
    def length(self) -> int:
        """Positions that fit."""
        return self.data_LBSW.shape[2]

    def open(self, count: int) -> Tensor:
        """Makes room for `count` new positions behind those in use; returns them, `[B, T]`."""
        self._positions_BT = self.used_B[:, None] + torch.arange(count, device=self.used_B.device)
        self._rows_B1 = torch.arange(len(self.used_B), device=self.used_B.device)[:, None]
        self.used_B = self.used_B + count
        self.filled += count
        return self._positions_BT

    def extend(self, layer: int, entry_BTW: Tensor) -> Tensor:
        """Writes the new positions of a layer; returns all, `[B, S, W]`, those behind a row's own end included."""
        self.data_LBSW[layer][self._rows_B1, self._positions_BT] = entry_BTW
        return self.data_LBSW[layer, :, : self.filled]


def attend(q_BTHd: Tensor, k_BSJd: Tensor, v_BSJu: Tensor, mask_BTS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, `[B, T, H, u]`; without a mask keys are those of the queries' own positions, causally."""
    q, k, v = q_BTHd.transpose(1, 2), k_BSJd.transpose(1, 2), v_BSJu.transpose(1, 2)
    if mask_BTS is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    # Queries that share a key head become more queries of that head, so that the cache is read once and not copied.
    batch, heads, count, _ = q.shape
    shared = heads // k.shape[1]
    mask = mask_BTS[:, None, None].expand(-1, -1, shared, -1, -1).reshape(batch, 1, shared * count, -1)
    out = F.scaled_dot_product_attention(q.reshape(batch, k.shape[1], shared * count, -1), k, v, mask, scale=scale)
    return out.reshape(batch, heads, count, -1).transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share key/value heads; queries and keys are normalised before the rotation."""

    def __init__(self, config: GroupedQueryConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rope, self.clip = layer, config.head_dim, config.rope, config.clip_qkv
        self.a_head = config.qk_norm == "head"
        q, kv, bias = config.num_attention_heads * self.head_dim, config.cache_width // 2, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=bias)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim if self.a_head else q, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim if self.a_head else kv, eps=config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_BTS: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        heads = (-1, self.head_dim)
        if self.a_head:
            q, k = self.q_norm(q.unflatten(-1, heads)), self.k_norm(k.unflatten(-1, heads))
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q_BTHd, k_BTJd = (self.rope.rotate(t.flatten(2).unflatten(-1, heads), cos, sin) for t in (q, k))
        entry = torch.cat((k_BTJd.flatten(2), v), -1)
        if cache is not None:
            entry = cache.extend(self.layer, entry)
        k_BSJd, v_BSJd = (t.unflatten(-1, heads) for t in entry.chunk(2, -1))
        out_BTHd = attend(q_BTHd, k_BSJd, v_BSJd, mask_BTS, self.head_dim**-0.5)
        return self.o_proj(out_BTHd.flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads are products of one latent, which is what is cached.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    def __init__(self, config: DeepseekConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.rope, self.scale = layer, config.rope, config.softmax_scale
        self.heads, bias = config.num_attention_heads, config.attention_bias
        self.query = (config.qk_nope_head_dim, config.qk_rope_head_dim)  # P, R
        self.cached = (config.kv_lora_rank, config.qk_rope_head_dim)  # C, R
        self.expanded = (config.qk_nope_head_dim, config.v_head_dim)  # P, U
        self.low_rank = config.q_lora_rank is not None
        # The norms inside have this epsilon whatever rms_norm_eps says.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, self.heads * sum(self.query), bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * sum(self.query), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, sum(self.cached), bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.heads * sum(self.expanded), bias=False)
        self.o_proj = nn.Linear(self.heads * config.v_head_dim, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_BTS: Tensor | None, cache: Cache | None) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if self.low_rank else self.q_proj(x_BTD)
        q_BTHP, q_BTHR = q.unflatten(-1, (self.heads, -1)).split(self.query, -1)
        q_BTHR = self.rope.rotate(q_BTHR, cos, sin)
        latent, k_BTR = self.kv_a_proj_with_mqa(x_BTD).split(self.cached, -1)
        k_BTR = self.rope.rotate(k_BTR[:, :, None], cos, sin)[:, :, 0]
        entry = torch.cat((self.kv_a_layernorm(latent), k_BTR), -1)
        if cache is not None:
            entry = cache.extend(self.layer, entry)
        latent_BSC, k_BSR = entry.split(self.cached, -1)
        if mask_BTS is None:
            # Nothing was cached before: each latent is expanded once, and scores are over P + R values.
            k_BSHP, v_BSHU = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1)).split(self.expanded, -1)
            k_BSHX = torch.cat((k_BSHP, k_BSR[:, :, None].expand(-1, -1, self.heads, -1)), -1)
            out_BTHU = attend(torch.cat((q_BTHP, q_BTHR), -1), k_BSHX, v_BSHU, None, self.scale)
        else:
            # Absorbed: the expansion moves to the query and the result, so that the cached latents are never expanded.
            k_HPC, v_HUC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(self.expanded, 1)
            q_BTHC = torch.einsum("bthp,hpc->bthc", q_BTHP, k_HPC)
            q_BTHW, k_BS1W, v_BS1C = torch.cat((q_BTHC, q_BTHR), -1), entry[:, :, None], latent_BSC[:, :, None]
            out_BTHC = attend(q_BTHW, k_BS1W, v_BS1C, mask_BTS, self.scale)
            out_BTHU = torch.einsum("bthc,huc->bthu", out_BTHC, v_HUC)
        return self.o_proj(out_BTHU.flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward of a dense layer, and the shared experts of a sparse one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Router(nn.Module):
    """Chooses the experts of each token, in fp32 whatever the model's type: rounding would change the choice."""

    def __init__(self, width: int, experts: int, active: int, gate: Gate) -> None:
        super().__init__()
        self.active, self.gate = active, gate
        self.weight = nn.Parameter(torch.empty(experts, width))
        if gate.correction_bias:
            self.e_score_correction_bias = nn.Parameter(torch.empty(experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, both `[N, K]`."""
        logits_NE = F.linear(x_ND.float(), self.weight)
        score_NE = logits_NE.sigmoid() if self.gate.score == "sigmoid" else logits_NE.softmax(-1)
        choice_NE = score_NE + self.e_score_correction_bias if self.gate.correction_bias else score_NE
        if self.gate.n_group > 1:
            grouped = choice_NE.unflatten(-1, (self.gate.n_group, -1))
            of_group = grouped.topk(2 if self.gate.correction_bias else 1, -1).values.sum(-1)
            best = torch.zeros_like(of_group).scatter_(1, of_group.topk(self.gate.topk_group, -1).indices, 1.0)
            choice_NE = grouped.masked_fill(best[..., None] == 0, float("-inf")).flatten(1)
        chosen_NK = choice_NE.topk(self.active, -1).indices
        weight_NK = score_NE.gather(1, chosen_NK)
        if self.gate.norm_topk_prob:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        return chosen_NK, weight_NK * self.gate.routed_scaling_factor


class Experts(nn.Module):
    """The routed experts of a layer as two grouped products; no token is dropped."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w13_E2ID = nn.Parameter(torch.empty(experts, 2 * hidden, width))  # gate, then up
        self.w2_EDI = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor) -> Tensor:
        # Every (token, slot) pair sorted by expert, so that each expert is one product.
        expert, order = chosen_NK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(
            expert, torch.arange(len(self.w2_EDI), device=expert.device), right=True, out_int32=True
        )
        rows = x_ND[order // chosen_NK.shape[1]]
        gate, up = F.grouped_mm(rows, self.w13_E2ID.transpose(-2, -1), offs=ends_E).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.w2_EDI.transpose(-2, -1), offs=ends_E)
        # Back into the tokens' order, so that a token's sum has one order whatever else is in the batch.
        out_NKD = torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, chosen_NK.shape)
        return (out_NKD * weight_NK[..., None].to(rows.dtype)).sum(1)


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones beside them where the family has any."""

    def __init__(self, config: OpenConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(width, config.num_experts, config.num_experts_per_tok, config.gate)
        self.experts = Experts(config.num_experts, width, hidden)
        self.shared_experts = (
            SwiGLU(width, config.shared_intermediate_size) if config.shared_intermediate_size else None
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        out_BTD = self.experts(x_ND, *self.gate(x_ND)).view_as(x_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(x_BTD)


class Layer(nn.Module):
    """Attention, then the feed-forward, both pre-normalised and residual."""

    def __init__(self, config: OpenConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: nn.Module
        if isinstance(config, DeepseekConfig):
            self.self_attn = LatentAttention(config, index)
        else:
            assert isinstance(config, GroupedQueryConfig)
            self.self_attn = GroupedQueryAttention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        sparse = config.is_sparse(index)
        self.mlp = MixtureOfExperts(config) if sparse else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask_BTS: Tensor | None, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask_BTS, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
