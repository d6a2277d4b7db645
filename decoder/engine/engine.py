"""The engine: requests in, tokens out, with continuous batching.

    engine = Engine(decoder, slots=32)
    for completion in engine.generate([Request([1, 2, 3], max_new_tokens=64)]):
        print(completion.ended, completion.ids)

Shapes: P positions of a prompt, D width, H numbers that `decide` is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from secrets import randbits
from typing import Final

from torch import Tensor

from decoder.engine.grammar import Grammar
from decoder.engine.requests import Completion, Plan, Request, Shared
from decoder.engine.rows import AT_END, NOT_FINITE, Decide
from decoder.engine.runner import Record, Runner
from decoder.engine.scheduler import Entry, Scheduler
from decoder.engine.ways import Ways
from decoder.errors import PromptError
from decoder.model import Decoder

MOST_SLOTS: Final = 256  # of one call of `generate`; more prompts wait for a slot
SEEDS_APART: Final = 0x9E3779B1  # prompts of one call draw different tokens


@dataclass(slots=True)
class Team:
    """Who runs, as long as nobody comes, goes or moves."""

    entries: list[tuple[int, Entry]]  # by slot
    slots: int
    changes: int
    longest: int = 0  # positions that the longest needs by the next step, at most
    room: int = -1  # up to where a step costs the same
    sampling: bool = field(init=False)
    forbidding: bool = field(init=False)

    def __post_init__(self) -> None:
        self.sampling = any(entry.plan.request.temperature > 0 for _, entry in self.entries)
        self.forbidding = any(entry.plan.request.forbidden for _, entry in self.entries)


class Engine:
    """Generates with one decoder: any number of requests through `slots` slots of `length` positions each.

    `grammar` binds what is written; `decide` takes the place of greedy choice and sampling, told `hints` numbers of
    each request. On a GPU steps are captured as CUDA graphs (`graphs`) when they are first needed; `compile`, for
    a GPU, fuses their kernels, which takes up to a minute for each size of the batch. Not for use by several threads at
    once.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int = 32,
        length: int | None = None,
        grammar: Grammar | None = None,
        decide: Decide | None = None,
        hints: int = 0,
        graphs: bool = True,
        compile: bool = False,
    ) -> None:
        config = decoder.config
        self.decoder, self.grammar, self.hints = decoder, grammar, hints
        self.length = config.length if length is None else min(length, config.length)
        if slots < 1 or self.length < 1:
            raise ValueError("slots and length must be 1 or above")
        if grammar is not None and grammar.vocabulary != config.vocabulary:
            raise ValueError(f"the grammar has {grammar.vocabulary} tokens, the decoder {config.vocabulary}")
        if compile and decoder.embedding.weight.device.type == "cpu":
            raise ValueError(
                "compile is for a GPU: leave it out on a CPU"
            )  # the grouped products of fp32 do not compile
        self._runner = Runner(decoder, slots, self.length, grammar, decide, hints, graphs=graphs, compile=compile)
        self._scheduler = Scheduler(slots)
        self._ways = Ways() if self._runner.device.type == "cpu" else None
        self._entries: dict[Completion, Entry] = {}
        self._flying: deque[tuple[list[tuple[int, Entry]], Record]] = deque()  # rows of a record, and whose they are
        self._team = Team([], 0, 0)
        self._listeners = 0  # requests that want to hear of their tokens

    # Doors

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions of the requests, in their order. Raises PromptError, before any runs, where one cannot."""
        completions = self._enter(requests)
        try:
            while not all(each.ended for each in completions):
                self.step()
        finally:
            for each in completions:
                self.cancel(each)
        return completions

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Completion, int]]:
        """Each token as it arrives, with the completion that it belongs to; else as `generate`."""
        completions = self._enter(requests)
        mine = set(completions)
        try:
            while not all(each.ended for each in completions):
                yield from ((completion, token) for completion, token in self.step() if completion in mine)
        finally:
            for each in completions:
                self.cancel(each)

    def submit(self, request: Request) -> Completion:
        """Queues a request; `step` works on it. Raises PromptError when it cannot run."""
        return self._enter([request])[0]

    def cancel(self, completion: Completion) -> None:
        """Ends a completion as it is; its slot is free at once. One that has ended stays as it ended."""
        if completion.ended is None:
            completion.ended = "cancelled"
            self._leave(self._entries[completion])

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle

    def step(self) -> list[tuple[Completion, int]]:
        """Goes on by one step; returns the tokens that arrived, which on a GPU are those of the step before."""
        listened, arrived = self._listeners > 0, self._admit()
        if self._ways is not None:  # nothing to wait for: what is known makes the step smaller
            self._collect(0, arrived)
        launched = self._launch()
        self._collect(1 if launched and self._ways is None else 0, arrived)
        for completion, token in arrived if listened else ():
            if completion.request.on_token is not None:
                completion.request.on_token(token)
        return arrived

    def share(self, ids: Sequence[int] = (), *, embeddings_PD: Tensor | None = None) -> Shared:
        """Computes once what several prompts begin with: embeddings, then token ids. See `Request.shared`."""
        count = len(ids) + (0 if embeddings_PD is None else len(embeddings_PD))
        request = Request(ids, embeddings_PD)
        self._check_prompt("what is shared", request, count, 0)
        return self._runner.share(request)

    # Requests

    def _enter(self, requests: Iterable[Request]) -> list[Completion]:
        completions = []
        for plan in [self._plan(f"prompt {number}", request) for number, request in enumerate(requests)]:
            completions.append(completion := Completion(plan.request))
            if plan.rules is not None and plan.rules.ways_S[plan.state] == 0:  # the grammar leaves no choice at all
                completion.ids, completion.ended = plan.head, "eos"
                continue
            self._entries[completion] = entry = Entry(completion, plan)
            self._listeners += plan.request.on_token is not None
            self._scheduler.add(entry)
        return completions

    def _plan(self, name: str, request: Request) -> Plan:
        """Checks a request."""
        if request.temperature < 0 or (request.max_new_tokens is not None and request.max_new_tokens < 1):
            raise ValueError("max_new_tokens must be 1 or above, temperature 0 or above")
        if self.hints != (0 if request.hints_H is None else len(request.hints_H)):
            raise ValueError(f"`decide` is told {self.hints} numbers: set Request.hints_H to so many")
        count = Plan(request, None, [], 0, 0).total
        room = max(1, self.length - count) if request.max_new_tokens is None else request.max_new_tokens
        self._check_prompt(name, request, count, room)
        if self.grammar is None:
            if request.pins:
                raise ValueError("pins are for an engine with a grammar")
            return Plan(request, None, [], 0, room, frozenset(request.eos))
        rules = self.grammar.rules_of(request.forbidden, request.pins)
        if rules.ways_S[0] > room:
            raise PromptError(
                "prompt-too-long", f"{name} leaves {room} tokens; what the grammar asks for takes {rules.ways_S[0]}"
            )
        head, state = [], 0
        while (token := int(rules.only_S[state])) >= 0:
            head.append(token)
            state = self.grammar.walk([token], state)
        return Plan(request, rules, head, state, room, frozenset(request.eos))

    def _check_prompt(self, name: str, request: Request, count: int, left: int) -> None:
        vocabulary, width = self.decoder.config.vocabulary, self.decoder.config.width
        if not count:
            raise PromptError("prompt-empty", f"{name} has no token")
        if count + left > self.length:
            raise PromptError(
                "prompt-too-long",
                f"{name} has {count} positions, and {left} more are for what is written; there is room for "
                f"{self.length}: shorten the prompt or ask for fewer new tokens",
            )
        for tokens in (request.ids, request.eos, request.forbidden):
            for token in (min(tokens), max(tokens)) if tokens else ():
                if not 0 <= token < vocabulary:
                    raise PromptError("token-out-of-vocabulary", f"{name} has token {token} of {vocabulary}")
        if request.embeddings_PD is not None and request.embeddings_PD.shape[1:] != (width,):
            shape = list(request.embeddings_PD.shape)
            raise PromptError("embeddings-shape", f"{name} has embeddings {shape}; expected [positions, {width}]")

    def _leave(self, entry: Entry) -> None:
        """Lets go of an entry that has ended."""
        del self._entries[entry.completion]
        self._listeners -= entry.plan.request.on_token is not None
        if entry.slot >= 0:
            self._scheduler.release(entry)
            self._runner.clear(entry.slot)

    # Steps

    def _admit(self) -> list[tuple[Completion, int]]:
        """Fills free slots from the queue; returns the tokens that no decision is needed for."""
        entries = self._scheduler.admit()
        if not entries:
            return []
        for group, record in self._runner.prefill([e.slot for e in entries], [e.plan for e in entries]):
            self._flying.append(([(row, entries[i]) for row, i in enumerate(group)], record))
        for entry in entries:
            entry.completion.ids.extend(entry.plan.head)
        return [(entry.completion, token) for entry in entries for token in entry.plan.head]

    def _launch(self) -> bool:
        """One more choice for all that run; whether any of them wants one."""
        running, ahead, width = self._scheduler.running, len(self._flying), self._runner.width
        if not any(len(e.completion.ids) + ahead < e.plan.room for e in running.values()):
            return False
        if self._team.changes != self._scheduler.changes:
            if moves := self._scheduler.moves():
                self._runner.move(moves)
            self._team = Team(list(running.items()), self._scheduler.reach, self._scheduler.changes)
        team = self._team
        # What was written goes through the decoder now, also what has not arrived yet.
        team.longest += width
        if team.longest > team.room:
            written = max(e.plan.total + len(e.completion.ids) - len(e.plan.head) for e in running.values())
            team.longest = min(self.length, written + (ahead + 1) * width)
            team.room = self._runner.bucket(team.slots, team.longest)[1]
        run = max(entry.pending for entry in running.values()) if self._ways else width
        with self._ways.of(team.slots * run) if self._ways else nullcontext():
            record = self._runner.step(
                team.slots, team.longest, run=run, sampling=team.sampling, forbidding=team.forbidding
            )
        self._flying.append((team.entries, record))
        return True

    def _collect(self, ahead: int, arrived: list[tuple[Completion, int]]) -> None:
        """Adds the tokens of all records but the last `ahead` to their completions, and to `arrived`."""
        while len(self._flying) > ahead:
            entries, record = self._flying.popleft()
            told = record.read()
            for row, entry in entries:
                completion = entry.completion
                if completion.ended is not None:
                    continue
                flags = told[row][0]
                count = flags & (NOT_FINITE - 1)
                if count:
                    entry.pending = count
                    completion.decisions += 1
                    for token in told[row][1 : count + 1]:
                        completion.ids.append(token)
                        arrived.append((completion, token))
                        if token in entry.plan.eos:
                            completion.ended = "eos"
                            break
                if flags >= NOT_FINITE or len(completion.ids) >= entry.plan.room or completion.ended is not None:
                    self._end(entry, flags)

    def _end(self, entry: Entry, flags: int) -> None:
        """Ends a completion for the reason that is there."""
        if entry.completion.ended is None:
            entry.completion.ended = "not-finite" if flags & NOT_FINITE else "eos" if flags & AT_END else "length"
        self._leave(entry)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    eos: Collection[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prefix_BPD: Tensor | None = None,
) -> list[Completion]:
    """Writes up to `max_new_tokens` after each prompt, with an engine for this call alone.

    `temperature` 0 is greedy; above it tokens are drawn, the same ones for one `seed`. `eos` ends a completion: None
    means the model's own tokens, () none. `on_token(prompt, id)` hears of each token. `prefix_BPD` goes ahead of the
    prompts: embeddings, such as what a bridge reads from a picture.
    Raises PromptError before anything is computed. A prompt whose logits are not finite ends; the others go on.
    """
    if prefix_BPD is not None and len(prefix_BPD) != len(prompts):
        raise ValueError(f"prefix_BPD is for {len(prefix_BPD)} prompts; there are {len(prompts)}")
    seed = randbits(32) if seed is None else seed
    requests = [
        Request(
            ids,
            None if prefix_BPD is None else prefix_BPD[number],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + number * SEEDS_APART,
            eos=decoder.config.end_tokens if eos is None else eos,
            on_token=None if on_token is None else partial(on_token, number),
        )
        for number, ids in enumerate(prompts)
    ]
    for number, request in enumerate(requests):
        if not request.ids:
            raise PromptError("prompt-empty", f"prompt {number} has no token")
    if not requests:
        return []
    longest = max(map(len, prompts)) + (0 if prefix_BPD is None else prefix_BPD.shape[1])
    slots = min(len(requests), MOST_SLOTS)
    return Engine(decoder, slots=slots, length=longest + max_new_tokens).generate(requests)
