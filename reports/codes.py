"""SNOMED CT codes of the CT finding types. Industrial defects have no international code system and carry none.

A type stands here only when one concept covers all of it: `thrombus-or-embolus` is neither the one nor the other, so it
has no code rather than a wrong one.
"""

from __future__ import annotations

from typing import Final

from reports.schema import Code

# Concept ids and preferred terms of the international edition; most stand in the context groups of DICOM PS3.16.
_SNOMED: Final[dict[str, tuple[str, str]]] = {
    "mass-or-lesion": ("52988006", "Lesion"),  # a mass is a lesion
    "calcification": ("18115005", "Pathologic calcification"),
    "cyst": ("367643001", "Cyst"),
    "inflammation": ("409774005", "Inflammation"),
    "adenopathy": ("30746006", "Lymphadenopathy"),
    "nodule": ("27925004", "Nodule"),
    "fracture": ("125605004", "Fracture of bone"),
    "effusion": ("41699000", "Effusion"),
    "hemorrhage": ("50960005", "Hemorrhage"),
    "atelectasis": ("46621007", "Atelectasis"),
    "stone": ("56381008", "Calculus"),
    "laceration-or-injury": ("417746004", "Traumatic injury"),  # a laceration is an injury
}


def code_of(finding_type: str) -> Code | None:
    """The SNOMED CT code of a finding type, or None when no single concept covers it."""
    if finding_type not in _SNOMED:
        return None
    value, meaning = _SNOMED[finding_type]
    return Code(value=value, scheme="SCT", meaning=meaning)
