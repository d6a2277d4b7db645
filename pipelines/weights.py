"""Weights on disk: safetensors with large matrices as integers and a scale for each output channel, the rest float16.

The file's metadata holds the sizes of the network that the weights belong to. A quantised tensor `name` is stored as
`name.int8` and `name.scale`, or, packed for a smaller file, as `name.int6`: four weights in three bytes of the second
dimension. Loading gives back float32. Symmetric, rounded to nearest. Of eight bits, the largest weight of a channel
becomes 127; of six, the scale is the one with the least squared error. A tensor that a network uses in several places
is stored once, under its first name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SMALL = 4096  # tensors with fewer elements stay float16
MOST = 31  # the largest integer of six bits
SCALES = torch.linspace(0.5, 1, 26)  # tried for six bits, as shares of the scale that the largest weight needs


def save_weights(path: Path, state: dict[str, Tensor], config: dict[str, Any], *, held_out: float = 0.0) -> None:
    """Writes a state dict and the sizes of its network; integer buffers (batch counters) are left out.

    `held_out` is the share of the training groups that the network has not seen.
    """
    stored: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        if not tensor.is_floating_point() or (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        value = tensor.detach().float().cpu()
        if value.ndim < 2 or value.numel() < SMALL:
            stored[name] = value.half().contiguous()
            continue
        axes = tuple(range(1, value.ndim))
        scale = value.abs().amax(axes, keepdim=True).clamp(min=1e-12) / 127
        stored[f"{name}.int8"] = (value / scale).round().clamp(-127, 127).to(torch.int8).contiguous()
        stored[f"{name}.scale"] = scale.contiguous()
    save_file(stored, path, metadata={"config": json.dumps(config), "held_out": json.dumps(held_out)})


def packed(stored: dict[str, Tensor], most: float) -> dict[str, Tensor]:
    """What `save_weights` stores in at most so many bytes, with six bits instead of eight for weights as need be.

    The largest tensors come first: early layers and heads, which suffer most, are small. Those of a glance count a
    quarter of their size, as its fields lose by six bits and a detector's boxes do not (measured). Raises ValueError
    where six bits for all do not suffice.
    """
    smaller = dict(stored)
    size = sum(value.nbytes for value in stored.values())
    large = [(name, value) for name, value in stored.items() if name.endswith(".int8") and value.shape[1] % 4 == 0]
    for name, value in sorted(large, key=lambda pair: pair[1].numel() / (-4 if pair[0].startswith("glance.") else -1)):
        if size <= most:
            break
        size -= value.nbytes // 4
        base = name.removesuffix(".int8")
        wide_O1 = value.flatten(1).float() * stored[f"{base}.scale"].flatten()[:, None]
        largest_O = wide_O1.abs().amax(1).clamp(min=1e-12) / MOST
        errors = torch.stack([(_six(wide_O1, largest_O * share)[1] - wide_O1).square().sum(1) for share in SCALES])
        scale_O = largest_O * SCALES[errors.argmin(0)]
        whole = (_six(wide_O1, scale_O)[0] + MOST).to(torch.int32).reshape(value.shape)
        a, b, c, d = whole.unflatten(1, (-1, 4)).unbind(2)
        together = a | b << 6 | c << 12 | d << 18
        parts = torch.stack([together >> shift & 255 for shift in (0, 8, 16)], 2)
        del smaller[name]
        smaller[f"{base}.int6"] = parts.flatten(1, 2).to(torch.uint8).contiguous()
        smaller[f"{base}.scale"] = scale_O.view_as(stored[f"{base}.scale"])
    if size > most:
        raise ValueError(f"the weights take {size / 2**20:.1f} MiB even with six bits; take fewer or smaller networks")
    return smaller


def _six(wide_OI: Tensor, scale_O: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as whole numbers of six bits, and what these stand for."""
    whole_OI = (wide_OI / scale_O[:, None]).round().clamp(-MOST, MOST)
    return whole_OI, whole_OI * scale_O[:, None]


def _unpacked(six: Tensor) -> Tensor:
    """The inverse of the packing: three bytes -> four whole numbers."""
    low, middle, high = six.to(torch.int32).unflatten(1, (-1, 3)).unbind(2)
    together = low | middle << 8 | high << 16
    return torch.stack([together >> shift & 63 for shift in (0, 6, 12, 18)], 2).flatten(1, 2) - MOST


def load_config(path: Path) -> dict[str, Any]:
    """The sizes that `save_weights` kept. Raises ValueError for a file that has none, or is no safetensors file."""
    try:
        config: dict[str, Any] = json.loads(_metadata(path)["config"])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{path} does not name the sizes of its network; give what training wrote") from None
    return config


def load_held_out(path: Path) -> float:
    """The share of the training groups that the network has not seen. Raises ValueError as `load_config` does."""
    return float(json.loads(_metadata(path).get("held_out", "0.0")))


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); give the file that training wrote"
        ) from None


def load_into(network: nn.Module, path: Path) -> None:
    """Loads a whole network. Raises ValueError that names the tensor that is missing, unknown or of another shape."""
    state, expected = load_weights(path), network.state_dict()
    given = {expected[name].data_ptr() for name in state if name in expected}
    for name, tensor in expected.items():
        if not tensor.is_floating_point() or (name not in state and tensor.data_ptr() in given):
            continue
        if name not in state:
            raise ValueError(f"{path}: tensor {name!r} is missing")
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"{path}: tensor {name!r} has shape {shapes}")
    if unknown := sorted(set(state) - set(expected)):
        raise ValueError(f"{path}: tensor {unknown[0]!r} is unknown to the network")
    network.load_state_dict(state, strict=False)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict of float32 tensors."""
    # Before version 1.2 a model had one detector, under that name.
    stored = {re.sub(r"^detector\.", "detectors.0.", name): tensor for name, tensor in load_file(path).items()}
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".int8"):
            base = name.removesuffix(".int8")
            state[base] = tensor.float() * stored[f"{base}.scale"]
        elif name.endswith(".int6"):
            base = name.removesuffix(".int6")
            state[base] = _unpacked(tensor).float() * stored[f"{base}.scale"]
        elif not name.endswith(".scale"):
            state[name] = tensor.float()
    return state
