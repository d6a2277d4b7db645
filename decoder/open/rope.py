"""Rotary position embedding: its frequencies, plain or stretched by YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Yarn:
    """A context longer than the one trained on: slow frequencies are interpolated, fast ones stay."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0  # turns within the original context from which on a frequency stays as it is
    beta_slow: float = 1.0  # ... and up to which it is divided by `factor`
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # None: from the factor and the two mscales
    truncate: bool = True  # round the bounds of the ramp to whole frequencies

    def temperature(self, mscale: float = 1.0) -> float:
        """How much attention is sharpened for the longer context; 1 where it is not longer."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def amplitude(self) -> float:
        """Scale of the cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature()

    def bounds(self, dim: int, theta: float) -> tuple[float, float]:
        """First and last frequency of the ramp between those that stay and those that are interpolated."""
        low, high = (
            dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high if high != low else high + 0.001  # a ramp of no width would divide by zero


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of `dim` values a head by the position."""

    dim: int
    theta: float = 10000.0
    yarn: Yarn | None = None
    interleaved: bool = False  # pairs are neighbours (DeepSeek), not halves

    @property
    def amplitude(self) -> float:
        """Scale of the cosines and sines."""
        return self.yarn.amplitude if self.yarn else 1.0

    def inverse_frequencies(self) -> Tensor:
        """Radians a position, `[dim / 2]`, fp32, on the CPU whatever the default device."""
        frequency = self.theta ** -(torch.arange(0, self.dim, 2, device="cpu", dtype=torch.float32) / self.dim)
        if self.yarn is None:
            return frequency
        low, high = self.yarn.bounds(self.dim, self.theta)
        ramp = ((torch.arange(self.dim // 2, device="cpu", dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequency, frequency / self.yarn.factor, ramp)

    def rotate(self, x_BTHR: Tensor, cos_BT1r: Tensor, sin_BT1r: Tensor) -> Tensor:
        """Rotates each pair; results lie in halves either way, alike for queries and keys, so that products hold."""
        a, b = (x_BTHR[..., 0::2], x_BTHR[..., 1::2]) if self.interleaved else x_BTHR.chunk(2, -1)
        return torch.cat((a * cos_BT1r - b * sin_BT1r, b * cos_BT1r + a * sin_BT1r), -1).to(x_BTHR.dtype)
