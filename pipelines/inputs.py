"""How a picture becomes the network's input: the same few steps in training, evaluation and reading.

The network sees three channels: the picture in grey, its golden sample (or the picture again when there is none), and
the absolute difference of the two. A CT slice is seen through a display window.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

GLANCE: Final = 256  # side of the square in which every picture is first seen
# Longest side, in pixels, at which each kind is inspected. Chosen on validation data: small defects need more pixels.
LONGEST_SIDE: Final = {"ct": GLANCE, "steel": GLANCE, "tile": 320, "board": 640}
# Lines whose evidence is also looked for in the picture's mirror images, at four times the cost. Steel: +1.4 points of
# mAP50 on validation data, tiles +6; boards are at 99.5 without.
MIRRORED: Final = frozenset({"steel", "tile"})
# How much the detector's word on the whole picture counts in a box's score (`encoders.select.select_boxes`).
PRESENCE: Final = {"steel": 0.5, "tile": 0.85, "board": 0.3}
# Lines of which the surest type of the whole picture is reported even where no box is sure. Steel: image type 0.932 ->
# 0.977 and F1 of the report 0.742 -> 0.738; tiles would get 0.755 -> 0.766 and 0.648 -> 0.619.
SHOWN: Final = frozenset({"steel"})
# Lines whose types are told from the picture at another size than their boxes. Tiles: +3 points of presence AUROC.
WHOLE_SIDE: Final = {"tile": GLANCE}
MULTIPLE: Final = 32  # the network's largest stride
MEAN, STD = 127.5, 64.0  # grey levels 0..255 -> about -2..2; padding is 0, a middle grey

SOFT_TISSUE: Final = (40.0, 400.0)  # centre, width in HU
LUNG: Final = (-600.0, 1500.0)


def window(hu: np.ndarray, centre: float, width: float) -> np.ndarray:
    """HU of any shape -> uint8 grey levels through a display window (DICOM PS3.3 C.11.2.1.2, linear exact)."""
    low = centre - width / 2
    return np.clip((hu.astype(np.float32) - low) * (255.0 / width) + 0.5, 0, 255).astype(np.uint8)


def grey8(pixels: np.ndarray, span: tuple[float, float] | None = None) -> np.ndarray:
    """`[H, W]` uint8/uint16 or `[H, W, 3]` uint8 -> `[H, W]` uint8.

    16-bit pictures rarely use their whole range: `span`, by default the 0.5th to 99.5th percentile, is stretched over
    the grey levels.
    """
    if pixels.ndim == 3:
        return np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.dtype == np.uint8:
        return pixels
    low, high = span or grey_range(pixels)
    scaled = (pixels.astype(np.float32) - low) * (255.0 / max(high - low, 1.0)) + 0.5
    return np.clip(scaled, 0, 255).astype(np.uint8)


def grey_range(pixels: np.ndarray) -> tuple[float, float]:
    """The values that `grey8` shows as black and as white."""
    low, high = np.percentile(pixels, (0.5, 99.5))
    return float(low), float(high)


def colourfulness(pixels: np.ndarray) -> float:
    """Hasler and Suesstrunk's M3 of `[H, W, 3]` uint8: 15 is slightly, 33 moderately, 109 extremely colourful.

    Of `[H, W]` grey levels it is 0. An even tint, as of warm light, counts little. Large pictures are sampled.
    """
    if pixels.ndim == 2:
        return 0.0
    step = max(1, max(pixels.shape[:2]) // GLANCE)
    red, green, blue = np.moveaxis(pixels[::step, ::step].astype(np.float32), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = math.hypot(float(red_green.std()), float(yellow_blue.std()))
    tint = math.hypot(float(red_green.mean()), float(yellow_blue.mean()))
    return spread + 0.3 * tint


def read_grey(path: Path) -> np.ndarray:
    """A picture file of a training set as `[H, W]` uint8: turned as its EXIF tag asks, 16-bit stretched by `grey8`.

    Raises OSError where Pillow cannot read it. Reports read their inputs through `pipelines.ingest` instead.
    """
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I"):
            return grey8(np.asarray(turned).astype(np.uint16))
        return grey8(np.asarray(turned.convert("L" if turned.mode in ("1", "L", "P", "LA") else "RGB")))


def resize(grey_HW: np.ndarray, longest: int) -> np.ndarray:
    """Scales so that the longest side is `longest` pixels (antialiased when it shrinks)."""
    height, width = grey_HW.shape
    scale = longest / max(height, width)
    return stretch(grey_HW, (max(1, round(height * scale)), max(1, round(width * scale))))


def stretch(grey_HW: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resamples to height and width `shape` (antialiased when it shrinks)."""
    if grey_HW.shape == shape:
        return grey_HW
    height, width = shape
    return np.asarray(Image.fromarray(grey_HW).resize((width, height), Image.Resampling.BILINEAR))


def channels(grey_HW: np.ndarray, reference_HW: np.ndarray | None = None) -> np.ndarray:
    """Grey levels and a golden sample of the same size -> `[3, H, W]` float32, the network's three channels."""
    image = (grey_HW.astype(np.float32) - MEAN) / STD
    if reference_HW is None:
        return np.stack((image, image, np.zeros_like(image)))
    reference = (reference_HW.astype(np.float32) - MEAN) / STD
    return np.stack((image, reference, np.abs(image - reference)))


def pad(x_CHW: np.ndarray, *, square: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """Centres the picture in a frame whose sides the network can take.

    Returns `[C, H', W']` and the (x, y) offset of the picture in it. `square` keeps left and right halves in place for
    the heads that compare them.
    """
    _, height, width = x_CHW.shape
    target_h, target_w = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    if square:
        target_h = target_w = max(target_h, target_w)
    y, x = (target_h - height) // 2, (target_w - width) // 2
    out = np.zeros((x_CHW.shape[0], target_h, target_w), np.float32)
    out[:, y : y + height, x : x + width] = x_CHW
    return out, (x, y)
