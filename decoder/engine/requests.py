"""What is asked of the engine, and what comes back.

Shapes: P positions of a prompt, D width, H numbers that `decide` is told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from decoder.cache import Cache
from decoder.engine.grammar import Rules

Ended = Literal["eos", "length", "cancelled", "not-finite"]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """The beginning that several prompts have in common, computed once by `Engine.share`."""

    cache: Cache  # of one slot
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt and how to go on from it: what is shared, then embeddings, then token ids."""

    ids: Sequence[int] = ()
    embeddings_PD: Tensor | None = None  # such as what a bridge reads from a picture
    shared: Shared | None = None
    max_new_tokens: int | None = None  # None: as many as fit
    temperature: float = 0.0  # 0: the likeliest token
    seed: int = 0  # the same seed draws the same tokens, whatever else is in the batch
    eos: Collection[int] = ()  # tokens that end the completion
    forbidden: Collection[int] = ()  # tokens that are never written
    pins: Mapping[int, int] = field(
        default_factory=dict
    )  # states of the grammar, each with the one token it is left with
    hints_H: Tensor | None = None  # what the engine's `decide` is told of this request
    on_token: Callable[[int], None] | None = None  # hears of each token as it comes


@dataclass(slots=True, eq=False)
class Completion:
    """What is written after one prompt; it grows while the engine works, and `ended` says that and why it is done.

    `eos`: an end token, or the grammar's end. `not-finite`: its logits had NaN or infinity.
    """

    request: Request
    ids: list[int] = field(default_factory=list)  # without the prompt, with the token that ended it
    ended: Ended | None = None
    decisions: int = 0  # forwards that chose a token; the grammar forced the others


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request that was checked, with what follows from it."""

    request: Request
    rules: Rules | None
    head: list[int]  # tokens that the grammar forces at the start
    state: int  # of the grammar behind them
    room: int  # tokens that may be written in all
    eos: frozenset[int] = frozenset()

    @property
    def ids(self) -> list[int]:
        """What goes through the decoder behind the embeddings."""
        return [*self.request.ids, *self.head]

    @property
    def count(self) -> int:
        """Positions to compute: those that are shared are not."""
        embeddings_PD = self.request.embeddings_PD
        return len(self.request.ids) + len(self.head) + (0 if embeddings_PD is None else len(embeddings_PD))

    @property
    def total(self) -> int:
        """Positions up to where the first choice goes."""
        return self.count + (self.request.shared.length if self.request.shared else 0)
