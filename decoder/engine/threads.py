"""How many threads a step on the CPU runs on, chosen by measurement.

Small steps want one thread: others only wait, and where the machine is busy with something else, a step waits for the
one that got no core. Which steps are small depends on the model and on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

TRIES = 3  # of each number of threads
SLOWER = 2.0  # times the best from which on things have changed
PATIENCE = 3  # steps in a row


@dataclass(slots=True)
class Times:
    """Seconds that steps of one size took."""

    seen: dict[int, list[float]]  # by threads
    slow: int = 0

    @property
    def threads(self) -> int:
        """The number that was tried least, until all were tried enough; then the fastest."""
        least = min(self.seen, key=lambda n: len(self.seen[n]))
        return least if len(self.seen[least]) < TRIES else min(self.seen, key=lambda n: min(self.seen[n]))

    def add(self, threads: int, seconds: float) -> bool:
        """Whether the measurements still hold, with this one beside them."""
        seen = self.seen[threads]
        if len(seen) < TRIES:
            seen.append(seconds)
            return True
        self.slow = self.slow + 1 if seconds > SLOWER * min(seen) else 0
        return self.slow < PATIENCE


@dataclass(slots=True)
class Threads:
    """Sets the number of threads around each step, and puts the former one back."""

    options: tuple[int, ...] = field(default_factory=lambda: _options(torch.get_num_threads()))
    times: dict[int, Times] = field(default_factory=dict)  # by size

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """Around a step of so many tokens, alike for all up to the next power of two."""
        if len(self.options) == 1:
            yield
            return
        size, before = (tokens - 1).bit_length(), torch.get_num_threads()
        times = self.times.setdefault(size, Times({threads: [] for threads in self.options}))
        threads = times.threads
        torch.set_num_threads(threads)
        started = time.perf_counter()
        try:
            yield
        finally:
            torch.set_num_threads(before)
        if not times.add(threads, time.perf_counter() - started):
            del self.times[size]


def _options(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`."""
    return tuple(sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)}))
