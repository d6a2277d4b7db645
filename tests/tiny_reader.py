"""A deterministic reader for tests of what happens around the model: it finds the brightest spot of a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.reading import FindingReading, ModelIdentity, Reading
from pipelines.sight import Sight
from pipelines.store import Calibration, StoredModel
from pipelines.study import ImageStudy

CURSED = 13  # a picture whose first pixel has this value makes the reader fail


class TinyReader:
    """The door of `pipelines.reader.Reader`, without a network."""

    def __init__(self, version: str = "1", *, seconds: float = 0.0) -> None:
        self.seconds = seconds  # that it takes for a study
        self.stored = StoredModel(Path(), "tiny", version, {}, Calibration(), version.zfill(64), "0" * 64)
        self.info = ModelIdentity("tiny", version, self.stored.weights_sha256, self.stored.config_sha256, "cpu")
        self.read_names: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every run of this process use this reader."""
        monkeypatch.setattr("pipelines.run.find", lambda model: self.stored)
        monkeypatch.setattr("pipelines.run.load_reader", lambda model, device: self)

    def read_many(self, sights: Sequence[Sight]) -> list[Reading | Exception]:
        return [self._outcome(each) for each in sights]

    def _outcome(self, seen: Sight) -> Reading | Exception:
        assert seen.source is not None
        study, reference = seen.source
        try:
            return self.read(study, kind=seen.kind, reference=reference)
        except Exception as error:
            return error

    def read(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Reading:
        time.sleep(self.seconds)
        self.read_names.append(study.name)
        grey = study.pixels[0] if study.pixels.ndim == 3 else study.pixels[0].mean(-1)
        if grey.flat[0] == CURSED:
            raise RuntimeError(f"shape mismatch while reading {study.name}")
        if reference is not None:
            grey = np.abs(grey.astype(float) - reference.pixels[0].reshape(grey.shape))
        y, x = np.unravel_index(int(grey.argmax()), grey.shape)
        finding = FindingReading("scratches", (float(x), float(y), x + 1.0, y + 1.0), 0, 0.9, True, "box")
        return Reading("defect", 1.0, "steel", {}, (finding,), "One scratch.")
