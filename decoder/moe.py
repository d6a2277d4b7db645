"""A sparse mixture of experts: a light gate, top-k routing, one shared expert, no dropped token.

Load is balanced without an auxiliary loss: a bias, moved once per optimiser step, tilts which experts are chosen but
not how their outputs are weighted.
Shapes: T tokens (batch and sequence flattened), D width, E experts, K active experts, I expert hidden width.
Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """`[T, D] -> [T, D]`."""

    balance_E: Tensor  # moved by `rebalance`, saved with the weights
    load_E: Tensor  # tokens of each expert since the last `rebalance`

    def __init__(self, width: int, experts: int, active: int, hidden: int, shared_hidden: int) -> None:
        super().__init__()
        self.experts, self.active = experts, active
        self.gate = nn.Linear(width, experts, bias=False)
        self.w13_E2ID = nn.Parameter(torch.randn(experts, 2 * hidden, width) * width**-0.5)
        self.w2_EDI = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.shared13 = nn.Linear(width, 2 * shared_hidden, bias=False)
        self.shared2 = nn.Linear(shared_hidden, width, bias=False)
        self.register_buffer("balance_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token `[T, K]` and their weights `[T, K]` (fp32, sum 1)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.gate.weight.float()).sigmoid()
        chosen_TK = (scores_TE + self.balance_E).topk(self.active, -1).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        return chosen_TK, weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-9)

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen_TK, weights_TK = self.route(x_TD)
        counts_E = torch.zeros(self.experts, device=x_TD.device).scatter_add_(
            0, chosen_TK.flatten(), torch.ones(chosen_TK.numel(), device=x_TD.device)
        )
        if self.training:
            self.load_E += counts_E
        # Every (token, slot) pair sorted by expert, so that each expert is one product.
        order = chosen_TK.flatten().argsort(stable=True)
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        rows = x_TD.to(dtype)[order // self.active]
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.w13_E2ID.to(dtype).transpose(-2, -1), offs=offsets_E).chunk(2, -1)
        routed = F.grouped_mm(F.silu(gate) * up, self.w2_EDI.to(dtype).transpose(-2, -1), offs=offsets_E)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        routed_TKD = routed[back].view(*chosen_TK.shape, -1) * weights_TK[..., None].to(dtype)
        gate, up = self.shared13(x_TD).chunk(2, -1)
        return (routed_TKD.sum(1) + self.shared2(F.silu(gate) * up)).to(x_TD.dtype)

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Moves the bias towards the experts that got fewer tokens than the mean; once per optimiser step."""
        delta = rate * torch.sign(self.load_E.mean() - self.load_E)
        self.balance_E += delta - delta.mean()
        self.load_E.zero_()
