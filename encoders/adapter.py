"""A light adapter: a trained detector learns another product line, and its own weights stay as they are.

The adapter brings heads for the new types, and low-rank additions (LoRA) to the deeper convolutions: a kernel `W`
becomes `W + B A` over its flattened shape, with the scale, shift and statistics of the batch norms beside it. Stem and
first stages see edges and textures that any surface has: they stay, which also halves the cost of training.

Shapes: O outputs, I inputs times kernel area, R rank.
Sources: LoRA (arXiv 2106.09685), adapting batch norms (arXiv 1603.04779), class activation maps (arXiv 1512.04150).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from encoders.detector import STRIDES, Detector, DetectorConfig

FROZEN = ("conv1", "bn1", "layer1", "layer2")  # of the backbone: up to stride 8


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Sizes of an adapter."""

    types: int  # that its heads tell apart
    rank: int = 8  # of the additions; 0: heads only


class LowRank(nn.Module):
    """A kernel plus a product of two small matrices; one starts at 0, so that training starts at the base."""

    def __init__(self, kernel: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = kernel.shape[0], kernel[0].numel()
        self.a_RI = nn.Parameter(torch.empty(rank, inputs, device=kernel.device))
        self.b_OR = nn.Parameter(torch.zeros(outputs, rank, device=kernel.device))
        nn.init.kaiming_uniform_(self.a_RI, a=5**0.5)

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel + (self.b_OR @ self.a_RI).view_as(kernel)


def adapted(base: Detector, config: AdapterConfig) -> Detector:
    """A copy of `base` with new heads and, for a rank above 0, low-rank additions; only what adapts has gradients.

    Batch norms of what stays fixed are in evaluation mode. `merge` ends the training.
    """
    network = copy.deepcopy(base).train().requires_grad_(False)
    network.config = DetectorConfig(config.types, base.config.widths, base.config.neck, base.config.bins)
    fresh = Detector(network.config)
    network.boxes.types, network.presence = fresh.boxes.types, fresh.presence
    network.to(next(base.parameters()).device)
    network.boxes.requires_grad_(True)
    network.presence.requires_grad_(True)
    for name, part in (*network.backbone.named_children(), ("neck", network.neck)):
        if config.rank == 0 or name in FROZEN:
            part.eval()
            continue
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
        for convolution in [module for module in part.modules() if isinstance(module, nn.Conv2d)]:
            parametrize.register_parametrization(convolution, "weight", LowRank(convolution.weight, config.rank))
    return network


def merge(network: Detector) -> Detector:
    """Folds the additions into the kernels, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return network


def adapter_state(network: Detector, average: Detector) -> dict[str, Tensor]:
    """What the adapter adds to its base: the parameters with gradients in `network`, and statistics of the batch norms
    that moved; as they are in `average`, its averaged copy."""
    wanted = set(_adapting(network))
    return {name: value for name, value in average.state_dict().items() if name in wanted}


def load_adapter(base: Detector, config: AdapterConfig, state: dict[str, Tensor]) -> Detector:
    """`base` with the adapter in it, merged. Raises ValueError for the state of another adapter or base."""
    network = adapted(base, config)
    wanted, known = set(_adapting(network)), network.state_dict()
    wrong = sorted(wanted ^ set(state)) or sorted(n for n in wanted if state[n].shape != known[n].shape)
    if wrong:
        raise ValueError(f"tensor {wrong[0]!r} does not fit the base or the sizes of the adapter")
    network.load_state_dict(state, strict=False)
    return merge(network).eval()


def _adapting(network: Detector) -> Iterator[str]:
    """Names of the tensors that belong to the adapter."""
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                yield name
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad:
            yield from (f"{prefix}.{name}" for name in ("running_mean", "running_var"))


@torch.no_grad()
def presence_maps(detector: Detector, x_B3HW: Tensor) -> Tensor:
    """Class activation maps `[B, T, H/8, W/8]` over the neck's levels: what the word on the whole picture rests on."""
    levels = detector.neck(detector.backbone(x_B3HW))
    of_means = detector.presence.weight.unflatten(1, (len(STRIDES), 2, -1))[:, :, 0]  # [T, level, C]
    maps = [torch.einsum("bchw,tc->bthw", level.float(), of_means[:, i].float()) for i, level in enumerate(levels)]
    return torch.stack([F.interpolate(m, size=maps[0].shape[-2:], mode="bilinear") for m in maps]).sum(0)
