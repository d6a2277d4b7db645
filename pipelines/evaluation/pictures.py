"""The images of an evaluation, read as a user's images are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines import ingest
from pipelines.inputs import SOFT_TISSUE, grey8, window
from pipelines.study import ImageStudy, Rejection


def load(image: Path) -> ImageStudy | Rejection:
    """The one image of a file."""
    plan = ingest.plan([image])
    if plan.rejections:
        return plan.rejections[0]
    if len(plan.units) != 1:
        reason = f"The file holds {len(plan.units)} images."
        return Rejection(str(image), "not-one-image", reason, "Give each case a file with one image.")
    return ingest.load(plan.units[0])


def grey(study: ImageStudy) -> np.ndarray:
    """The middle slice as a person sees it, `[H, W]` uint8."""
    middle = study.pixels[len(study.pixels) // 2]
    return window(middle, *(study.window or SOFT_TISSUE)) if study.units == "HU" else grey8(middle)
