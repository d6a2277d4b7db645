"""`config.json`, read key by key: a value of the wrong type or an option that is not implemented names its key."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from decoder.open.errors import CheckpointError
from decoder.rotary import Rope, Yarn

LONGEST: Final = 1 << 24  # positions of a context, words of a vocabulary
_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Settings:
    """The object in a JSON file. Every method raises CheckpointError."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Reads the file, which must hold one JSON object."""
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError("missing-file", file, "not there; a Hugging Face model folder is expected") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError("damaged-file", file, f"cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError("damaged-file", file, "must hold one JSON object")
        return cls(file, values)

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value; one that is null counts as absent."""
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise CheckpointError("damaged-file", self.file, f'lacks "{key}"')
        return default if value is None else value

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 1 << 20) -> Any:
        """A whole number from `least` to `most`; the default as it is where the key is absent."""
        value = self.get(key, default)
        if value is default or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
            return value
        expected = f"expected a whole number from {least} to {most}"
        raise CheckpointError("damaged-file", self.file, f'"{key}" is {value!r}: {expected}')

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number, 0 or above; the default as it is where the key is absent."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CheckpointError("damaged-file", self.file, f'"{key}" is {value!r}: expected a number >= 0')
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError("damaged-file", self.file, f'"{key}" is {value!r}: expected true or false')
        return value

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        """One whole number or a list of them; () where the key is absent."""
        value = self.get(key, [])
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
            raise CheckpointError("damaged-file", self.file, f'"{key}" is {value!r}: expected whole numbers >= 0')
        return tuple(listed)

    def one_of(self, key: str, known: Collection[Any], default: Any = _REQUIRED) -> Any:
        """One of the values that are implemented."""
        value = self.get(key, default)
        if value not in known:
            wanted = " or ".join(json.dumps(each) for each in known)
            raise CheckpointError(
                "unsupported-option", self.file, f'"{key}" is {json.dumps(value)}; implemented: {wanted}'
            )
        return value

    def fits(self, holds: bool, expected: str) -> None:
        """Raises unless the sizes fit each other as `expected` says."""
        if not holds:
            raise CheckpointError("damaged-file", self.file, f"sizes do not fit each other: expected {expected}")

    def refuse_unsupported(self) -> None:
        """Raises for what would silently change the results of every family here."""
        if self.get("quantization_config", None) is not None:
            raise CheckpointError(
                "unsupported-option", self.file, '"quantization_config": convert the weights to bfloat16 first'
            )
        if self.get("sliding_window", None) is not None and self.flag("use_sliding_window", True):
            raise CheckpointError(
                "unsupported-option", self.file, '"sliding_window": only full attention is implemented'
            )
        kinds = self.get("layer_types", [])
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise CheckpointError(
                "unsupported-option", self.file, f'"layer_types" is {kinds!r}; implemented: "full_attention" everywhere'
            )
        self.one_of("hidden_act", ("silu",), "silu")

    def rope(self, dim: int, *, interleaved: bool = False) -> Rope:
        """`rope_parameters`, or `rope_theta` beside `rope_scaling` as older files have it."""
        self.fits(dim % 2 == 0, f"an even number of rotary values a head, not {dim}")
        key = "rope_parameters" if self.get("rope_parameters", None) is not None else "rope_scaling"
        values = self.get(key, {})
        if not isinstance(values, dict):
            raise CheckpointError("damaged-file", self.file, f'"{key}" is {values!r}: expected an object')
        rope = Settings(self.file, values)
        kind = rope.one_of("rope_type" if "rope_type" in values else "type", ("default", "yarn"), "default")
        for holder in (self, rope):
            holder.one_of("partial_rotary_factor", (1, 1.0), 1.0)
        theta = rope.number("rope_theta", self.number("rope_theta", 10000.0))
        self.fits(theta > 1, '"rope_theta" above 1')
        if kind == "default":
            return Rope(theta, interleaved=interleaved)
        yarn = Yarn(
            factor=rope.number("factor"),
            original_max_position_embeddings=rope.size("original_max_position_embeddings", most=LONGEST),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.number("mscale", 0.0),
            mscale_all_dim=rope.number("mscale_all_dim", 0.0),
            attention_factor=rope.number("attention_factor", None),
            truncate=rope.flag("truncate", True),
        )
        self.fits(min(yarn.factor, yarn.beta_fast, yarn.beta_slow) > 0, "YaRN's factor and betas above 0")
        return Rope(theta, yarn, interleaved)
