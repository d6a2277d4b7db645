"""What is measured of one finding: the outline inside its evidence box where there is a distinct one, else the box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from pipelines import inputs
from pipelines.measures.outline import Outline, axes, find_outline, least_rectangle
from pipelines.study import ImageStudy
from reports import measurements
from reports.measurements import OUTLINE, PIXEL, Box, Scale, box_sides, what_is_measured
from reports.schema import Measurement

LEAST_HU: Final = 20.0  # less contrast is no outline, however quiet the image
LEAST_GREY: Final = 12 / 255  # the same for photos, as a share of the grey levels in use


def measure_lesion(study: ImageStudy, bbox: Box, slice_index: int, *, weak: bool) -> tuple[Measurement, ...]:
    """Axes in mm where the scale is known, and HU where there are any, on the slice of the evidence."""
    spacing = study.geometry.spacing_mm
    found: tuple[Measurement, ...] = ()
    values = study.pixels[slice_index]
    if spacing:
        outline = None if weak else find_outline(values, bbox, least_contrast=_least_contrast(study, values))
        found = _axes(outline, bbox, spacing, weak=weak)
    if study.units == "HU":
        found += measurements.box_hounsfield(bbox, values, weak=weak)
    return found


def measure_defect(
    study: ImageStudy, bbox: Box, others: Sequence[Box], *, weak: bool, reference: ImageStudy | None = None
) -> tuple[Measurement, ...]:
    """Length, width and area, and distances, in pixels and in mm where the scale is known.

    `others` are the boxes of the other findings.  An outline is what differs from a golden sample of the same size,
    where there is one, else from the surroundings of the box.
    """
    values = study.pixels[0]
    height, width = values.shape[:2]
    golden = reference.pixels[0] if reference and reference.pixels.shape[1:3] == (height, width) else None
    outline = None
    if not weak:
        outline = find_outline(values, bbox, least_contrast=_least_contrast(study, values), reference=golden)
    scales: list[Scale] = [(PIXEL, (1.0, 1.0))]
    if study.geometry.spacing_mm:
        scales.append(("mm", study.geometry.spacing_mm))
    what = OUTLINE if outline else what_is_measured(weak=weak)
    found: list[Measurement] = []
    for unit, spacing in scales:
        length, wide = least_rectangle(outline, spacing) if outline else box_sides(bbox, spacing)
        area = outline.pixels if outline else (bbox[2] - bbox[0]) * (bbox[3] - bbox[1])
        rectangle = f"side of the least rectangle around {what}" if outline else f"side of {what}"
        found += [
            Measurement(name="length", value=length, unit=unit, method=f"long {rectangle}"),
            Measurement(name="width", value=wide, unit=unit, method=f"short {rectangle}"),
            Measurement(
                name="area",
                value=area * spacing[0] * spacing[1],
                unit="mm2" if unit == "mm" else unit,
                method=f"area of {what}",
            ),
        ]
    found.append(measurements.box_share(bbox, width, height, weak=weak))
    for unit, spacing in scales:
        found.append(measurements.edge_distance(bbox, width, height, (unit, spacing)))
        if others:
            found.append(measurements.nearest_distance(bbox, others, (unit, spacing)))
    return tuple(found)


def _axes(
    outline: Outline | None, bbox: Box, spacing: tuple[float, float], *, weak: bool
) -> tuple[Measurement, Measurement]:
    if outline is None:
        long, short = box_sides(bbox, spacing)
        how = tuple(f"{side} side of {what_is_measured(weak=weak)}, by pixel spacing" for side in ("long", "short"))
    else:
        long, short = axes(outline, spacing)
        how = (f"longest diameter of {OUTLINE}", f"largest extent of {OUTLINE} at right angles to its longest diameter")
    # A region of attention is much larger than what drew it: its size must not pass for the finding's.
    of_what = " of the marked region" if weak else ""
    return (
        Measurement(name=f"long axis{of_what}", value=long, unit="mm", method=how[0]),
        Measurement(name=f"short axis{of_what}", value=short, unit="mm", method=how[1]),
    )


def _least_contrast(study: ImageStudy, values: np.ndarray) -> float:
    if study.units == "HU":
        return LEAST_HU
    if values.dtype == np.uint8:
        return LEAST_GREY * 255
    low, high = inputs.grey_range(values[:: max(1, values.shape[0] // 512), :: max(1, values.shape[1] // 512)])
    return LEAST_GREY * (high - low)
