"""What the encoder found, as tokens in the decoder's space: one for each evidence item, one for all field logits.

Shapes: B batch, K evidence slots, F field logits in all, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOX_FREQUENCIES = 6


def box_code(boxes_BK4: Tensor) -> Tensor:
    """Sine and cosine codes of boxes in 0..1, unit scale: `[B, K, 8 * BOX_FREQUENCIES]`."""
    frequency = torch.pi * 2.0 ** torch.arange(BOX_FREQUENCIES, device=boxes_BK4.device)
    angle = (boxes_BK4[..., None] * frequency).flatten(-2)
    return torch.cat((angle.sin(), angle.cos()), -1)


class EvidenceTokens(nn.Module):
    """An item's token: its pointer's and its type's embedding, and a code of its box and score."""

    def __init__(self, width: int, fields: int) -> None:
        super().__init__()
        self.item = nn.Sequential(nn.Linear(8 * BOX_FREQUENCIES + 3, width), nn.GELU(), nn.Linear(width, width))
        self.empty = nn.Parameter(torch.zeros(width))
        self.fields = nn.Linear(fields, width)

    def forward(
        self, fields_BF: Tensor, boxes_BK4: Tensor, scores_BK: Tensor, types_BKD: Tensor, pointers_KD: Tensor
    ) -> Tensor:
        """`[B, 1 + K, D]`.

        `fields_BF` are log-probabilities, `boxes` are shares of the picture's sides, `types` and `pointers` rows of the
        embedding table. A slot with score 0 is empty.
        """
        logit = torch.logit(scores_BK.clamp(1e-4, 1 - 1e-4))[..., None]
        area = ((boxes_BK4[..., 2] - boxes_BK4[..., 0]) * (boxes_BK4[..., 3] - boxes_BK4[..., 1]))[..., None]
        features = torch.cat((box_code(boxes_BK4), logit / 4, scores_BK[..., None], area.clamp(1e-6).log() / 4), -1)
        items = self.item(features) + types_BKD
        items = torch.where((scores_BK > 0)[..., None], items, self.empty.to(items.dtype)) + pointers_KD
        return torch.cat((self.fields(fields_BF)[:, None], items), 1)
