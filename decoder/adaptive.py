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

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.attention import FullAttention, FullAttentionConfig, Places, Stored, attend
from decoder.layers import Linear
from decoder.rotary import on_gpu

ALIGNED: Final = 8  # masks of attention kernels want rows of whole 16 bytes


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

    def masks(self, positions_BT: Tensor, reach: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """What is added to the scores of raw keys and of blocks, `[B, T, ...]` each, for each window of new positions.

        A single position has stored its key before it looks; more find their own keys behind the stored ones. None
        where kernels do it, which know what a position sees.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        if positions_BT.shape[1] == 1 and self.fused and on_gpu(positions_BT.device, dtype):
            return pairs
        blocks_M = torch.arange(reach // self.stride + 1, device=positions_BT.device)
        places_R = torch.arange(self.stored(0)[0][1], device=positions_BT.device)
        for new_BT in positions_BT.split(self.window, 1):
            single = new_BT.shape[1] == 1 and positions_BT.shape[1] == 1
            last_B1 = new_BT[:, :1] if single else new_BT[:, :1] - 1
            raw_BR = last_B1 - (last_B1 - places_R) % (2 * self.window)  # the position in each place
            raw_BR = torch.where(places_R < 2 * self.window, raw_BR, -1)
            if not single:
                raw_BR = torch.cat((raw_BR, new_BT), 1)
            window_BT1 = new_BT[..., None] // self.window
            first_BT1 = (window_BT1 - 1).clamp(min=0) * self.window
            seen_BTR = (raw_BR[:, None] >= first_BT1) & (raw_BR[:, None] <= new_BT[..., None])
            seen_BTM = blocks_M <= window_BT1 * (self.window // self.stride)
            pairs.append((_added(seen_BTR, dtype), _added(seen_BTM, dtype)))
        return pairs


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

    def mix(
        self, x_BTD: Tensor, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> Tensor:
        if self.config.fused and on_gpu(q_BTHd.device, q_BTHd.dtype) and (at.masks is None or q_BTHd.shape[1] == 1):
            return self._fused(x_BTD, q_BTHd, k_BTJd, v_BTJd, at, stored)
        if at.masks is None:
            near_BTHd, far_BTHd = self._at_once(q_BTHd, k_BTJd, v_BTJd, at, stored)
        else:
            assert stored is not None
            kv_BTJe = torch.cat((k_BTJd, v_BTJd), -1)
            parts, start = [], 0
            for masks in at.masks:
                end = start + masks[0].shape[1]
                parts.append(self._further(q_BTHd[:, start:end], kv_BTJe[:, start:end], at, start, masks, stored))
                start = end
            near_BTHd, far_BTHd = (
                torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)
            )
        gate_BTH1 = self.gate(x_BTD).sigmoid()[..., None].to(near_BTHd.dtype)
        return torch.lerp(far_BTHd, near_BTHd, gate_BTH1)

    def pool(self, k: Tensor, v: Tensor, absent: Tensor | None = None) -> Tensor:
        """Keys and values `[..., P, J, d]` of blocks to one row each, `[..., J, e]`, without those `absent`."""
        salience = torch.einsum("...jd,jd->...j", k.float(), self.salience_Jd.float())
        if absent is not None:
            # Not -inf: a block of which nothing is there yet must be finite, too, as masks multiply it by 0.
            salience = salience.masked_fill(absent[..., None], torch.finfo(torch.float32).min)
        weight = salience.softmax(-2).to(k.dtype)
        return torch.cat([torch.einsum("...pjd,...pj->...jd", each, weight) for each in (k, v)], -1)

    def _at_once(
        self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> tuple[Tensor, Tensor]:
        """Results of both kinds for positions from 0 on."""
        stride = self.config.stride
        whole = q_BTHd.shape[1] // stride * stride
        blocks_BMJe = self.pool(*(each[:, :whole].unflatten(1, (-1, stride)) for each in (k_BTJd, v_BTJd)))
        blocks_BMJe = F.pad(blocks_BMJe, (0, 0, 0, 0, 1, 0))  # the null key is the first
        if stored is not None:
            stored[1][:, :, : blocks_BMJe.shape[1]] = blocks_BMJe.transpose(1, 2)
            self._keep(torch.cat((k_BTJd, v_BTJd), -1), at, 0, stored)
        return self._near(q_BTHd, k_BTJd, v_BTJd), self._far(q_BTHd, blocks_BMJe)

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
        return windows.attend(config, q_BTHd, k_BTJd, v_BTJd, blocks_BJMe, self.gate(x_BTD))

    def _near(self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor) -> Tensor:
        """Local results: the first window by itself, whole ones with the one before them as one batch, then the rest.

        Windows overlap in memory; only more than one sequence makes copies of them.
        """
        config, (batch, count) = self.config, q_BTHd.shape[:2]
        scale, window = config.head_dim**-0.5, config.window
        results, whole = [], count // window * window
        k_BJTd, v_BJTd = k_BTJd.transpose(1, 2), v_BTJd.transpose(1, 2)
        results.append(attend(q_BTHd[:, :window], k_BJTd[:, :, :window], v_BJTd[:, :, :window], None, scale))
        seen = torch.arange(2 * window, device=q_BTHd.device) - window
        mask_TS = _added(seen <= torch.arange(window, device=q_BTHd.device)[:, None], q_BTHd.dtype)
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
        """Global results: each window looks at the blocks before it, the first at the null key, whose value is 0."""
        config, count, device = self.config, q_BTHd.shape[1], q_BTHd.device
        scale, ratio = config.head_dim**-0.5, config.window // config.stride
        k_BJMd, v_BJMd = _halves(blocks_BMJe.transpose(1, 2))
        if q_BTHd.is_cuda:
            window_T1 = torch.arange(count, device=device)[:, None] // config.window
            mask_TM = _added(torch.arange(k_BJMd.shape[2], device=device) <= window_T1 * ratio, q_BTHd.dtype)
            return attend(q_BTHd, k_BJMd, v_BJMd, mask_TM[None].expand(len(q_BTHd), -1, -1), scale)
        results = [torch.zeros_like(q_BTHd[:, : config.window])]
        grouped = config.heads != config.kv_heads
        for window in range(1, -(-count // config.window)):
            q_BHTd = q_BTHd[:, window * config.window : (window + 1) * config.window].transpose(1, 2)
            k, v = k_BJMd[:, :, : window * ratio + 1], v_BJMd[:, :, : window * ratio + 1]
            out = F.scaled_dot_product_attention(q_BHTd, k, v, scale=scale, enable_gqa=grouped)
            results.append(out.transpose(1, 2))
        return torch.cat(results, 1)

    def _further(
        self, q_BTHd: Tensor, kv_BTJe: Tensor, at: Places, start: int, masks: tuple[Tensor, Tensor], stored: Stored
    ) -> tuple[Tensor, Tensor]:
        """Results of both kinds for at most a window of positions, the new ones from `start` on, behind stored ones."""
        config, count, single = self.config, q_BTHd.shape[1], at.positions_BT.shape[1] == 1
        raw_BJRe, blocks_BJMe = stored
        first_B1 = at.positions_BT[:, start : start + 1]
        # Blocks that the new positions are in: pooled anew from raw keys, and looked at once their window is past.
        touched = torch.arange((count + config.stride - 2) // config.stride + 1, device=first_B1.device)
        block_BN = first_B1 // config.stride + touched
        members_BNP = block_BN[..., None] * config.stride + torch.arange(config.stride, device=first_B1.device)
        place_BNP = members_BNP % (2 * config.window)
        if single:
            raw_BJRe[at.rows_B1, :, first_B1 % (2 * config.window)] = kv_BTJe
        else:
            new_BNP = (members_BNP - first_B1[..., None]).clamp(max=count - 1)
            place_BNP = torch.where(new_BNP < 0, place_BNP, raw_BJRe.shape[2] + new_BNP)
            raw_BJRe = torch.cat((raw_BJRe, kv_BTJe.transpose(1, 2)), 2)
        absent_BNP = members_BNP >= first_B1[..., None] + count
        place_BN = (block_BN + 1).clamp(max=blocks_BJMe.shape[2] - 1)
        blocks_BJMe[at.rows_B1, :, place_BN] = self.pool(
            *_halves(raw_BJRe[at.rows_B1[..., None], :, place_BNP]), absent_BNP
        )
        if not single:
            self._keep(kv_BTJe, at, start, stored)
        scale = config.head_dim**-0.5
        near = attend(q_BTHd, *_halves(raw_BJRe), masks[0], scale)
        return near, attend(q_BTHd, *_halves(blocks_BJMe[:, :, : masks[1].shape[-1]]), masks[1], scale)

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
