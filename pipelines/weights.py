"""Weights on disk: safetensors with large matrices as int8 and a scale for each output channel, the rest as float16.

A quantised tensor `name` is stored as `name.int8` and `name.scale`; loading gives back float32. Symmetric, rounded to
nearest: the largest weight of a channel becomes 127.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL = 4096  # tensors with fewer elements stay float16


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a state dict; integer buffers (batch counters) are left out."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        value = tensor.detach().float().cpu()
        if value.ndim < 2 or value.numel() < SMALL:
            stored[name] = value.half().contiguous()
            continue
        axes = tuple(range(1, value.ndim))
        scale = value.abs().amax(axes, keepdim=True).clamp(min=1e-12) / 127
        stored[f"{name}.int8"] = (value / scale).round().clamp(-127, 127).to(torch.int8).contiguous()
        stored[f"{name}.scale"] = scale.contiguous()
    save_file(stored, path, metadata=metadata)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict of float32 tensors."""
    stored = load_file(path)
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".int8"):
            base = name.removesuffix(".int8")
            state[base] = tensor.float() * stored[f"{base}.scale"]
        elif not name.endswith(".scale"):
            state[name] = tensor.float()
    return state
