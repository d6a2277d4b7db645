"""What the model says about a study, before it becomes a report: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from reports.grammar import Draft, DraftFinding
from reports.taxonomy import PRODUCT_LINES, ProductLine

OUT_OF_DOMAIN: Final = "out-of-domain"  # the quality flag of a study unlike those that the model was trained on
ADAPTED_LINE: Final = "adapted-line"  # of a picture of a line that an adapter brought, of which no decoder writes


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model read the study: enough to find the same weights and configuration again."""

    name: str
    version: str
    weights_sha256: str  # of the weights file's bytes, lower-case hex
    config_sha256: str  # of the configuration file's bytes
    device: str  # "cpu", "cuda:0": where it ran; two devices are the same model


@dataclass(frozen=True, slots=True)
class FieldReading:
    """One categorical field (region, plane, contrast, laterality, covid19)."""

    value: str  # the chosen value, or "undetermined"
    probabilities: dict[str, float]  # calibrated, sums to 1 over the field's values
    raw_probabilities: dict[str, float] = field(default_factory=dict)  # as the network gave them; empty: not kept


@dataclass(frozen=True, slots=True)
class FindingReading:
    """One finding, with its evidence box."""

    type: str  # a type of `reports.taxonomy`, or of an owner's line
    bbox: tuple[
        float, float, float, float
    ]  # x0, y0, x1, y1 in the image's own pixels (continuous, x1 and y1 exclusive)
    slice_index: int  # index into `ImageStudy.pixels`
    confidence: float  # calibrated probability that the finding is right
    reported: bool  # True: the decoder put it in the report; False: a candidate that stays below the line
    localisation: str  # "box" (detected) or "weak" (region of a class activation map)
    location: str = ""  # words written by the decoder, e.g. "upper left"
    extent: str = ""  # e.g. "small", "large"
    raw_confidence: float | None = None  # the network's score before calibration; None: not kept
    word: str = ""  # the decoder's word for it, of `reports.taxonomy.WORDS_OF_TYPE`; empty: the type's own noun


@dataclass(frozen=True, slots=True)
class Reading:
    """All that the model says about one study."""

    kind: str  # "ct" | "defect"
    kind_confidence: float
    product_line: str | None  # for defects: "steel", "tile", "board", or an owner's own
    fields: dict[str, FieldReading]  # CT only
    findings: tuple[FindingReading, ...]  # by falling confidence; reported ones and candidates
    impression: str  # sentence(s) that sum up the reported findings, English; empty when there is none
    slices_read: tuple[int, ...] = (0,)  # which slices of a volume the model looked at
    windows: tuple[str, ...] = ()  # CT display windows that the model looked through
    quality_flags: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()  # "impression": the decoder's own does not sum up what it pointed at
    refused: tuple[str, ...] = ()  # sentences of the decoder that contradict the findings: they are in no report
    timing_s: dict[str, float] = field(default_factory=dict)  # "encode", "decode"
    unsure: tuple[str, ...] = ()  # finding types that were not shown to be told from chance, so that none is reported
    tokens: tuple[str, ...] = ()  # the decoder's output, for the audit trail
    domain: float | None = None  # how likely the study is of a kind that the model was trained on; None: not judged
    lines: tuple[ProductLine, ...] = PRODUCT_LINES  # that the model tells apart, with their types

    def draft(self) -> Draft:
        """What is reported, as sentences about it are held against it (`reports.language`)."""
        return Draft(
            self.kind,
            self.product_line,
            {name: reading.value for name, reading in self.fields.items()},
            tuple(DraftFinding(0, f.type, f.location, f.extent, f.word) for f in self.findings if f.reported),
        )


class DeviceLostError(RuntimeError):
    """The GPU has failed under this process, which cannot use it any more; another process may."""

    code = "device-lost"

    def __init__(self, why: str) -> None:
        super().__init__(
            f"The GPU has failed ({why}): start the same command again. If that does not help, see what nvidia-smi and "
            "the system's log say, or add --device cpu."
        )


class NotFiniteError(ArithmeticError):
    """A study of which the decoder can write nothing: its scores had NaN or infinity."""

    code = "not-finite"
