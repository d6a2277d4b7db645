"""A grammar as a token automaton, and what one request may write by it.

Tokens that lead to the same states everywhere form a class, so that tables have a column for each class and not for
each token of the vocabulary. A state that allows nothing is an end.
Shapes: S states, V tokens, C classes, N transitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from decoder.errors import PromptError

FAR = np.iinfo(np.int32).max // 2  # no way to an end


@dataclass(frozen=True, slots=True)
class Rules:
    """What one request may write: the grammar less its forbidden tokens and all that leads to no end."""

    forbidden_V: np.ndarray | None  # bool
    only_S: np.ndarray  # int32: the token of a state that leaves no choice, -1 of others
    ways_S: np.ndarray  # int32: tokens to the nearest end, FAR where there is none


class Grammar:
    """An automaton that starts in state 0: `next_SC[state, class_V[token]]` is the next state, -1 where not allowed."""

    def __init__(self, next_SC: np.ndarray, class_V: np.ndarray) -> None:
        states, classes = next_SC.shape
        if next_SC.min(initial=-1) < -1 or next_SC.max(initial=-1) >= states:
            raise ValueError(f"a grammar of {states} states names states from {next_SC.min()} to {next_SC.max()}")
        if class_V.min() < 0 or class_V.max() >= classes:
            raise ValueError(f"tokens have classes from {class_V.min()} to {class_V.max()}; the table has {classes}")
        self.next_SC, self.class_V = np.ascontiguousarray(next_SC, np.int32), np.ascontiguousarray(class_V, np.int32)
        self._sizes_C = np.bincount(self.class_V, minlength=classes)
        self._source_N, self._class_N = np.nonzero((self.next_SC >= 0) & (self._sizes_C > 0))
        self._target_N = self.next_SC[self._source_N, self._class_N]
        self._sources, self._starts = np.unique(self._source_N, return_index=True)
        self.rules = lru_cache(maxsize=256)(self._rules)

    @classmethod
    def from_table(cls, table_SV: np.ndarray) -> Grammar:
        """From `[S, V]`: the state after a token, -1 where it is not allowed."""
        # Columns are compared by a hash of theirs, then the classes that this gave with the table itself.
        factors = np.random.default_rng(0).integers(1, 2**62, len(table_SV), dtype=np.int64)
        hashes_V = (table_SV.astype(np.int64) * factors[:, None]).sum(0)
        _, first_C, class_V = np.unique(hashes_V, return_index=True, return_inverse=True)
        grammar = cls(table_SV[:, first_C], class_V)
        assert np.array_equal(grammar.next_SC[:, grammar.class_V], table_SV)
        return grammar

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(self.class_V)

    def _rules(self, forbidden: frozenset[int] = frozenset(), pins: tuple[tuple[int, int], ...] = ()) -> Rules:
        """The rules of a request; `pins` are pairs of a state and the one token that it is left with.

        Raises PromptError where no way leads from the start to an end.
        """
        sizes_C, forbidden_V = self._sizes_C, None
        if forbidden:
            forbidden_V = np.zeros(self.vocabulary, bool)
            forbidden_V[list(forbidden)] = True
            sizes_C = sizes_C - np.bincount(self.class_V[forbidden_V], minlength=len(sizes_C))
        alive_N = sizes_C[self._class_N] > 0
        for state, token in pins:
            alive_N[(self._source_N == state) & (self._class_N != self.class_V[token])] = False

        ways_S = np.full(len(self.next_SC), FAR, np.int32)
        ways_S[np.setdiff1d(np.arange(len(ways_S)), self._sources)] = 0
        while True:
            through_N = np.where(alive_N, ways_S[self._target_N] + 1, FAR)
            shorter = np.minimum(np.minimum.reduceat(through_N, self._starts), FAR)
            if np.array_equal(shorter, ways_S[self._sources]):
                break
            ways_S[self._sources] = shorter
        if ways_S[0] >= FAR:
            raise PromptError("nothing-to-write", "the grammar and the forbidden tokens leave nothing to write")

        alive_N &= ways_S[self._target_N] < FAR
        choices_S = np.bincount(self._source_N[alive_N], sizes_C[self._class_N[alive_N]], minlength=len(ways_S))
        only_S = np.full(len(ways_S), -1, np.int32)
        single_N = alive_N & (choices_S[self._source_N] == 1)
        only_S[self._source_N[single_N]] = self._first_of(self._class_N[single_N], forbidden_V)
        for state, token in pins:
            if ways_S[state] < FAR:
                only_S[state] = token
        return Rules(forbidden_V, only_S, ways_S)

    def _first_of(self, classes: np.ndarray, forbidden_V: np.ndarray | None) -> np.ndarray:
        """The first token of each class that is not forbidden."""
        tokens = np.arange(self.vocabulary) if forbidden_V is None else np.flatnonzero(~forbidden_V)
        first_C = np.full(self.next_SC.shape[1], -1, np.int32)
        first_C[self.class_V[tokens][::-1]] = tokens[::-1]
        return first_C[classes]

    def rules_of(self, forbidden: Iterable[int] = (), pins: Mapping[int, int] | None = None) -> Rules:
        """What a request may write that must not write `forbidden`, and in a state of `pins` only its token there."""
        forbidden, pins = frozenset(map(int, forbidden)), pins or {}
        for state, token in pins.items():
            if self.next_SC[state, self.class_V[token]] < 0 or token in forbidden:
                raise ValueError(f"token {token} is pinned to state {state}, where it is not allowed")
        if not pins:
            return self.rules(forbidden)
        # Pins on the shortest ways to an end change nothing but the choice in their own states.
        free, states, tokens = self.rules(forbidden), np.array([*pins]), np.array([*pins.values()])
        ways = free.ways_S[states]
        if (ways == np.minimum(free.ways_S[self.next_SC[states, self.class_V[tokens]]] + 1, FAR)).all():
            only_S = free.only_S.copy()
            only_S[states[ways < FAR]] = tokens[ways < FAR]
            return Rules(free.forbidden_V, only_S, free.ways_S)
        return self.rules(forbidden, tuple(sorted(pins.items())))

    def walk(self, tokens: Iterable[int], state: int = 0) -> int:
        """The state after the tokens, -1 from where they leave the grammar on."""
        for token in tokens:
            state = int(self.next_SC[state, self.class_V[token]])
            if state < 0:
                return -1
        return state

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Whether the tokens lead from the start to an end."""
        state = self.walk(tokens)
        return state >= 0 and bool((self.next_SC[state] < 0).all())
