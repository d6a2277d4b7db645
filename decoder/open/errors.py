"""What a checkpoint that cannot be used gets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

CheckpointCode = Literal[
    "missing-file",
    "damaged-file",
    "unknown-architecture",
    "unsupported-option",
    "tensor-mismatch",
    "tokenizer-mismatch",
]


class CheckpointError(ValueError):
    """A folder that cannot be loaded: the message names the file, what is wrong in it and what was expected."""

    def __init__(self, code: CheckpointCode, file: Path, message: str, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(f"{file}: {message}")
        self.code, self.file = code, file
        self.tensors = tensors  # names of all that are missing, not expected or of the wrong shape or type
