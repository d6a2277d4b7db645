"""A step of the decoder in six to nine Triton kernels a layer, for few new positions on a GPU.

At a batch of one a step is bound by the number of kernels, not by what they do: PyTorch takes about fifty a layer.
These read each weight once and the cache up to where it is used. Up to `FEW` rows a kernel takes as long as its longest
program: there each product is spread over many programs of a few outputs, and what little lies between two products is
done anew by each program that needs it. For grouped-query attention and a mixture of experts:
`fits` says which decoders that is. All accumulate in fp32 as PyTorch's do, but not in the same order.
Shapes: R rows (slots times new positions), D width, H query heads, J key/value heads, d width of a head, E experts, K
experts of a token, I hidden width of an expert, N splits of a cache row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoder.attention import FullAttentionConfig
from decoder.cache import Cache
from decoder.engine import lean
from decoder.model import Decoder

PROGRAMS = 264  # enough to keep a large GPU busy
POSITIONS = 64  # of the cache that are looked at together
FEW = 8  # rows up to which hardly any share an expert
OUTPUTS = 4  # of a product of few rows that a program makes
JOINED = 4  # parts of a row up to which each program that needs them joins them


def _depth(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides the size."""
    return min(most, size & -size)


def fits(decoder: Decoder) -> bool:
    """Whether `Fused` can run the decoder."""
    config = decoder.config
    attention, experts = config.attention, config.experts
    return (
        lean.fits(decoder)
        and isinstance(attention, FullAttentionConfig)
        and attention.head_dim in (32, 64, 128)
        and config.width % 64 == 0
        and experts is not None
        and experts.hidden % 16 == 0
    )


class Fused:
    """`hidden` of a decoder that `fits`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def hidden(self, x_BTD: Tensor, cache: Cache, counts_B: Tensor | None = None) -> Tensor:
        """As `Decoder.hidden` into a cache, for few positions: never waits for the device, and can be captured."""
        decoder = self.decoder
        batch, count, width = x_BTD.shape
        counts_B = torch.ones_like(cache.used_B) if counts_B is None else counts_B
        x_RD = x_BTD.reshape(-1, width).clone()
        for layer, stored in zip(decoder.layers, cache.layers, strict=True):
            self._attention(layer, x_RD, cache, stored, counts_B, count)
            self._experts(layer, x_RD)
        cache.used_B.add_(counts_B)
        return decoder.norm(x_RD).view(batch, count, width)

    def _attention(self, layer: Any, x_RD: Tensor, cache: Cache, stored: Any, counts_B: Tensor, count: int) -> None:
        attention, config = layer.attention, layer.attention.config
        rows, width = x_RD.shape
        keys, values = stored
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        few = rows <= FEW
        block = 16 if rows <= 16 else 32 if rows <= 256 else 64
        q_RHd = x_RD.new_empty(rows, heads, dim)
        norm = config.qk_norm == "head"
        if few:
            new = torch.empty(rows, heads + 2 * kv_heads, dim, dtype=torch.float32, device=x_RD.device)
            _project[(rows, triton.cdiv(new[0].numel(), OUTPUTS))](
                x_RD, layer.attention_norm.weight, attention.qkv.weight, x_RD, new, layer.attention_norm.eps,
                WIDTH=width, PADDED=triton.next_power_of_2(width), OUTPUTS=new[0].numel(), TILE=OUTPUTS, KEPT=False,
            )  # fmt: skip
        else:
            new = q_RHd
            _qkv[(triton.cdiv(rows, block), heads + 2 * kv_heads)](
                x_RD,
                layer.attention_norm.weight,
                attention.qkv.weight,
                attention.q_norm.weight if norm else x_RD,
                attention.k_norm.weight if norm else x_RD,
                self.decoder.rotary.inv_freq,
                cache.used_B,
                counts_B,
                q_RHd,
                keys,
                values,
                keys.stride(0),
                keys.stride(1),
                cache.length,
                rows,
                count,
                layer.attention_norm.eps,
                self.decoder.rotary.amplitude,
                WIDTH=width,
                HEADS=heads,
                KV_HEADS=kv_heads,
                HALF=dim // 2,
                NORM=norm,
                ROWS=block,
                # Few rows leave shared memory for longer steps through the weights.
                DEPTH=_depth(width, 128 if rows <= 16 and x_RD.element_size() == 2 and dim <= 64 else 64),
            )
        # Few rows leave most of the GPU idle: then each row of the cache is looked at in parts.
        splits = max(1, min(16, PROGRAMS // (rows * kv_heads), cache.places // POSITIONS))
        splits = 1 << (splits.bit_length() - 1)
        mixed_RHd = torch.empty_like(q_RHd)
        part = torch.empty(rows, heads, splits, dim if splits > 1 else 0, dtype=torch.float32, device=x_RD.device)
        peak, total = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=x_RD.device)
        _attend[(rows, kv_heads, splits)](
            new,
            attention.q_norm.weight if norm else x_RD,
            attention.k_norm.weight if norm else x_RD,
            self.decoder.rotary.inv_freq,
            keys,
            values,
            keys.stride(0),
            keys.stride(1),
            cache.used_B,
            counts_B,
            mixed_RHd,
            part,
            peak,
            total,
            cache.length,
            count,
            dim**-0.5,
            layer.attention_norm.eps,
            self.decoder.rotary.amplitude,
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            NORM=norm,
            PLAIN=few,
            SPLITS=splits,
            POSITIONS=POSITIONS,
        )
        joined = few and splits <= JOINED
        if splits > 1 and not joined:
            _join[(rows * heads,)](part, peak, total, mixed_RHd, DIM=dim, SPLITS=splits, num_warps=1)
        if few:
            _out_few[(rows, triton.cdiv(width, OUTPUTS))](
                mixed_RHd, part, peak, total, attention.out.weight, x_RD,
                WIDTH=width, DEPTHS=heads * dim, PADDED=triton.next_power_of_2(heads * dim), DIM=dim,
                SPLITS=splits if joined else 1, TILE=OUTPUTS,
            )  # fmt: skip
        else:
            out = 16 if rows <= 32 else 32
            _out[(triton.cdiv(rows, block), triton.cdiv(width, out))](
                mixed_RHd, attention.out.weight, x_RD, rows, width,
                DEPTHS=heads * dim, DEPTH=_depth(heads * dim, 64), ROWS=block, OUT=out,
            )  # fmt: skip

    def _experts(self, layer: Any, x_RD: Tensor) -> None:
        mixture = layer.feed_forward
        config, router, experts = mixture.router.config, mixture.router, mixture.experts
        rows, width = x_RD.shape
        pairs, hidden = rows * config.active, config.hidden
        normed_RD = torch.empty_like(x_RD)
        gates = triton.next_power_of_2(config.count)
        if rows <= FEW:
            self._few_experts(layer, x_RD, normed_RD, gates)
            if mixture.shared is not None:
                x_RD.add_(mixture.shared(normed_RD))
            return
        chosen_RK = torch.empty(rows, config.active, dtype=torch.int32, device=x_RD.device)
        share_RK = torch.empty(rows, config.active, dtype=torch.float32, device=x_RD.device)
        _route[(rows,)](
            x_RD,
            layer.feed_forward_norm.weight,
            router.weight,
            router.balance_E if config.balanced else router.weight,
            normed_RD,
            chosen_RK,
            share_RK,
            layer.feed_forward_norm.eps,
            config.scale,
            WIDTH=width,
            EXPERTS=config.count,
            PADDED=gates,
            ACTIVE=config.active,
            ACTIVE_PADDED=triton.next_power_of_2(config.active),
            SIGMOID=config.score == "sigmoid",
            BALANCED=config.balanced,
            NORMALISED=config.normalised,
            DEPTH=_depth(width, max(16, min(256, 8192 // gates))),
            num_warps=8,
        )
        h = x_RD.new_empty(pairs, hidden)
        sizes = {"WIDTH": width, "HIDDEN": hidden, "ACTIVE": config.active}
        # Sorted by expert, so that each reads its weights once for all rows that chose it.
        order = torch.empty(pairs, dtype=torch.int32, device=x_RD.device)
        bounds = torch.empty(2, config.count, dtype=torch.int32, device=x_RD.device)
        padded = triton.next_power_of_2(pairs)
        _sort[(config.count,)](chosen_RK, order, bounds, pairs, EXPERTS=config.count, PAIRS=padded, num_warps=8)
        sizes["ROWS"] = 16 if pairs <= 8 * config.count else 32 if pairs <= 16 * config.count else 64
        tile = 16 if rows <= 32 else 32
        _up[(config.count, triton.cdiv(hidden, tile))](
            normed_RD, order, bounds, experts.w13_E2ID, h, EXPERTS=config.count, TILE=tile, DEPTH=64, **sizes
        )
        y = x_RD.new_empty(pairs, width)
        _down[(config.count, width // 64)](
            h, order, bounds, experts.w2_EDI, y,
            EXPERTS=config.count, TILE=64, DEPTH=_depth(hidden, 64), **sizes,
        )  # fmt: skip
        _sum[(rows,)](y, share_RK, x_RD, WIDTH=width, ACTIVE=config.active, PADDED=triton.next_power_of_2(width))
        if mixture.shared is not None:
            x_RD.add_(mixture.shared(normed_RD))

    def _few_experts(self, layer: Any, x_RD: Tensor, normed_RD: Tensor, gates: int) -> None:
        """For few rows: the experts are chosen by each program that needs to know them."""
        mixture = layer.feed_forward
        config, router, experts = mixture.router.config, mixture.router, mixture.experts
        rows, width = x_RD.shape
        pairs, hidden = rows * config.active, config.hidden
        logits_RE = torch.empty(rows, config.count, dtype=torch.float32, device=x_RD.device)
        _project[(rows, triton.cdiv(config.count, OUTPUTS))](
            x_RD, layer.feed_forward_norm.weight, router.weight, normed_RD, logits_RE, layer.feed_forward_norm.eps,
            WIDTH=width, PADDED=triton.next_power_of_2(width), OUTPUTS=config.count, TILE=OUTPUTS, KEPT=True,
        )  # fmt: skip
        h = x_RD.new_empty(pairs, hidden)
        balance = router.balance_E if config.balanced else router.weight
        sizes = {"WIDTH": width, "HIDDEN": hidden, "ACTIVE": config.active, "EXPERTS": config.count, "PADDED": gates}
        sizes |= {"SIGMOID": config.score == "sigmoid", "BALANCED": config.balanced}
        _up_few[(pairs, hidden // 4)](
            normed_RD, logits_RE, balance, experts.w13_E2ID, h, TILE=4, DEPTH=_depth(width, 512), **sizes
        )
        depth = triton.next_power_of_2(min(hidden, 256))
        _down_few[(rows, width // 8)](
            h, logits_RE, balance, experts.w2_EDI, x_RD, config.scale,
            TILE=8, DEPTH=depth, NORMALISED=config.normalised, **sizes,
        )  # fmt: skip


@triton.jit
def _qkv(  # type: ignore[no-untyped-def]
    x,
    gain,
    weight,
    q_gain,
    k_gain,
    inv_freq,
    used,
    counts,
    q_out,
    keys,
    values,
    slot_stride,
    head_stride,
    length,
    rows,
    count,
    eps,
    amplitude,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Norm, projection, norm of the head, rotation, into the cache: one head of a block of rows."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    i = tl.arange(0, HALF)
    first = tl.zeros([ROWS, HALF], tl.float32)
    second = tl.zeros([ROWS, HALF], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        at = start + tl.arange(0, DEPTH)
        each = tl.load(x + row[:, None] * WIDTH + at[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        squares += tl.sum(each * each, axis=1)
        each = (each * tl.load(gain + at).to(tl.float32)[None, :]).to(weight.dtype.element_ty)
        from_ = weight + (head * 2 * HALF + i)[None, :] * WIDTH + at[:, None]
        first = tl.dot(each, tl.load(from_), first, input_precision="ieee")
        second = tl.dot(each, tl.load(from_ + HALF * WIDTH), second, input_precision="ieee")
    scale = tl.rsqrt(squares / WIDTH + eps)[:, None]
    first, second = first * scale, second * scale
    slot, nth = row // count, row % count
    position = tl.load(used + slot, mask=inside, other=0) + nth
    new = (nth < tl.load(counts + slot, mask=inside, other=1)) & (position < length)
    if head < HEADS + KV_HEADS:
        if NORM:
            own = q_gain if head < HEADS else k_gain
            mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
            scale = tl.rsqrt(mean + eps)[:, None]
            first = first * scale * tl.load(own + i).to(tl.float32)[None, :]
            second = second * scale * tl.load(own + HALF + i).to(tl.float32)[None, :]
        angle = position.to(tl.float32)[:, None] * tl.load(inv_freq + i)[None, :]
        cos, sin = tl.cos(angle) * amplitude, tl.sin(angle) * amplitude
        first, second = first * cos - second * sin, second * cos + first * sin
    if head < HEADS:
        to = q_out + (row * HEADS + head) * 2 * HALF
    else:
        # What does not count goes to the place behind the last position, where nobody looks.
        cache = keys if head < HEADS + KV_HEADS else values
        own_head = (head - HEADS) % KV_HEADS
        to = cache + slot * slot_stride + own_head * head_stride + tl.where(new, position, length) * 2 * HALF
    to = to[:, None] + i[None, :]
    tl.store(to, first.to(to.dtype.element_ty), mask=inside[:, None])
    tl.store(to + HALF, second.to(to.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    x,
    gain,
    weight,
    normed,
    out,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Norm and some outputs of a product of one row, in fp32; `KEPT` the normed row, too."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, PADDED)
    o = part * TILE + tl.arange(0, TILE)
    real = at < WIDTH
    own = tl.load(weight + o[:, None] * WIDTH + at[None, :], mask=(o < OUTPUTS)[:, None] & real[None, :], other=0.0)
    each = tl.load(x + row * WIDTH + at, mask=real, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(each * each, axis=0) / WIDTH + eps)
    rounded = each * root * tl.load(gain + at, mask=real, other=0.0).to(tl.float32)
    rounded = rounded.to(normed.dtype.element_ty)
    if KEPT:  # noqa: SIM102 - known when it is compiled
        if part == 0:
            tl.store(normed + row * WIDTH + at, rounded, mask=real)
    result = tl.sum(own.to(tl.float32) * rounded.to(tl.float32)[None, :], axis=1)
    tl.store(out + row * OUTPUTS + o, result, mask=o < OUTPUTS)


@triton.jit
def _placed(  # type: ignore[no-untyped-def]
    from_, real, position, gain, inv_freq, eps, amplitude, DIM: tl.constexpr, NORM: tl.constexpr
):
    """Some heads `[G, d]` of a plain projection, normed and rotated."""
    c = tl.arange(0, DIM)[None, :]
    other = (c + DIM // 2) % DIM  # what a value is rotated with
    first, second = tl.load(from_ + c, mask=real, other=0.0), tl.load(from_ + other, mask=real, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first, axis=1) / DIM + eps)[:, None]
        first = first * scale * tl.load(gain + c).to(tl.float32)
        second = second * scale * tl.load(gain + other).to(tl.float32)
    angle = position.to(tl.float32) * tl.load(inv_freq + c % (DIM // 2))
    cos, sin = tl.cos(angle) * amplitude, tl.sin(angle) * amplitude
    return first * cos + tl.where(c < DIM // 2, -second, second) * sin


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    new,
    q_gain,
    k_gain,
    inv_freq,
    keys,
    values,
    slot_stride,
    head_stride,
    used,
    counts,
    out,
    part,
    peak,
    total,
    length,
    count,
    scale,
    eps,
    amplitude,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    PLAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Attention of the query heads of one key/value head over a part of one row of the cache.

    `new` are the queries; `PLAIN`: queries, keys and values as they were projected. Then the last part stores its row's
    key and value, and looks at those of the rows before it in `new`, as nobody knows when they are stored.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PADDED: tl.constexpr = 16 if GROUP < 16 else GROUP
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot, nth = row // count, row % count
    before = tl.load(used + slot)
    position = before + nth
    counts_here = (nth < tl.load(counts + slot)) & (position < length)
    # Padding looks at one position, so that it stays finite.
    stored = tl.where(counts_here, before if PLAIN else position + 1, 0 if PLAIN else 1)
    span = tl.cdiv(tl.cdiv(stored, SPLITS), POSITIONS) * POSITIONS
    start = split * span
    end = tl.minimum(start + span, stored)
    g, c, s = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, POSITIONS)
    head = row * HEADS + kv_head * GROUP + g
    real = (g < GROUP)[:, None]
    if PLAIN:
        from_ = new + (row * (HEADS + 2 * KV_HEADS) + kv_head * GROUP + g)[:, None] * DIM
        query = _placed(from_, real, position, q_gain, inv_freq, eps, amplitude, DIM, NORM).to(keys.dtype.element_ty)
    else:
        query = tl.load(new + head[:, None] * DIM + c[None, :], mask=real, other=0.0)
    keys += slot * slot_stride + kv_head * head_stride
    values += slot * slot_stride + kv_head * head_stride
    top = tl.full([PADDED], float("-inf"), tl.float32)
    weight = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, DIM], tl.float32)
    for first in range(start, end, POSITIONS):
        at = first + s
        seen = at < end
        key = tl.load(keys + at[None, :] * DIM + c[:, None], mask=seen[None, :], other=0.0)
        score = tl.where(seen[None, :], tl.dot(query, key, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade, p = tl.exp(top - higher), tl.exp(score - higher[:, None])
        value = tl.load(values + at[:, None] * DIM + c[None, :], mask=seen[:, None], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        weight = weight * fade + tl.sum(p, axis=1)
        top = higher
    if PLAIN:  # noqa: SIM102 - known when it is compiled
        if split == SPLITS - 1:
            for other in range(tl.where(counts_here, 0, nth), nth + 1):
                its = new + ((row - nth + other) * (HEADS + 2 * KV_HEADS) + HEADS + kv_head) * DIM + c[None, :] * 0
                one = _placed(its, c[None, :] >= 0, before + other, k_gain, inv_freq, eps, amplitude, DIM, NORM)
                one = one.to(keys.dtype.element_ty)
                its_value = tl.load(its + KV_HEADS * DIM + c[None, :]).to(values.dtype.element_ty)
                if other == nth:
                    # What does not count goes to the place behind the last position, where nobody looks.
                    place = tl.where(counts_here, position, length) * DIM + c[None, :]
                    tl.store(keys + place, one)
                    tl.store(values + place, its_value)
                new_score = tl.sum(query.to(tl.float32) * one.to(tl.float32), axis=1) * scale
                new_top = tl.maximum(top, new_score)
                new_fade, new_p = tl.exp(top - new_top), tl.exp(new_score - new_top)
                mixed = mixed * new_fade[:, None] + new_p[:, None] * its_value.to(tl.float32)
                weight = weight * new_fade + new_p
                top = new_top
    if SPLITS == 1:
        mixed = (mixed / weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + head[:, None] * DIM + c[None, :], mixed, mask=real)
    else:
        to = head * SPLITS + split
        tl.store(part + to[:, None] * DIM + c[None, :], mixed, mask=real)
        tl.store(peak + to, top, mask=g < GROUP)
        tl.store(total + to, weight, mask=g < GROUP)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    part, peak, total, out, DIM: tl.constexpr, SPLITS: tl.constexpr
):
    """Joins the parts of one head of one row."""
    head = tl.program_id(0).to(tl.int64)
    at, c = head * SPLITS + tl.arange(0, SPLITS), tl.arange(0, DIM)
    top = tl.load(peak + at)
    share = tl.exp(top - tl.max(top, axis=0))  # a part without positions has a peak of -inf
    mixed = tl.sum(share[:, None] * tl.load(part + at[:, None] * DIM + c[None, :]), axis=0)
    mixed = mixed / tl.sum(share * tl.load(total + at), axis=0)
    tl.store(out + head * DIM + c, mixed.to(out.dtype.element_ty))


@triton.jit
def _out(  # type: ignore[no-untyped-def]
    mixed,
    weight,
    x,
    rows,
    width,
    DEPTHS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
):
    """Projects what the heads made, and adds it to the residual stream."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    real = (out < width)[None, :]
    result = tl.zeros([ROWS, OUT], tl.float32)
    for start in range(0, DEPTHS, DEPTH):
        at = start + tl.arange(0, DEPTH)
        each = tl.load(mixed + row[:, None] * DEPTHS + at[None, :], mask=inside, other=0.0)
        from_ = weight + out[None, :] * DEPTHS + at[:, None]
        result = tl.dot(each, tl.load(from_, mask=real, other=0.0), result, input_precision="ieee")
    to = x + row[:, None] * width + out[None, :]
    result = tl.load(to, mask=inside & real, other=0.0).to(tl.float32) + result
    tl.store(to, result.to(to.dtype.element_ty), mask=inside & real)


@triton.jit
def _out_few(  # type: ignore[no-untyped-def]
    mixed,
    part,
    peak,
    total,
    weight,
    x,
    WIDTH: tl.constexpr,
    DEPTHS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `_join` and `_out`, some outputs of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    o = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real, inside = at < DEPTHS, o < WIDTH
    own = tl.load(weight + o[:, None] * DEPTHS + at[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    if SPLITS == 1:
        each = tl.load(mixed + row * DEPTHS + at, mask=real, other=0.0)
    else:
        place = (row * (DEPTHS // DIM) + at // DIM) * SPLITS
        highest = tl.load(peak + place, mask=real, other=0.0)
        for nth in tl.static_range(1, SPLITS):
            highest = tl.maximum(highest, tl.load(peak + place + nth, mask=real, other=0.0))
        sums, weights = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
        for nth in tl.static_range(SPLITS):
            share = tl.exp(tl.load(peak + place + nth, mask=real, other=0.0) - highest)
            sums += share * tl.load(part + (place + nth) * DIM + at % DIM, mask=real, other=0.0)
            weights += share * tl.load(total + place + nth, mask=real, other=1.0)
        each = (sums / weights).to(x.dtype.element_ty)
    result = tl.sum(own.to(tl.float32) * each.to(tl.float32)[None, :], axis=1)
    to = x + row * WIDTH + o
    tl.store(to, (tl.load(to, mask=inside).to(tl.float32) + result).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    x,
    gain,
    weight,
    balance,
    normed,
    chosen,
    share,
    eps,
    scale,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVE: tl.constexpr,
    ACTIVE_PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BALANCED: tl.constexpr,
    NORMALISED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Norm, gate in fp32 and choice of experts of one row."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    squares = tl.zeros([DEPTH], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        each = tl.load(x + row * WIDTH + start + tl.arange(0, DEPTH)).to(tl.float32)
        squares += each * each
    root = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    products = tl.zeros([PADDED, DEPTH], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        at = start + tl.arange(0, DEPTH)
        each = tl.load(x + row * WIDTH + at).to(tl.float32) * root * tl.load(gain + at).to(tl.float32)
        rounded = each.to(normed.dtype.element_ty)
        tl.store(normed + row * WIDTH + at, rounded)
        gate = tl.load(weight + e[:, None] * WIDTH + at[None, :], mask=(e < EXPERTS)[:, None], other=0.0)
        products += gate * rounded.to(tl.float32)[None, :]
    logit = tl.where(e < EXPERTS, tl.sum(products, axis=1), float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)
    choice = tl.where(e < EXPERTS, score, float("-inf"))
    if BALANCED:
        choice += tl.load(balance + e, mask=e < EXPERTS, other=0.0)
    k = tl.arange(0, ACTIVE_PADDED)
    experts = tl.zeros([ACTIVE_PADDED], tl.int32)
    shares = tl.zeros([ACTIVE_PADDED], tl.float32)
    for nth in tl.static_range(ACTIVE):
        best = tl.minimum(tl.argmax(choice, axis=0), EXPERTS - 1)  # also where all is NaN
        experts = tl.where(k == nth, best, experts)
        shares = tl.where(k == nth, tl.sum(tl.where(e == best, score, 0.0), axis=0), shares)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALISED:
        shares = shares / (tl.sum(shares, axis=0) + 1e-20)
    tl.store(chosen + row * ACTIVE + k, experts, mask=k < ACTIVE)
    tl.store(share + row * ACTIVE + k, shares * scale, mask=k < ACTIVE)


@triton.jit
def _sort(  # type: ignore[no-untyped-def]
    chosen, order, bounds, pairs, EXPERTS: tl.constexpr, PAIRS: tl.constexpr
):
    """Puts the pairs (row times ACTIVE plus place) that chose one expert behind those of the experts before it."""
    expert = tl.program_id(0)
    p = tl.arange(0, PAIRS)
    its = tl.load(chosen + p, mask=p < pairs, other=EXPERTS)
    mine = (its == expert).to(tl.int32)
    first = tl.sum((its < expert).to(tl.int32), axis=0)
    tl.store(order + first + tl.cumsum(mine, axis=0) - 1, p, mask=mine == 1)
    tl.store(bounds + expert, first)
    tl.store(bounds + EXPERTS + expert, first + tl.sum(mine, axis=0))


@triton.jit
def _up(  # type: ignore[no-untyped-def]
    x,
    order,
    bounds,
    w13,
    h,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """Gate and up projection and SwiGLU of one expert, for the rows that chose it; results stay in that order."""
    expert = tl.program_id(0)
    end = tl.load(bounds + EXPERTS + expert)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = (i < HIDDEN)[None, :]
    own = w13 + expert.to(tl.int64) * 2 * HIDDEN * WIDTH
    for first in range(tl.load(bounds + expert), end, ROWS):
        nth = first + tl.arange(0, ROWS)
        row = tl.load(order + nth, mask=nth < end, other=0) // ACTIVE
        gate = tl.zeros([ROWS, TILE], tl.float32)
        up = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, WIDTH, DEPTH):
            at = start + tl.arange(0, DEPTH)
            each = tl.load(x + row[:, None] * WIDTH + at[None, :])
            from_ = own + i[None, :] * WIDTH + at[:, None]
            gate = tl.dot(each, tl.load(from_, mask=real, other=0.0), gate, input_precision="ieee")
            up = tl.dot(each, tl.load(from_ + HIDDEN * WIDTH, mask=real, other=0.0), up, input_precision="ieee")
        result = (gate / (1.0 + tl.exp(-gate)) * up).to(h.dtype.element_ty)
        tl.store(h + nth[:, None] * HIDDEN + i[None, :], result, mask=(nth < end)[:, None] & real)


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    h,
    order,
    bounds,
    w2,
    y,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """Down projection of one expert, for the rows that chose it; results go back to their pairs."""
    expert = tl.program_id(0)
    end = tl.load(bounds + EXPERTS + expert)
    o = tl.program_id(1) * TILE + tl.arange(0, TILE)
    own = w2 + expert.to(tl.int64) * WIDTH * HIDDEN
    for first in range(tl.load(bounds + expert), end, ROWS):
        nth = first + tl.arange(0, ROWS)
        mine = (nth < end)[:, None]
        pair = tl.load(order + nth, mask=nth < end, other=0)
        result = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            at = start + tl.arange(0, DEPTH)
            each = tl.load(h + nth[:, None] * HIDDEN + at[None, :], mask=mine, other=0.0)
            result = tl.dot(each, tl.load(own + o[None, :] * HIDDEN + at[:, None]), result, input_precision="ieee")
        tl.store(y + pair[:, None] * WIDTH + o[None, :], result.to(y.dtype.element_ty), mask=mine)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    y, share, x, WIDTH: tl.constexpr, ACTIVE: tl.constexpr, PADDED: tl.constexpr
):
    """Adds the weighted outputs of a row's experts to the residual stream."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, PADDED)
    result = tl.load(x + row * WIDTH + o, mask=o < WIDTH, other=0.0).to(tl.float32)
    for nth in tl.static_range(ACTIVE):
        pair = row * ACTIVE + nth
        result += tl.load(share + pair) * tl.load(y + pair * WIDTH + o, mask=o < WIDTH, other=0.0).to(tl.float32)
    tl.store(x + row * WIDTH + o, result.to(x.dtype.element_ty), mask=o < WIDTH)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    logits, balance, e, EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, BALANCED: tl.constexpr
):
    """The scores of a row's experts, and what they are chosen by."""
    logit = tl.load(logits + e, mask=e < EXPERTS, other=float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)
    choice = tl.where(e < EXPERTS, score, float("-inf"))
    if BALANCED:
        choice += tl.load(balance + e, mask=e < EXPERTS, other=0.0)
    return score, choice


@triton.jit
def _up_few(  # type: ignore[no-untyped-def]
    x,
    logits,
    balance,
    w13,
    h,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVE: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BALANCED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """As `_up`, one pair alone, for which it chooses the expert."""
    pair = tl.program_id(0).to(tl.int64)
    row, e = pair // ACTIVE, tl.arange(0, PADDED)
    _, choice = _scores(logits + row * EXPERTS, balance, e, EXPERTS, SIGMOID, BALANCED)
    best = tl.minimum(tl.argmax(choice, axis=0), EXPERTS - 1)  # also where all is NaN
    for _nth in range(pair % ACTIVE):
        choice = tl.where(e == best, float("-inf"), choice)
        best = tl.minimum(tl.argmax(choice, axis=0), EXPERTS - 1)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    own = w13 + best.to(tl.int64) * 2 * HIDDEN * WIDTH
    gate = tl.zeros([TILE, DEPTH], tl.float32)
    up = tl.zeros([TILE, DEPTH], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        at = start + tl.arange(0, DEPTH)
        each = tl.load(x + row * WIDTH + at).to(tl.float32)[None, :]
        from_ = own + i[:, None] * WIDTH + at[None, :]
        gate += tl.load(from_).to(tl.float32) * each
        up += tl.load(from_ + HIDDEN * WIDTH).to(tl.float32) * each
    gate, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    tl.store(h + pair * HIDDEN + i, (gate / (1.0 + tl.exp(-gate)) * up).to(h.dtype.element_ty))


@triton.jit
def _down_few(  # type: ignore[no-untyped-def]
    h,
    logits,
    balance,
    w2,
    x,
    scale,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVE: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BALANCED: tl.constexpr,
    NORMALISED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """As `_down` and `_sum`, one row alone, for which it chooses the experts."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    score, choice = _scores(logits + row * EXPERTS, balance, e, EXPERTS, SIGMOID, BALANCED)
    o = tl.program_id(1) * TILE + tl.arange(0, TILE)
    result = tl.zeros([TILE], tl.float32)
    shares = 0.0
    for nth in tl.static_range(ACTIVE):
        best = tl.minimum(tl.argmax(choice, axis=0), EXPERTS - 1)
        share = tl.sum(tl.where(e == best, score, 0.0), axis=0)
        choice = tl.where(e == best, float("-inf"), choice)
        shares += share
        pair = row * ACTIVE + nth
        own = w2 + best.to(tl.int64) * WIDTH * HIDDEN
        each = tl.zeros([TILE, DEPTH], tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            at = start + tl.arange(0, DEPTH)
            real = at < HIDDEN
            value = tl.load(h + pair * HIDDEN + at, mask=real, other=0.0).to(tl.float32)
            weight = tl.load(own + o[:, None] * HIDDEN + at[None, :], mask=real[None, :], other=0.0).to(tl.float32)
            each += weight * value[None, :]
        result += share * tl.sum(each, axis=1)
    if NORMALISED:
        result = result / (shares + 1e-20)
    to = x + row * WIDTH + o
    tl.store(to, (tl.load(to).to(tl.float32) + result * scale).to(x.dtype.element_ty))
