"""What kind of image a DICOM file holds, by its header: original slices, what was made of them, or no CT at all."""

from __future__ import annotations

import re
from typing import Final, Literal

from pipelines.ingest.values import Item, image_type, text

CT_SOP_CLASSES: Final = frozenset(
    (
        "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
    )
)
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kinds, which begin alike
DOSE_REPORTS: Final = ("1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.88.68")  # X-ray, radionuclides
_MODALITIES: Final = "CR DX IO MG MR NM OT PR PT PX RF RTDOSE RTPLAN RTSTRUCT SEG SR US XA XC"
OTHER_MODALITIES: Final = frozenset(_MODALITIES.split())

# Attributes that only images of another modality have (PS3.3 C.8.9.1, C.8.3.1, C.8.11): some archives and workstations
# label such images as CT.
FOREIGN_ATTRIBUTES: Final = {
    "DecayCorrection": "PET",
    "EchoTime": "MR",
    "MagneticFieldStrength": "MR",
    "CompressionForce": "mammography or tomosynthesis",
}
LOCALIZERS: Final = frozenset(("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM", "SCANO", "SCOUT MODE"))
PROJECTIONS: Final = frozenset(("MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "VRT", "VOLREN", "SSD"))
REFORMATS: Final = frozenset(("MPR", "REFORMATTED", "CPR", "CURVED", "RESAMPLED", "AVERAGE", "CSA MPR", "MPVR"))
DOSE_WORDS: Final = re.compile(r"\b(dose|protocol|exam summary)\b", re.IGNORECASE)

Kind = Literal[
    "original",  # reconstructed from the scan itself
    "reformatted",  # planes through a volume: multiplanar, averaged
    "projection",  # MIP, MinIP, volume rendering
    "derived",  # any other image that was computed from images
    "localizer",
    "secondary-capture",
    "dose-report",
    "not-ct",
]


def kind_of(dataset: Item, sop_class: str, foreign: str) -> Kind:
    if sop_class in DOSE_REPORTS:
        return "dose-report"
    types = image_type(dataset)
    if sop_class.startswith(SECONDARY_CAPTURE):
        title = text(dataset, "SeriesDescription") + " " + text(dataset, "ProtocolName")
        return "dose-report" if DOSE_WORDS.search(title) else "secondary-capture"
    if "Rows" not in dataset or foreign:
        return "not-ct"
    if LOCALIZERS.intersection(types) or LOCALIZERS.intersection(text(dataset, "ScanOptions").upper().split("\\")):
        return "localizer"
    if PROJECTIONS.intersection(types):
        return "projection"
    if REFORMATS.intersection(types):
        return "reformatted"
    return "derived" if types[0] == "DERIVED" else "original"


def foreign(dataset: Item, sop_class: str) -> str:
    """In words what makes the image one of another modality than CT; "" for a CT image."""
    modality = text(dataset, "Modality")
    if modality != "CT" and (modality or sop_class not in CT_SOP_CLASSES):
        # a value that the standard does not define is not quoted
        return f"Its modality is {modality if modality in OTHER_MODALITIES else 'another one'}, not CT."
    for keyword, which in FOREIGN_ATTRIBUTES.items():
        if keyword in dataset and text(dataset, keyword):
            return f"It is labelled CT, but has attributes of {which}."
    breast = text(dataset, "BodyPartExamined").upper() == "BREAST" and text(dataset, "PositionerPrimaryAngle")
    maker = text(dataset, "Manufacturer").upper()
    if breast or maker.startswith("HOLOGIC") or any(each.startswith("TOMO") for each in image_type(dataset)):
        return "It is labelled CT, but is a tomosynthesis."
    return ""


def contrast_phase(dataset: Item) -> str:
    """The contrast phase, as far as the header tells: its words are looked up, never quoted."""
    title = " ".join(text(dataset, keyword) for keyword in ("SeriesDescription", "ProtocolName")).lower()
    for phase, words in CONTRAST_WORDS.items():
        if words.search(title):
            return phase
    return "contrast-enhanced" if text(dataset, "ContrastBolusAgent") else ""


CONTRAST_WORDS: Final = {
    "non-contrast": re.compile(r"\b(non[- ]?con\w*|native?|nativ|unenhanced|plain|without)\b|\bc-|w/o|sans inj"),
    "arterial": re.compile(r"\b(art|arterial\w*|arteriell\w*|angio|cta)\b"),
    "portal-venous": re.compile(r"\b(pv|pvp|portal\w*|portalven\w*)\b"),
    "venous": re.compile(r"\b(ven|venous|venos\w*|venös)\b"),
    "delayed": re.compile(r"\b(delay\w*|late|spaet|spät|tardi\w*|excretory|nephro\w*)\b"),
    "contrast-enhanced": re.compile(r"\b(contrast|enhanced|post|with|km|iv)\b|\bc\+"),
}
