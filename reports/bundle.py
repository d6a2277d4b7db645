"""All that a report's formats are made from, and how a report folder keeps it, so that any format can be made again.

The folder keeps `report.json` and, under `parts/`, the pictures (PNG, in the image's own pixels), the segments (a bit a
voxel) and the header of the DICOM source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from pydantic import ValidationError

from reports.dicom_source import DicomSource, Instance
from reports.files import atomic_write, plain
from reports.images import Picture, ReportImages, encoded_png
from reports.schema import Report

REPORT: Final = "report.json"
PARTS: Final = "parts"
_PICTURES, _DICOM, _SEGMENTS = "pictures.json", "source.dcm.json", "segments.npz"
SUPERSEDED: Final = "superseded.json"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Bundle:
    """A report with what its formats need beside it."""

    report: Report
    images: ReportImages = field(default_factory=ReportImages)
    dicom: DicomSource | None = None  # of CT that came as DICOM
    segments: Mapping[str, np.ndarray] = field(default_factory=dict)  # by `Segment.id`: bool [S, H, W]


class BundleError(Exception):
    """A folder that holds no report which can be read. The message says what mends it."""

    code = "no-report"


def save_parts(directory: Path, bundle: Bundle) -> None:
    """Writes what belongs to the report into `directory/parts`. Raises OSError."""
    pictures = {f"slice-{index:04d}.png": picture for index, picture in bundle.images.slices.items()}
    if bundle.images.reference is not None:
        pictures["reference.png"] = bundle.images.reference
    pictures |= {f"detail-{finding}.png": picture for finding, picture in bundle.images.details.items()}
    shown = {
        name: {"shown_as": p.shown_as, "pixel_aspect": p.pixel_aspect, "part": p.part} for name, p in pictures.items()
    }
    parts = directory / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (parts / name).write_bytes(encoded_png(Image.fromarray(picture.pixels)))
    (parts / _PICTURES).write_text(json.dumps(shown, ensure_ascii=False), encoding="utf-8")
    if bundle.dicom is not None:
        (parts / _DICOM).write_text(json.dumps(bundle.dicom, default=plain), encoding="utf-8")
    if bundle.segments:
        arrays: dict[str, Any] = {name: np.packbits(mask) for name, mask in bundle.segments.items()}
        arrays |= {f"{name}.shape": np.array(mask.shape) for name, mask in bundle.segments.items()}
        np.savez_compressed(parts / _SEGMENTS, **arrays)


def load_report(directory: Path) -> Report:
    """Reads back the report object of a report folder, and whether it was superseded since. Raises BundleError."""
    try:
        report = Report.model_validate_json((directory / REPORT).read_bytes())
        if (note := directory / SUPERSEDED).is_file():
            superseded = json.loads(note.read_text("utf-8"))
            report = Report.model_validate_json(report.model_copy(update=superseded).model_dump_json())
        return report
    except FileNotFoundError:
        raise BundleError(f"{directory} holds no {REPORT}: name the folder of one report.") from None
    except OSError as error:
        raise BundleError(f"{directory / REPORT} cannot be read ({error.strerror}): check its rights.") from None
    except ValueError as error:
        raise BundleError(f"{directory / REPORT} is no report of this version ({_first_fault(error)}).") from None


def note_superseded(directory: Path, by: str) -> None:
    """Leaves a note in a report folder that another report replaced it; the report itself stays as it is."""
    atomic_write(directory / SUPERSEDED, json.dumps({"superseded_by": by}))


def load_bundle(directory: Path) -> Bundle:
    """Reads back a report folder. Raises BundleError."""
    report = load_report(directory)
    folder = directory / PARTS
    try:
        return Bundle(
            report,
            _load_images(folder),
            _load_dicom(folder / _DICOM),
            _load_segments(folder / _SEGMENTS),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise BundleError(f"{folder} is damaged ({fault}): make the report again from its source.") from None


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'report'}: {fault['msg']}"
    return str(error)


def _load_images(folder: Path) -> ReportImages:
    if not (folder / _PICTURES).is_file():
        return ReportImages()
    slices, reference, details = {}, None, {}
    for name, shown in json.loads((folder / _PICTURES).read_text("utf-8")).items():
        part = shown.pop("part", None)
        with Image.open(folder / name) as image:
            picture = Picture(np.asarray(image), **shown, part=part and tuple(part))
        what, _, which = Path(name).stem.partition("-")
        if what == "reference":
            reference = picture
        elif what == "detail":
            details[which] = picture
        else:
            slices[int(which)] = picture
    return ReportImages(slices, reference, details)


def _load_dicom(path: Path) -> DicomSource | None:
    if not path.is_file():
        return None
    stored = json.loads(path.read_text("utf-8"))
    instances = tuple(Instance(**each | {"position_mm": _tuple(each["position_mm"])}) for each in stored["instances"])
    return DicomSource(stored["header"], instances, _tuple(stored["orientation"]))


def _tuple(numbers: list[float] | None) -> Any:
    return None if numbers is None else tuple(numbers)


def _load_segments(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path) as stored:
        shapes = {name: tuple(stored[f"{name}.shape"]) for name in stored if not name.endswith(".shape")}
        return {
            name: np.unpackbits(stored[name], count=int(np.prod(shape))).reshape(shape).astype(bool)
            for name, shape in shapes.items()
        }
