"""A product line that an adapter brings: what it is called, and how its pictures are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.inputs import GLANCE

SIDES = (GLANCE, 320, 640)  # longest sides at which pictures are inspected (`pipelines.inputs.LONGEST_SIDE`)
ENOUGH = 10.0  # pixels of the shorter side that three of four boxes should have at that size
MIRRORED_UP_TO = 320  # four looks at a larger picture would take more than a second on two CPU cores


@dataclass(frozen=True, slots=True)
class OwnLine:
    """One product line beyond those of `reports.taxonomy`, or with types of its own."""

    name: str
    types: tuple[str, ...]
    weak: tuple[str, ...] = ()  # the types of which no boxes are labelled: they are told from the picture as a whole
    longest: int = GLANCE  # longest side, in pixels, at which pictures are inspected
    presence: float = 0.5  # weight of the whole picture's word in a box's score
    colour: float = 0.0  # how colourful its pictures usually are (`pipelines.domain.colourfulness`)

    @property
    def mirrored(self) -> bool:
        """Whether pictures are also seen in three mirror images."""
        return self.longest <= MIRRORED_UP_TO


def inspection_size(shorter_sides: Sequence[float], pictures: Sequence[int]) -> int:
    """The longest side at which to inspect a line.

    `shorter_sides` are those of its boxes as shares of the picture's longest side; `pictures` the longest sides of the
    pictures in pixels. Large enough for the smaller boxes, and not beyond what the pictures have.
    """
    if not shorter_sides:
        return GLANCE
    small = sorted(shorter_sides)[len(shorter_sides) // 4]
    own = sorted(pictures)[len(pictures) // 2]
    fitting = [side for side in SIDES if side == GLANCE or side <= own]
    return next((side for side in fitting if side * small >= ENOUGH), fitting[-1])
