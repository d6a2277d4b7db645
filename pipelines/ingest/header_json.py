"""A DICOM header as the DICOM JSON model (PS3.18 Annex F), for objects that are derived from a series."""

from __future__ import annotations

import json
from typing import Any, Final

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

MAX_VALUE_CHARACTERS: Final = 1024  # of one element in JSON; longer ones are bulk data
CHARACTER_SET: Final = "00080005"
# Positions of single frames stand in the study's geometry; thousands of frames would make megabytes of JSON.
PER_FRAME_GROUPS: Final = tag_for_keyword("PerFrameFunctionalGroupsSequence")


def header_json(dataset: Dataset) -> dict[str, Any]:
    """The public attributes of `dataset` (file meta information apart) that are neither pixels nor bulk data.

    Elements whose value breaks the rules of its VR are left out, so that the result is always valid JSON.
    """
    header = {}
    for tag in dataset.keys():  # noqa: SIM118 - iterating the data set itself would decode every element
        if _is_wanted(tag) and (element := _element_json(dataset, tag)) is not None:
            header[f"{tag:08X}"] = element
    if CHARACTER_SET in header:  # JSON is Unicode, whatever the file was written in
        header[CHARACTER_SET] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    return header


def _is_wanted(tag: BaseTag) -> bool:
    curves_overlays_pixels = tag.group >> 8 in (0x50, 0x60) or tag.group == 0x7FE0
    return not (tag.is_private or tag.element == 0 or curves_overlays_pixels or tag == PER_FRAME_GROUPS)


def _element_json(dataset: Dataset, tag: BaseTag) -> dict[str, Any] | None:
    try:
        element = dataset[tag]
        if element.VR == "SQ":
            return {"vr": "SQ", "Value": [header_json(item) for item in element.value]}
        described = element.to_json_dict(None, MAX_VALUE_CHARACTERS)
        return described if len(json.dumps(described, allow_nan=False)) <= MAX_VALUE_CHARACTERS else None
    except Exception:  # pydicom meets values that break their VR with errors of many types
        return None
