"""`decoder.engine.rows.advance` as two Triton kernels: one reads the logits once, one moves every slot on.

Shapes as there; K parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoder.engine.rows import AT_END, NOT_FINITE, DeviceGrammar, Rows

BLOCK = 1024  # tokens that a program looks at together
PROGRAMS = 1056  # enough to keep a large GPU busy
PARTS = 64  # of a row at most


def advance(rows: Rows, used_B: Tensor, logits_BV: Tensor, grammar: DeviceGrammar | None) -> None:
    """The same as `decoder.engine.rows.advance` without `decide`."""
    batch, vocabulary = logits_BV.shape
    parts = max(1, min(triton.cdiv(vocabulary, BLOCK), PROGRAMS // batch, PARTS))
    length = triton.cdiv(triton.cdiv(vocabulary, parts), BLOCK) * BLOCK  # of a part
    parts = triton.cdiv(vocabulary, length)
    best_BK = torch.empty(batch, parts, dtype=torch.float32, device=logits_BV.device)
    token_BK = torch.empty(batch, parts, dtype=torch.int32, device=logits_BV.device)
    finite_BK = torch.empty_like(token_BK)
    # Without a grammar any tensor stands for its tables: they are not read.
    next_SC, class_V = (grammar.next_SC, grammar.class_V) if grammar else (rows.left_B, rows.left_B)
    classes, states = next_SC.shape[-1], rows.ways_BS.shape[1]
    _race[(batch, parts)](
        logits_BV,
        logits_BV.stride(0),
        vocabulary,
        rows.left_B,
        used_B,
        rows.temperature_B,
        rows.seed_B,
        rows.forbidden_BX,
        rows.forbidden_BX.stride(0),
        rows.state_B,
        next_SC,
        classes,
        class_V,
        rows.ways_BS,
        states,
        best_BK,
        token_BK,
        finite_BK,
        length,
        GRAMMAR=grammar is not None,
        BLOCK=BLOCK,
    )
    _move[(batch,)](
        best_BK,
        token_BK,
        finite_BK,
        parts,
        rows.left_B,
        used_B,
        rows.tokens_BW,
        rows.count_B,
        rows.record_BR,
        rows.state_B,
        next_SC,
        classes,
        class_V,
        rows.only_BS,
        rows.ways_BS,
        states,
        GRAMMAR=grammar is not None,
        WIDTH=rows.tokens_BW.shape[1],
        PARTS=PARTS,
        NOT_FINITE=NOT_FINITE,
        AT_END=AT_END,
        num_warps=1,
    )


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["length"])
def _race(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    vocabulary,
    left,
    used,
    temperature,
    seed,
    forbidden,
    forbidden_stride,
    state,
    next_states,
    classes,
    class_of,
    ways,
    states,
    best_out,
    token_out,
    finite_out,
    length,
    GRAMMAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of what is allowed in one part of a row, and whether all logits there are finite."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best, finite = tl.full((), float("-inf"), tl.float32), tl.full((), 1, tl.int32)
    chosen = part * length
    room = tl.load(left + row)
    if room > 0:
        heat = tl.load(temperature + row)
        position = tl.load(used + row).to(tl.uint32)
        key = _mix(tl.load(seed + row).to(tl.uint32, bitcast=True) ^ _mix(position))
        here = tl.load(state + row)
        for start in range(part * length, (part + 1) * length, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < vocabulary
            score = tl.load(logits + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
            finite = tl.minimum(finite, tl.min((tl.abs(score) < float("inf")).to(tl.int32), axis=0))
            word = tl.load(forbidden + row * forbidden_stride + token // 32, mask=inside, other=-1)
            may = (word >> (token % 32)) & 1 == 0
            if GRAMMAR:
                kind = tl.load(class_of + token, mask=inside, other=0)
                target = tl.load(next_states + here * classes + kind)
                way = tl.load(ways + row * states + tl.maximum(target, 0))
                may = may & (target >= 0) & (way < room)
            if heat > 0:
                bits = _mix(_mix((token.to(tl.uint32) * 0x9E3779B1) ^ key))
                uniform = ((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
                uniform = tl.minimum(uniform, 0.99999994)
                # log1p by what rounding lost in 1 - x: exact where x is small
                rest = 1.0 - uniform
                clock = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / (1.0 - rest)))
                score = score - heat * tl.log(clock)
            score = tl.where(may, score, float("-inf"))
            top = tl.max(score, axis=0)
            if top > best:
                best = top
                chosen = start + tl.argmax(score, axis=0)
    at = row * tl.num_programs(1) + part
    tl.store(best_out + at, best)
    tl.store(token_out + at, chosen)
    tl.store(finite_out + at, finite)


@triton.jit(do_not_specialize=["parts"])
def _move(  # type: ignore[no-untyped-def]
    best,
    token_of,
    finite_of,
    parts,
    left,
    used,
    tokens,
    count_out,
    record,
    state,
    next_states,
    classes,
    class_of,
    only,
    ways,
    states,
    GRAMMAR: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    AT_END: tl.constexpr,
):
    """The chosen token of one slot, the forced ones behind it, and what is left."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    score = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    finite = tl.min(tl.load(finite_of + row * parts + part, mask=part < parts, other=1), axis=0)
    token = tl.load(token_of + row * parts + tl.argmax(score, axis=0))
    room = tl.load(left + row)
    going = (finite == 1) & (room > 0)
    token = tl.where(going, token, 0)
    out, told = tokens + row * WIDTH, record + row * (WIDTH + 1)
    tl.store(out, token.to(tl.int64))
    tl.store(told + 1, token)
    count = tl.full((), 1, tl.int32)
    ended = finite < 0  # never
    if GRAMMAR:
        here = tl.load(state + row)
        here = tl.maximum(tl.load(next_states + here * classes + tl.load(class_of + token)), 0)
        forcing = going
        for w in tl.static_range(1, WIDTH):
            single = tl.load(only + row * states + here)
            forcing = forcing & (single >= 0)
            token = tl.where(forcing, single, 0)
            tl.store(out + w, token.to(tl.int64))
            tl.store(told + 1 + w, token)
            after = tl.maximum(tl.load(next_states + here * classes + tl.load(class_of + token)), 0)
            here = tl.where(forcing, after, here)
            count += forcing.to(tl.int32)
        ended = going & (tl.load(ways + row * states + here) == 0)
        tl.store(state + row, tl.where(going, here, 0))
    rest = tl.where(going & (ended == 0), room - count, 0)
    tl.store(count_out + row, count.to(tl.int64))
    tl.store(left + row, rest)
    flags = tl.where(going, count, 0) + tl.where(finite == 1, 0, NOT_FINITE) + tl.where(ended, AT_END, 0)
    tl.store(told, flags)
    if rest == 0:
        tl.store(used + row, tl.zeros((), tl.int64))
