"""A deterministic reader for tests of what happens around the model: it finds the brightest spot of a picture."""

from __future__ import annotations

import numpy as np

from pipelines.reading import FindingReading, ModelIdentity, Reading
from pipelines.study import ImageStudy

CURSED = 13  # a picture whose first pixel has this value makes the reader fail


class TinyReader:
    """The door of `pipelines.reader.Reader`, without a network."""

    def __init__(self, version: str = "1") -> None:
        self.info = ModelIdentity("tiny", version, version.zfill(64), "0" * 64, "cpu")
        self.read_names: list[str] = []

    def read(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Reading:
        self.read_names.append(study.name)
        grey = study.pixels[0] if study.pixels.ndim == 3 else study.pixels[0].mean(-1)
        if grey.flat[0] == CURSED:
            raise RuntimeError(f"shape mismatch while reading {study.name}")
        if reference is not None:
            grey = np.abs(grey.astype(float) - reference.pixels[0].reshape(grey.shape))
        y, x = np.unravel_index(int(grey.argmax()), grey.shape)
        finding = FindingReading("scratches", (float(x), float(y), x + 1.0, y + 1.0), 0, 0.9, True, "box")
        return Reading("defect", 1.0, "steel", {}, (finding,), "One scratch.")
