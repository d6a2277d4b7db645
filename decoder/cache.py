"""What attention keeps of the positions it has seen: static buffers on the device, one row a slot."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.attention import AttentionConfig
from decoder.errors import PromptError

ALIGNED = 8  # masks of attention kernels want rows of whole 16 bytes


class Cache:
    """Rows of all layers; row b holds a sequence of `used_B[b]` positions, at most `length`.

    `used_B` is a tensor on the device and moves in place, so that a step can be captured as a CUDA graph.
    """

    def __init__(
        self, attention: AttentionConfig, layers: int, slots: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.attention, self.slots, self.length = attention, slots, length
        # One place more than positions: what does not count, such as padding, is written there and seen by none.
        self.places = -(-(length + 1) // ALIGNED) * ALIGNED
        self.buffers = tuple(
            torch.zeros(layers, slots, *shape, device=device, dtype=dtype) for shape in attention.stored(self.places)
        )
        self.layers = [tuple(buffer[layer] for buffer in self.buffers) for layer in range(layers)]
        self.used_B = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows_B1 = torch.arange(slots, device=device)[:, None]
        self.empty = True  # nothing was ever written: new positions need not look into the cache

    def open(self, count: int, counts_B: Tensor | None = None) -> tuple[Tensor, int]:
        """Positions of `count` new ones behind those in use, `[B, T]`, and how many places they may have to look at.

        Raises PromptError where they do not fit. A step (`count` 1) on another device than the CPU is not waited for:
        it looks at all places, and a row that is full stays as it is.
        """
        device, reach = self.used_B.device, self.places
        positions_BT = self.used_B[:, None] + torch.arange(count, device=device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if device.type == "cpu" or (count > 1 and not capturing):
            used = 0 if self.empty else int((self.used_B + (count if counts_B is None else counts_B)).max()) - count
            if used + count > self.length:
                room = self.length - used
                raise PromptError("prompt-too-long", f"{count} positions do not fit: there is room for {room}")
            if device.type == "cpu":
                reach = used + count
        return positions_BT.clamp_(max=self.length), reach

    def close(self, count: int | Tensor) -> None:
        """Takes the new positions into use."""
        self.used_B.add_(count).clamp_(max=self.length)
        self.empty = False

    def put(self, slots: Tensor, other: Cache) -> None:
        """Rows of another cache, which may be shorter, into `slots` (long `[n]`); one row goes into all of them.

        Nothing is left of what the slots held. Raises PromptError where the other cache holds more than fits.
        """
        if other.places > self.places and int(other.used_B.max()) > self.length:
            raise PromptError(
                "prompt-too-long", f"{int(other.used_B.max())} positions do not fit: there is room for {self.length}"
            )
        for mine, its in zip(self.buffers, other.buffers, strict=True):
            # Along the third dimension from the right lie heads, then positions, then values.
            count = min(mine.shape[-2], its.shape[-2])
            mine[:, slots, :, :count] = its[..., :count, :].to(mine.dtype)
            mine[:, slots, :, count:] = 0
        self.used_B[slots] = other.used_B
        self.empty = False

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies rows into other slots of the same cache, both long `[n]`."""
        for buffer in self.buffers:
            buffer[:, targets] = buffer[:, sources]
        self.used_B[targets] = self.used_B[sources]

    def view(self, slots: int, length: int) -> Cache:
        """The first slots and positions in the same memory: steps in it cost less, and it counts as used."""
        other = object.__new__(Cache)
        other.attention, other.slots, other.length = self.attention, slots, length
        other.places = -(-(length + 1) // ALIGNED) * ALIGNED
        other.buffers = tuple(
            buffer[:, :slots, :, : shape[-2]]
            for buffer, shape in zip(self.buffers, self.attention.stored(other.places), strict=True)
        )
        other.layers = [tuple(buffer[layer] for buffer in other.buffers) for layer in range(len(self.layers))]
        other.used_B, other.rows_B1, other.empty = self.used_B[:slots], self.rows_B1[:slots], False
        return other
