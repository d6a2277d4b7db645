"""The state of the slots on the device, and the step from logits to the next tokens in plain torch.

`advance` is the reference; on a GPU `decoder.engine.kernels` does the same in two kernels.
Shapes: B slots, V tokens, S states and C classes of the grammar, W tokens of a step (one that is chosen and the forced
ones behind it), X words of 32 tokens, H numbers that `decide` is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from torch import Tensor

from decoder.engine.grammar import Grammar

# Log-probabilities over what is allowed [B, V], -inf elsewhere, and hints [B, H] -> chosen tokens [B]. Tensors only: no
# look from the host, so that it can be a part of a CUDA graph.
Decide = Callable[[Tensor, Tensor], Tensor]

WIDE: Final = 1 << 13  # tokens from which on a CPU looks at those that are allowed, instead of masking the others
NOT_FINITE: Final = 1 << 8  # flags of a record, above its count of tokens
AT_END: Final = 1 << 9


@dataclass(frozen=True, slots=True)
class DeviceGrammar:
    """The automaton's tables on the device."""

    next_SC: Tensor  # int32
    class_V: Tensor  # int32
    members: tuple[Tensor, ...] = ()  # the tokens of each class, of a wide vocabulary on a CPU

    @classmethod
    def of(cls, grammar: Grammar, device: torch.device) -> DeviceGrammar:
        """Copies the tables."""
        next_SC, class_V = torch.from_numpy(grammar.next_SC).to(device), torch.from_numpy(grammar.class_V).to(device)
        if device.type != "cpu" or len(class_V) < WIDE:
            return cls(next_SC, class_V)
        sizes_C = torch.bincount(class_V, minlength=next_SC.shape[1])
        return cls(next_SC, class_V, class_V.argsort(stable=True).split(sizes_C.tolist()))


@dataclass(frozen=True, slots=True)
class Rows:
    """What the step knows of each slot; `left_B` 0 is a slot that has nothing to write."""

    tokens_BW: Tensor  # long: what goes into the next forward
    count_B: Tensor  # long: how many of them, 1 to W
    left_B: Tensor  # int32: tokens that may still be written
    record_BR: Tensor  # int32: flags and count of what was written last, and the tokens
    temperature_B: Tensor  # fp32
    seed_B: Tensor  # int32
    forbidden_BX: Tensor  # int32: a bit a token
    state_B: Tensor  # int32; this and the next two are of width 0 without a grammar
    only_BS: Tensor  # int32: the rules' `only_S`
    ways_BS: Tensor  # int32: the rules' `ways_S`
    hints_BH: Tensor  # fp32

    @classmethod
    def zeros(cls, slots: int, vocabulary: int, width: int, states: int, hints: int, device: torch.device) -> Rows:
        """Idle slots."""

        def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        return cls(
            tokens_BW=make(width, dtype=torch.long),
            count_B=make(dtype=torch.long) + 1,
            left_B=make(),
            record_BR=make(1 + width),
            temperature_B=make(dtype=torch.float32),
            seed_B=make(),
            forbidden_BX=make(-(-vocabulary // 32)),
            state_B=make(),
            only_BS=make(states),
            ways_BS=make(states),
            hints_BH=make(hints, dtype=torch.float32),
        )

    def first(self, count: int) -> Rows:
        """Views of the first slots."""
        return Rows(*(getattr(self, each.name)[:count] for each in fields(self)))

    def take(self, slots: Tensor) -> Rows:
        """Copies of some slots."""
        return Rows(*(getattr(self, each.name)[slots] for each in fields(self)))

    def put(self, slots: Tensor, other: Rows) -> None:
        """Writes rows of another one into some slots."""
        for each in fields(self):
            getattr(self, each.name)[slots] = getattr(other, each.name)


def pack(forbidden_V: np.ndarray | None, words: int) -> np.ndarray:
    """Forbidden tokens as bits, `[X]` int32, the first token in the lowest bit."""
    if forbidden_V is None:
        return np.zeros(words, np.int32)
    return np.packbits(np.pad(forbidden_V, (0, 32 * words - len(forbidden_V))), bitorder="little").view(np.int32)


def mix(x: Tensor) -> Tensor:
    """Scrambles 32 bits held in int64: the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel(seed_B: Tensor, position_B: Tensor, vocabulary: int) -> Tensor:
    """Noise `[B, V]` of a seed and the position that the token goes to: no generator, no state, no neighbours.

    The likeliest token after adding it is the first of exponential clocks that run as fast as tokens are likely.
    """
    key_B = mix((seed_B.long() & 0xFFFFFFFF) ^ mix(position_B))
    token_V = torch.arange(vocabulary, device=seed_B.device) * 0x9E3779B1 & 0xFFFFFFFF
    bits_BV = mix(mix(token_V ^ key_B[:, None]))
    # In the open interval: the clock that counts is the one that runs first, near 0, where fp32 is finest.
    uniform_BV = (((bits_BV >> 8).float() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_BV))


def _classes(rows: Rows, grammar: DeviceGrammar) -> Tensor:
    """Which classes may come next, `[B, C]`. They leave enough of the budget to get to an end."""
    next_BC = grammar.next_SC[rows.state_B]
    ways_BC = rows.ways_BS.gather(1, next_BC.clamp(min=0).long())
    return (next_BC >= 0) & (ways_BC < rows.left_B[:, None])


def _likeliest(rows: Rows, grammar: DeviceGrammar, logits_BV: Tensor) -> Tensor | None:
    """The likeliest token of each row among the members of classes that may come; None where these are many."""
    listed = [[grammar.members[c] for c in may_C.nonzero()[:, 0].tolist()] for may_C in _classes(rows, grammar)]
    if 4 * sum(len(members) for each in listed for members in each) > logits_BV.numel():
        return None
    token_B = torch.zeros(len(listed), dtype=torch.long)
    for row, each in enumerate(listed):
        tokens = torch.cat(each) if each else grammar.members[0][:0]
        tokens = tokens[(rows.forbidden_BX[row, tokens >> 5] >> (tokens & 31)) & 1 == 0]
        if len(tokens):
            token_B[row] = tokens[logits_BV[row, tokens].argmax()]
    return token_B


def allowed(rows: Rows, grammar: DeviceGrammar | None, vocabulary: int, *, forbidding: bool) -> Tensor | None:
    """Which tokens may come next, `[B, V]`; None: all."""
    allowed_BV = None
    if grammar is not None:
        allowed_BV = _classes(rows, grammar)[:, grammar.class_V]
    if forbidding:
        token_V = torch.arange(vocabulary, device=rows.state_B.device)
        free_BV = (rows.forbidden_BX[:, token_V >> 5] >> (token_V & 31)) & 1 == 0
        allowed_BV = free_BV if allowed_BV is None else allowed_BV & free_BV
    return allowed_BV


def advance(
    rows: Rows,
    used_B: Tensor,
    logits_BV: Tensor,
    grammar: DeviceGrammar | None,
    decide: Decide | None = None,
    *,
    sampling: bool = True,
    forbidding: bool = True,
) -> None:
    """Chooses a token for each slot, appends what the grammar forces behind it, and records both; all in place.

    `used_B`, the cache's, goes to 0 in slots that have nothing to write. `sampling` and `forbidding` say that some slot
    does that.
    """
    logits_BV = logits_BV.float()
    finite_B = logits_BV.isfinite().all(-1)
    token_B = None
    if grammar is not None and grammar.members and decide is None and not sampling:
        token_B = _likeliest(rows, grammar, logits_BV)
    if token_B is None:
        allowed_BV = allowed(rows, grammar, logits_BV.shape[1], forbidding=forbidding)
        masked_BV = logits_BV if allowed_BV is None else torch.where(allowed_BV, logits_BV, float("-inf"))
        if decide is not None:
            token_B = decide(masked_BV.log_softmax(-1), rows.hints_BH)
        else:
            if sampling:
                noise_BV = gumbel(rows.seed_B, used_B, logits_BV.shape[1])
                masked_BV = torch.addcmul(masked_BV, rows.temperature_B[:, None], noise_BV)
            token_B = masked_BV.argmax(-1)

    going_B = finite_B & (rows.left_B > 0)
    chosen = [torch.where(going_B, token_B, 0)]
    count_B, end_B = torch.ones_like(rows.count_B), torch.zeros_like(going_B)
    if grammar is not None:
        state_B = after(grammar, rows.state_B, chosen[0])
        for _ in range(rows.tokens_BW.shape[1] - 1):
            only_B = rows.only_BS.gather(1, state_B[:, None].long())[:, 0]
            forced_B = going_B & (only_B >= 0) & (count_B == len(chosen))
            chosen.append(torch.where(forced_B, only_B, 0).long())
            count_B += forced_B
            state_B = torch.where(forced_B, after(grammar, state_B, chosen[-1]), state_B)
        end_B = rows.ways_BS.gather(1, state_B[:, None].long())[:, 0] == 0
        rows.state_B.copy_(torch.where(going_B, state_B, 0))
    rows.tokens_BW.copy_(torch.stack(chosen, 1))
    rows.count_B.copy_(count_B)
    rows.left_B.copy_(torch.where(going_B & ~end_B, rows.left_B - count_B, 0))
    flags_B = count_B * going_B + NOT_FINITE * ~finite_B + AT_END * (end_B & going_B)
    rows.record_BR.copy_(torch.cat((flags_B[:, None], rows.tokens_BW), 1))
    used_B.mul_(rows.left_B > 0)


def after(grammar: DeviceGrammar, state_B: Tensor, token_B: Tensor) -> Tensor:
    """The states after the tokens; 0 for tokens that are not allowed, which only idle slots have."""
    return grammar.next_SC[state_B, grammar.class_V[token_B]].clamp(min=0)
