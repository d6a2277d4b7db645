"""What a run is told: flags over the environment (`SCANSCRIBE_*`) over `scanscribe.toml` over the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pipelines.ingest.identifiers import DEFAULT_PATTERNS
from pipelines.run import FORMATS, UsageError
from reports.lot.sampling import LotPlan
from reports.rules import DEFAULT_RULES
from reports.texts import Language

FILE = "scanscribe.toml"  # in the folder where the command is given


class Settings(BaseSettings):
    """The settings that every run shares."""

    model_config = SettingsConfigDict(
        env_prefix="SCANSCRIBE_", env_nested_delimiter="__", toml_file=FILE, extra="forbid"
    )

    formats: Annotated[tuple[str, ...], NoDecode] = FORMATS
    model: str = "default"
    device: str = "auto"
    kind: str = "auto"
    reference: Path | None = None
    rules: Path = DEFAULT_RULES
    language: Language = "en"
    lot: LotPlan = LotPlan()
    mm_per_pixel: float | None = None
    identifiers: Path = DEFAULT_PATTERNS

    @field_validator("formats", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """A list, or names with commas between them, as flags and the environment write it."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def settings(**flags: Any) -> Settings:
    """The settings in force; a flag that is None was not given. Raises UsageError that names what to mend."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        unknown = any(fault["type"] == "extra_forbidden" for fault in error.errors())
        known = f"; there are: {', '.join(Settings.model_fields)}" if unknown else ""
        raise UsageError(
            f"A setting cannot be used ({faults}): mend the flag, SCANSCRIBE_* or {FILE}{known}."
        ) from None
    except ValueError as error:  # a TOML file that does not parse
        raise UsageError(f"{FILE} is not valid TOML ({error}): mend or remove it.") from None
