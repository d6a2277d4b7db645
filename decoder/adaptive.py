"""Adaptive attention: a window of raw keys and the whole past in pooled ones, mixed by a gate for each token and head.

`g * local + (1 - g) * global`, `g = sigmoid(W x + b)`. Sequences are cut into windows. A position sees the raw keys of
its own window and the one before (local), and all windows before its own in blocks (global): a block's keys are pooled
into one by weights that the keys themselves give, so that what matters in a block is not averaged away. Ahead of the
blocks stands a null key of zeros, so that the first window has something to look at.

The cache holds the raw keys of two windows, each at its position modulo their length, and the blocks: 2W + S/P entries
where full attention has S. As what a position sees changes with windows only, prompts need no masks.
Shapes: B batch, T new positions, S positions of a sequence, W of a window, P of a block; R places of raw keys and M of
blocks, the null key first; D width, H query heads, J key/value heads, d width of a head,
e = 2d of a key and its value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.attention import FullAttention, FullAttentionConfig, Places, Stored, attend
from decoder.layers import Linear
from decoder.rotary import on_gpu

ALIGNED: Final = 8  # masks of attention kernels want rows of whole 16 bytes
POOLED: Final = 32  # blocks that a CPU pools together
PIECE: Final = 1024  # positions of a prompt that a CPU takes through a layer together, so far as windows go into it


@dataclass(frozen=True, slots=True)
class Sight:
    """What up to a window of new positions see, and the blocks that they are in, `N` of them in each of `Q` rows."""

    near_BTR: Tensor  # is added to the scores of raw keys: 0 or -inf
    far_BTM: Tensor  # ... of blocks
    row_Q1: Tensor  # the rows whose blocks are pooled
    block_QN: Tensor  # places of these blocks
    place_QNP: Tensor  # those of their raw keys
    absent_QNP: Tensor  # which of them are still to come


@dataclass(frozen=True, kw_only=True)
class AdaptiveAttentionConfig(FullAttentionConfig):
    """Every position sees the last `window` to `2 * window` positions, and what is before its window in blocks."""

    name: str = "adaptive"
    window: int = 128
    stride: int = 16  # positions of a block

    def __post_init__(self) -> None:
        if self.stride < 1 or self.window < 1 or self.window % self.stride:
            raise ValueError(f"a window of {self.window} positions is not made of whole blocks of {self.stride}")

    @property
    def fused(self) -> bool:
        """Whether the kernels of `decoder.windows` can run it."""
        sizes = (self.window, self.stride, self.head_dim)
        return all(size & (size - 1) == 0 for size in sizes) and self.window >= 16 and 16 <= self.head_dim <= 128

    def build(self, width: int, norm_eps: float) -> nn.Module:
        return AdaptiveAttention(self, width, norm_eps)

    def stored(self, length: int) -> tuple[tuple[int, ...], ...]:
        # One place more for each, where what does not count is written.
        raw, blocks = (-(-count // ALIGNED) * ALIGNED for count in (2 * self.window + 1, length // self.stride + 3))
        # Keys and values of a head are one row, so that they are written, gathered and pooled together.
        return (self.kv_heads, raw, 2 * self.head_dim), (self.kv_heads, blocks, 2 * self.head_dim)

    def parameters(self, width: int) -> int:
        return super().parameters(width) + self.heads * (width + 1) + self.kv_heads * self.head_dim

    def flops(self, context: int) -> int:
        windows = context // self.window
        raw = context - max(0, windows - 1) * self.window
        return 4 * self.heads * self.head_dim * (raw + windows * self.window // self.stride)

    def masks(self, positions_BT: Tensor, reach: int, dtype: torch.dtype) -> list[Sight]:
        """What each window of new positions sees.

        A single position has stored its key before it looks; more find their own keys behind the stored ones. None
        where kernels do it, which know what a position sees.
        """
        if positions_BT.shape[1] == 1 and self.fused and on_gpu(positions_BT.device, dtype):
            return []
        return [
            self._sight(new_BT, positions_BT.shape[1] == 1, reach, dtype)
            for new_BT in positions_BT.split(self.window, 1)
        ]

    def _sight(self, new_BT: Tensor, single: bool, reach: int, dtype: torch.dtype) -> Sight:
        (_, count), device, places = new_BT.shape, new_BT.device, 2 * self.window
        first_B1, stored_R = new_BT[:, :1], torch.arange(self.stored(0)[0][1], device=device)
        last_B1 = first_B1 if single else first_B1 - 1
        raw_BR = torch.where(
            stored_R < places, last_B1 - (last_B1 - stored_R) % places, -1
        )  # the position in each place
        if not single:
            raw_BR = torch.cat((raw_BR, new_BT), 1)
        window_BT1 = new_BT[..., None] // self.window
        since_BT1 = (window_BT1 - 1).clamp(min=0) * self.window
        near_BTR = (raw_BR[:, None] >= since_BT1) & (raw_BR[:, None] <= new_BT[..., None])
        blocks_M = torch.arange(reach // self.stride + 1, device=device)
        far_BTM = blocks_M <= window_BT1 * (self.window // self.stride)
        block_BN = first_B1 // self.stride + torch.arange((count + self.stride - 2) // self.stride + 1, device=device)
        member_BNP = block_BN[..., None] * self.stride + torch.arange(self.stride, device=device)
        place_BNP = member_BNP % places
        if not single:
            nth_BNP = (member_BNP - first_B1[..., None]).clamp(max=count - 1)
            place_BNP = torch.where(nth_BNP < 0, place_BNP, len(stored_R) + nth_BNP)
        absent_BNP = member_BNP >= first_B1[..., None] + count
        pooled = [torch.arange(len(new_BT), device=device)[:, None], block_BN + 1, place_BNP, absent_BNP]
        if single and device.type == "cpu":
            # Nobody sees a block before it is whole; whose is whole now is known on a CPU alone, without waiting.
            whole_B = ~absent_BNP[:, 0].any(-1)
            pooled = [each[whole_B] for each in pooled]
        return Sight(_added(near_BTR, dtype), _added(far_BTM, dtype), *pooled)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _halves(kv_BJSe: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    k_BJSd, v_BJSd = kv_BJSe.chunk(2, -1)
    return k_BJSd, v_BJSd


class AdaptiveAttention(FullAttention):
    """See the module."""

    config: AdaptiveAttentionConfig

    def __init__(self, config: AdaptiveAttentionConfig, width: int, norm_eps: float) -> None:
        super().__init__(config, width, norm_eps)
        self.gate = Linear(width, config.heads)
        self.salience_Jd = nn.Parameter(torch.zeros(config.kv_heads, config.head_dim))  # zeros: blocks are plain means

    def forward(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor:
        piece = max(1, PIECE // self.config.window) * self.config.window
        if at.masks is not None or x_BTD.is_cuda or torch.is_grad_enabled() or x_BTD.shape[1] <= piece:
            return super().forward(x_BTD, at, stored)
        return self._in_pieces(x_BTD, at, stored, piece)

    def _in_pieces(self, x_BTD: Tensor, at: Places, stored: Stored | None, piece: int) -> Tensor:
        """For positions from 0 on, some windows after the other: a CPU uses the same memory again for each.

        Tensors of a whole prompt are new memory each time, which the system hands out page by page.
        """
        config, (batch, count, _) = self.config, x_BTD.shape
        shape = (batch, config.kv_heads, count // config.stride + 1, 2 * config.head_dim)
        blocks_BJMe = x_BTD.new_empty(shape) if stored is None else stored[1]
        blocks_BJMe[:, :, 0] = 0
        out_BTD = torch.empty_like(x_BTD)
        before: tuple[Tensor, ...] = ()  # keys and values of the window before a piece
        for start in range(0, count, piece):
            new, first = slice(start, start + piece), start // config.stride + 1
            turn = {"cos_BT1r": at.cos_BT1r[:, new], "sin_BT1r": at.sin_BT1r[:, new]}
            q_BTHd, k_BTJd, v_BTJd = self.project(x_BTD[:, new], replace(at, **turn))
            pooled_BNJe = self._blocks(k_BTJd, v_BTJd)
            blocks_BJMe[:, :, first : first + pooled_BNJe.shape[1]] = pooled_BNJe.transpose(1, 2)
            if stored is not None:
                self._keep(torch.cat((k_BTJd, v_BTJd), -1), at, start, stored)
            if before:
                k_BTJd, v_BTJd = (torch.cat(each, 1) for each in zip(before, (k_BTJd, v_BTJd), strict=True))
            before = k_BTJd[:, -config.window :], v_BTJd[:, -config.window :]
            gate_BTH1 = self.gate(x_BTD[:, new]).sigmoid()[..., None].to(q_BTHd.dtype)
            mixed_BTHd = self._by_window(q_BTHd, k_BTJd, v_BTJd, blocks_BJMe, gate_BTH1, start // config.window)
            out_BTD[:, new] = self.out(mixed_BTHd.flatten(2))
        return out_BTD

    def _blocks(self, k_BTJd: Tensor, v_BTJd: Tensor) -> Tensor:
        """Whole blocks, pooled, `[B, N, J, e]`."""
        stride = self.config.stride
        whole = k_BTJd.shape[1] // stride * stride
        return self.pool(*(each[:, :whole].unflatten(1, (-1, stride)) for each in (k_BTJd, v_BTJd)))

    def mix(
        self, x_BTD: Tensor, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> Tensor:
        if self.config.fused and on_gpu(q_BTHd.device, q_BTHd.dtype) and (at.masks is None or q_BTHd.shape[1] == 1):
            return self._fused(x_BTD, q_BTHd, k_BTJd, v_BTJd, at, stored)
        gate_BTH1 = self.gate(x_BTD).sigmoid()[..., None].to(q_BTHd.dtype)
        if at.masks is None:
            return self._at_once(q_BTHd, k_BTJd, v_BTJd, gate_BTH1, at, stored)
        assert stored is not None
        kv_BTJe, results, start = torch.cat((k_BTJd, v_BTJd), -1), [], 0
        for sight in at.masks:
            new = slice(start, start := start + sight.near_BTR.shape[1])
            near_BTHd, far_BTHd = self._further(q_BTHd[:, new], kv_BTJe[:, new], at, new.start, sight, stored)
            results.append(torch.lerp(far_BTHd, near_BTHd, gate_BTH1[:, new]))
        return torch.cat(results, 1) if len(results) > 1 else results[0]

    def pool(self, k: Tensor, v: Tensor, absent: Tensor | None = None) -> Tensor:
        """Keys and values `[..., P, J, d]` of blocks to one row each, `[..., J, e]`, without those `absent`."""
        if absent is None and not k.is_cuda and k.shape[1] > POOLED:  # in parts that a CPU's cache holds
            parts = zip(k.split(POOLED, 1), v.split(POOLED, 1), strict=True)
            return torch.cat([self.pool(*part) for part in parts], 1)
        salience = (k.float() * self.salience_Jd.float()).sum(-1)
        if absent is not None:
            # Not -inf: a block of which nothing is there yet must be finite, too, as masks multiply it by 0.
            salience = salience.masked_fill(absent[..., None], torch.finfo(torch.float32).min)
        weight = salience.softmax(-2).to(k.dtype).mT[..., None, :]
        return torch.cat([weight @ each.transpose(-3, -2) for each in (k, v)], -1)[..., 0, :]

    def _at_once(
        self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, gate_BTH1: Tensor, at: Places, stored: Stored | None
    ) -> Tensor:
        """For positions from 0 on."""
        blocks_BMJe = F.pad(self._blocks(k_BTJd, v_BTJd), (0, 0, 0, 0, 1, 0))  # the null key is the first
        if stored is not None:
            stored[1][:, :, : blocks_BMJe.shape[1]] = blocks_BMJe.transpose(1, 2)
            self._keep(torch.cat((k_BTJd, v_BTJd), -1), at, 0, stored)
        if q_BTHd.is_cuda:
            near_BTHd, far_BTHd = self._near(q_BTHd, k_BTJd, v_BTJd), self._far(q_BTHd, blocks_BMJe)
            return torch.lerp(far_BTHd, near_BTHd, gate_BTH1)
        return self._by_window(q_BTHd, k_BTJd, v_BTJd, blocks_BMJe.transpose(1, 2), gate_BTH1, 0)

    def _by_window(
        self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, blocks_BJMe: Tensor, gate_BTH1: Tensor, first: int
    ) -> Tensor:
        """Both kinds mixed, one window after another, so that a CPU works on what is in its cache.

        `first` is the number of the first window; keys and values are those of the window before it, too.
        """
        config, window = self.config, self.config.window
        attend = partial(
            F.scaled_dot_product_attention, scale=config.head_dim**-0.5, enable_gqa=config.heads != config.kv_heads
        )
        q_BHTd, k_BJTd, v_BJTd, gate_BHT1 = (each.transpose(1, 2) for each in (q_BTHd, k_BTJd, v_BTJd, gate_BTH1))
        k_BJMd, v_BJMd = _halves(blocks_BJMe)
        mask_TS, results = self._mask(q_BTHd), []
        parts = zip(q_BHTd.split(window, 2), gate_BHT1.split(window, 2), strict=True)
        for n, (q, gate) in enumerate(parts, first):
            own = (n - max(0, first - 1)) * window  # where its own keys begin
            since, end = max(0, own - window), own + q.shape[2]
            mask = mask_TS[: q.shape[2], since - own + window : end - own + window]
            mixed = attend(q, k_BJTd[:, :, since:end], v_BJTd[:, :, since:end], mask)
            if n:
                seen = n * (window // config.stride) + 1
                mixed = torch.lerp(attend(q, k_BJMd[:, :, :seen], v_BJMd[:, :, :seen]), mixed, gate)
            else:
                mixed = mixed * gate  # the null key's value is 0
            results.append(mixed.transpose(1, 2))
        return torch.cat(results, 1)

    def _mask(self, like: Tensor) -> Tensor:
        """What a window of positions sees of the window before it and of its own, `[W, 2W]`."""
        seen = torch.arange(2 * self.config.window, device=like.device) - self.config.window
        return _added(seen <= torch.arange(self.config.window, device=like.device)[:, None], like.dtype)

    def _fused(
        self, x_BTD: Tensor, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> Tensor:
        """The whole of `mix` for positions from 0 on, or for one behind stored ones, by kernels for a GPU."""
        from decoder import windows  # which needs Triton

        if at.masks is not None:
            assert stored is not None
            gate = self.gate(x_BTD)
            return windows.step(self.config, q_BTHd, k_BTJd, v_BTJd, self.salience_Jd, gate, at.positions_BT, stored)
        (batch, count), config = q_BTHd.shape[:2], self.config
        if stored is None:
            blocks_BJMe = k_BTJd.new_empty(batch, config.kv_heads, count // config.stride + 1, 2 * config.head_dim)
        else:
            blocks_BJMe = stored[1]
            self._keep(torch.cat((k_BTJd, v_BTJd), -1), at, 0, stored)
        windows.pool(k_BTJd, v_BTJd, self.salience_Jd, config.stride, blocks_BJMe)
        gate_BTH = windows.gate(x_BTD, self.gate.weight, self.gate.bias, q_BTHd.dtype)
        return windows.attend(config, q_BTHd, k_BTJd, v_BTJd, blocks_BJMe, gate_BTH)

    def _near(self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor) -> Tensor:
        """Local results: the first window by itself, whole ones with the one before them as one batch, then the rest.

        Windows overlap in memory; only more than one sequence makes copies of them.
        """
        config, (batch, count) = self.config, q_BTHd.shape[:2]
        scale, window = config.head_dim**-0.5, config.window
        results, whole = [], count // window * window
        k_BJTd, v_BJTd = k_BTJd.transpose(1, 2), v_BTJd.transpose(1, 2)
        results.append(attend(q_BTHd[:, :window], k_BJTd[:, :, :window], v_BJTd[:, :, :window], None, scale))
        mask_TS = self._mask(q_BTHd)
        if whole > window:
            q = q_BTHd[:, window:whole].unflatten(1, (-1, window)).flatten(0, 1)
            k, v = (each[:, :whole].unfold(1, 2 * window, window).flatten(0, 1).mT for each in (k_BTJd, v_BTJd))
            out = attend(q, k, v, mask_TS[None].expand(len(q), -1, -1), scale)
            results.append(out.unflatten(0, (batch, -1)).flatten(1, 2))
        if window <= whole < count:
            k, v = k_BJTd[:, :, whole - window :], v_BJTd[:, :, whole - window :]
            mask_TS = mask_TS[: count - whole, : window + count - whole]
            results.append(attend(q_BTHd[:, whole:], k, v, mask_TS[None].expand(batch, -1, -1), scale))
        return torch.cat(results, 1)

    def _far(self, q_BTHd: Tensor, blocks_BMJe: Tensor) -> Tensor:
        """Global results: each window looks at the blocks before it."""
        config, count, device = self.config, q_BTHd.shape[1], q_BTHd.device
        k_BJMd, v_BJMd = _halves(blocks_BMJe.transpose(1, 2))
        window_T1 = torch.arange(count, device=device)[:, None] // config.window
        seen_TM = torch.arange(k_BJMd.shape[2], device=device) <= window_T1 * (config.window // config.stride)
        mask_BTM = _added(seen_TM, q_BTHd.dtype)[None].expand(len(q_BTHd), -1, -1)
        return attend(q_BTHd, k_BJMd, v_BJMd, mask_BTM, config.head_dim**-0.5)

    def _further(
        self, q_BTHd: Tensor, kv_BTJe: Tensor, at: Places, start: int, sight: Sight, stored: Stored
    ) -> tuple[Tensor, Tensor]:
        """Results of both kinds for at most a window of positions, the new ones from `start` on, behind stored ones."""
        config, single = self.config, at.positions_BT.shape[1] == 1
        raw_BJRe, blocks_BJMe = stored
        if single:
            raw_BJRe[at.rows_B1, :, at.positions_BT % (2 * config.window)] = kv_BTJe
        else:
            raw_BJRe = torch.cat((raw_BJRe, kv_BTJe.transpose(1, 2)), 2)
        if len(sight.row_Q1):
            place_QN = sight.block_QN.clamp(max=blocks_BJMe.shape[2] - 1)
            raw_QNPJe = raw_BJRe[sight.row_Q1[..., None], :, sight.place_QNP]
            blocks_BJMe[sight.row_Q1, :, place_QN] = self.pool(*_halves(raw_QNPJe), sight.absent_QNP)
        if not single:
            self._keep(kv_BTJe, at, start, stored)
        scale = config.head_dim**-0.5
        near = attend(q_BTHd, *_halves(raw_BJRe), sight.near_BTR, scale)
        return near, attend(q_BTHd, *_halves(blocks_BJMe[:, :, : sight.far_BTM.shape[-1]]), sight.far_BTM, scale)

    def _keep(self, kv_BTJe: Tensor, at: Places, start: int, stored: Stored) -> None:
        """Stores the last two windows of each row's new keys, of which the first is number `start`."""
        places, count = 2 * self.config.window, kv_BTJe.shape[1]
        new_R = torch.arange(min(places, count), device=kv_BTJe.device)
        first_B1 = at.positions_BT[:, start : start + 1]
        if at.counts_B is None:
            index_BR = (new_R + count - len(new_R)).expand(len(at.rows_B1), -1)
            place_BR = (first_B1 + index_BR) % places
        else:
            new_B1 = (at.counts_B[:, None] - start).clamp(0, count)
            index_BR = new_R + (new_B1 - len(new_R)).clamp(min=0)
            place_BR = torch.where(index_BR < new_B1, (first_B1 + index_BR) % places, places)
        stored[0][at.rows_B1, :, place_BR] = kv_BTJe[at.rows_B1, index_BR]
