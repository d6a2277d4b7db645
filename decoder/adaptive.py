"""Adaptive attention: a window of raw keys and the whole past in pooled ones, mixed by a gate for each token and head.

`g * local + (1 - g) * global`, `g = sigmoid(W x + b)`. Sequences are cut into windows. A position sees the raw keys of
its own window and the one before (local), and all windows before its own in blocks (global): a block's keys are pooled
into one by weights that the keys themselves give, so that what matters in a block is not averaged away. Ahead of the
blocks stands a null key of zeros, so that the first window has something to look at.

The cache holds the raw keys of two windows, each at its position modulo their length, and the blocks: 2W + S/P entries
where full attention has S. As what a position sees changes with windows only, prompts need no masks.
Shapes: B batch, T new positions, S positions of a sequence, W of a window, P of a block; R places of raw keys and M of
blocks, the null key first; D width, H query heads, J key/value heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.attention import FullAttention, FullAttentionConfig, Places, Stored, attend

ALIGNED: Final = 8  # masks of attention kernels want rows of whole 16 bytes
HALVES: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class AdaptiveAttentionConfig(FullAttentionConfig):
    """Every position sees the last `window` to `2 * window` positions, and what is before its window in blocks."""

    name: str = "adaptive"
    window: int = 128
    stride: int = 16  # positions of a block

    def __post_init__(self) -> None:
        if self.stride < 1 or self.window < 1 or self.window % self.stride:
            raise ValueError(f"a window of {self.window} positions is not made of whole blocks of {self.stride}")

    def build(self, width: int, norm_eps: float) -> nn.Module:
        return AdaptiveAttention(self, width, norm_eps)

    def stored(self, length: int) -> tuple[tuple[int, ...], ...]:
        # One place more for each, where what does not count is written.
        raw, blocks = (-(-count // ALIGNED) * ALIGNED for count in (2 * self.window + 1, length // self.stride + 3))
        return ((self.kv_heads, raw, self.head_dim),) * 2 + ((self.kv_heads, blocks, self.head_dim),) * 2

    def parameters(self, width: int) -> int:
        return super().parameters(width) + self.heads * (width + 1) + self.kv_heads * self.head_dim

    def flops(self, context: int) -> int:
        windows = context // self.window
        raw = context - max(0, windows - 1) * self.window
        return 4 * self.heads * self.head_dim * (raw + windows * self.window // self.stride)

    def masks(self, positions_BT: Tensor, reach: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """What is added to the scores of raw keys and of blocks, `[B, T, ...]` each, for each window of new positions.

        A single position has stored its key before it looks; more find their own keys behind the stored ones.
        """
        pairs = []
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


class AdaptiveAttention(FullAttention):
    """See the module."""

    config: AdaptiveAttentionConfig

    def __init__(self, config: AdaptiveAttentionConfig, width: int, norm_eps: float) -> None:
        super().__init__(config, width, norm_eps)
        self.gate = nn.Linear(width, config.heads)
        self.salience_Jd = nn.Parameter(torch.zeros(config.kv_heads, config.head_dim))  # zeros: blocks are plain means

    def forward(self, x_BTD: Tensor, at: Places, stored: Stored | None) -> Tensor:
        q_BTHd, k_BTJd, v_BTJd = self.project(x_BTD, at)
        if at.masks is None:
            near_BTHd, far_BTHd = self._at_once(q_BTHd, k_BTJd, v_BTJd, at, stored)
        else:
            assert stored is not None
            parts, start = [], 0
            for masks in at.masks:
                part = slice(start, start + masks[0].shape[1])
                parts.append(self._further(q_BTHd[:, part], k_BTJd[:, part], v_BTJd[:, part], at, start, masks, stored))
                start = part.stop
            near_BTHd, far_BTHd = (
                torch.cat(each, 1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)
            )
        gate_BTH1 = self.gate(x_BTD).sigmoid()[..., None].to(near_BTHd.dtype)
        return self.out(torch.lerp(far_BTHd, near_BTHd, gate_BTH1).flatten(2))

    def pool(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., P, J, d]` of blocks to one each, `[..., J, d]`; `valid` `[..., P]` leaves some out."""
        salience = (k.float() * self.salience_Jd.float()).sum(-1, keepdim=True)
        if valid is not None:
            # Not -inf: a block of which nothing is there yet must be finite, too, as masks multiply it by 0.
            salience = salience.masked_fill(~valid[..., None, None], torch.finfo(torch.float32).min)
        weight = salience.softmax(-3)
        return (k * weight).sum(-3).to(k.dtype), (v * weight).sum(-3).to(v.dtype)

    def _at_once(
        self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, stored: Stored | None
    ) -> tuple[Tensor, Tensor]:
        """Results of both kinds for positions from 0 on."""
        config, count = self.config, q_BTHd.shape[1]
        whole = count // config.stride * config.stride
        blocks = (t[:, :whole].unflatten(1, (-1, config.stride)) for t in (k_BTJd, v_BTJd))
        # The null key is the first.
        k_BMJd, v_BMJd = (F.pad(t, (0, 0, 0, 0, 1, 0)) for t in self.pool(*blocks))
        if stored is not None:
            for blocks_BJMd, made_BMJd in zip(stored[2:], (k_BMJd, v_BMJd), strict=True):
                blocks_BJMd[:, :, : made_BMJd.shape[1]] = made_BMJd.transpose(1, 2)
            self._keep(k_BTJd, v_BTJd, at, 0, stored)
        if q_BTHd.is_cuda and q_BTHd.dtype in HALVES and not torch.is_grad_enabled():
            return self._ragged(q_BTHd, k_BTJd, v_BTJd, k_BMJd, v_BMJd)
        return self._near(q_BTHd, k_BTJd, v_BTJd), self._far(q_BTHd, k_BMJd, v_BMJd)

    def _near(self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor) -> Tensor:
        """Local results: the first window by itself, each other one with the one before it, all as one batch."""
        config, batch, count = self.config, q_BTHd.shape[0], q_BTHd.shape[1]
        scale, window = config.head_dim**-0.5, min(config.window, count)
        k, v = (t[:, :window].transpose(1, 2) for t in (k_BTJd, v_BTJd))
        head = attend(q_BTHd[:, :window], k, v, None, scale)
        if count == window:
            return head
        filled = (F.pad(t, (0, 0, 0, 0, 0, -count % window)) for t in (q_BTHd, k_BTJd, v_BTJd))
        q, k, v = (t.unflatten(1, (-1, window)) for t in filled)
        k, v = (torch.cat((t[:, :-1], t[:, 1:]), 2).flatten(0, 1).transpose(1, 2) for t in (k, v))
        ahead = torch.arange(2 * window, device=q.device) - window > torch.arange(window, device=q.device)[:, None]
        mask = _added(~ahead, q.dtype)[None].expand(len(k), -1, -1)
        rest = attend(q[:, 1:].flatten(0, 1), k, v, mask, scale).unflatten(0, (batch, -1)).flatten(1, 2)
        return torch.cat((head, rest[:, : count - window]), 1)

    def _far(self, q_BTHd: Tensor, k_BMJd: Tensor, v_BMJd: Tensor) -> Tensor:
        """Global results: each window looks at the blocks before it, the first at the null key, whose value is 0."""
        config, count = self.config, q_BTHd.shape[1]
        scale, ratio = config.head_dim**-0.5, config.window // config.stride
        k_BJMd, v_BJMd = k_BMJd.transpose(1, 2), v_BMJd.transpose(1, 2)
        if q_BTHd.is_cuda:
            window_T1 = torch.arange(count, device=q_BTHd.device)[:, None] // config.window
            mask_TM = _added(torch.arange(k_BMJd.shape[1], device=q_BTHd.device) <= window_T1 * ratio, q_BTHd.dtype)
            return attend(q_BTHd, k_BJMd, v_BJMd, mask_TM[None].expand(len(q_BTHd), -1, -1), scale)
        results = [torch.zeros_like(q_BTHd[:, : config.window])]
        grouped = config.heads != config.kv_heads
        for window in range(1, -(-count // config.window)):
            q_BHTd = q_BTHd[:, window * config.window : (window + 1) * config.window].transpose(1, 2)
            seen = window * ratio + 1
            out = F.scaled_dot_product_attention(
                q_BHTd, k_BJMd[:, :, :seen], v_BJMd[:, :, :seen], scale=scale, enable_gqa=grouped
            )
            results.append(out.transpose(1, 2))
        return torch.cat(results, 1)

    def _ragged(
        self, q_BTHd: Tensor, k_BTJd: Tensor, v_BTJd: Tensor, k_BMJd: Tensor, v_BMJd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both results by flash attention over windows as sequences, each of which has its own stretch of the keys."""
        config, (batch, count) = self.config, q_BTHd.shape[:2]
        windows, ratio, device = -(-count // config.window), config.window // config.stride, q_BTHd.device
        window_N = torch.arange(windows, device=device).repeat(batch)
        row_N = torch.arange(batch, device=device).repeat_interleave(windows)
        starts_N = torch.cat((row_N * count + window_N * config.window, row_N.new_tensor([batch * count])))
        ends_N = ((window_N + 1) * config.window).clamp(max=count)
        first_N = (window_N - 1).clamp(min=0) * config.window
        blocks = k_BMJd.shape[1]

        def flash(k: Tensor, v: Tensor, first_N: Tensor, seen_N: Tensor, longest: int, causal: bool) -> Tensor:
            out = torch.ops.aten._flash_attention_forward(
                q_BTHd.flatten(0, 1),
                k.flatten(0, 1),
                v.flatten(0, 1),
                starts_N.int(),
                F.pad(first_N, (0, 1)).int(),
                config.window,
                longest,
                0.0,
                causal,
                False,
                scale=config.head_dim**-0.5,
                seqused_k=seen_N.int(),
            )[0]
            return out.unflatten(0, (batch, count))

        near = flash(k_BTJd, v_BTJd, row_N * count + first_N, ends_N - first_N, 2 * config.window, True)
        far = flash(k_BMJd, v_BMJd, row_N * blocks, window_N * ratio + 1, (windows - 1) * ratio + 1, False)
        return near, far

    def _further(
        self,
        q_BTHd: Tensor,
        k_BTJd: Tensor,
        v_BTJd: Tensor,
        at: Places,
        start: int,
        masks: tuple[Tensor, Tensor],
        stored: Stored,
    ) -> tuple[Tensor, Tensor]:
        """Results of both kinds for at most a window of positions, the new ones from `start` on, behind stored ones."""
        config, count = self.config, q_BTHd.shape[1]
        keys, values, block_keys, block_values = stored
        first_B1 = at.positions_BT[:, start : start + 1]
        # Blocks that the new positions are in: pooled anew from raw keys, and looked at once their window is past.
        touched = torch.arange((count + config.stride - 2) // config.stride + 1, device=first_B1.device)
        block_BN = first_B1 // config.stride + touched
        members_BNP = block_BN[..., None] * config.stride + torch.arange(config.stride, device=first_B1.device)
        valid_BNP = members_BNP < first_B1[..., None] + count
        place_BNP = members_BNP % (2 * config.window)
        if at.positions_BT.shape[1] == 1:
            keys[at.rows_B1, :, first_B1 % (2 * config.window)] = k_BTJd
            values[at.rows_B1, :, first_B1 % (2 * config.window)] = v_BTJd
            k_BJRd, v_BJRd = keys, values
        else:
            k_BJRd = torch.cat((keys, k_BTJd.transpose(1, 2)), 2)
            v_BJRd = torch.cat((values, v_BTJd.transpose(1, 2)), 2)
            new_BNP = (members_BNP - first_B1[..., None]).clamp(max=count - 1)
            place_BNP = torch.where(new_BNP < 0, place_BNP, keys.shape[2] + new_BNP)
        rows_B11 = at.rows_B1[..., None]
        pooled = self.pool(k_BJRd[rows_B11, :, place_BNP], v_BJRd[rows_B11, :, place_BNP], valid_BNP)
        place_BN = (block_BN + 1).clamp(max=block_keys.shape[2] - 1)
        block_keys[at.rows_B1, :, place_BN], block_values[at.rows_B1, :, place_BN] = pooled
        if at.positions_BT.shape[1] > 1:
            self._keep(k_BTJd, v_BTJd, at, start, stored)
        scale, blocks = config.head_dim**-0.5, masks[1].shape[-1]
        near = attend(q_BTHd, k_BJRd, v_BJRd, masks[0], scale)
        return near, attend(q_BTHd, block_keys[:, :, :blocks], block_values[:, :, :blocks], masks[1], scale)

    def _keep(self, k_BTJd: Tensor, v_BTJd: Tensor, at: Places, start: int, stored: Stored) -> None:
        """Stores the last two windows of each row's new keys, of which the first is number `start`."""
        config, count = self.config, k_BTJd.shape[1]
        new_R = torch.arange(min(2 * config.window, count), device=k_BTJd.device)
        if at.counts_B is None:
            index_BR = (new_R + count - len(new_R)).expand(len(at.rows_B1), -1)
        else:
            new_B1 = (at.counts_B[:, None] - start).clamp(0, count)
            index_BR = new_R + (new_B1 - len(new_R)).clamp(min=0)
        place_BR = (at.positions_BT[:, start : start + 1] + index_BR) % (2 * config.window)
        if at.counts_B is not None:
            place_BR = torch.where(index_BR < new_B1, place_BR, 2 * config.window)
        keys, values = stored[:2]
        keys[at.rows_B1, :, place_BR] = k_BTJd[at.rows_B1, index_BR]
        values[at.rows_B1, :, place_BR] = v_BTJd[at.rows_B1, index_BR]
