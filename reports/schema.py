"""The report object (pydantic). Its JSON Schema is published as `reports/report.schema.json`.

Title, descriptions, impression, what was not assessed and the disclaimer are in the report's language
(`reports/texts.py` makes them). Types, zones, severities, names and methods of measurements are closed terms, in
English whatever the language.

Every renderer and exporter reads this one object; nothing else carries report content. A report never says
"normal" for what was not assessed: what was not looked at stands in `not_assessed`.
After a change, `python -m reports.schema` writes the published schema anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = "1.0"
SCHEMA_PATH: Final = Path(__file__).with_name("report.schema.json")

Confidence = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ReportId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Point = tuple[float, float, float]


class Record(BaseModel):
    """Base of all parts: unknown keys are an error, values are fixed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Code(Record):
    """A coded concept (DICOM's triplet)."""

    value: str
    scheme: str = Field(description="coding scheme designator as DICOM writes it: SCT, RADLEX, UCUM")
    meaning: str


class SourceInput(Record):
    """One input file or frame."""

    name: str
    sha256: Sha256
    media_type: str
    page: int | None = None
    sop_instance_uid: str | None = None


class Source(Record):
    name: str = Field(default="", description="short name of the study or picture, for its title")
    inputs: Annotated[tuple[SourceInput, ...], Field(min_length=1)]
    reference: SourceInput | None = Field(
        default=None, description="the golden sample that the image was compared with"
    )
    study_uid: str | None = None
    series_uid: str | None = None
    accession: str | None = None
    lot: str | None = None
    part: str | None = None
    serial: str | None = None
    read_from: dict[str, str] = Field(
        default_factory=dict, description="document, file or folder that accession, lot, part and serial stood in"
    )


class ContextNote(Record):
    """What a document beside the images says, in its own words: quoted, never interpreted."""

    text: str
    kind: Literal["request", "prior-report", "inspection-sheet", "text"]
    name: str = Field(description="the document's name")
    sha256: Sha256
    page: int | None = Field(default=None, description="0-based")


class Segment(Record):
    """A mask over the whole study, kept beside the report (`parts/segments.npz`)."""

    id: str
    title: str
    code: Code | None = None
    method: str


class FieldValue(Record):
    """One categorical field with the calibrated probability of each value."""

    value: str
    confidence: Confidence
    probabilities: dict[str, Confidence]


class Technique(Record):
    """How the image was made, as far as it can be known."""

    region: FieldValue | None = None
    plane: FieldValue | None = None
    contrast: FieldValue | None = None
    slice_count: int | None = None
    slices_read: tuple[int, ...] = ()
    spacing_mm: tuple[float, float] | None = None
    slice_spacing_mm: float | None = None
    slice_thickness_mm: float | None = None
    kernel: str | None = None
    windows: tuple[str, ...] = ()
    contrast_agent: str | None = Field(default=None, description="what the file's header says")
    body_part: str | None = Field(default=None, description="what the file's header says")
    product_line: str | None = None
    image_size_px: tuple[int, int] = Field(description="width, height")
    read_from: dict[str, Literal["model", "header", "geometry", "user"]] = Field(
        default_factory=dict, description="where each field comes from, by its name; what is not named was counted"
    )


class Evidence(Record):
    """Where on which image the finding is seen."""

    input_index: int = Field(ge=0, description="index into source.inputs")
    slice_index: int = Field(ge=0)
    sop_instance_uid: str | None = None
    bbox: tuple[float, float, float, float] = Field(
        description="x0, y0, x1, y1 in pixels of the image, from its upper left corner; x1, y1 exclusive"
    )
    bbox_mm: tuple[Point, Point] | None = Field(
        default=None,
        description="the box's first and last corner (outer pixel edges) in patient coordinates (LPS, mm), CT only",
    )
    localisation: Literal["box", "weak"] = Field(description="box: detected; weak: region of a class activation map")


class Measurement(Record):
    name: str
    value: float
    unit: str = Field(description="UCUM")
    method: str


class Finding(Record):
    id: str = Field(description="F1, F2, ... in the order of the report")
    type: str
    word: str | None = Field(
        default=None, description="how the text names the finding, a term of `reports.taxonomy.WORDS_OF_TYPE`"
    )
    code: Code | None = None
    description: str
    location: str | None = Field(default=None, description="the zone of the image, a term of `reports.grammar.ZONES`")
    extent: Literal["small", "medium", "large"] | None = None
    laterality: str | None = None
    evidence: tuple[Evidence, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    severity: Literal["critical", "major", "minor"] | None = None
    confidence: Confidence


class NotAssessed(Record):
    """Something that the report says nothing about. `code` and `values` say it for machines and for other languages."""

    what: str
    reason: str
    code: str = ""
    values: dict[str, str | int | float | tuple[str, ...]] = Field(default_factory=dict)

    @classmethod
    def of(cls, code: str, **values: str | int | float | tuple[str, ...]) -> NotAssessed:
        """By its code alone; `reports.texts` has the words."""
        return cls(what="", reason="", code=code, values=values)


class ModelInfo(Record):
    name: str
    version: str
    weights_sha256: Sha256
    config_sha256: Sha256
    device: str


class Report(Record):
    """One draft report about one study or photo."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    id: ReportId
    kind: Literal["ct", "defect"]
    status: Literal["preliminary"] = "preliminary"
    created: AwareDatetime
    language: Literal["en", "zh-CN"] = "en"
    version: Annotated[int, Field(ge=1)] = 1
    title: str
    source: Source
    context: tuple[ContextNote, ...] = ()
    technique: Technique
    fields: dict[str, FieldValue] = Field(
        default_factory=dict, description="fields that are not technique: laterality, covid19"
    )
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = Field(default=(), description="of the whole image or study")
    segments: tuple[Segment, ...] = ()
    impression: str
    disposition: Literal["accept", "rework", "reject", "hold"] | None = None
    disposition_rule: str | None = Field(default=None, description="the rule that gave severity and disposition")
    not_assessed: tuple[NotAssessed, ...] = ()
    quality_flags: tuple[str, ...] = ()
    supersedes: ReportId | None = None
    superseded_by: ReportId | None = Field(
        default=None,
        description="the report that replaced this one, where its folder says so; never in report.json, which stays as "
        "it was",
    )
    model: ModelInfo
    timing_s: dict[str, float] = Field(default_factory=dict)
    disclaimer: str = "Draft made by software for review by a qualified person. Not for diagnosis."


def json_schema() -> str:
    """The published JSON Schema of a report, as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Report.model_json_schema()
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json_schema(), encoding="utf-8")
    print(f"wrote {SCHEMA_PATH}")
