"""Weights in huge pages, where Linux leaves that to programs: a step on a CPU reads most of them.

With pages of 4 KiB each of a core's misses looks up an address as well, and 120 MB take 30,000 of them.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

import torch
from torch import nn

HUGE: Final = 1 << 21  # bytes of a page
ALIGNED: Final = 64  # bytes of a cache line
ASKED: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@torch.inference_mode(False)  # or the weights could not be trained any more
def settle(module: nn.Module) -> bool:
    """Moves the parameters of a module on a CPU into one piece of memory in huge pages; whether it did.

    Parameters stay the objects that they are. Those that processes share, or that were made in inference mode, stay
    where they are; nothing moves where the system gives huge pages to all or to none.
    """
    weights = [
        each
        for each in module.parameters()
        if each.device.type == "cpu" and each.numel() and not each.is_shared() and not each.is_inference()
    ]
    starts, size = [], 0
    for weight in weights:
        starts.append(size)
        size += -(-weight.nbytes // ALIGNED) * ALIGNED
    if size < HUGE or not _left_to_programs():
        return False
    begins = weights[0].data_ptr()
    if begins % HUGE == 0 and [weight.data_ptr() - begins for weight in weights] == starts:
        return False  # they lie there already
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    for weight, start in zip(weights, starts, strict=True):
        # Each with a storage of its own, so that it is saved and copied alone.
        place = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=first + start)
        weight.data = place.view(weight.shape).copy_(weight.data)
    return True


def _left_to_programs() -> bool:
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[madvise]" in ASKED.read_text()
    except OSError:
        return False
