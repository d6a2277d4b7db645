"""Who runs in which slot: knows requests and slots, no tensors."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from decoder.engine.requests import Completion, Plan


@dataclass(slots=True, eq=False)
class Entry:
    """A completion in the queue or in a slot."""

    completion: Completion
    plan: Plan
    slot: int = -1
    pending: int = 1  # tokens that the next step feeds, as far as is known


class Scheduler:
    """A queue in front of `slots` slots. A slot that is released is taken again at once, the lowest first."""

    def __init__(self, slots: int) -> None:
        self.waiting: deque[Entry] = deque()
        self.running: dict[int, Entry] = {}  # by slot
        self.changes = 0  # of who runs where
        self._free = list(range(slots))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, entry: Entry) -> None:
        """Queues an entry."""
        self.waiting.append(entry)

    def admit(self) -> list[Entry]:
        """Gives free slots to those who wait longest; returns them."""
        admitted = []
        while self.waiting and self._free:
            entry = self.waiting.popleft()
            if entry.completion.ended is not None:  # cancelled in the queue
                continue
            entry.slot = heapq.heappop(self._free)
            self.running[entry.slot] = entry
            self.changes += 1
            admitted.append(entry)
        return admitted

    def release(self, entry: Entry) -> None:
        """Frees the entry's slot."""
        del self.running[entry.slot]
        self.changes += 1
        heapq.heappush(self._free, entry.slot)

    @property
    def reach(self) -> int:
        """Slots from the first to the last one that is running."""
        return max(self.running, default=-1) + 1

    def moves(self) -> list[tuple[int, int]]:
        """Moves (from, to) that bring the running entries into the first slots, when that halves their reach."""
        moves: list[tuple[int, int]] = []
        if self.waiting or 2 * len(self.running) > self.reach:
            return moves
        for source in sorted(self.running, reverse=True):
            if not self._free or self._free[0] > source:
                break
            entry = self.running.pop(source)
            entry.slot = heapq.heappop(self._free)
            heapq.heappush(self._free, source)
            self.running[entry.slot] = entry
            self.changes += 1
            moves.append((source, entry.slot))
        return moves
