"""`scanscribe export`: reports in further formats or another language, from what their folders keep."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from scanscribe.options import Json

if TYPE_CHECKING:
    from pipelines.export import ExportSummary

OK, SOME_FAILED = 0, 1


class ListsFormats(TyperCommand):
    """Its help ends with every format and what it is, those of other packages too; they are looked up only then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        from reports.formats import formats

        super().format_help(ctx, formatter)
        console = Console()
        for scope, title in (("report", "Formats of each report"), ("run", "Formats over a whole output folder")):
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            for each in formats().values():
                if each.scope == scope:
                    table.add_row(f"[cyan]{each.name}[/]", each.summary)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def export(
    reports: Annotated[
        list[Path], typer.Argument(help="Report folders, or output folders of runs.", show_default=False)
    ],
    formats: Annotated[str, typer.Option(help="Names with commas, as listed below.")],
    language: Annotated[
        str | None, typer.Option(help="Language: en or zh-CN. (default each report's own)", show_default=False)
    ] = None,
    aql: Annotated[float | None, typer.Option(help="lot: acceptance quality limit. (default 1.0)")] = None,
    inspection_level: Annotated[
        str | None, typer.Option(help="lot: I, II, III, S-1, S-2, S-3 or S-4. (default II)")
    ] = None,
    lot_size: Annotated[
        int | None, typer.Option(help="lot: items in each lot. (default as many as were inspected)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write reports in further formats, or another language, from what their folders keep."""
    from pipelines.export import export as export_reports
    from scanscribe import console
    from scanscribe.settings import settings

    lot = {"aql": aql, "inspection_level": inspection_level, "size": lot_size}
    given = {name: value for name, value in lot.items() if value is not None}
    chosen = settings(formats=formats, language=language, lot=given or None)
    with console.progress("Exporting") as tell:
        summary = export_reports(
            reports,
            chosen.formats,
            language=chosen.language if language else None,
            lot=chosen.lot,
            tell=lambda done, total: tell("Exporting", done, total),
        )
    if as_json:
        sys.stdout.write(json.dumps(summary.as_dict()) + "\n")
    else:
        _show(summary)
    raise typer.Exit(SOME_FAILED if summary.failures else OK)


def _show(summary: ExportSummary) -> None:
    from rich.table import Table
    from rich.text import Text

    from scanscribe.console import ROWS, output, short

    console = output()
    if summary.failures:
        table = Table(title="Could not be written", title_justify="left", title_style="italic red")
        for name in ("where", "format", "why"):
            table.add_column(name, overflow="fold")
        for failure in summary.failures[:ROWS]:
            table.add_row(Text(short(failure.place)), failure.format, Text(failure.message))
        console.print(table)
        if len(summary.failures) > ROWS:
            console.print(f"… and {len(summary.failures) - ROWS} more: see index.jsonl.")
    console.print(f"Reports: {summary.reports}, formats written in their folders: {summary.written}.")
    for file in summary.files:
        console.print(Text(f"Wrote {short(file)}"), soft_wrap=True)
