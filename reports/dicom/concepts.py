"""Report terms as coded concepts: SNOMED CT, DICOM and LOINC codes where one fits, else a private scheme.

Standard codes come from pydicom's tables of PS3.16, so that their meanings are the standard's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from highdicom.sr import CodedConcept
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from reports import taxonomy
from reports.dicom.text import line
from reports.schema import Code as ReportCode
from reports.schema import Finding
from reports.texts import words

SCHEME: Final = "99SCANSCRIBE"


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a measurement is of: a concept, how it was derived from many values, and the organ with its side."""

    concept: Code | CodedConcept
    derivation: Code | None = None
    site: Code | None = None
    side: Code | None = None


_QUANTITIES: Final[dict[str, Quantity]] = {  # by the name of the measurement
    "long axis": Quantity(codes.SCT.LongAxis),
    "short axis": Quantity(codes.SCT.ShortAxis),
    "length": Quantity(codes.SCT.Length),
    "width": Quantity(codes.SCT.Width),
    "area": Quantity(codes.SCT.Area),
    "volume": Quantity(codes.SCT.Volume),
    "bone volume": Quantity(codes.SCT.Volume, site=codes.SCT.Bone),
    "lung volume": Quantity(codes.SCT.Volume, site=codes.SCT.Lung, side=codes.SCT.RightAndLeft),
    "left lung volume": Quantity(codes.SCT.Volume, site=codes.SCT.Lung, side=codes.SCT.Left),
    "right lung volume": Quantity(codes.SCT.Volume, site=codes.SCT.Lung, side=codes.SCT.Right),
    "water-equivalent diameter": Quantity(codes.DCM.WaterEquivalentDiameter),
    "mean attenuation": Quantity(codes.DCM.AttenuationCoefficient, codes.SCT.Mean),
    "spread of attenuation": Quantity(codes.DCM.AttenuationCoefficient, codes.SCT.StandardDeviation),
    "lowest attenuation": Quantity(codes.DCM.AttenuationCoefficient, codes.SCT.Minimum),
    "highest attenuation": Quantity(codes.DCM.AttenuationCoefficient, codes.SCT.Maximum),
    "mean lung density": Quantity(
        codes.DCM.AttenuationCoefficient, codes.SCT.Mean, codes.SCT.Lung, codes.SCT.RightAndLeft
    ),
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
_ENGLISH: Final = words("en")  # meanings stay English in every language of the report, as those of the standards are
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
    return coded(finding.code) if finding.code else private(finding.type, _ENGLISH.term("type", finding.type))


def quantity(name: str) -> Quantity:
    """What the measurement called `name` is of."""
    return _QUANTITIES.get(name) or Quantity(private(name, name))


def unit(ucum: str) -> CodedConcept:
    """A unit of the UCUM, which DICOM uses throughout (PS3.16 CID 82)."""
    value = line(ucum) or "1"
    return CodedConcept(value, "UCUM", _UNITS.get(value, value))


def field(name: str) -> CodedConcept:
    return CodedConcept.from_code(_FIELDS[name]) if name in _FIELDS else private(name, _ENGLISH.term("field", name))


def field_value(name: str, value: str) -> CodedConcept:
    if value == taxonomy.UNDETERMINED:
        return CodedConcept.from_code(codes.SCT.Undetermined)
    known = _VALUES.get(name, {}).get(value)
    return CodedConcept.from_code(known) if known else private(value, _ENGLISH.term(name, value))


def language(tag: str) -> CodedConcept:
    return CodedConcept(tag, "RFC5646", LANGUAGES[tag])
