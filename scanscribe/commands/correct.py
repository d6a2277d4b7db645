"""`scanscribe correct`: a person's corrections become the next version of a report."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanscribe.options import Json

if TYPE_CHECKING:
    from pipelines.correct import Correction

OK, SOME_FAILED = 0, 1


def correct(
    report: Annotated[Path, typer.Argument(help="The folder of the report.", show_default=False)],
    by: Annotated[
        Path, typer.Option(help="JSON file: a corrected copy of report.json, or only what changes (RFC 7396).")
    ],
    as_json: Json = False,
) -> None:
    """Make the next version of a report, as corrected by a person. The report itself stays, marked as superseded."""
    from pipelines.correct import correct as make

    correction = make(report, by)
    if as_json:
        facts = {"id": correction.report.id, "version": correction.report.version}
        facts |= {"supersedes": correction.report.supersedes, "directory": str(correction.directory)}
        changes = [asdict(change) for change in correction.changes]
        facts |= {"changes": changes, "contradictions": [asdict(each) for each in correction.contradictions]}
        sys.stdout.write(json.dumps(facts | {"errors": correction.errors}) + "\n")
    else:
        _show(correction)
    raise typer.Exit(SOME_FAILED if correction.errors else OK)


def _show(correction: Correction) -> None:
    from rich.table import Table
    from rich.text import Text

    from scanscribe.console import err, output, plain, short, unwritten

    def brief(value: Any) -> Text:
        words = json.dumps(value, ensure_ascii=False)
        return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words[:200]))

    table = Table(title="Changed", title_justify="left")
    for name in ("what", "before", "after"):
        table.add_column(name, overflow="fold")
    for change in correction.changes:
        table.add_row(Text(change.place), brief(change.before), brief(change.after))
    console = output()
    console.print(table)
    for line in unwritten(correction.errors):
        console.print(Text(line, "red"), soft_wrap=True)
    if correction.contradictions:
        err.print("Warning: text and findings contradict each other. Both stand as corrected:", style="yellow")
        for each in correction.contradictions:
            err.print(plain(f"  {each.sentence} — {each.said!r}: {each.reason}"), soft_wrap=True)
    report = correction.report
    console.print(f"Version {report.version}, report {report.id}, supersedes {report.supersedes}.")
    console.print(Text(f"In {short(str(correction.directory))}"), soft_wrap=True)
