"""Training data as streams: each data set a stack of uint8 pictures on the device, with padded labels.

A stream's pictures are scaled so that their longest side is the size at which its kind is inspected (board pictures
appear a second time at glance size), and sit in the top left corner of a common canvas. Everything fits the memory of
one GPU, so that a step reads no file.
Shapes: N cases, S canvas side, M labelled boxes (padded).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.inputs import GLANCE, LONGEST_SIDE, read_grey, resize, stretch
from pipelines.manifest import Case, read_data_sets
from pipelines.model import FIELDS
from pipelines.training.wording import words_of
from reports.taxonomy import CT_TYPES, DEFECT_TYPES

MAX_BOXES = 20


@dataclass(slots=True)
class Stream:
    """One data set (one split) on a device."""

    name: str
    line: str  # "steel", "tile", "board" or "ct"
    pictures: Tensor  # [N, 1 or 2, S, S] uint8: image, golden sample
    sizes: Tensor  # [N, 2] float: width, height of the picture in the canvas
    boxes: Tensor  # [N, MAX_BOXES, 4] float, canvas pixels
    labels: Tensor  # [N, MAX_BOXES] long
    valid: Tensor  # [N, MAX_BOXES] bool
    fields: Tensor  # [N, len(FIELDS)] long, -1 where unknown
    # [N, len(CT_TYPES)] float, -1 where unknown; of a line with types of its own [N, those], 1 where one has no box.
    types: Tensor
    words: Tensor  # [N, len(CT_TYPES)] long: how the caption words each type, as its place in `wording.WORDS`

    def __len__(self) -> int:
        return len(self.pictures)

    def rows(self, index: Tensor) -> Stream:
        return Stream(self.name, self.line, *(t[index] for t in self._tensors))

    def to(self, device: torch.device) -> Stream:
        return Stream(self.name, self.line, *(t.to(device) for t in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        held = (self.pictures, self.sizes, self.boxes, self.labels, self.valid, self.fields, self.types, self.words)
        return held


def _read(case: Case, longest: int) -> tuple[list[np.ndarray], float]:
    """The picture and its golden sample (of the picture's size), and output pixels a picture pixel."""
    grey = read_grey(case.image)
    scale = longest / max(grey.shape)
    pictures = [resize(grey, longest)]
    if case.template is not None:
        pictures.append(stretch(read_grey(case.template), pictures[0].shape))
    return pictures, scale


def load_stream(
    name: str, cases: list[Case], *, longest: int | None = None, own_types: Sequence[str] | None = None
) -> Stream:
    """Reads the pictures of `cases`; `longest` overrides the size at which the kind is inspected.

    Labels are places in `DEFECT_TYPES`, or in the `own_types` of a line that the taxonomy does not know.

    Raises ValueError when the cases are of more than one product line.
    """
    lines = {case.product_line or "ct" for case in cases}
    if len(lines) != 1:
        raise ValueError(f"{name}: a training manifest holds one product line, this one has {sorted(lines)}")
    line = lines.pop()
    side = longest or LONGEST_SIDE[line]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda case: _read(case, side), cases))
    layers = max(len(pictures) for pictures, _ in read)
    pictures = np.zeros((len(cases), layers, side, side), np.uint8)
    sizes = np.zeros((len(cases), 2), np.float32)
    boxes = np.zeros((len(cases), MAX_BOXES, 4), np.float32)
    labels = np.zeros((len(cases), MAX_BOXES), np.int64)
    valid = np.zeros((len(cases), MAX_BOXES), bool)
    fields = np.full((len(cases), len(FIELDS)), -1, np.int64)
    types = np.full((len(cases), len(CT_TYPES)), -1.0, np.float32)
    if own_types is not None:
        types = np.zeros((len(cases), len(own_types)), np.float32)
    words = np.array([words_of(str(case.extra.get("caption") or "")) for case in cases])
    names = DEFECT_TYPES if own_types is None else tuple(own_types)
    for i, (case, (layer, scale)) in enumerate(zip(cases, read, strict=True)):
        height, width = layer[0].shape
        for j in range(layers):
            pictures[i, j, :height, :width] = layer[
                min(j, len(layer) - 1)
            ]  # without a golden sample: the picture again
        sizes[i] = width, height
        for j, box in enumerate(case.boxes[:MAX_BOXES]):
            boxes[i, j] = np.asarray(box.bbox, np.float32) * scale
            labels[i, j] = names.index(box.type)
            valid[i, j] = True
        known = {"line": line, **case.fields}
        if "lung_nodule" in case.extra:
            known["lung_nodule"] = case.extra["lung_nodule"]
        for j, (field, values) in enumerate(FIELDS.items()):
            if known.get(field) in values:
                fields[i, j] = values.index(known[field])
        if line == "ct" and case.finding_types is not None:
            types[i] = [float(t in case.finding_types) for t in CT_TYPES]
        elif own_types is not None:
            boxless = set(case.finding_types or ()) - {box.type for box in case.boxes}
            types[i] = [float(name in boxless) for name in own_types]
    name += "" if longest is None else f"@{side}"
    return Stream(name, line, *map(torch.from_numpy, (pictures, sizes, boxes, labels, valid, fields, types, words)))


def held_out_groups(cases: Sequence[Case], share: float) -> set[str]:
    """Whole groups of a data set, by chance but always the same ones, that hold at most `share` of its images.

    Where every group is larger, the smallest one; where there is but one group, none.
    """
    sizes: dict[str, int] = defaultdict(int)
    for case in cases:
        sizes[case.group] += 1
    if share <= 0 or len(sizes) < 2:
        return set()
    order = sorted(sizes)
    random.Random(0).shuffle(order)
    room, held = share * len(cases), set[str]()
    for group in order:
        if sizes[group] <= room:
            held.add(group)
            room -= sizes[group]
    return held or {min(order, key=lambda group: sizes[group])}


def load_streams(data: Path, split: str, *, held_out: float = 0.0, inverted: bool = False) -> list[Stream]:
    """Every data set below `data` that has cases of `split`; boards also at glance size.

    The share `held_out` of a data set's groups is left out; `inverted`: it is what is read.

    Raises `ManifestError` with the faults of all manifests, ValueError when there is nothing to read.
    """
    streams: list[Stream] = []
    for name, every in read_data_sets(data).items():
        cases = [case for case in every if case.split == split]
        held = held_out_groups(cases, held_out)
        cases = [case for case in cases if (case.group in held) == inverted]
        if not cases:
            continue
        stream = load_stream(name, cases)
        streams.append(stream)
        if LONGEST_SIDE[stream.line] > 2 * GLANCE:
            streams.append(load_stream(name, cases, longest=GLANCE))
    if not streams:
        raise ValueError(f"no */manifest.jsonl with a {split!r} split below {data}")
    return streams
