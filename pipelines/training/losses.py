"""Losses of the evidence head: task-aligned assignment, IoU, distribution focal and classification terms.

Every shape is static and nothing waits for the device, so that a whole training step can be one CUDA graph.
Shapes: B batch, A anchor points, M labelled boxes (padded), T types, R distance bins.
Sources: TOOD (arXiv 2108.07755) for the assignment, CIoU (arXiv 1911.08287), DFL (arXiv 2006.04388).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.detector import Dense, decode_boxes

TOP_K = 10  # anchor points assigned to a labelled box
ALPHA, BETA = 0.5, 6.0  # exponents of score and IoU in the alignment
WEIGHTS = {"iou": 7.5, "types": 0.5, "distances": 1.5}


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes `[..., 4]` and `[..., 4]` (broadcast)."""
    wa, ha = (a[..., 2] - a[..., 0]).clamp(min=1e-3), (a[..., 3] - a[..., 1]).clamp(min=1e-3)
    wb, hb = (b[..., 2] - b[..., 0]).clamp(min=1e-3), (b[..., 3] - b[..., 1]).clamp(min=1e-3)
    iw = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    ih = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)
    inter = iw * ih
    iou = inter / (wa * ha + wb * hb - inter + 1e-7)
    hull_w = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    hull_h = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    dx = a[..., 0] + a[..., 2] - b[..., 0] - b[..., 2]
    dy = a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]
    distance = (dx * dx + dy * dy) / 4 / (hull_w * hull_w + hull_h * hull_h + 1e-7)
    shape = 4 / math.pi**2 * (torch.atan(wb / hb) - torch.atan(wa / ha)).square()
    with torch.no_grad():
        weight = shape / (1 - iou + shape + 1e-7)
    return iou - distance - weight * shape


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """`torch.nn.functional.one_hot` looks at the values on the host, which a CUDA graph cannot."""
    return (index[..., None] == torch.arange(classes, device=index.device)).float()


@torch.no_grad()
def assign(
    scores_BAT: Tensor, boxes_BA4: Tensor, points_A2: Tensor, labels_BM: Tensor, truth_BM4: Tensor, valid_BM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchor point answers for which labelled box.

    Returns the assigned box's index `[B, A]`, whether there is one `[B, A]` (float) and the soft score that the
    point's type logit should reach `[B, A]`.
    """
    inside = torch.minimum(
        (points_A2 - truth_BM4[:, :, None, :2]).amin(-1), (truth_BM4[:, :, None, 2:] - points_A2).amin(-1)
    )
    candidate_BMA = (inside > 1e-6) & valid_BM[:, :, None]
    score_BMA = scores_BAT.gather(2, labels_BM[:, None, :].expand(-1, scores_BAT.shape[1], -1)).transpose(1, 2)
    iou_BMA = ciou(truth_BM4[:, :, None], boxes_BA4[:, None]).clamp(min=0)
    aligned_BMA = (score_BMA**ALPHA * iou_BMA**BETA) * candidate_BMA
    top = aligned_BMA.topk(TOP_K, -1)
    chosen_BMA = torch.zeros_like(aligned_BMA).scatter_(-1, top.indices, (top.values > 1e-9).to(aligned_BMA.dtype))
    chosen_BMA = chosen_BMA * candidate_BMA
    # A point wanted by several boxes goes to the one that it overlaps most.
    owner_BA = iou_BMA.masked_fill(chosen_BMA == 0, -1).argmax(1)
    has_BA = chosen_BMA.amax(1)
    mine_BMA = _one_hot(owner_BA, truth_BM4.shape[1]).transpose(1, 2) * chosen_BMA
    aligned_BMA = aligned_BMA * mine_BMA
    peak_BM1 = aligned_BMA.amax(-1, keepdim=True)
    overlap_BM1 = (iou_BMA * mine_BMA).amax(-1, keepdim=True)
    soft_BA = (aligned_BMA * overlap_BM1 / (peak_BM1 + 1e-9)).amax(1)
    return owner_BA, has_BA, soft_BA


def evidence_loss(
    dense: Dense, labels_BM: Tensor, truth_BM4: Tensor, valid_BM: Tensor, boxless_BT: Tensor | None = None
) -> Tensor:
    """The weighted sum of the three terms, per assigned score; `truth` in pixels of the network's input.

    `boxless` is 1 for a type that the picture shows without a box: nothing is learned there about where it is.
    """
    logits_BAT, distances_BA4R = dense.types_BAT.float(), dense.distances_BA4R.float()
    boxes_BA4 = decode_boxes(distances_BA4R, dense.points_A2, dense.strides_A)
    owner_BA, has_BA, soft_BA = assign(
        logits_BAT.detach().sigmoid(), boxes_BA4.detach(), dense.points_A2, labels_BM, truth_BM4, valid_BM
    )
    total = soft_BA.sum().clamp(min=1)
    label_BA = labels_BM.gather(1, owner_BA)
    target_BAT = _one_hot(label_BA, logits_BAT.shape[-1]) * soft_BA[..., None]
    weight_B1T = None if boxless_BT is None else 1 - boxless_BT[:, None]
    types = F.binary_cross_entropy_with_logits(logits_BAT, target_BAT, weight_B1T, reduction="sum") / total

    truth_BA4 = truth_BM4.gather(1, owner_BA[..., None].expand(-1, -1, 4))
    weight_BA = soft_BA * has_BA
    iou = ((1 - ciou(boxes_BA4, truth_BA4)) * weight_BA).sum() / total

    bins = distances_BA4R.shape[-1]
    sides_BA4 = torch.cat((dense.points_A2 - truth_BA4[..., :2], truth_BA4[..., 2:] - dense.points_A2), -1)
    sides_BA4 = (sides_BA4 / dense.strides_A[:, None]).clamp(0, bins - 1.01)
    low = sides_BA4.floor()
    log_p = distances_BA4R.log_softmax(-1)
    low_p, high_p = (log_p.gather(-1, (low.long() + step)[..., None])[..., 0] for step in (0, 1))
    spread = -(low_p * (low + 1 - sides_BA4) + high_p * (sides_BA4 - low)).mean(-1)
    distances = (spread * weight_BA).sum() / total
    return WEIGHTS["types"] * types + WEIGHTS["iou"] * iou + WEIGHTS["distances"] * distances


def presence_loss(logits_BT: Tensor, labels_BM: Tensor, valid_BM: Tensor, boxless_BT: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each type being on the picture, with a box or without, summed over types, mean over
    pictures."""
    present_BT = torch.zeros_like(logits_BT, dtype=torch.float32) if boxless_BT is None else boxless_BT
    present_BT = present_BT.scatter_add(1, labels_BM, valid_BM.float()).clamp(max=1)
    return F.binary_cross_entropy_with_logits(logits_BT.float(), present_BT, reduction="none").sum(1).mean()


def field_loss(fields: dict[str, Tensor], truth_BF: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy summed over fields, each the mean over the pictures whose value is known (-1: unknown)."""
    total = truth_BF.new_zeros((), dtype=torch.float32)
    for i, logits in enumerate(fields.values()):
        truth_B = truth_BF[:, i]
        each = F.cross_entropy(logits.float(), truth_B.clamp(min=0), reduction="none", label_smoothing=smoothing)
        known = (truth_B >= 0).float()
        total = total + (each * known).sum() / known.sum().clamp(min=1)
    return total


def type_loss(logits_BT: Tensor, truth_BT: Tensor) -> Tensor:
    """Binary cross-entropy over the finding types, mean over what is labelled (-1: not labelled)."""
    known = (truth_BT >= 0).float()
    each = F.binary_cross_entropy_with_logits(logits_BT.float(), truth_BT.clamp(min=0), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)
