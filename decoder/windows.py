"""Triton kernels on a GPU: rotation, and adaptive attention of whole prompts and of single positions behind a cache.

PyTorch takes some forty kernels for adaptive attention, and copies keys for windows that overlap; these are two for a
prompt and one or two for a position, and read keys where they lie. All accumulate in fp32. The null key scores 0 and
has the value 0: it is how the running sums of the global part start, and is never read.
Shapes: B batch, T positions, W of a window, P of a block, R places of raw keys, M blocks, the null key first; H query
heads, J key/value heads, d width of a head, r half of it, e = 2d of a key and its value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoder.adaptive import AdaptiveAttentionConfig

KEYS = 64  # that a program looks at together
PROGRAMS = 264  # enough to keep a large GPU busy
SPLITS = 16  # of a row at most
TILES = 4  # of keys from which on a split pays
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


def step(
    config: AdaptiveAttentionConfig,
    q_B1Hd: Tensor,
    k_B1Jd: Tensor,
    v_B1Jd: Tensor,
    salience_Jd: Tensor,
    gate_B1H: Tensor,
    positions_B1: Tensor,
    stored: tuple[Tensor, ...],
) -> Tensor:
    """Stores one more position of each row and mixes both parts for it, `[B, 1, H, d]`; can be captured as a graph."""
    raw_BJRe, blocks_BJMe = stored
    (batch, _, heads, dim), kv_heads = q_B1Hd.shape, config.kv_heads
    keys = min(KEYS, config.window)
    # Few rows leave most of the GPU idle: then each is looked at in parts. By what a row may hold, not what it holds.
    tiles = (2 * config.window + blocks_BJMe.shape[2]) // keys
    splits = max(1, min(SPLITS, PROGRAMS // (batch * kv_heads), tiles // TILES))
    splits = 1 << (splits.bit_length() - 1)
    out_B1Hd = torch.empty(q_B1Hd.shape, dtype=q_B1Hd.dtype, device=q_B1Hd.device)
    # Of the near and the far part: sums, and by how much they count.
    sums = torch.empty(batch, heads, splits, 2, dim if splits > 1 else 0, dtype=torch.float32, device=q_B1Hd.device)
    peak, total = torch.empty(2, batch, heads, splits, 2, dtype=torch.float32, device=q_B1Hd.device)
    _step[(batch, kv_heads, splits)](
        q_B1Hd, k_B1Jd, v_B1Jd, raw_BJRe, blocks_BJMe, salience_Jd, gate_B1H, positions_B1, out_B1Hd, sums, peak, total,
        q_B1Hd.stride(0), q_B1Hd.stride(2), k_B1Jd.stride(0), k_B1Jd.stride(2), v_B1Jd.stride(0), v_B1Jd.stride(2),
        *raw_BJRe.stride()[:2], *blocks_BJMe.stride()[:2], gate_B1H.stride(0), positions_B1.stride(0),
        dim**-0.5 * LOG2E,
        HEADS=heads, GROUP=heads // kv_heads, PADDED=max(16, triton.next_power_of_2(heads // kv_heads)), DIM=dim,
        WINDOW=config.window, STRIDE=config.stride, SPLITS=splits, KEYS=keys,
    )  # fmt: skip
    if splits > 1:
        _join[(batch, heads)](
            sums, peak, total, gate_B1H, out_B1Hd, gate_B1H.stride(0), HEADS=heads, DIM=dim, SPLITS=splits, num_warps=1
        )
    return out_B1Hd


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


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    raw,
    blocks,
    salience,
    gate,
    positions,
    out,
    sums_out,
    peak_out,
    total_out,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    raw_row,
    raw_head,
    blocks_row,
    blocks_head,
    gate_row,
    position_row,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The query heads of one key/value head over a part of one row; the last part also stores the new key."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row * position_row).to(tl.int32)
    window = position // WINDOW
    g, i, s = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, KEYS)
    real, head = (g < GROUP)[:, None], kv_head * GROUP + g
    mine = tl.load(q + row * q_row + head[:, None] * q_head + i[None], real, 0.0)
    key = tl.load(k + row * k_row + kv_head * k_head + i)
    value = tl.load(v + row * v_row + kv_head * v_head + i)
    raw += row * raw_row + kv_head * raw_head
    blocks += row * blocks_row + kv_head * blocks_head

    # Nobody reads here what this writes: the new key comes from where it was made, its block is seen by later windows.
    if split == SPLITS - 1:
        member = position // STRIDE * STRIDE + tl.arange(0, STRIDE)
        from_ = raw + (member % (2 * WINDOW))[:, None] * 2 * DIM + i[None]
        before, own = (member < position)[:, None], (member == position)[:, None]
        keys = tl.where(own, key[None].to(tl.float32), tl.load(from_, before, 0.0).to(tl.float32))
        values = tl.where(own, value[None].to(tl.float32), tl.load(from_ + DIM, before, 0.0).to(tl.float32))
        score = tl.sum(keys * tl.load(salience + kv_head * DIM + i).to(tl.float32)[None], 1)
        score = tl.where(member <= position, score, float("-inf"))
        weight = tl.exp(score - tl.max(score, 0))
        weight = (weight / tl.sum(weight, 0))[:, None]
        to = blocks + (position // STRIDE + 1) * 2 * DIM + i
        tl.store(to, tl.sum(keys * weight, 0).to(to.dtype.element_ty))
        tl.store(to + DIM, tl.sum(values * weight, 0).to(to.dtype.element_ty))
        to = raw + position % (2 * WINDOW) * 2 * DIM + i
        tl.store(to, key)
        tl.store(to + DIM, value)

    # The first part begins with the new key, and with the null key.
    begins = split == 0
    score = tl.sum(mine.to(tl.float32) * key[None].to(tl.float32), 1) * scale
    peak = tl.where(begins, score, float("-inf"))
    total = tl.where(begins, tl.full([PADDED], 1.0, tl.float32), 0.0)
    sums = tl.where(begins, tl.zeros([PADDED, DIM], tl.float32) + value[None].to(tl.float32), 0.0)
    first = tl.maximum(window - 1, 0) * WINDOW
    span = tl.cdiv(tl.cdiv(position - first, SPLITS), KEYS) * KEYS
    start = first + split * span
    end = tl.minimum(start + span, position)
    for at in range(start, end, KEYS):
        j = at + s
        place = j % (2 * WINDOW) * 2 * DIM
        keys = tl.load(raw + place[None] + i[:, None], j[None] < end, 0.0)
        values = tl.load(raw + place[:, None] + DIM + i[None], j[:, None] < end, 0.0)
        peak, total, sums = _look(mine, keys, values, j[None] < end, scale, peak, total, sums)

    far_peak = tl.where(begins, tl.zeros([PADDED], tl.float32), float("-inf"))
    far_total = tl.where(begins, tl.full([PADDED], 1.0, tl.float32), 0.0)
    far_sums = tl.zeros([PADDED, DIM], tl.float32)
    visible = window * (WINDOW // STRIDE)
    span = tl.cdiv(tl.cdiv(visible, SPLITS), KEYS) * KEYS
    start = 1 + split * span
    end = tl.minimum(start + span, visible + 1)
    for at in range(start, end, KEYS):
        j = at + s
        keys = tl.load(blocks + j[None] * 2 * DIM + i[:, None], j[None] < end, 0.0)
        values = tl.load(blocks + j[:, None] * 2 * DIM + DIM + i[None], j[:, None] < end, 0.0)
        far_peak, far_total, far_sums = _look(mine, keys, values, j[None] < end, scale, far_peak, far_total, far_sums)

    place = row * HEADS + head
    if SPLITS == 1:
        near, far = sums / total[:, None], far_sums / far_total[:, None]
        share = tl.sigmoid(tl.load(gate + row * gate_row + head, g < GROUP, 0.0).to(tl.float32))[:, None]
        mixed = far + share * (near - far)
        tl.store(out + place[:, None] * DIM + i[None], mixed.to(out.dtype.element_ty), real)
    else:
        place = (place * SPLITS + split) * 2
        to = sums_out + place[:, None] * DIM + i[None]
        tl.store(to, sums, real)
        tl.store(to + DIM, far_sums, real)
        tl.store(peak_out + place, peak, g < GROUP)
        tl.store(peak_out + place + 1, far_peak, g < GROUP)
        tl.store(total_out + place, total, g < GROUP)
        tl.store(total_out + place + 1, far_total, g < GROUP)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    sums, peak, total, gate, out, gate_row, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr
):
    """Joins the parts of one head of one row, near and far, and mixes both."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * HEADS + head
    at, i = (place * SPLITS + tl.arange(0, SPLITS)) * 2, tl.arange(0, DIM)
    share = tl.sigmoid(tl.load(gate + row * gate_row + head).to(tl.float32))
    mixed = tl.zeros([DIM], tl.float32)
    for part in tl.static_range(2):  # near, far
        top = tl.load(peak + at + part)
        fading = tl.exp2(top - tl.max(top, 0))  # a part without keys has a peak of -inf
        joined = tl.sum(fading[:, None] * tl.load(sums + (at + part)[:, None] * DIM + i[None]), 0)
        weight = share if part == 0 else 1.0 - share
        mixed += weight * joined / tl.sum(fading * tl.load(total + at + part), 0)
    tl.store(out + place * DIM + i, mixed.to(out.dtype.element_ty))
