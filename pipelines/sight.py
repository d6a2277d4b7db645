"""What the network is to see of a study: frames at its sizes, made on the CPU before the device is asked.

Small and picklable, so that a study need not leave the process that has decoded it. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from pipelines import tiles
from pipelines.inputs import (
    GLANCE,
    LONGEST_SIDE,
    LUNG,
    MULTIPLE,
    SOFT_TISSUE,
    WHOLE_SIDE,
    colourfulness,
    grey8,
    resize,
    stretch,
    window,
)
from pipelines.study import ImageStudy
from reports.taxonomy import LINES

MAX_SLICES: Final = 24  # of a volume, spread evenly
WINDOWS: Final = {"soft tissue": SOFT_TISSUE, "lung": LUNG}


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture scaled and centred in a frame whose sides the network can take, and how to get back to its pixels."""

    grey_HW: np.ndarray  # uint8
    golden_HW: np.ndarray | None  # its golden sample, framed alike
    place: tuple[int, int, int, int]  # x, y, width, height of the picture in the frame
    scale: float  # frame pixels a picture pixel
    size: tuple[int, int]  # width, height of the picture

    def boxes(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Frame pixels -> the picture's own pixels, clipped to it."""
        x, y = self.place[:2]
        own = (boxes_N4 - np.array([x, y, x, y], np.float32)) / self.scale
        width, height = self.size
        return np.clip(own, 0, np.array([width, height, width, height], np.float32))


def frame(grey_HW: np.ndarray, longest: int, golden_HW: np.ndarray | None = None, *, square: bool) -> Frame:
    """Scales a picture so that its longest side is `longest`, its golden sample with it, and frames both.

    `square` keeps left and right halves in place for the heads that compare them.
    """
    small = resize(grey_HW, longest)
    height, width = small.shape
    sides = tuple(-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    frame_h, frame_w = (max(sides), max(sides)) if square else sides
    x, y = (frame_w - width) // 2, (frame_h - height) // 2

    def framed(picture: np.ndarray) -> np.ndarray:
        out = np.zeros((frame_h, frame_w), np.uint8)
        out[y : y + height, x : x + width] = picture
        return out

    golden = None if golden_HW is None else framed(stretch(golden_HW, small.shape))
    size = (grey_HW.shape[1], grey_HW.shape[0])
    return Frame(framed(small), golden, (x, y, width, height), max(small.shape) / max(size), size)


@dataclass(frozen=True, slots=True)
class Sight:
    """A study as the network sees it: a picture, the slices of a volume, or a large picture with its pixels."""

    kind: str  # "auto", "ct" or "defect": what it is to be read as
    size: tuple[int, int]  # width, height
    slices: tuple[int, ...] = (0,)
    glances: tuple[Frame, ...] = ()  # of a picture one; of a volume its slices, in soft tissue
    lungs: tuple[Frame, ...] = ()  # the slices of a volume once more
    closer: dict[int, Frame] = field(default_factory=dict)  # by longest side
    colour: float = 0.0  # how colourful the picture is
    large: bool = False  # read tile by tile, from its source
    source: tuple[ImageStudy, ImageStudy | None] | None = None  # with its golden sample; absent where it lies elsewhere

    @property
    def volume(self) -> bool:
        return bool(self.lungs)


def sight(study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Sight:
    """Looks at a study for the network. `kind` is "auto", "ct" or "defect"; `reference` a golden sample of the view."""
    height, width = study.pixels.shape[1:3]
    size = (width, height)
    if as_volume(study, kind):
        chosen = _spread(len(study.pixels))
        soft, lung = (
            tuple(frame(window(study.pixels[s], *WINDOWS[name]), GLANCE, square=True) for s in chosen)
            for name in WINDOWS
        )
        return Sight(kind, size, chosen, soft, lung, source=(study, reference))
    if study.units == "display" and tiles.is_large(study.pixels[0]):
        return Sight(kind, size, large=True, source=(study, reference))
    middle = len(study.pixels) // 2  # of a volume that is to be read as a defect picture; a picture has one slice
    pixels = study.pixels[middle]
    grey = window(pixels, *(study.window or SOFT_TISSUE)) if study.units == "HU" else grey8(pixels)
    golden = grey8(reference.pixels[0]) if reference is not None and reference.units == "display" else None
    sides = {*(LONGEST_SIDE[line] for line in LINES), *WHOLE_SIDE.values()} if kind != "ct" else set()
    return Sight(
        kind,
        size,
        (middle,),
        (frame(grey, GLANCE, golden, square=True),),
        closer={side: frame(grey, side, golden, square=False) for side in sorted(sides)},
        colour=colourfulness(pixels),
        source=(study, reference),
    )


def as_volume(study: ImageStudy, kind: str) -> bool:
    """Whether a study is looked at slice by slice, and measured."""
    return study.units == "HU" and kind != "defect"


def _spread(count: int) -> tuple[int, ...]:
    return tuple(np.unique(np.linspace(0, count - 1, min(count, MAX_SLICES)).round().astype(int)).tolist())
