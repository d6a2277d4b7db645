"""What the model said about the cases of a manifest: one JSON line a case, enough to score it again without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.manifest import Box
from pipelines.reading import FieldReading, ModelIdentity, Reading
from reports.language import contradictions


@dataclass(frozen=True, slots=True)
class PredictedFinding:
    """A finding with its evidence box. Candidates left out of the report are kept: average precision needs them."""

    type: str
    bbox: Box  # x0, y0, x1, y1 in the image's pixels
    confidence: float
    reported: bool
    raw_confidence: float | None = None  # the network's score before calibration; None: the model does not give it


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
    refused: tuple[str, ...] = ()  # sentences of the decoder that contradict the findings
    contradicted: bool | None = None  # whether what is reported does so all the same; None: not looked at
    impression: str = ""
    in_domain: float | None = None  # how likely the image is of a kind that the model was trained on
    flags: tuple[str, ...] = ()  # quality flags of the model
    model: str = ""  # the model and weights that answered; see `signature`
    error: str | None = None

    @classmethod
    def from_reading(cls, case_id: str, reading: Reading, model: str = "") -> Prediction:
        findings = (
            PredictedFinding(f.type, f.bbox, f.confidence, f.reported, f.raw_confidence) for f in reading.findings
        )
        return cls(
            case_id,
            reading.kind,
            reading.kind_confidence,
            reading.product_line,
            reading.fields,
            tuple(findings),
            corrections=reading.corrections,
            refused=reading.refused,
            contradicted=bool(contradictions(reading.draft(), [reading.impression])),
            impression=reading.impression,
            in_domain=reading.domain,
            flags=reading.quality_flags,
            model=model,
        )


class PredictionsError(ValueError):
    """A predictions file that cannot be scored."""

    code = "predictions-fault"


def signature(model: ModelIdentity) -> str:
    """Short for the weights and settings that answer, so that answers of two models are never mixed."""
    return f"{model.name} {model.version} {model.weights_sha256[:12]} {model.config_sha256[:12]}"


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


def resume_predictions(path: Path, model: str) -> list[Prediction]:
    """What an interrupted evaluation with this `model` has answered; none when the file is not there.

    A last line that was torn is cut off, so that lines can be appended. Raises `PredictionsError` for answers of
    another model, and OSError.
    """
    if not path.exists():
        return []
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    answers = read_predictions(path)
    if others := sorted({answer.model for answer in answers} - {model}):
        raise PredictionsError(
            f"{path} has answers of another model ({others[0] or 'not named'}, now {model}): "
            "leave --resume out to start over, or give another file"
        )
    return answers


def _from_record(record: dict[str, Any]) -> Prediction:
    fields = {name: FieldReading(**value) for name, value in record.pop("fields").items()}
    findings = [PredictedFinding(**finding) for finding in record.pop("findings")]
    boxed = tuple(
        PredictedFinding(f.type, _four(f.bbox), float(f.confidence), bool(f.reported), f.raw_confidence)
        for f in findings
    )
    record |= {name: tuple(map(str, record.get(name, ()))) for name in ("corrections", "refused", "flags")}
    return Prediction(**record | {"fields": fields, "findings": boxed})


def _four(values: Iterable[float]) -> Box:
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1
