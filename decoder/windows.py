"""Triton kernels for whole prompts on a GPU: rotation, and adaptive attention in two kernels.

PyTorch takes some forty kernels for adaptive attention, and copies keys for windows that overlap; these read keys where
they lie. All accumulate in fp32. The null key scores 0 and has the value 0: it is how the running sums of the global
part start, and is never read.
Shapes: B batch, T positions, W of a window, P of a block, M blocks, the null key first; H query heads, J key/value
heads, d width of a head, r half of it, e = 2d of a key and its value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoder.adaptive import AdaptiveAttentionConfig

KEYS = 64  # that a program looks at together
LOG2E = 1.4426950408889634


def rotate(x_BTHd: Tensor, cos_BT1r: Tensor, sin_BT1r: Tensor, interleaved: bool) -> Tensor:
    """See `decoder.rotary.Rope.rotate`; cosines and sines are contiguous, of each row or of all."""
    batch, count, heads, dim = x_BTHd.shape
    out_BTHd = torch.empty(x_BTHd.shape, dtype=x_BTHd.dtype, device=x_BTHd.device)
    half = dim // 2
    block = 64 if count >= 64 else triton.next_power_of_2(count)
    turn = 0 if len(cos_BT1r) == 1 else count * half
    _rotate[(triton.cdiv(count, block), heads, batch)](
        x_BTHd, cos_BT1r, sin_BT1r, out_BTHd, *x_BTHd.stride(), turn, count, heads,
        HALF=half, PADDED=triton.next_power_of_2(half), INTERLEAVED=interleaved, ROWS=block,
    )  # fmt: skip
    return out_BTHd


def pool(k_BTJd: Tensor, v_BTJd: Tensor, salience_Jd: Tensor, stride: int, blocks_BJMe: Tensor) -> None:
    """Writes the null key and every whole block into `blocks_BJMe`, which has room for them."""
    batch, count, heads, dim = k_BTJd.shape
    blocks, together = count // stride + 1, max(1, 64 // stride)
    _pool[(triton.cdiv(blocks, together), heads, batch)](
        k_BTJd, v_BTJd, salience_Jd, blocks_BJMe, *k_BTJd.stride(), *v_BTJd.stride(), *blocks_BJMe.stride()[:3], blocks,
        DIM=dim, STRIDE=stride, BLOCKS=together,
    )  # fmt: skip


def attend(
    config: AdaptiveAttentionConfig,
    q_BTHd: Tensor,
    k_BTJd: Tensor,
    v_BTJd: Tensor,
    blocks_BJMe: Tensor,
    gate_BTH: Tensor,
) -> Tensor:
    """Both parts for positions from 0 on, mixed by the gate (before its sigmoid), `[B, T, H, d]`."""
    batch, count, heads, dim = q_BTHd.shape
    queries = min(config.window, 128 if dim <= 64 else 64)
    out_BTHd = torch.empty(q_BTHd.shape, dtype=q_BTHd.dtype, device=q_BTHd.device)
    _attend[(triton.cdiv(count, queries), heads, batch)](
        q_BTHd, k_BTJd, v_BTJd, blocks_BJMe, gate_BTH, out_BTHd,
        *q_BTHd.stride()[:3], *k_BTJd.stride()[:3], *v_BTJd.stride()[:3], *blocks_BJMe.stride()[:3],
        count, heads, config.head_dim**-0.5 * LOG2E,
        GROUP=heads // config.kv_heads, DIM=dim, WINDOW=config.window, RATIO=config.window // config.stride,
        QUERIES=queries, KEYS=min(KEYS, queries), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_BTHd


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    row_stride,
    position_stride,
    head_stride,
    value_stride,
    turn_stride,
    count,
    heads,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some positions of one head of one row."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, PADDED)[None]
    inside = (t < count) & (i < HALF)
    turn = row * turn_stride + t * HALF + i
    c, s = tl.load(cos + turn, inside, 0.0), tl.load(sin + turn, inside, 0.0)
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + HALF
    x += row * row_stride + head * head_stride + t * position_stride
    a = tl.load(x + first * value_stride, inside, 0.0).to(tl.float32)
    b = tl.load(x + second * value_stride, inside, 0.0).to(tl.float32)
    out += ((row * count + t) * heads + head) * 2 * HALF + i
    tl.store(out, (a * c - b * s).to(out.dtype.element_ty), inside)
    tl.store(out + HALF, (b * c + a * s).to(out.dtype.element_ty), inside)


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    k,
    v,
    salience,
    out,
    k_row,
    k_position,
    k_head,
    k_value,
    v_row,
    v_position,
    v_head,
    v_value,
    out_row,
    out_head,
    out_block,
    blocks,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some blocks of one head of one row; the null key is block 0, one before those of the positions."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCKS
    t = (first - 1) * STRIDE + tl.arange(0, BLOCKS * STRIDE)[:, None]
    i = tl.arange(0, DIM)[None]
    inside = (t >= 0) & (t < (blocks - 1) * STRIDE)
    keys = tl.load(k + row * k_row + head * k_head + t * k_position + i * k_value, inside, 0.0).to(tl.float32)
    values = tl.load(v + row * v_row + head * v_head + t * v_position + i * v_value, inside, 0.0).to(tl.float32)
    score = tl.sum(keys * tl.load(salience + head * DIM + i).to(tl.float32), 1)
    score = tl.reshape(score, [BLOCKS, STRIDE])
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    weight = tl.reshape(weight / tl.sum(weight, 1)[:, None], [BLOCKS, STRIDE, 1])
    key = tl.sum(tl.reshape(keys, [BLOCKS, STRIDE, DIM]) * weight, 1)
    value = tl.sum(tl.reshape(values, [BLOCKS, STRIDE, DIM]) * weight, 1)
    block = first + tl.arange(0, BLOCKS)[:, None]
    out += row * out_row + head * out_head + block * out_block + i
    tl.store(out, key.to(out.dtype.element_ty), block < blocks)
    tl.store(out + DIM, value.to(out.dtype.element_ty), block < blocks)


@triton.jit
def _look(q, keys, values, seen, scale, peak, total, sums):  # type: ignore[no-untyped-def]
    """Takes some keys `[d, S]` and values `[S, d]` into running sums of a softmax."""
    score = tl.where(seen, tl.dot(q, keys) * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    fading = tl.exp2(peak - higher)
    sums = tl.dot(weight.to(values.dtype), values, sums * fading[:, None])
    return higher, total * fading + tl.sum(weight, 1), sums


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    blocks,
    gate,
    out,
    q_row,
    q_position,
    q_head,
    k_row,
    k_position,
    k_head,
    v_row,
    v_position,
    v_head,
    blocks_row,
    blocks_head,
    blocks_block,
    count,
    heads,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some positions of one window, of one head of one row."""
    # The last windows see most blocks: they go first, so that none is left over at the end.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    window = start // WINDOW
    t = start + tl.arange(0, QUERIES)
    s = tl.arange(0, KEYS)
    i = tl.arange(0, DIM)
    inside = t[:, None] < count
    mine = tl.load(q + row * q_row + head * q_head + t[:, None] * q_position + i[None], inside, 0.0)
    k += row * k_row + (head // GROUP) * k_head
    v += row * v_row + (head // GROUP) * v_head
    blocks += row * blocks_row + (head // GROUP) * blocks_head

    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, DIM], tl.float32)
    for at in range(tl.maximum(window - 1, 0) * WINDOW, start + QUERIES, KEYS):
        j = at + s
        keys = tl.load(k + j[None] * k_position + i[:, None], j[None] < count, 0.0)
        values = tl.load(v + j[:, None] * v_position + i[None], j[:, None] < count, 0.0)
        peak, total, sums = _look(mine, keys, values, j[None] <= t[:, None], scale, peak, total, sums)
    near = sums / total[:, None]

    # The null key has been seen.
    peak = tl.zeros([QUERIES], tl.float32)
    total = tl.full([QUERIES], 1.0, tl.float32)
    sums = tl.zeros([QUERIES, DIM], tl.float32)
    last = window * RATIO
    for at in range(1, last + 1, KEYS):
        j = at + s
        keys = tl.load(blocks + j[None] * blocks_block + i[:, None], j[None] <= last, 0.0)
        values = tl.load(blocks + j[:, None] * blocks_block + DIM + i[None], j[:, None] <= last, 0.0)
        peak, total, sums = _look(mine, keys, values, j[None] <= last, scale, peak, total, sums)
    far = sums / total[:, None]

    place = (row * count + t) * heads + head
    share = tl.sigmoid(tl.load(gate + place, t < count, 0.0).to(tl.float32))[:, None]
    mixed = far + share * (near - far)
    tl.store(out + place[:, None] * DIM + i[None], mixed.to(out.dtype.element_ty), inside)
