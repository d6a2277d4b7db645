"""Augmentation on the device: one bilinear warp a picture, photometric jitter, mosaics. No step waits for the device.

An output pixel p is taken from the canvas at `A p + b`; boxes follow by the inverse map.
Shapes: B batch, S canvas side, P output side, M boxes of an output picture (padded).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.inputs import MEAN, STD
from pipelines.model import FIELDS
from pipelines.training.streams import MAX_BOXES, Stream
from reports.taxonomy import CT_FIELDS


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How hard a stream is shaken."""

    zoom: tuple[float, float] = (0.75, 1.35)  # output pixels a canvas pixel: 1 is the scale of inspection
    aspect: float = 0.1  # log-normal spread of the aspect ratio
    rotate: float = 0.0  # degrees, uniform; only where there are no boxes
    symmetry: str = "d4"  # "d4": all flips and quarter turns; "mirror": left-right only
    whole: bool = False  # keep the whole picture in view: for CT, and for learning to write
    mosaic: float = 0.0  # share of pictures composed of four
    mixup: float = 0.0  # share of pictures with another one of the stream laid over them, with the boxes of both
    aim: float = 0.0  # share of views that look at a labelled box
    contrast: float = 0.3
    noise: float = 0.05
    erase: float = 0.0  # share of pictures with a grey rectangle
    keep_reference: float = 0.85  # share of pictures that keep their golden sample


def augmentation(table: dict[str, Any]) -> Augmentation:
    """A recipe's table as an `Augmentation`; the keys that say how many and how large are left out.

    Raises ValueError for a key that is unknown or missing.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k not in ("batch", "side", "findings")
    }
    known = {each.name for each in fields(Augmentation)}
    if faults := (set(values) - known) | ({"batch"} - set(table)):
        raise ValueError(f"a stream of the recipe lacks or does not know: {', '.join(sorted(faults))}")
    how = Augmentation(**values)
    if how.mixup > 0.5:
        raise ValueError(f"mixup = {how.mixup}: at most half of the pictures can have another one laid over them")
    return how


@dataclass(slots=True)
class Batch:
    """Network input and labels. `boxes` in pixels of the output."""

    x: Tensor  # [B, 3, P, P]
    boxes: Tensor  # [B, M, 4]
    labels: Tensor  # [B, M]
    valid: Tensor  # [B, M]
    fields: Tensor  # [B, F]
    types: Tensor  # [B, T]
    words: Tensor  # [B, T] as in `Stream`


MAX_TARGETS = 40
LEFT_RIGHT = [CT_FIELDS["laterality"].index(side) for side in ("right", "left")]
LATERALITY = list(FIELDS).index("laterality")


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(n, device=device) * (high - low) + low


def sample(pictures_BCSS: Tensor, size_B2: Tensor, canvas_BPP2: Tensor) -> Tensor:
    """Grey levels `[B, C, P, P]` of the pictures at points (x, y) of their canvas."""
    inside = ((canvas_BPP2 >= 0) & (canvas_BPP2 <= size_B2[:, None, None])).all(-1)[:, None].float()
    grid = canvas_BPP2 * (2 / pictures_BCSS.shape[-1]) - 1
    sampled = F.grid_sample(pictures_BCSS.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Outside the picture is the padding of reading: a middle grey.
    return sampled * inside + MEAN * (1 - inside)


def _warp(stream: Stream, index: Tensor, side: int, how: Augmentation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One warped view a picture: `[B, C, side, side]` grey levels, boxes, validity and whether it was mirrored."""
    device, n = index.device, len(index)
    pictures, size = stream.pictures[index], stream.sizes[index]
    zoom = torch.exp(_uniform(n, math.log(how.zoom[0]), math.log(how.zoom[1]), device))
    stretch = torch.exp(torch.randn(n, device=device) * how.aspect / 2)
    scale = torch.stack((zoom * stretch, zoom / stretch), 1)  # output pixels a canvas pixel, x and y
    # The linear part maps canvas to output: rotation, then symmetry.
    angle = torch.deg2rad(_uniform(n, -how.rotate, how.rotate, device))
    cos, sin = angle.cos(), angle.sin()
    mirror = (torch.rand(n, device=device) < 0.5).float() * 2 - 1
    upside = (torch.rand(n, device=device) < 0.5).float() * 2 - 1
    turn = (torch.rand(n, device=device) < 0.5).float()
    if how.symmetry == "mirror":
        upside, turn = torch.ones_like(upside), torch.zeros_like(turn)
    sx, sy = scale[:, 0], scale[:, 1]
    row0 = torch.stack((cos * sx, -sin * sy), 1) * mirror[:, None]
    row1 = torch.stack((sin * sx, cos * sy), 1) * upside[:, None]
    t = turn[:, None]
    forward = torch.stack((row0 * (1 - t) + row1 * t, row1 * (1 - t) + row0 * t), 1)  # [B, 2, 2]
    det = forward[:, 0, 0] * forward[:, 1, 1] - forward[:, 0, 1] * forward[:, 1, 0]
    inverse = (
        torch.stack(
            (
                torch.stack((forward[:, 1, 1], -forward[:, 0, 1]), 1),
                torch.stack((-forward[:, 1, 0], forward[:, 0, 0]), 1),
            ),
            1,
        )
        / det[:, None, None]
    )
    # Where the view's centre sits: anywhere that keeps the view filled where the picture is larger than it, else
    # the picture's centre with a little slack.
    extent = (torch.full_like(size, side)[:, None, :] @ inverse.abs().transpose(1, 2))[:, 0]  # view in canvas pixels
    slack = torch.zeros_like(size) if how.whole else ((size - extent) / 2).clamp(min=0)
    slack = slack + 0.08 * torch.minimum(size, extent)
    centre = size / 2 + (torch.rand(n, 2, device=device) * 2 - 1) * slack
    if how.aim > 0:
        count = stream.valid[index].sum(1)
        pick = (torch.rand(n, device=device) * count).long().clamp(max=MAX_BOXES - 1)
        box = stream.boxes[index].gather(1, pick[:, None, None].expand(-1, 1, 4))[:, 0]
        near = (box[:, :2] + box[:, 2:]) / 2 + (torch.rand(n, 2, device=device) - 0.5) * extent * 0.9
        aimed = ((torch.rand(n, device=device) < how.aim) & (count > 0))[:, None]
        centre = torch.where(aimed, near, centre)
    offset = side / 2 - (forward @ centre[:, :, None])[:, :, 0]

    grid1 = torch.arange(side, device=device) + 0.5
    yy, xx = torch.meshgrid(grid1, grid1, indexing="ij")
    points = torch.stack((xx, yy), -1).reshape(1, -1, 2) - offset[:, None]
    canvas = (points @ inverse.transpose(1, 2)).reshape(n, side, side, 2)
    sampled = sample(pictures, size, canvas)

    boxes = stream.boxes[index]
    first = boxes[..., :2] @ forward.transpose(1, 2) + offset[:, None]
    second = boxes[..., 2:] @ forward.transpose(1, 2) + offset[:, None]
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    area = (high - low)[..., 0] * (high - low)[..., 1]
    low, high = low.clamp(0, side), high.clamp(0, side)
    extent_wh = high - low
    seen = extent_wh[..., 0] * extent_wh[..., 1] / area.clamp(min=1e-3)
    valid = stream.valid[index] & (seen > 0.35) & (extent_wh.amin(-1) > 2)
    return sampled, torch.cat((low, high), -1), valid, mirror < 0


def photometric(x_BCHW: Tensor, how: Augmentation) -> Tensor:
    """Contrast, brightness, gamma, noise on network-scaled pictures; all channels of a picture alike but for noise."""
    n, device = len(x_BCHW), x_BCHW.device
    view = (n, 1, 1, 1)
    contrast = torch.exp(torch.randn(n, device=device) * how.contrast).clamp(0.4, 2.5).view(view)
    shift = (torch.randn(n, device=device) * how.contrast).view(view)
    x = x_BCHW * contrast + shift
    low, high = -MEAN / STD, (255 - MEAN) / STD
    unit = ((x - low) / (high - low)).clamp(1e-4, 1)
    gamma = torch.exp(torch.randn(n, device=device) * how.contrast * 0.7).view(view)
    x = unit.pow(gamma) * (high - low) + low
    strength = (torch.rand(n, device=device) * how.noise * 2).view(view)
    x = x + torch.randn_like(x) * strength
    if how.erase > 0:
        side = x.shape[-1]
        axis = torch.arange(side, device=device)
        centre = torch.rand(n, 2, device=device) * side
        half = (0.05 + 0.15 * torch.rand(n, 2, device=device)) * side
        hit_x = (axis[None] - centre[:, :1]).abs() < half[:, :1]
        hit_y = (axis[None] - centre[:, 1:]).abs() < half[:, 1:]
        hit = hit_x[:, None, :] & hit_y[:, :, None] & (torch.rand(n, 1, 1, device=device) < how.erase)
        x = x.masked_fill(hit[:, None], 0)
    return x


def draw(stream: Stream, n: int, side: int, how: Augmentation) -> Batch:
    """`n` augmented pictures of the stream, `side` pixels square."""
    device = stream.pictures.device
    composed = round(n * how.mosaic)
    plain = n - composed

    index = torch.randint(len(stream), (plain,), device=device)
    image, boxes, valid, mirrored = _warp(stream, index, side, how)
    labels, fields = stream.labels[index], stream.fields[index]
    types, words = stream.types[index], stream.words[index]
    # A mirrored body shows its left on the right.
    laterality = fields[:, LATERALITY]
    swapped = sum(LEFT_RIGHT) - laterality
    is_sided = (laterality == LEFT_RIGHT[0]) | (laterality == LEFT_RIGHT[1])
    fields = fields.clone()
    fields[:, LATERALITY] = torch.where(mirrored & is_sided, swapped, laterality)
    boxes, labels, valid = _fit(boxes, labels, valid)

    if composed:
        quarter = torch.randint(len(stream), (composed * 4,), device=device)
        q_image, q_boxes, q_valid, _ = _warp(stream, quarter, side // 2, how)
        q_image = q_image.view(composed, 2, 2, -1, side // 2, side // 2)
        q_image = q_image.permute(0, 3, 1, 4, 2, 5).reshape(composed, -1, side, side)
        quadrant = torch.arange(4, device=device)
        shift = torch.stack((quadrant % 2, quadrant // 2), 1).repeat(1, 2) * (side // 2)
        q_boxes = (q_boxes.view(composed, 4, -1, 4) + shift[None, :, None]).flatten(1, 2)
        q_labels = stream.labels[quarter].view(composed, -1)
        q_boxes, q_labels, q_valid = _fit(q_boxes, q_labels, q_valid.view(composed, -1))
        image = torch.cat((image, q_image))
        boxes, labels, valid = torch.cat((boxes, q_boxes)), torch.cat((labels, q_labels)), torch.cat((valid, q_valid))
        first = quarter.view(composed, 4)[:, 0]
        fields, types = torch.cat((fields, stream.fields[first])), torch.cat((types, stream.types[first]))
        words = torch.cat((words, stream.words[first]))

    x = photometric((image - MEAN) / STD, how)
    if x.shape[1] == 1:
        x = torch.cat((x, x, torch.zeros_like(x)), 1)
    else:
        keep = torch.rand(n, 1, 1, 1, device=device) < how.keep_reference
        reference = torch.where(keep, x[:, 1:], x[:, :1])
        x = torch.cat((x[:, :1], reference, (x[:, :1] - reference).abs()), 1)
    batch = Batch(x, boxes, labels, valid, fields, types, words)
    return _lay_over(batch, round(n * how.mixup)) if how.mixup > 0 else batch


def _lay_over(batch: Batch, count: int) -> Batch:
    """Blends the first `count` pictures with others of the batch, mosaics among them (mixup, arXiv 1710.09412).

    Both have about the same weight, so that the boxes of both count whole; fields and types stay those of the first.
    """
    n = len(batch.x)
    other = slice(n - 2 * count, n - count)
    share = _uniform(count, 0.35, 0.65, batch.x.device).view(-1, 1, 1, 1)
    x = torch.cat((share * batch.x[:count] + (1 - share) * batch.x[other], batch.x[count:]))
    both = [torch.cat((part[:count], part[other]), 1) for part in (batch.boxes, batch.labels, batch.valid)]
    boxes, labels, valid = (
        torch.cat((mixed, part[count:]))
        for mixed, part in zip(_fit(*both), (batch.boxes, batch.labels, batch.valid), strict=True)
    )
    return Batch(x, boxes, labels, valid, batch.fields, batch.types, batch.words)


def _fit(boxes: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pads or cuts to MAX_TARGETS boxes, valid ones first."""
    count = boxes.shape[1]
    if count < MAX_TARGETS:
        missing = MAX_TARGETS - count
        return F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing)), F.pad(valid, (0, missing))
    order = valid.float().sort(dim=1, descending=True, stable=True).indices[:, :MAX_TARGETS]
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order), valid.gather(1, order)


def join(batches: list[Batch]) -> Batch:
    """One batch of several."""
    return Batch(
        *(
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("x", "boxes", "labels", "valid", "fields", "types", "words")
        )
    )
