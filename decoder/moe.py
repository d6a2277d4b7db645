"""A sparse mixture of experts: a light gate, top-k routing, shared experts, no dropped token.

Load is balanced without an auxiliary loss: a bias, moved once per optimiser step, tilts which experts are chosen but
not how their outputs are weighted. Two options: a number of experts that varies from token to token, and experts that
see each other's results.
Shapes: N tokens (batch and sequence flattened), D width, E experts, K active experts, I hidden width of an expert.
Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.layers import READING, Linear, product, stepping
from decoder.rotary import Fp32

# Up to so many (token, expert) pairs on a GPU weights are gathered; above, pairs are sorted for one grouped product.
GATHERED: Final = 64
MOST: Final = 8  # rows of an expert that a CPU takes together with the other experts


def swiglu_parameters(width: int, hidden: int) -> int:
    """Weights of one SwiGLU."""
    return 3 * width * hidden


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sizes of a mixture, and how a token's experts are chosen and weighted."""

    count: int = 16
    active: int = 2
    hidden: int = 96
    shared_hidden: int = 192  # of all shared experts together; 0: none
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    balanced: bool = True  # a bias tilts the choice, not the weights; then a group's score is the sum of its best two
    groups: int = 1  # experts come from the best `best_groups` of so many groups
    best_groups: int = 1
    normalised: bool = True  # weights sum to 1 before they are scaled
    scale: float = 1.0
    threshold: float = 0.0  # of a token's experts those stay whose score is at least this share of its best one's
    cooperation: int = 0  # rank of the attention by which a token's experts see each other's results; 0: none

    def parameters(self, width: int) -> int:
        """Weights of one layer."""
        expert = swiglu_parameters(width, self.hidden)
        shared = swiglu_parameters(width, self.shared_hidden)
        return self.count * (expert + width) + shared + 4 * width * self.cooperation

    def flops(self, width: int) -> int:
        """FLOPs of one token in one layer, with `active` experts whatever `threshold` leaves of them."""
        # Cooperation works on the result of each expert, its weights are not used once a token.
        once = self.parameters(width) - self.idle_parameters(width) - 4 * width * self.cooperation
        together = self.active * (4 * width + 2 * self.active) * self.cooperation
        return 2 * (once + together)

    def idle_parameters(self, width: int) -> int:
        """Weights of one layer that take no part in one token."""
        return (self.count - self.active) * swiglu_parameters(width, self.hidden)


class SwiGLU(nn.Module):
    """The feed-forward of a dense layer, and the shared experts of a sparse one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w13 = Linear(width, 2 * hidden, bias=False)  # gate, then up
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.w13(x_BTD).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Router(Fp32):
    """Chooses the experts of each token, in fp32 whatever the model's type: rounding would change the choice."""

    balance_E: Tensor  # moved by `rebalance`, saved with the weights
    load_E: Tensor  # tokens of each expert since the last `rebalance`

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.count, width).uniform_(-(width**-0.5), width**-0.5))
        if config.balanced:
            self.register_buffer("balance_E", torch.zeros(config.count))
        self.register_buffer("load_E", torch.zeros(config.count, device="cpu"), persistent=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, both `[N, K]`; E and 0 where `threshold` leaves one out."""
        config = self.config
        # Entering a context costs as much as the product does for one row.
        device = x_ND.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits_NE = F.linear(x_ND.float(), self.weight)
        score_NE = logits_NE.sigmoid() if config.score == "sigmoid" else logits_NE.softmax(-1)
        choice_NE = score_NE + self.balance_E if config.balanced else score_NE
        if config.groups > 1:
            grouped = choice_NE.unflatten(-1, (config.groups, -1))
            of_group = grouped.topk(2 if config.balanced else 1, -1).values.sum(-1)
            best = torch.zeros_like(of_group).scatter_(1, of_group.topk(config.best_groups, -1).indices, 1.0)
            choice_NE = grouped.masked_fill(best[..., None] == 0, float("-inf")).flatten(1)
        chosen_NK = choice_NE.topk(config.active, -1).indices
        weight_NK = score_NE.gather(1, chosen_NK)
        if config.threshold:
            out_NK = weight_NK < config.threshold * weight_NK.amax(-1, keepdim=True)
            weight_NK = weight_NK.masked_fill(out_NK, 0.0)
        # Activation checkpointing runs a layer again within the backward pass: that is no second load.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.load_E.scatter_add_(0, chosen_NK.flatten(), (weight_NK > 0).flatten().to(self.load_E.dtype))
        if config.threshold:
            chosen_NK = chosen_NK.masked_fill(out_NK, config.count)
        if config.normalised:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        return chosen_NK, weight_NK if config.scale == 1.0 else weight_NK * config.scale

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Moves the bias towards the experts that got fewer tokens than the mean; once per optimiser step.

        Where processes train together each counts its own tokens, and all move alike by their sum.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load_E)
        delta_E = rate * torch.sign(self.load_E.mean() - self.load_E)
        self.balance_E += delta_E - delta_E.mean()
        self.load_E.zero_()


class Experts(nn.Module):
    """The routed experts of a layer; no token is dropped."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        count, hidden = config.count, config.hidden
        self.varying = config.threshold > 0
        self.w13_E2ID = nn.Parameter(torch.randn(count, 2 * hidden, width) * width**-0.5)  # gate, then up
        self.w2_EDI = nn.Parameter(torch.randn(count, width, hidden) * hidden**-0.5)

    def forward(self, x_ND: Tensor, chosen_NK: Tensor) -> Tensor:
        """What each token's experts make of it, `[N, K, D]`; 0 for an expert E, which is none."""
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        x_ND, w13_E2ID, w2_EDI = x_ND.to(dtype), self.w13_E2ID.to(dtype), self.w2_EDI.to(dtype)
        if x_ND.is_cuda and chosen_NK.numel() <= GATHERED and not torch.is_grad_enabled():
            expert_NK = chosen_NK.clamp(max=len(w2_EDI) - 1) if self.varying else chosen_NK
            gate, up = torch.einsum("nd,nkid->nki", x_ND, w13_E2ID[expert_NK]).chunk(2, -1)
            out_NKD = torch.einsum("nki,nkdi->nkd", F.silu(gate) * up, w2_EDI[expert_NK])
            return out_NKD.masked_fill((chosen_NK == len(w2_EDI))[..., None], 0.0) if self.varying else out_NKD
        if stepping(x_ND):
            return self._few(x_ND, chosen_NK)
        # Every (token, expert) pair sorted by expert, so that each expert is one product.
        expert, order = chosen_NK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(expert, torch.arange(len(w2_EDI), device=expert.device), right=True, out_int32=True)
        rows = x_ND[order // chosen_NK.shape[1]]
        # Pairs without an expert come last: the products pass over them and leave their rows as they find them.
        none = (expert == len(w2_EDI))[:, None] if self.varying else None
        if none is not None:
            rows = rows.masked_fill(none, 0.0)  # for the gradient
        gate, up = F.grouped_mm(rows, w13_E2ID.transpose(-2, -1), offs=ends_E).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, w2_EDI.transpose(-2, -1), offs=ends_E)
        if none is not None:
            rows = rows.masked_fill(none, 0.0)
        # Back into the tokens' order, so that a token's sum has one order whatever else is in the batch.
        return torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, chosen_NK.shape)

    def _few(self, x_ND: Tensor, chosen_NK: Tensor) -> Tensor:
        """The same on a CPU: experts one by one that somebody chose, or all side by side, by which is quicker."""
        numbers, count = chosen_NK.flatten().tolist(), len(self.w2_EDI)
        quick = READING.get()
        if quick and torch.get_num_threads() > 1 and 2 * len(set(numbers)) >= count and max(numbers) < count:
            return self._side_by_side(x_ND, chosen_NK, numbers)
        multiply = product if quick else F.linear
        w13_E, w2_E = self.w13_E2ID.unbind(), self.w2_EDI.unbind()
        expert, order = chosen_NK.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=count + 1).tolist()
        used = [number for number, count in enumerate(counts[:-1]) if count]
        *parts, none = x_ND[order // chosen_NK.shape[1]].split(counts)
        gate, up = torch.cat([multiply(parts[number], w13_E[number]) for number in used]).chunk(2, -1)
        hidden = F.silu(gate).mul_(up).split([counts[number] for number in used])
        results = [multiply(rows, w2_E[number]) for number, rows in zip(used, hidden, strict=True)]
        out = torch.cat((*results, torch.zeros_like(none)))
        return torch.empty_like(out).index_copy_(0, order, out).unflatten(0, chosen_NK.shape)

    def _side_by_side(self, x_ND: Tensor, chosen_NK: Tensor, numbers: Sequence[int]) -> Tensor:
        """The same by products over all experts, `MOST` rows of each, which threads share; the rows behind them apart.

        A product of a few rows by itself is too small to be shared.
        """
        count, active, seen, nth = len(self.w2_EDI), chosen_NK.shape[1], Counter[int](), []
        for number in numbers:
            nth.append(seen[number])
            seen[number] += 1
        rows = min(max(seen.values()), MOST)
        tokens, late = [0] * (count * rows), []  # any token where an expert has fewer
        for pair, (number, place) in enumerate(zip(numbers, nth, strict=True)):
            if place < rows:
                tokens[number * rows + place] = pair // active
            else:
                late.append(pair)
        x_ERD = x_ND.index_select(0, torch.tensor(tokens)).view(count, rows, -1)
        # With weights on the left and rows that lie one after another it takes half as long as the other way round.
        gate_EIR, up_EIR = torch.bmm(self.w13_E2ID, x_ERD.mT).chunk(2, 1)
        hidden_ERI = F.silu(gate_EIR).mul_(up_EIR).mT.contiguous()
        expert_P, nth_P = chosen_NK.flatten(), torch.tensor(nth).clamp_(max=rows - 1)
        out_PD = torch.bmm(self.w2_EDI, hidden_ERI.mT)[expert_P, :, nth_P]
        if late:
            late_L = torch.tensor(late)
            out_PD[late_L] = self._few(x_ND[late_L // active], expert_P[late_L, None])[:, 0]
        return out_PD.unflatten(0, chosen_NK.shape)


class Cooperation(nn.Module):
    """Low-rank attention among the results of one token's experts, added to them: `[N, K, D] -> [N, K, D]`.

    The last projection starts as zeros, so that a mixture starts as one without.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, results_NKD: Tensor, weight_NK: Tensor) -> Tensor:
        q, k, v = self.qkv(results_NKD).chunk(3, -1)
        scores_NKK = q @ k.mT * q.shape[-1] ** -0.5
        # Experts that were left out are not seen; at least one stays.
        scores_NKK = scores_NKK.masked_fill((weight_NK == 0)[:, None], float("-inf"))
        return results_NKD + self.out(scores_NKK.softmax(-1).to(v.dtype) @ v)


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones beside them: `[B, T, D] -> [B, T, D]`."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(width, config)
        self.cooperation = Cooperation(width, config.cooperation) if config.cooperation else None
        self.shared = SwiGLU(width, config.shared_hidden) if config.shared_hidden else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weight_NK = self.router(x_ND)
        out_NKD = self.experts(x_ND, chosen_NK)
        if self.cooperation is not None:
            out_NKD = self.cooperation(out_NKD, weight_NK)
        out_BTD = (out_NKD * weight_NK[..., None].to(out_NKD.dtype)).sum(1).view_as(x_BTD)
        return (out_BTD if self.shared is None else out_BTD + self.shared(x_BTD)).to(x_BTD.dtype)
