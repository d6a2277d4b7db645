"""Text to token ids and back, with the tokenizer.json of a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tokenizers

from decoder.open.configs import OpenConfig, read_config
from decoder.open.errors import CheckpointError

# Embedding tables are padded to round sizes, by 3% at most in published models: much more is another model's tokenizer.
LEAST_SHARE: Final = 0.9


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: OpenConfig | None = None) -> Tokenizer:
        """Raises CheckpointError where tokenizer.json cannot be read or does not match the model's configuration."""
        file = Path(folder) / "tokenizer.json"
        config = config or read_config(Path(folder))
        if not file.is_file():
            raise CheckpointError("missing-file", file, "not there; only tokenizers of this format are read")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError("damaged-file", file, f"cannot be read: {error}") from error
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        size, rows = max(ids, default=-1) + 1, config.vocabulary
        if not LEAST_SHARE * rows <= size <= rows:
            raise CheckpointError(
                "tokenizer-mismatch",
                file,
                f"its ids go up to {size - 1}, but model.embed_tokens.weight has {rows} rows: expected the tokenizer "
                f"that came with the weights, with {LEAST_SHARE:.0%} to 100% of as many ids",
            )
        for token in config.end_tokens:
            if tokenizer.id_to_token(token) is None:
                raise CheckpointError(
                    "tokenizer-mismatch", file, f"has no token {token}, which ends a text by config.json's eos_token_id"
                )
        return cls(tokenizer)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))
