"""Report terms as coded concepts: SNOMED CT, DICOM and LOINC codes where one fits, else a private scheme.

Standard codes come from pydicom's tables of PS3.16, so that their meanings are the standard's own.
"""

from __future__ import annotations

import hashlib
from typing import Final

from highdicom.sr import CodedConcept
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from reports import taxonomy
from reports.dicom.text import line
from reports.schema import Code as ReportCode
from reports.schema import Finding

SCHEME: Final = "99SCANSCRIBE"

# Name of a measurement -> (what is measured, how it was derived from many values).
_MEASUREMENTS: Final[dict[str, tuple[Code, Code | None]]] = {
    "long axis": (codes.SCT.LongAxis, None),
    "short axis": (codes.SCT.ShortAxis, None),
    "length": (codes.SCT.Length, None),
    "width": (codes.SCT.Width, None),
    "area": (codes.SCT.Area, None),
    "volume": (codes.SCT.Volume, None),
    "water-equivalent diameter": (codes.DCM.WaterEquivalentDiameter, None),
    "mean attenuation": (codes.DCM.AttenuationCoefficient, codes.SCT.Mean),
    "spread of attenuation": (codes.DCM.AttenuationCoefficient, codes.SCT.StandardDeviation),
    "lowest attenuation": (codes.DCM.AttenuationCoefficient, codes.SCT.Minimum),
    "highest attenuation": (codes.DCM.AttenuationCoefficient, codes.SCT.Maximum),
}
_UNITS: Final = {
    "1": "no units",
    "%": "percent",
    "mm": "millimeter",
    "cm": "centimeter",
    "mm2": "square millimeter",
    "mm3": "cubic millimeter",
    "cm3": "cubic centimeter",
    "mL": "milliliter",
    "{pixel}": "pixels",
    "[hnsf'U]": "Hounsfield unit",
}
_FIELDS: Final[dict[str, Code]] = {"region": codes.DCM.TargetRegion, "laterality": codes.SCT.Laterality}
REGIONS: Final[dict[str, Code]] = {
    "abdomen": codes.SCT.Abdomen,
    "chest": codes.SCT.Chest,
    "head-and-neck": codes.SCT.HeadAndNeck,
}
SIDES: Final[dict[str, Code]] = {
    "right": codes.SCT.Right,
    "left": codes.SCT.Left,
    "bilateral": codes.SCT.RightAndLeft,
}
_VALUES: Final[dict[str, dict[str, Code]]] = {"region": REGIONS, "laterality": SIDES}
LANGUAGES: Final = {"en": "English", "zh-CN": "Chinese, simplified"}


def private(value: str, meaning: str = "") -> CodedConcept:
    """A concept of the product's own scheme; its value is the term itself."""
    return CodedConcept(_value(value), SCHEME, line(meaning) or line(taxonomy.title(value)) or "unspecified")


def coded(code: ReportCode) -> CodedConcept:
    """A code that the report carries."""
    value = _value(code.value)
    return CodedConcept(value, line(code.scheme, 16) or SCHEME, line(code.meaning) or value)


def _value(term: str) -> str:
    """A code value, which is ASCII whatever the term: the meaning beside it says the term to people."""
    value = line(term) or "unspecified"
    return value if value.isascii() else f"term-{hashlib.sha256(term.encode('utf-8', 'replace')).hexdigest()[:11]}"


def finding_type(finding: Finding) -> CodedConcept:
    return coded(finding.code) if finding.code else private(finding.type)


def measurement(name: str) -> tuple[CodedConcept, Code | None]:
    """(what is measured, its derivation)."""
    if name in _MEASUREMENTS:
        concept, derivation = _MEASUREMENTS[name]
        return CodedConcept.from_code(concept), derivation
    return private(name), None


def unit(ucum: str) -> CodedConcept:
    """A unit of the UCUM, which DICOM uses throughout (PS3.16 CID 82)."""
    value = line(ucum) or "1"
    return CodedConcept(value, "UCUM", _UNITS.get(value, value))


def field(name: str) -> CodedConcept:
    return CodedConcept.from_code(_FIELDS[name]) if name in _FIELDS else private(name)


def field_value(name: str, value: str) -> CodedConcept:
    if value == taxonomy.UNDETERMINED:
        return CodedConcept.from_code(codes.SCT.Undetermined)
    known = _VALUES.get(name, {}).get(value)
    return CodedConcept.from_code(known) if known else private(value)


def language(tag: str) -> CodedConcept:
    return CodedConcept(tag, "RFC5646", LANGUAGES[tag])
