"""What a prompt that cannot be run gets."""

from __future__ import annotations

from typing import Literal

PromptCode = Literal[
    "prompt-too-long", "prompt-empty", "token-out-of-vocabulary", "embeddings-shape", "nothing-to-write"
]


class PromptError(ValueError):
    """A prompt that the decoder cannot take; raised before anything is computed."""

    def __init__(self, code: PromptCode, message: str) -> None:
        super().__init__(message)
        self.code = code
