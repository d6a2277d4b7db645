"""Rotary position embedding: its frequencies, plain or stretched by YaRN (arXiv 2309.00071).

Shapes: B batch, T positions, H heads, R rotary width of a head, r half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


def on_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels of our own serve: halves on a GPU, no gradients; a compiler makes its own."""
    halves = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and halves and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
    """Rotation of the values of a head by the position."""

    theta: float = 10000.0
    yarn: Yarn | None = None
    interleaved: bool = False  # pairs are neighbours (DeepSeek), not halves

    @property
    def amplitude(self) -> float:
        """Scale of the cosines and sines."""
        return self.yarn.amplitude if self.yarn else 1.0

    def inverse_frequencies(self, dim: int) -> Tensor:
        """Radians a position of `dim` values, `[dim / 2]`, fp32, on the CPU whatever the default device."""
        frequency = self.theta ** -(torch.arange(0, dim, 2, device="cpu", dtype=torch.float32) / dim)
        if self.yarn is None:
            return frequency
        low, high = self.yarn.bounds(dim, self.theta)
        ramp = ((torch.arange(dim // 2, device="cpu", dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequency, frequency / self.yarn.factor, ramp)

    def rotate(self, x_BTHR: Tensor, cos_BT1r: Tensor, sin_BT1r: Tensor) -> Tensor:
        """Rotates each pair; results lie in halves either way, alike for queries and keys, so that products hold."""
        if on_gpu(x_BTHR.device, x_BTHR.dtype):
            from decoder import windows  # which needs Triton

            return windows.rotate(x_BTHR, cos_BT1r, sin_BT1r, self.interleaved)
        a, b = (x_BTHR[..., 0::2], x_BTHR[..., 1::2]) if self.interleaved else x_BTHR.chunk(2, -1)
        halves_BTHR = torch.cat((a, b), -1) if self.interleaved else x_BTHR
        # Over whole heads: operators are slow on rows as short as half of one.
        cos_BT1R, sin_BT1R = torch.cat((cos_BT1r, cos_BT1r), -1), torch.cat((-sin_BT1r, sin_BT1r), -1)
        return (halves_BTHR * cos_BT1R).addcmul_(torch.cat((b, a), -1), sin_BT1R).to(x_BTHR.dtype)


class Fp32(nn.Module):
    """What stays in fp32 when the model around it is converted to another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep, recurse)


class Rotary(Fp32):
    """Positions `[B, T]` to cosines and sines `[B, T, 1, r]`."""

    inv_freq: Tensor

    def __init__(self, rope: Rope, dim: int) -> None:
        super().__init__()
        self.amplitude = rope.amplitude
        self.register_buffer("inv_freq", rope.inverse_frequencies(dim), persistent=False)

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        angle_BT1r = (positions_BT[..., None] * self.inv_freq)[:, :, None]
        cos, sin = angle_BT1r.cos(), angle_BT1r.sin()
        return (cos, sin) if self.amplitude == 1.0 else (cos * self.amplitude, sin * self.amplitude)
