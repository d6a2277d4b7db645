"""The model store: where models lie, what belongs to one, and whether it is whole.

A model is a folder with `model.json` (name, version, sizes, calibration, the weights' SHA-256), `weights.safetensors`
and `MODEL_CARD.md`. Bundled models lie in the package `models`, an owner's own below `$SCANSCRIBE_HOME/models`.

An adapted model has the weights of its adapter alone; its settings name the base by SHA-256 (`Base`), and the product
line that it brings (`OwnLine`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import models
from pipelines.own_line import OwnLine
from reports.taxonomy import PRODUCT_LINES, ProductLine

WEIGHTS: Final = "weights.safetensors"
DOMAIN: Final = "domain.safetensors"
SETTINGS: Final = "model.json"


class ModelError(ValueError):
    """A model that cannot be used. The message names the folder or file and what would mend it."""

    code = "model"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What makes scores honest, fitted on validation data and stored with the weights."""

    # Confidence of an evidence item: sigmoid(a * logit(score) + b), by product line, and "ct" for class maps.
    evidence: dict[str, tuple[float, float]] = field(default_factory=dict)
    # A field's probabilities: softmax(log p / t).
    temperature: dict[str, float] = field(default_factory=dict)
    # How much the decoder's word on an item counts beside the item's confidence, 0 to 1, by product line and "ct".
    point: dict[str, float] = field(default_factory=dict)
    # What both together must reach for a finding to be in the report, as a probability; below it stays a candidate.
    report: dict[str, float] = field(default_factory=dict)
    # The least probability at which a field is answered at all; below it is undetermined.
    answer: dict[str, float] = field(default_factory=dict)
    # Finding types that were shown to be told from chance, by product line and "ct": no other is reported. All, where a
    # line has no entry.
    assessed: dict[str, Sequence[str]] = field(default_factory=dict)

    def joined(self, other: Calibration) -> Calibration:
        """With what another one says of further lines; the other's word stands."""
        return Calibration(**{each.name: getattr(self, each.name) | getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was made for."""

    name: str
    version: str
    weights_sha256: str
    folder: str  # where it was; it is looked for elsewhere, too


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's folder, and what its settings say."""

    folder: Path
    name: str
    version: str
    config: dict[str, Any]
    calibration: Calibration
    weights_sha256: str
    config_sha256: str
    domain_sha256: str | None = None  # of the description of what the model knows, where there is one
    base: Base | None = None  # of an adapted model
    own_line: OwnLine | None = None  # that an adapted model brings
    adapted: dict[str, Any] = field(default_factory=dict)  # how, on how much, and what was measured

    @property
    def lines(self) -> tuple[ProductLine, ...]:
        """The product lines that the model tells apart, and their types; an adapted model's own is the last one."""
        if self.own_line is None:
            return PRODUCT_LINES
        own = ProductLine(self.own_line.name, self.own_line.name, self.own_line.types)
        return (*(line for line in PRODUCT_LINES if line.name != own.name), own)

    @property
    def own_types(self) -> tuple[str, ...]:
        """The finding types that an adapted model brings."""
        return self.own_line.types if self.own_line else ()

    def find_base(self) -> StoredModel:
        """The model that this adapted one needs. Raises `ModelError` where it is not installed."""
        assert self.base is not None
        installed = [each for each in stored_models(told=lambda damaged: None) if each.base is None]
        if (Path(self.base.folder) / SETTINGS).is_file():
            installed.append(_open(Path(self.base.folder)))
        for each in installed:
            if each.weights_sha256 == self.base.weights_sha256:
                return each
        raise ModelError(
            f"{self.folder} adapts {self.base.name} {self.base.version} (weights {self.base.weights_sha256[:12]}...), "
            "which is not installed: install that model, or run scanscribe adapt again on one that is"
        )

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def domain(self) -> Path:
        """What kinds of pictures the model knows; not every model says so."""
        return self.folder / DOMAIN

    def verify(self) -> None:
        """Raises `ModelError` unless the files, also those of an adapted model's base, are the ones that are named."""
        if self.base is not None:
            self.find_base().verify()
        for path, expected in ((self.weights, self.weights_sha256), (self.domain, self.domain_sha256)):
            if expected is None:
                continue
            if not path.is_file():
                raise ModelError(f"{path} is missing; install the model again")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != expected:
                raise ModelError(
                    f"{path} has SHA-256 {found[:12]}..., expected {expected[:12]}...; "
                    "the file is damaged or of another version: install the model again"
                )


def home() -> Path:
    """Where ScanScribe keeps what outlives a run: `SCANSCRIBE_HOME`, else `~/.local/share/scanscribe`."""
    return Path(os.environ.get("SCANSCRIBE_HOME") or "~/.local/share/scanscribe").expanduser().resolve()


def folders() -> list[Path]:
    """Where models are looked for, an owner's own first."""
    return [home() / "models", *map(Path, models.__path__)]


def stored_models(told: Callable[[ModelError], object] | None = None) -> Iterator[StoredModel]:
    """Every model that can be named, an owner's own before a bundled one of the same name.

    `told` hears of models whose settings are damaged, which are left out; without it they raise `ModelError`.
    """
    for folder in _named().values():
        try:
            yield _open(folder)
        except ModelError as error:
            if told is None:
                raise
            told(error)


def _named() -> dict[str, Path]:
    """Names -> folders."""
    found: dict[str, Path] = {}
    for folder in folders():
        for settings in sorted(folder.glob(f"*/{SETTINGS}")):
            found.setdefault(settings.parent.name, settings.parent)
    return found


def find(model: str | Path) -> StoredModel:
    """The model called so, or the one in that folder. Raises `ModelError`."""
    if isinstance(model, Path) or is_folder(model):
        return _open(Path(model))
    if folder := _named().get(model):
        return _open(folder)
    names = ", ".join(_named()) or "none is installed"
    raise ModelError(f"there is no model {model!r}; choose from: {names}, or give a model's folder")


def is_folder(model: str) -> bool:
    """Whether it is the folder of a model, rather than a name."""
    return os.sep in model or (model not in _named() and Path(model).is_dir())


def _open(folder: Path) -> StoredModel:
    path = folder / SETTINGS
    try:
        data = path.read_bytes()
        settings = json.loads(data)
        calibration = settings["calibration"]
        base, line = settings.get("base"), settings.get("line")
        return StoredModel(
            folder,
            settings["name"],
            settings["version"],
            settings["config"],
            Calibration(**calibration),
            settings["weights_sha256"],
            hashlib.sha256(data).hexdigest(),
            settings.get("domain_sha256"),
            None if base is None else Base(**base),
            None if line is None else OwnLine(**line | {"types": tuple(line["types"]), "weak": tuple(line["weak"])}),
            settings.get("adapted", {}),
        )
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give a folder with {SETTINGS}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not the settings of a model ({error!r}); install the model again") from None


def save_settings(
    folder: Path,
    *,
    name: str,
    version: str,
    config: dict[str, Any],
    calibration: Calibration,
    base: Base | None = None,
    own_line: OwnLine | None = None,
    adapted: dict[str, Any] | None = None,
) -> None:
    """Writes `model.json` beside weights that are already there; the last three are of an adapted model."""
    settings = {
        "name": name,
        "version": version,
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "config": config,
        "calibration": asdict(calibration),
    }
    if (folder / DOMAIN).is_file():
        settings["domain_sha256"] = hashlib.sha256((folder / DOMAIN).read_bytes()).hexdigest()
    if base is not None and own_line is not None:
        settings |= {"base": asdict(base), "line": asdict(own_line), "adapted": adapted or {}}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
