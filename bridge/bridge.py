"""The cross-modal bridge, and the plain controls that it is measured against.

The bridge itself, `align`: learned queries attend over the visual tokens; each result becomes a distribution over the
decoder's vocabulary, and what the decoder reads is the mean embedding under it: a convex combination, so that images
arrive in the space that the decoder's own words live in.  Two choices make it, and `BRIDGES` has every mix of them that
tells which one matters: how many tokens are given on, and what puts them into the decoder's width.
Shapes: B batch, N visual tokens, Q tokens given, C visual width, D decoder width, V vocabulary.
Sources: Perceiver resampler (arXiv 2204.14198), ALIGN module of AlignVLM (arXiv 2502.01341), pixel unshuffle of
InternVL (arXiv 2404.16821), MLP projection of LLaVA 1.5 (arXiv 2310.03744).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL: Final = 2  # side of the squares of visual tokens that `unshuffle` joins
FREQUENCIES: Final = 6


@dataclass(frozen=True, slots=True)
class Design:
    """What a registered name stands for."""

    tokens: Literal["queries", "all", "unshuffle"]  # learned queries; every visual token; squares of them joined
    into: Literal["align", "mlp"]  # a mean of vocabulary embeddings; any vector


BRIDGES: Final[dict[str, Design]] = {
    "align": Design("queries", "align"),
    "align-all": Design("all", "align"),
    "mlp": Design("all", "mlp"),  # plain concatenation
    "mlp-queries": Design("queries", "mlp"),
    "unshuffle": Design("unshuffle", "mlp"),
}


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """Sizes of a bridge, with what they cost. Raises ValueError for a name that is not registered, or odd sizes."""

    visual_width: int  # C
    width: int  # D
    vocabulary: int  # V
    name: str = "align"
    queries: int = 32  # Q, where the design has queries
    layers: int = 2
    heads: int = 6

    def __post_init__(self) -> None:
        if self.name not in BRIDGES:
            raise ValueError(f"there is no bridge {self.name!r}; choose from: {', '.join(BRIDGES)}")
        if self.design.tokens == "queries" and (self.width % self.heads or self.queries < 1):
            raise ValueError(
                f"a bridge of width {self.width} with {self.queries} queries and {self.heads} heads: "
                "give at least one query, and heads that divide the width"
            )

    @property
    def design(self) -> Design:
        return BRIDGES[self.name]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        joined = CELL**2 if self.design.tokens == "unshuffle" else 1
        count = _linear(joined * self.visual_width, self.width)
        if self.design.tokens == "queries":
            # Attention has four square matrices, the MLP another four; three layer norms.
            square = 8 * self.width**2 + 7 * self.width
            count += self.queries * self.width + self.layers * (square + 6 * self.width)
        if self.design.into == "align":
            return count + _linear(self.width, self.width) + 2 * self.width + _linear(self.width, self.vocabulary)
        return count + self._mlp_matrices * _linear(self.width, self.width)

    @property
    def _mlp_matrices(self) -> int:
        """After queries the MLP has both of its matrices; else the projection is the first."""
        return 2 if self.design.tokens == "queries" else 1

    def given(self, rows: int, columns: int) -> int:
        """Tokens that the decoder reads of a grid of visual tokens."""
        if self.design.tokens == "queries":
            return self.queries
        return -(-rows // CELL) * -(-columns // CELL) if self.design.tokens == "unshuffle" else rows * columns

    def flops(self, rows: int, columns: int) -> int:
        """Multiply-adds times two for one picture whose visual tokens form that grid; norms and softmax left out."""
        visual, given = rows * columns, self.given(rows, columns)
        if self.design.tokens == "queries":
            attended = 2 * given * visual * self.width  # scores and mixing
            matrices = (6 * given + 2 * visual) * self.width**2
            adds = visual * self.visual_width * self.width + self.layers * (attended + matrices)
        else:
            joined = CELL**2 if self.design.tokens == "unshuffle" else 1
            adds = given * joined * self.visual_width * self.width
        if self.design.into == "align":
            return 2 * (adds + given * (self.width**2 + 2 * self.width * self.vocabulary))
        return 2 * (adds + given * self._mlp_matrices * self.width**2)


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the visual tokens; square unless `grid` says so. Raises ValueError where they do not fit."""
    rows, columns = grid or (math.isqrt(tokens), math.isqrt(tokens))
    if rows * columns != tokens:
        said = f"a grid of {rows} x {columns}" if grid else "a square grid: give grid=(rows, columns)"
        raise ValueError(f"{tokens} visual tokens are not {said}")
    return rows, columns


def grid_code(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Sine and cosine of row and column for visual tokens row by row: `[rows * columns, width]`, unit scale."""
    longest = max(rows, columns) - 1 or 1
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    place = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1) / longest
    frequency = torch.pi * 2 ** torch.arange(0, FREQUENCIES, device=device)
    angle = (place[:, :, None] * frequency).flatten(1)
    code = torch.cat((angle.sin(), angle.cos()), 1)[:, :width]
    return F.pad(code, (0, width - code.shape[1]))


def unshuffle(visual_BNC: Tensor, rows: int, columns: int) -> Tensor:
    """Joins each square of tokens into one that is `CELL**2` times as wide; the last row and column are filled up."""
    x = visual_BNC.unflatten(1, (rows, columns))
    x = F.pad(x, (0, 0, 0, -columns % CELL, 0, -rows % CELL))
    x = x.unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL))  # [B, rows / CELL, CELL, columns / CELL, CELL, C]
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


class CrossAttention(nn.Module):
    """Queries attend over visual tokens, then an MLP; both residual and pre-normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BQD: Tensor, visual_BND: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys, values = self.kv(self.norm_kv(visual_BND)).chunk(2, -1)
        mixed = F.scaled_dot_product_attention(split(self.q(self.norm_q(x_BQD))), split(keys), split(values))
        x_BQD = x_BQD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BQD + self.mlp(self.norm_mlp(x_BQD))


class Bridge(nn.Module):
    """`[B, N, C]` visual tokens and the decoder's embedding table `[V, D]` -> `[B, Q, D]`."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config, design, width = config, config.design, config.width
        joined = CELL**2 if design.tokens == "unshuffle" else 1
        self.project = nn.Linear(joined * config.visual_width, width)
        if design.tokens == "queries":
            self.queries = nn.Parameter(torch.randn(config.queries, width) * 0.5)
            self.layers = nn.ModuleList(CrossAttention(width, config.heads) for _ in range(config.layers))
        if design.into == "align":
            self.hidden, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.words = nn.Linear(width, config.vocabulary)
        else:
            first = [nn.Linear(width, width)] if design.tokens == "queries" else []
            self.mlp = nn.Sequential(*first, nn.GELU(), nn.Linear(width, width))

    def forward(self, visual_BNC: Tensor, embedding_VD: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`grid` is rows and columns of the visual tokens, where they are not square. Raises ValueError."""
        rows, columns = grid_of(visual_BNC.shape[1], grid)
        design = self.config.design
        if design.tokens == "unshuffle":
            visual_BNC = unshuffle(visual_BNC, rows, columns)
            rows, columns = -(-rows // CELL), -(-columns // CELL)
        x = self.project(visual_BNC)
        x = x + grid_code(rows, columns, x.shape[2], x.device).to(x.dtype)
        if design.tokens == "queries":
            visual, x = x, self.queries.expand(len(x), -1, -1)
            for layer in self.layers:
                x = layer(x, visual)
        if design.into == "mlp":
            mapped: Tensor = self.mlp(x)
            return mapped
        distribution_BQV = self.words(self.norm(self.hidden(x))).float().softmax(-1)
        return distribution_BQV.to(embedding_VD.dtype) @ embedding_VD
