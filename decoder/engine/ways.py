"""How a step on the CPU runs, chosen by measurement: on how many threads, and whether by products for few rows.

Small steps want one thread: others only wait, and where the machine is busy with something else, a step waits for the
one that got no core. Those products pay where weights come from memory, not where a cache holds them all. Which
steps are small, and what a cache holds, depends on the model and on the machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from decoder.layers import READING

TRIES = 3  # of each way
SLOWER = 2.0  # times the best from which on things have changed
PATIENCE = 3  # steps in a row

Way = tuple[int, bool]  # threads, and whether by products for few rows (`decoder.layers.READING`)


@dataclass(slots=True)
class Times:
    """Seconds that steps of one size took."""

    seen: dict[Way, list[float]]
    slow: int = 0

    @property
    def way(self) -> Way:
        """The way that was tried least, until all were tried enough; then the fastest."""
        least = min(self.seen, key=lambda way: len(self.seen[way]))
        return least if len(self.seen[least]) < TRIES else min(self.seen, key=lambda way: min(self.seen[way]))

    def add(self, way: Way, seconds: float) -> bool:
        """Whether the measurements still hold, with this one beside them."""
        seen = self.seen[way]
        if len(seen) < TRIES:
            seen.append(seconds)
            return True
        self.slow = self.slow + 1 if seconds > SLOWER * min(seen) else 0
        return self.slow < PATIENCE


@dataclass(slots=True)
class Ways:
    """Has each step run in the way that was fastest so far, and puts back what was set before."""

    options: tuple[Way, ...] = field(default_factory=lambda: _options(torch.get_num_threads()))
    times: dict[int, Times] = field(default_factory=dict)  # by size

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """Around a step of so many tokens, alike for all up to the next power of two."""
        size, before = (tokens - 1).bit_length(), torch.get_num_threads()
        times = self.times.setdefault(size, Times({way: [] for way in self.options}))
        way = threads, reading = times.way
        if threads != before:
            torch.set_num_threads(threads)
        token = READING.set(reading)
        started = time.perf_counter()
        try:
            yield
        finally:
            READING.reset(token)
            if threads != before:
                torch.set_num_threads(before)
        if not times.add(way, time.perf_counter() - started):
            del self.times[size]


def _options(most: int) -> tuple[Way, ...]:
    """1, 2, 4, ... and `most` threads, with and without."""
    threads = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)})
    return tuple(itertools.product(threads, (False, True)))
