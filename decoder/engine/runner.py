"""Runs the decoder for the slots: prompts into the cache, steps for all slots at once, tokens back to the host.

It knows no queue. On a GPU a step is a CUDA graph, one for each number of slots and length of the cache that is asked
for, and what it chose is copied to the host while the next step runs.
Shapes: as in `decoder.engine.rows`; T prompt positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decoder.cache import Cache
from decoder.engine import lean
from decoder.engine.grammar import Grammar
from decoder.engine.pages import settle
from decoder.engine.requests import Plan, Request, Shared
from decoder.engine.rows import Decide, DeviceGrammar, Rows, advance, pack
from decoder.model import Decoder

RUN = 4  # tokens of a step under a grammar: the one that was chosen, and up to three that it forces
LEAST_LENGTH = 256  # of the part of the cache that a step looks at
PROMPT_TOKENS = 1 << 14  # that go through the decoder together
PADDING = 1.25  # times their tokens that prompts of different lengths may fill together


@dataclass(frozen=True, slots=True)
class Record:
    """What prompts or a step gave, on its way to the host: `[B, 1 + W]`, flags and tokens."""

    host_BR: Tensor
    rows: int
    arrived: torch.cuda.Event | None
    spare: list[Tensor]  # pinned memory that nobody uses

    def read(self) -> list[list[int]]:
        """Waits for it; once."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.spare.append(self.host_BR)
        return self.host_BR[: self.rows].tolist()


class Runner:
    """`slots` sequences of up to `length` positions."""

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        length: int,
        grammar: Grammar | None,
        decide: Decide | None,
        hints: int,
        *,
        graphs: bool,
        compile: bool,
    ) -> None:
        self.decoder, self.decide = decoder, decide
        weight = decoder.embedding.weight
        self.device, self.graphs = weight.device, graphs and weight.is_cuda
        self.cache = decoder.new_cache(slots, length)
        self.grammar = DeviceGrammar.of(grammar, self.device) if grammar else None
        self.width = RUN if grammar else 1
        states = len(grammar.next_SC) if grammar else 0
        self.rows = Rows.zeros(slots, decoder.config.vocabulary, self.width, states, hints, self.device)
        self.hidden: Callable[..., Tensor] = decoder.hidden
        if compile:
            self.hidden = torch.compile(decoder.hidden, dynamic=False)
        elif weight.is_cuda:
            from decoder.engine import fused  # Triton, which comes with torch where there is a GPU

            self.hidden = fused.Fused(decoder).hidden if fused.fits(decoder) else decoder.hidden
        elif weight.dtype == torch.float32 and lean.fits(decoder):
            self.hidden = lean.Lean(decoder).hidden
        if weight.device.type == "cpu":
            settle(decoder)
        self._views: dict[tuple[int, int], tuple[Rows, Cache]] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        # Without one torch captures on a stream that all of the process shares, of the GPU that captured first.
        self._capturing = torch.cuda.Stream(self.device) if self.graphs else None
        self._spare: list[Tensor] = []

    # Prompts

    @torch.inference_mode()
    def share(self, request: Request) -> Shared:
        """Computes what prompts begin with."""
        plan = Plan(request, None, [], 0, 0)
        cache = self.decoder.new_cache(1, plan.count)
        self.decoder.hidden(self._embeddings([plan], plan.count), cache)
        return Shared(cache, plan.count)

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], plans: Sequence[Plan]) -> list[tuple[list[int], Record]]:
        """Puts prompts into slots and chooses the first token of each; which of them each record is of."""
        return [
            (group, self._prefill([slots[i] for i in group], [plans[i] for i in group]))
            for group in self._groups(plans)
        ]

    def _groups(self, plans: Sequence[Plan]) -> list[list[int]]:
        """Prompts that go through the decoder together: with one beginning, and of about one length."""
        order = sorted(range(len(plans)), key=lambda i: (id(plans[i].request.shared), plans[i].count))
        groups: list[list[int]] = []
        real = 0
        for i in order:
            count = plans[i].count
            group = groups[-1] if groups else []
            padded = count * (len(group) + 1)
            if (
                not group
                or plans[group[0]].request.shared is not plans[i].request.shared
                or padded > PADDING * (real + count)
                or padded > PROMPT_TOKENS
            ):
                groups.append([i])
                real = count
            else:
                group.append(i)
                real += count
        return groups

    def _prefill(self, slots: list[int], plans: list[Plan]) -> Record:
        shared, counts = plans[0].request.shared, [plan.count for plan in plans]
        longest, before = max(counts), shared.length if shared else 0
        x_BTD = self._embeddings(plans, longest)
        cache = self.decoder.new_cache(len(plans), before + longest)
        if shared:
            cache.put(torch.arange(len(plans), device=self.device), shared.cache)
        counts_B = self._tensor(counts, torch.long)
        x_BTD = self.decoder.hidden(x_BTD, cache, None if min(counts) == longest else counts_B)
        last_BD = x_BTD[torch.arange(len(plans), device=self.device), counts_B - 1]
        rows, slots_B = self._new_rows(plans), self._tensor(slots, torch.long)
        self._advance(
            rows,
            cache.used_B,
            self.decoder.logits(last_BD),
            sampling=any(plan.request.temperature > 0 for plan in plans),
            forbidding=any(plan.request.forbidden for plan in plans),
        )
        self.cache.put(slots_B, cache)
        self.rows.put(slots_B, rows)
        return self._record(rows)

    def _embeddings(self, plans: list[Plan], longest: int) -> Tensor:
        """`[B, T, D]`; shorter ones repeat their last position behind it."""
        ids_BT = torch.zeros(len(plans), longest, dtype=torch.long)
        for row, plan in enumerate(plans):
            ids_BT[row, plan.count - len(plan.ids) : plan.count] = torch.tensor(plan.ids, dtype=torch.long)
        x_BTD = self.decoder.embed(ids_BT.to(self.device))
        for row, plan in enumerate(plans):
            if plan.request.embeddings_PD is not None:
                x_BTD[row, : plan.count - len(plan.ids)] = plan.request.embeddings_PD.to(x_BTD)
            if plan.count < longest:
                # Attention multiplies what it must not see by 0: a token that gives NaN would survive that.
                x_BTD[row, plan.count :] = x_BTD[row, plan.count - 1]
        return x_BTD

    def _new_rows(self, plans: list[Plan]) -> Rows:
        """The rows of slots that begin."""
        words, states, hints = (t.shape[1] for t in (self.rows.forbidden_BX, self.rows.only_BS, self.rows.hints_BH))
        rules = [plan.rules for plan in plans]
        forbidden = [_forbidden(plan, self.decoder.config.vocabulary) for plan in plans]
        new = Rows.zeros(len(plans), self.decoder.config.vocabulary, self.width, states, hints, self.device)
        return Rows(
            tokens_BW=new.tokens_BW,
            count_B=new.count_B,
            record_BR=new.record_BR,
            left_B=self._tensor([plan.room - len(plan.head) for plan in plans], torch.int32),
            temperature_B=self._tensor([plan.request.temperature for plan in plans], torch.float32),
            seed_B=self._tensor([_signed(plan.request.seed) for plan in plans], torch.int32),
            forbidden_BX=self._tensor(np.stack([pack(each, words) for each in forbidden]), torch.int32),
            state_B=self._tensor([plan.state for plan in plans], torch.int32),
            only_BS=self._tensor(np.stack([r.only_S for r in rules if r]), torch.int32) if states else new.only_BS,
            ways_BS=self._tensor(np.stack([r.ways_S for r in rules if r]), torch.int32) if states else new.ways_BS,
            hints_BH=torch.stack([p.request.hints_H for p in plans if p.request.hints_H is not None]).to(new.hints_BH)
            if hints
            else new.hints_BH,
        )

    # Steps

    @torch.inference_mode()
    def step(self, slots: int, length: int, *, run: int, sampling: bool, forbidding: bool) -> Record:
        """One more choice for each of the first `slots` slots, none of which needs more than `length` positions.

        `run` says how many tokens at most await a forward in one slot, where the host knows.
        """
        slots, length = self.bucket(slots, length)
        key = slots, length
        if key not in self._views:
            self._views[key] = self.rows.first(slots), self.cache.view(slots, length)
        rows, cache = self._views[key]
        if not self.graphs:
            self._step(rows, cache, run, sampling=sampling, forbidding=forbidding)
        elif key not in self._graphs:
            # The first time as it is, which loads and tunes what the graph will need; the second time it is captured.
            self._step(rows, cache, self.width)
            self._graphs[key] = None
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing):
                    self._step(rows, cache, self.width)
            graph.replay()
        return self._record(rows)

    def bucket(self, slots: int, length: int) -> tuple[int, int]:
        """The smallest part of the cache with a graph of its own that has so many slots and positions."""
        if self.device.type == "cpu":
            return slots, self.cache.length
        slots = min(self.cache.slots, 1 << (slots - 1).bit_length())
        # One place of a power of two stays for what does not count.
        length = max(LEAST_LENGTH, 1 << length.bit_length()) - 1
        return slots, min(self.cache.length, length)

    def _step(self, rows: Rows, cache: Cache, run: int, *, sampling: bool = True, forbidding: bool = True) -> None:
        x_BWD = self.decoder.embed(rows.tokens_BW[:, :run])
        if run == 1:
            last_BD = self.hidden(x_BWD, cache)[:, 0]
        else:
            x_BWD = self.hidden(x_BWD, cache, rows.count_B)
            last_BD = x_BWD.gather(1, (rows.count_B - 1)[:, None, None].expand(-1, 1, x_BWD.shape[2]))[:, 0]
        self._advance(rows, cache.used_B, self.decoder.logits(last_BD), sampling=sampling, forbidding=forbidding)

    def _advance(self, rows: Rows, used_B: Tensor, logits_BV: Tensor, *, sampling: bool, forbidding: bool) -> None:
        if self.device.type == "cuda" and self.decide is None:
            from decoder.engine import kernels  # Triton, which comes with torch where there is a GPU

            kernels.advance(rows, used_B, logits_BV, self.grammar)
        else:
            advance(rows, used_B, logits_BV, self.grammar, self.decide, sampling=sampling, forbidding=forbidding)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Moves slots (from, to)."""
        sources, targets = (self._tensor([move[i] for move in moves], torch.long) for i in (0, 1))
        self.cache.move(sources, targets)
        self.rows.put(targets, self.rows.take(sources))

    def clear(self, slot: int) -> None:
        """Leaves a slot with nothing to write. On a GPU steps take as long without that."""
        if self.device.type == "cpu":
            self.rows.left_B[slot] = 0
            self.cache.used_B[slot] = 0

    # Between host and device

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _record(self, rows: Rows) -> Record:
        count = len(rows.record_BR)
        if self.device.type != "cuda":
            return Record(rows.record_BR.clone(), count, None, self._spare)
        host_BR = self._spare.pop() if self._spare else torch.empty_like(self.rows.record_BR, device="cpu").pin_memory()
        host_BR[:count].copy_(rows.record_BR, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Record(host_BR, count, arrived, self._spare)


def _forbidden(plan: Plan, vocabulary: int) -> np.ndarray | None:
    if plan.rules is not None:
        return plan.rules.forbidden_V
    if not plan.request.forbidden:
        return None
    forbidden_V = np.zeros(vocabulary, bool)
    forbidden_V[list(plan.request.forbidden)] = True
    return forbidden_V


def _signed(seed: int) -> int:
    """The lowest 32 bits as a signed number."""
    return (seed + (1 << 31)) % (1 << 32) - (1 << 31)
