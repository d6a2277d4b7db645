"""The closed terms of a report: product lines, finding types, CT fields. The one place where they are listed.

Their SNOMED CT codes, where one concept covers the term, are in `reports/codes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KINDS: Final = ("ct", "defect")


@dataclass(frozen=True, slots=True)
class ProductLine:
    """One line of inspected products."""

    name: str
    title: str
    types: tuple[str, ...]


PRODUCT_LINES: Final = (
    ProductLine(
        "steel",
        "hot-rolled steel strip",
        ("crazing", "inclusion", "patches", "pitted-surface", "rolled-in-scale", "scratches"),
    ),
    ProductLine("tile", "ferrite magnetic tile", ("blowhole", "break", "crack", "fray", "uneven")),
    ProductLine("board", "bare printed circuit board", ("open", "short", "mousebite", "spur", "copper", "pin-hole")),
)
LINES: Final = tuple(line.name for line in PRODUCT_LINES)
DEFECT_TYPES: Final = tuple(t for line in PRODUCT_LINES for t in line.types)
LINE_OF_TYPE: Final = {t: line.name for line in PRODUCT_LINES for t in line.types}

CT_TYPES: Final = (
    "mass-or-lesion",
    "wall-thickening",
    "obstruction-or-dilatation",
    "calcification",
    "opacity",
    "cyst",
    "inflammation",
    "thrombus-or-embolus",
    "adenopathy",
    "nodule",
    "abscess-or-collection",
    "hernia",
    "fracture",
    "effusion",
    "hemorrhage",
    "aneurysm-or-dissection",
    "atelectasis",
    "stone",
    "laceration-or-injury",
    "free-air",
    "emphysema-or-bulla",
)

CT_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "region": ("abdomen", "chest", "head-and-neck", "pelvis-and-urinary", "musculoskeletal"),
    "plane": ("axial", "coronal", "sagittal"),
    "contrast": ("none", "iv", "iv-and-oral", "oral"),
    "laterality": ("unspecified", "right", "left", "bilateral"),
    "covid19": ("false", "true"),
}
UNDETERMINED: Final = "undetermined"
# Narrower or other words in which a report may name a finding of a type; a type without any has its one noun.
WORDS_OF_TYPE: Final[dict[str, tuple[str, ...]]] = {
    "mass-or-lesion": ("mass", "lesion"),
    "obstruction-or-dilatation": ("obstruction", "dilatation"),
    "opacity": ("infiltrate", "ground-glass-opacity"),
    "inflammation": ("stranding",),
    "thrombus-or-embolus": ("thrombus", "embolus"),
    "adenopathy": ("enlarged-lymph-nodes",),
    "abscess-or-collection": ("abscess", "collection"),
    "hemorrhage": ("hematoma",),
    "aneurysm-or-dissection": ("aneurysm", "dissection"),
    "stone": ("calculus",),
}
TYPE_OF_WORD: Final = {word: name for name, words in WORDS_OF_TYPE.items() for word in words}


def title(term: str) -> str:
    """A term as people write it: `mass-or-lesion` -> `mass or lesion`."""
    return "pin-hole" if term == "pin-hole" else term.replace("-", " ")


def line(name: str) -> ProductLine:
    """The product line called `name`; raises KeyError."""
    for candidate in PRODUCT_LINES:
        if candidate.name == name:
            return candidate
    raise KeyError(name)
