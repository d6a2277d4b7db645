"""Pictures far larger than the model's view: seen once as a reduced overview, then tile by tile with overlap.

Nothing here copies the whole picture: `pixels` may be a map of a file, and is taken a part at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from PIL import Image

from pipelines.inputs import grey8, grey_range

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in the picture's pixels; x1, y1 exclusive

LARGE_SIDE: Final = 8192  # longest side, in pixels, above which a picture is read tile by tile
OVERVIEW_SIDE: Final = 2048  # longest side of an overview is at most this
MAX_TILES: Final = 100  # more would take minutes on a CPU; larger pictures get larger tiles, which are scaled down
OVERLAP: Final = 0.2  # of a tile's side, that it shares with its neighbour
KEEP: Final = 300  # findings of a picture
LIKELIEST: Final = 2_000  # of all items of all tiles, that are merged into findings
SAME: Final = 0.5  # share of the smaller box inside the larger from which both are one finding
SAMPLE_STEP: Final = 16  # every so many pixels tell the range of grey levels


def is_large(pixels: np.ndarray) -> bool:
    """Whether a picture, `[H, W]` or `[H, W, 3]`, is read tile by tile."""
    return max(pixels.shape[:2]) > LARGE_SIDE


def grey_span(pixels: np.ndarray) -> tuple[float, float]:
    """The values that stand for black and white in the grey of a large picture, from a sample of its pixels."""
    return (0.0, 255.0) if pixels.dtype == np.uint8 else grey_range(pixels[::SAMPLE_STEP, ::SAMPLE_STEP])


def overview(pixels: np.ndarray) -> np.ndarray:
    """A large picture reduced by a whole factor to at most `OVERVIEW_SIDE`: `[h, w]` or `[h, w, 3]` uint8, averaged."""
    factor = -(-max(pixels.shape[:2]) // OVERVIEW_SIDE)
    span = grey_span(pixels)
    rows = []
    for top in range(0, len(pixels), step := factor * 64):
        strip = np.ascontiguousarray(pixels[top : top + step])
        strip = strip if strip.dtype == np.uint8 else grey8(strip, span)
        rows.append(np.asarray(Image.fromarray(strip).reduce(factor)))
        _let_go(pixels)
    return np.concatenate(rows)


def layout(height: int, width: int, view: int) -> list[tuple[int, int, int, int]]:
    """Overlapping tiles (x0, y0, x1, y1) that cover a picture: of `view` pixels a side, or larger to be no more than
    `MAX_TILES`."""
    side = float(view)
    while len(rows := _starts(height, side)) * len(columns := _starts(width, side)) > MAX_TILES:
        side *= 1.05
    whole = round(side)
    return [(x, y, min(x + whole, width), min(y + whole, height)) for y in rows for x in columns]


def _starts(length: int, side: float) -> list[int]:
    """Where tiles begin along one axis: evenly spread, each sharing at least `OVERLAP` with the next."""
    if length <= side:
        return [0]
    count = int(np.ceil((length - side) / (side * (1 - OVERLAP)))) + 1
    return [round(start) for start in np.linspace(0, length - round(side), count)]


def cut(
    pixels: np.ndarray, tiles: Sequence[tuple[int, int, int, int]], shape: tuple[int, ...] | None = None
) -> Iterator[np.ndarray]:
    """The tiles in grey, `[h, w]` uint8. `shape` is that of the picture that the tiles were laid out on, when it is
    another one than `pixels` (a golden sample of the same view)."""
    span = grey_span(pixels)
    height, width = pixels.shape[:2]
    sy, sx = (height / shape[0], width / shape[1]) if shape else (1.0, 1.0)
    for x0, y0, x1, y1 in tiles:
        part = pixels[round(y0 * sy) : max(round(y1 * sy), 1), round(x0 * sx) : max(round(x1 * sx), 1)]
        yield grey8(np.ascontiguousarray(part), span)
        _let_go(pixels)


def merge(
    boxes: Sequence[Box], types: Sequence[str], scores: Sequence[float], tiles: Sequence[tuple[int, int, int, int]]
) -> list[tuple[int, Box]]:
    """One entry for each finding, by falling score: the index of the item that shows it best, and its box.

    Item i was seen in `tiles[i]`. Of items of a type that cover each other one stays, preferably one that no edge of a
    tile cuts; pieces of one finding that the edge between two tiles cuts are joined.
    """
    ends = (max((t[2] for t in tiles), default=0), max((t[3] for t in tiles), default=0))
    is_cut = [_is_cut(box, tile, ends) for box, tile in zip(boxes, tiles, strict=True)]
    kept: list[tuple[int, Box]] = []
    likeliest = sorted(range(len(boxes)), key=lambda i: -scores[i])[:LIKELIEST]
    for i in sorted(likeliest, key=lambda i: (is_cut[i], -scores[i])):
        for n, (j, box) in enumerate(kept):
            if types[i] != types[j] or not (share := _shared(boxes[i], box)):
                continue
            pieces = is_cut[i] and is_cut[j] and tiles[i] != tiles[j] and scores[i] >= scores[j] / 2
            if share >= SAME or pieces:
                if pieces:
                    kept[n] = j, _around_both(boxes[i], box)
                break
        else:
            kept.append((i, boxes[i]))
    return sorted(kept, key=lambda entry: -scores[entry[0]])[:KEEP]


def _is_cut(box: Box, tile: tuple[int, int, int, int], ends: tuple[int, int]) -> bool:
    """Whether the box ends where its tile ends, and the picture does not."""
    margin = 0.01 * (tile[2] - tile[0])
    before = any(start > 0 and box[k] - start < margin for k, start in enumerate(tile[:2]))
    return before or any(tile[k] < ends[k - 2] and tile[k] - box[k] < margin for k in (2, 3))


def _shared(a: Box, b: Box) -> float:
    """Area that both share over that of the smaller one."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(wide, 0.0) * max(high, 0.0) / smaller if smaller > 0 else 0.0


def _around_both(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _let_go(pixels: np.ndarray) -> None:
    """Tells the system that what was read of a mapped file need not stay in memory."""
    if isinstance(mapped := getattr(pixels, "_mmap", None), mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)
