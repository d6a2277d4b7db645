"""Dense evidence -> a few items: the best boxes of each type, and the regions of CT class maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.detector import Dense, decode_boxes


@dataclass(frozen=True, slots=True)
class Items:
    """Evidence items of a batch, by falling score. B pictures, K items each; `score` is 0 where there is none."""

    boxes: Tensor  # [B, K, 4] pixels of the network's input
    types: Tensor  # [B, K] long: index of a box type, or of a map type
    scores: Tensor  # [B, K] probability, uncalibrated


def box_iou(a_N4: Tensor, b_M4: Tensor) -> Tensor:
    """IoU of every pair, `[..., N, M]`."""
    low = torch.maximum(a_N4[..., :, None, :2], b_M4[..., None, :, :2])
    high = torch.minimum(a_N4[..., :, None, 2:], b_M4[..., None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a = (a_N4[..., 2:] - a_N4[..., :2]).prod(-1)
    area_b = (b_M4[..., 2:] - b_M4[..., :2]).prod(-1)
    return inter / (area_a[..., :, None] + area_b[..., None, :] - inter).clamp(min=1e-7)


@torch.no_grad()
def select_boxes(
    dense: Dense,
    *,
    presence: float = 0.5,
    keep: int = 100,
    overlap: float = 0.5,
    candidates: int = 400,
    threshold: float = 0.005,
) -> Items:
    """Greedy non-maximum suppression within each type; a box that stays is the mean of those that it stands for.

    A score is the weighted geometric mean of what the anchor point says and of what the whole picture says about that
    type (`presence` is the weight of the latter).  The mean over the boxes of the same type that overlap by more than
    `overlap` is weighted by score and squared IoU, as in score voting (arXiv 2007.08103).
    Written here and not taken from torchvision because importing torchvision costs a cold process three seconds; a test
    holds what is suppressed equal.
    """
    point_BAT, picture_BT = dense.types_BAT.float().sigmoid(), dense.presence_BT.float().sigmoid()
    scores_BAT = point_BAT ** (1 - presence) * picture_BT[:, None] ** presence
    batch, anchors, types = scores_BAT.shape
    candidates = min(candidates, anchors * types)
    scores_BC, flat = scores_BAT.flatten(1).topk(candidates, 1)
    type_BC, anchor_BC = flat % types, flat // types
    expanded = anchor_BC[..., None, None].expand(-1, -1, *dense.distances_BA4R.shape[2:])
    distances = dense.distances_BA4R.gather(1, expanded)
    points = dense.points_A2[anchor_BC]
    boxes_BC4 = torch.cat(
        [decode_boxes(distances[b : b + 1], points[b], dense.strides_A[anchor_BC[b]]) for b in range(batch)]
    )
    iou_BCC = box_iou(boxes_BC4, boxes_BC4) * (type_BC[:, :, None] == type_BC[:, None, :])
    clash_BCC = (iou_BCC > overlap).triu(1)
    alive_BC = _survivors(scores_BC > threshold, clash_BCC)
    votes_BCC = iou_BCC.square() * (iou_BCC > overlap) * (scores_BC * (scores_BC > threshold))[:, None]
    voted_BC4 = (votes_BCC @ boxes_BC4) / votes_BCC.sum(-1, keepdim=True).clamp(min=1e-9)
    scores_BK, order = (scores_BC * alive_BC).topk(min(keep, candidates), 1)
    boxes_BK4 = voted_BC4.gather(1, order[..., None].expand(-1, -1, 4))
    return Items(boxes_BK4, type_BC.gather(1, order), scores_BK)


def _survivors(able_BC: Tensor, clash_BCC: Tensor) -> Tensor:
    """Who is left of candidates in falling order when each removes the later ones that it clashes with, `[B, C]` bool.

    One after another in other words: who clashes with no survivor before it. Each round settles at least one more of a
    chain of clashes; that nothing changes any more is asked of the device every few rounds only.
    """
    alive_BC, clash = able_BC, clash_BCC.float()
    while True:
        for _ in range(6):
            former = alive_BC
            alive_BC = able_BC & ((former.float()[:, None] @ clash)[:, 0] == 0)
        if torch.equal(alive_BC, former):
            return alive_BC


@torch.no_grad()
def select_regions(maps_BTHW: Tensor, side: tuple[int, int], *, keep: int | None = None, level: float = 0.5) -> Items:
    """The likeliest map types, each with the box around the part of its map above `level` of the map's range.

    All types unless `keep` says how many. `side` is the height and width of the network's input. The boxes are weak
    evidence: a class activation map shows what the logit rests on, not an outline.
    """
    probability_BT = maps_BTHW.mean((2, 3)).float().sigmoid()
    scores_BK, types_BK = probability_BT.topk(keep or probability_BT.shape[1], 1)
    _, _, rows, columns = maps_BTHW.shape
    chosen = maps_BTHW.float().gather(1, types_BK[..., None, None].expand(-1, -1, rows, columns))
    fine = F.interpolate(chosen, scale_factor=4, mode="bilinear", align_corners=False)
    low, high = fine.amin((2, 3), keepdim=True), fine.amax((2, 3), keepdim=True)
    hot = fine >= low + level * (high - low)

    def span(line: Tensor, length: int) -> tuple[Tensor, Tensor]:
        cell = length / line.shape[-1]
        first = line.float().argmax(-1) * cell
        last = length - line.flip(-1).float().argmax(-1) * cell
        return first, last

    x0, x1 = span(hot.any(2), side[1])
    y0, y1 = span(hot.any(3), side[0])
    return Items(torch.stack((x0, y0, x1, y1), -1), types_BK, scores_BK)
