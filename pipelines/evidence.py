"""Dense evidence of one product line -> its items: the same for reading a picture and for training on many."""

from __future__ import annotations

from encoders import Dense
from encoders.select import Items, select_boxes
from pipelines.inputs import PRESENCE
from reports.taxonomy import DEFECT_TYPES, LINE_OF_TYPE


def items_of(dense: Dense, line: str) -> Items:
    """Boxes by falling score; those of other lines' types have score 0."""
    items = select_boxes(dense, presence=PRESENCE[line])
    own_T = items.scores.new_tensor([LINE_OF_TYPE[name] == line for name in DEFECT_TYPES])
    scores_BK, order = (items.scores * own_T[items.types]).sort(dim=1, descending=True, stable=True)
    boxes_BK4 = items.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Items(boxes_BK4, items.types.gather(1, order), scores_BK)
