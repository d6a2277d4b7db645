"""FLOPs of operators that torch.utils.flop_counter passes over; importing this module makes it count them.

A formula sees shapes only: rows of a grouped product that belong to no expert are counted, too, and causal attention
counts as full attention, as torch's own formulas have it.
"""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Rows `[M, k]` by experts `[E, k, n]`, or backwards `[k, M]` by rows `[M, n]`: each row meets one expert."""
    return 2 * prod(a) * b[-1]


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: object, **__: object) -> int:
    """Queries `[B, H, T, d]` by keys `[B, J, S, d]` and values `[B, J, S, u]`."""
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


for operator, formula in (
    (torch.ops.aten._grouped_mm, grouped_mm_flops),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, attention_flops),
):
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)
