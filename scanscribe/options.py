"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

import typer


def flag(name: str, words: str) -> Any:
    """An option that takes no value; the parser's help would show `<bool>` behind it, as if one had to follow."""
    return typer.Option(name, metavar="", help=words)


Inputs = Annotated[
    list[Path], typer.Argument(help="Files, folders, DICOM series folders, zip archives, PDF.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Folder for the reports, index.jsonl, rejected.jsonl and index.html.")]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Names with commas; `scanscribe export --help` lists them. (default json,html)", show_default=False
    ),
]
Model = Annotated[str | None, typer.Option(help="A model's name, or its folder. (default default)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... (default auto)")]
Kind = Annotated[str | None, typer.Option(help="What the inputs are: auto, ct or defect. (default auto)")]
Reference = Annotated[
    Path | None,
    typer.Option(help="Golden sample to compare pictures with, or a folder of them, matched by file name."),
]
Rules = Annotated[
    Path | None, typer.Option(help="Rule file for severity and disposition. (default reports/default_rules.yaml)")
]
Language = Annotated[str | None, typer.Option(help="Language of the reports: en or zh-CN. (default en)")]
MmPerPixel = Annotated[
    float | None, typer.Option(help="Size of a picture's pixel in millimetres. (default the file's resolution tag)")
]
Identifiers = Annotated[
    Path | None,
    typer.Option(
        help="Patterns for accession, lot, part and serial numbers. (default pipelines/ingest/default_identifiers.toml)"
    ),
]
SETTINGS: Final[dict[str, Any]] = {  # name in `scanscribe.settings` -> option
    "formats": Formats,
    "model": Model,
    "device": Device,
    "kind": Kind,
    "reference": Reference,
    "rules": Rules,
    "language": Language,
    "mm_per_pixel": MmPerPixel,
    "identifiers": Identifiers,
}
LogJson = Annotated[bool, flag("--log-json", "Log JSON objects.")]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics",
        min=0,
        max=65535,
        help="Port of Prometheus metrics on 127.0.0.1; 0 takes a free one. (default none)",
    ),
]
NotifyUrl = Annotated[
    str | None,
    typer.Option(
        "--notify",
        envvar="SCANSCRIBE_NOTIFY",
        show_envvar=True,
        show_default=False,
        help="URL that is told of failures and critical findings, signed with SCANSCRIBE_NOTIFY_SECRET.",
    ),
]
_Lanes = Literal["urgent", "normal", "off-peak"]
Workers = Annotated[bool, flag("--workers", "Let workers read (`scanscribe worker`), not this process.")]
Lane = Annotated[_Lanes, typer.Option(help="With --workers: what goes before what.")]
LaneOfWorkers = Annotated[
    _Lanes | None, typer.Option(help="Let workers read, in this lane. (default the run reads itself)")
]
MinFree = Annotated[int, typer.Option(min=0, help="MiB that stay free: with less, no work is taken.")]
Json = Annotated[bool, flag("--json", "Print one JSON object on standard output.")]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each setting of a run; the command gets as `chosen: Settings` what is in force with them."""
    hints = get_type_hints(command, localns={"Settings": Any}, include_extras=True)
    options: list[inspect.Parameter] = []
    for each in inspect.signature(command).parameters.values():
        if each.name == "chosen":
            options += [
                inspect.Parameter(name, each.KEYWORD_ONLY, default=None, annotation=option)
                for name, option in SETTINGS.items()
            ]
        else:
            options.append(each.replace(kind=each.KEYWORD_ONLY, annotation=hints[each.name]))

    @functools.wraps(command)
    def given(**values: Any) -> None:
        from scanscribe.settings import settings

        flags = {name: values.pop(name) for name in SETTINGS}
        command(**values, chosen=settings(**flags))

    given.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    given.__annotations__ = {each.name: each.annotation for each in options}
    return given
