"""What the model said about the cases of a manifest: one JSON line a case, enough to score it again without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.manifest import Box
from pipelines.reading import FieldReading, Reading


@dataclass(frozen=True, slots=True)
class PredictedFinding:
    """A finding with its evidence box. Candidates left out of the report are kept: average precision needs them."""

    type: str
    bbox: Box  # x0, y0, x1, y1 in the image's pixels
    confidence: float
    reported: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer for one case; with `error`, why there is none."""

    id: str
    kind: str | None = None
    kind_confidence: float = 0.0
    product_line: str | None = None
    fields: dict[str, FieldReading] = field(default_factory=dict)
    findings: tuple[PredictedFinding, ...] = ()
    corrections: tuple[str, ...] = ()  # where the decoder's words did not agree with the evidence
    error: str | None = None

    @classmethod
    def from_reading(cls, case_id: str, reading: Reading) -> Prediction:
        findings = (PredictedFinding(f.type, f.bbox, f.confidence, f.reported) for f in reading.findings)
        return cls(
            case_id,
            reading.kind,
            reading.kind_confidence,
            reading.product_line,
            reading.fields,
            tuple(findings),
            reading.corrections,
        )


class PredictionsError(ValueError):
    """A predictions file that cannot be scored."""

    code = "predictions-fault"


def to_json_lines(predictions: Iterable[Prediction]) -> str:
    """One line a prediction, in the order given."""
    return "".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions that `to_json_lines` wrote. Raises `PredictionsError` naming the first faulty line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise PredictionsError(f"{path} cannot be read; give the file that evaluation wrote") from None
    predictions: list[Prediction] = []
    for number, line in enumerate(lines, start=1):
        try:
            predictions.append(_from_record(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise PredictionsError(f"{path}, line {number} is no prediction; evaluate again to write it anew") from None
    return predictions


def _from_record(record: dict[str, Any]) -> Prediction:
    fields = {name: FieldReading(**value) for name, value in record.pop("fields").items()}
    findings = [PredictedFinding(**finding) for finding in record.pop("findings")]
    boxed = tuple(PredictedFinding(f.type, _four(f.bbox), float(f.confidence), bool(f.reported)) for f in findings)
    corrections = tuple(map(str, record.pop("corrections", ())))
    return Prediction(**record, fields=fields, findings=boxed, corrections=corrections)


def _four(values: Iterable[float]) -> Box:
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1
