"""Triton kernels on a GPU: rotation, and adaptive attention of whole prompts and of single positions behind a cache.

PyTorch takes some forty kernels for adaptive attention, and copies keys for windows that overlap; these are three for a
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

TILE = 64  # queries and keys that a program looks at together
PROGRAMS = 264  # enough to keep a large GPU busy
SPLITS = 16  # of a row at most
LOG2E = 1.4426950408889634


def rotate(x_BTHd: Tensor, cos_BT1r: Tensor, sin_BT1r: Tensor, interleaved: bool) -> Tensor:
    """See `decoder.rotary.Rope.rotate`; cosines and sines are contiguous, of each row or of all."""
    batch, count, heads, dim = x_BTHd.shape
    out_BTHd = torch.empty(x_BTHd.shape, dtype=x_BTHd.dtype, device=x_BTHd.device)
    half = dim // 2
    block, together = (32, 2) if count >= 32 else (triton.next_power_of_2(count), 1)
    turn = 0 if len(cos_BT1r) == 1 else count * half
    _rotate[(triton.cdiv(count, block), triton.cdiv(heads, together), batch)](
        x_BTHd, cos_BT1r, sin_BT1r, out_BTHd, *x_BTHd.stride(), turn, count, heads,
        HALF=half, PADDED=triton.next_power_of_2(half), INTERLEAVED=interleaved, ROWS=block, HEADS=together,
    )  # fmt: skip
    return out_BTHd


def pool(k_BTJd: Tensor, v_BTJd: Tensor, salience_Jd: Tensor, stride: int, blocks_BJMe: Tensor) -> None:
    """Writes the null key and every whole block into `blocks_BJMe`, which has room for them."""
    batch, count, heads, dim = k_BTJd.shape
    blocks, together = count // stride + 1, 16
    _pool[(triton.cdiv(blocks, together), heads, batch)](
        k_BTJd, v_BTJd, salience_Jd, blocks_BJMe, *k_BTJd.stride(), *v_BTJd.stride(), *blocks_BJMe.stride()[:3], blocks,
        DIM=dim, STRIDE=stride, UNROLLED=min(stride, 16), BLOCKS=together, num_warps=max(1, dim // 8),
    )  # fmt: skip


def gate(x_BTD: Tensor, weight_HD: Tensor, bias_H: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate of each position and head before its sigmoid, `[B, T, H]`: as a product it is too narrow for cuBLAS."""
    x_RD, heads = x_BTD.reshape(-1, x_BTD.shape[-1]), len(weight_HD)
    out_BTH = torch.empty(*x_BTD.shape[:-1], heads, dtype=dtype, device=x_BTD.device)
    _gate[(triton.cdiv(len(x_RD), 2 * TILE),)](
        x_RD, weight_HD, bias_H, out_BTH, x_RD.stride(0), len(x_RD),
        WIDTH=x_RD.shape[1], HEADS=heads, PADDED=max(16, triton.next_power_of_2(heads)), ROWS=2 * TILE, DEPTH=TILE,
    )  # fmt: skip
    return out_BTH


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
    tile = min(config.window, TILE)
    out_BTHd = torch.empty(q_BTHd.shape, dtype=q_BTHd.dtype, device=q_BTHd.device)
    _attend[(triton.cdiv(count, tile), heads, batch)](
        q_BTHd, k_BTJd, v_BTJd, blocks_BJMe, gate_BTH, out_BTHd,
        *q_BTHd.stride()[:3], *k_BTJd.stride()[:3], *v_BTJd.stride()[:3], *blocks_BJMe.stride()[:3],
        count, heads, config.head_dim**-0.5 * LOG2E,
        GROUP=heads // config.kv_heads, DIM=dim, WINDOW=config.window, RATIO=config.window // config.stride,
        TILE=tile, num_warps=4, num_stages=3, maxnreg=96 if dim <= 32 else None,  # five programs at once, not four
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
    # Few rows leave most of the GPU idle: then each is looked at in parts. By what a row may hold, not what it holds.
    spare = PROGRAMS // (batch * kv_heads)
    keys = min(TILE if spare < 2 else TILE // 2, config.window)
    splits = max(1, min(SPLITS, spare, (2 * config.window + blocks_BJMe.shape[2]) // keys))
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
        WINDOW=config.window, STRIDE=config.stride, SPLITS=splits, KEYS=keys, num_warps=2,
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
    HEADS: tl.constexpr,
):
    """Some positions of some heads of one row."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, PADDED)[None]
    inside = (t < count) & (i < HALF)
    turn = row * turn_stride + t * HALF + i
    c, s = tl.load(cos + turn, inside, 0.0), tl.load(sin + turn, inside, 0.0)
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + HALF
    for nth in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + nth
        real = inside & (head < heads)
        from_ = x + row * row_stride + head * head_stride + t * position_stride
        a = tl.load(from_ + first * value_stride, real, 0.0).to(tl.float32)
        b = tl.load(from_ + second * value_stride, real, 0.0).to(tl.float32)
        to = out + ((row * count + t) * heads + head) * 2 * HALF + i
        tl.store(to, (a * c - b * s).to(out.dtype.element_ty), real)
        tl.store(to + HALF, (b * c + a * s).to(out.dtype.element_ty), real)


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
    UNROLLED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some blocks of one head of one row; the null key is block 0, one before those of the positions.

    One position of each block after another, as running sums of a softmax: nothing is exchanged but a row's score.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    i = tl.arange(0, DIM)[None]
    inside = (block > 0) & (block < blocks)
    k += row * k_row + head * k_head + (block - 1) * STRIDE * k_position + i * k_value
    v += row * v_row + head * v_head + (block - 1) * STRIDE * v_position + i * v_value
    salient = tl.load(salience + head * DIM + i).to(tl.float32)
    peak = tl.full([BLOCKS, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCKS, 1], tl.float32)
    key_sum = tl.zeros([BLOCKS, DIM], tl.float32)
    value_sum = tl.zeros([BLOCKS, DIM], tl.float32)
    for start in range(0, STRIDE, UNROLLED):
        for nth in tl.static_range(UNROLLED):
            key = tl.load(k + (start + nth) * k_position, inside, 0.0).to(tl.float32)
            value = tl.load(v + (start + nth) * v_position, inside, 0.0).to(tl.float32)
            score = tl.sum(key * salient, 1)[:, None]
            higher = tl.maximum(peak, score)
            weight, fading = tl.exp(score - higher), tl.exp(peak - higher)
            total = total * fading + weight
            key_sum = key_sum * fading + key * weight
            value_sum = value_sum * fading + value * weight
            peak = higher
    out += row * out_row + head * out_head + block * out_block + i
    tl.store(out, (key_sum / total).to(out.dtype.element_ty), block < blocks)
    tl.store(out + DIM, (value_sum / total).to(out.dtype.element_ty), block < blocks)


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    x_row,
    rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The gates of some rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    head, at = tl.arange(0, PADDED)[None], tl.arange(0, DEPTH)
    x += row.to(tl.int64) * x_row
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for start in tl.range(0, WIDTH, DEPTH, num_stages=3):
        i = start + at
        each = tl.load(x + i[None], (row < rows) & (i[None] < WIDTH), 0.0).to(out.dtype.element_ty)
        own = tl.load(weight + head * WIDTH + i[:, None], (head < HEADS) & (i[:, None] < WIDTH), 0.0)
        total = tl.dot(each, own.to(out.dtype.element_ty), total)
    total += tl.load(bias + head, head < HEADS, 0.0).to(tl.float32)
    to = out + row.to(tl.int64) * HEADS + head
    tl.store(to, total.to(out.dtype.element_ty), (row < rows) & (head < HEADS))


@triton.jit
def _look(q, keys, values, scale, peak, total, sums, seen, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Takes some keys `[d, S]` and values `[S, d]` into running sums of a softmax."""
    score = tl.dot(q, keys)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - higher[:, None])  # one multiply-add and one exponential
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
    TILE: tl.constexpr,
):
    """Some positions of one window, of one head of one row. Tiles that all of them see whole need no mask."""
    # The last windows see most blocks: they go first, so that none is left over at the end.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    window = start // WINDOW
    s = tl.arange(0, TILE)
    t = start + s
    i = tl.arange(0, DIM)
    inside = t[:, None] < count
    mine = tl.load(q + row * q_row + head * q_head + t[:, None] * q_position + i[None], inside, 0.0)
    place = (row * count + t) * heads + head
    share = tl.sigmoid(tl.load(gate + place, t < count, 0.0).to(tl.float32))[:, None]  # early: nobody waits for it
    k += row * k_row + (head // GROUP) * k_head
    v += row * v_row + (head // GROUP) * v_head
    blocks += row * blocks_row + (head // GROUP) * blocks_head

    # Tiles with masks go before the loops: the keys of the first come together with the queries, not after a loop.
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DIM], tl.float32)
    keys = tl.load(k + t[None] * k_position + i[:, None], t[None] < count, 0.0)
    values = tl.load(v + t[:, None] * v_position + i[None], inside, 0.0)
    peak, total, sums = _look(mine, keys, values, scale, peak, total, sums, t[None] <= t[:, None], True)
    for at in range(tl.maximum(window - 1, 0) * WINDOW, start, TILE):
        j = at + s
        keys = tl.load(k + j[None] * k_position + i[:, None])
        values = tl.load(v + j[:, None] * v_position + i[None])
        peak, total, sums = _look(mine, keys, values, scale, peak, total, sums, inside, False)
    near = sums * (share / total[:, None])

    # The null key has been seen.
    peak = tl.zeros([TILE], tl.float32)
    total = tl.full([TILE], 1.0, tl.float32)
    sums = tl.zeros([TILE, DIM], tl.float32)
    last = window * RATIO
    whole = last // TILE * TILE
    if whole < last:
        j = whole + 1 + s
        keys = tl.load(blocks + j[None] * blocks_block + i[:, None], j[None] <= last, 0.0)
        values = tl.load(blocks + j[:, None] * blocks_block + DIM + i[None], j[:, None] <= last, 0.0)
        peak, total, sums = _look(mine, keys, values, scale, peak, total, sums, j[None] <= last, True)
    for at in range(1, whole + 1, TILE):
        j = at + s
        keys = tl.load(blocks + j[None] * blocks_block + i[:, None])
        values = tl.load(blocks + j[:, None] * blocks_block + DIM + i[None])
        peak, total, sums = _look(mine, keys, values, scale, peak, total, sums, inside, False)
    mixed = near + sums * ((1.0 - share) / total[:, None])
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
        peak, total, sums = _look(mine, keys, values, scale, peak, total, sums, j[None] < end, True)

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
        seen = j[None] < end
        far_peak, far_total, far_sums = _look(mine, keys, values, scale, far_peak, far_total, far_sums, seen, True)

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
