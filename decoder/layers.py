"""PyTorch's layers, for few rows on a CPU by a quicker way: what a step of decoding is made of there.

A product of few rows waits for memory: its kernels read several rows of the weights at a time, which defeats what
processors fetch ahead. Reading the weights through before, piece by piece, so that the product finds them in the core's
cache, takes about half the time, on machines where that is so (docs/lab-notes.md). Such a product is too small to be
shared by threads: several get parts of the weights as a batch of products.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW: Final = 64  # rows: a product with more of them computes for longer than it reads
PIECE: Final = 1 << 16  # weights that a core's cache holds beside all else
BATCHED: Final = 1 << 10  # values of all rows together up to which large weights are one batched product,
PARTS: Final = 4  # ... a part of the weights each: one product alone is slow

# Whether products of few rows are `product`. `decoder.engine.ways` finds out whether that pays.
READING: ContextVar[bool] = ContextVar("READING", default=False)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, which on a CPU is ten operations, in five."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not stepping(x) or self.eps is None:
            return super().forward(x)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().mul_(1 / x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)


def stepping(x: Tensor) -> bool:
    """Whether few rows are on a CPU, and nobody wants gradients."""
    few = x.numel() <= FEW * x.shape[-1]
    return few and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`: `[..., D]` to `[..., O]`."""
    if not (READING.get() and stepping(x)):
        return F.linear(x, weight_OD, bias_O)
    out = product(x.reshape(-1, x.shape[-1]), weight_OD).view(*x.shape[:-1], -1)
    return out if bias_O is None else out.add_(bias_O)


def product(x_RD: Tensor, weight_OD: Tensor) -> Tensor:
    """`x @ weight.T` of few rows on a CPU, `[R, O]`, for weights that come from memory."""
    (rows, width), outs = x_RD.shape, weight_OD.shape[0]
    large = outs * width > PIECE
    fewest = rows == 1 or (large and rows * width <= BATCHED)
    if (fewest or torch.get_num_threads() > 1) and outs % PARTS == 0:
        # As a batch of products with the weights on the left, nothing has to be read twice, and threads share it.
        parts_PID = weight_OD.view(PARTS, -1, width)
        out_OR = torch.bmm(parts_PID, x_RD.t().expand(PARTS, -1, -1)).view(-1, rows)
        return out_OR.view(1, -1) if rows == 1 else out_OR.t().contiguous()
    if not large:
        return _read_first(x_RD, weight_OD)
    return torch.cat([_read_first(x_RD, each) for each in weight_OD.split(max(1, PIECE // width))], -1)


def add_product(to_1O: Tensor, x_1D: Tensor, weight_OD: Tensor, scale: float) -> None:
    """Adds `product` of one row, times a number, in place."""
    if weight_OD.shape[0] % PARTS:
        to_1O.add_(product(x_1D, weight_OD), alpha=scale)
        return
    parts_PID = weight_OD.view(PARTS, -1, weight_OD.shape[1])
    to_1O.view(PARTS, -1, 1).baddbmm_(parts_PID, x_1D.t().expand(PARTS, -1, -1), alpha=scale)


def _read_first(x_RD: Tensor, weight_OD: Tensor) -> Tensor:
    weight_OD.sum()
    return F.linear(x_RD, weight_OD)
