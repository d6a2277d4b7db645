"""`scanscribe ledger`: what the ledger of an output folder says, and what to do about items that failed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanscribe.options import Json, flag

if TYPE_CHECKING:
    from flows.ledger import Ledger, Row

URL_VARIABLE = "SCANSCRIBE_LEDGER"

Out = Annotated[Path, typer.Option(help="The output folder of the reports.")]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        envvar=URL_VARIABLE,
        show_envvar=True,
        help="URL of a PostgreSQL ledger. (default SQLite in the state folder)",
        show_default=False,
    ),
]
Items = Annotated[list[str], typer.Argument(help="Items by the beginnings of their hashes.", show_default=False)]

app = typer.Typer(help="What is waiting, at work, done, or in quarantine.", no_args_is_help=True)


@dataclass
class UnknownItemError(Exception):
    """No item, or no single one, is called so."""

    message: str
    code: str = "usage"

    def __str__(self) -> str:
        return self.message


@app.command("list", epilog="Example: [cyan]scanscribe ledger list --out reports --state quarantined[/]")
def list_items(
    out: Out,
    state: Annotated[str | None, typer.Option(help="Only waiting, claimed, done, failed or quarantined items.")] = None,
    ledger: LedgerUrl = None,
    as_json: Json = False,
) -> None:
    """List the items of an output folder."""
    from flows.ledger import STATES, Ledger

    if state is not None and state not in STATES:
        raise UnknownItemError(f"There is no state {state!r}: choose one of {', '.join(STATES)}.")
    with Ledger(out, ledger) as open_ledger:
        counts = open_ledger.counts()
        rows = open_ledger.rows(state)  # type: ignore[arg-type]  # checked above
    if not any(counts.values()):
        check_folder(out)
    if as_json:
        _print({"counts": counts, "items": [row.as_dict() for row in rows]})
        return
    from rich.table import Table

    from scanscribe.console import output, plain, short

    if not any(counts.values()):
        output().print(plain(f"The ledger has no items for {short(str(out))}."), soft_wrap=True)
        return
    table = Table("item", "state", "tries", "report", "files", "why")
    for row in rows:
        first = Path(row.files[0]).name if row.files else ""
        files = first if len(row.files) == 1 else f"{first} and {len(row.files) - 1} more"
        cells = (row.request[:16], row.state, str(row.attempts), row.report or "", files, row.code or "")
        table.add_row(*map(plain, cells))
    if rows:
        output().print(table)
    output().print(", ".join(f"{count} {name}" for name, count in counts.items()))


@app.command("show", epilog="Example: [cyan]scanscribe ledger show 0123456789abcdef --out reports[/]")
def show_item(
    item: Annotated[str, typer.Argument(help="An item by the beginning of its hash.")],
    out: Out,
    ledger: LedgerUrl = None,
    as_json: Json = False,
) -> None:
    """Show everything about one item."""
    from flows.ledger import Ledger

    with Ledger(out, ledger) as open_ledger:
        row = _row(open_ledger, item)
    if as_json:
        _print(row.as_dict())
        return
    from scanscribe.console import output, plain

    for name, value in row.as_dict().items():
        if value is None or (name == "due" and row.state in ("done", "quarantined")):
            continue
        if name in ("due", "added", "changed"):
            value = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        for line in (value or ("",)) if isinstance(value, tuple) else (value,):
            output().print(plain(f"{name:9} {line}"), soft_wrap=True)
            name = ""


@app.command("retry", epilog="Example: [cyan]scanscribe ledger retry 0123456789abcdef --out reports[/]")
def retry_items(items: Items, out: Out, ledger: LedgerUrl = None, as_json: Json = False) -> None:
    """Let items be tried again. A watcher that runs takes them at its next full look."""
    from flows.ledger import Ledger

    with Ledger(out, ledger) as open_ledger:
        changed = open_ledger.retry([_row(open_ledger, item).request for item in items])
    _tell("retried", changed, len(items), as_json)


@app.command("forget", epilog="Example: [cyan]scanscribe ledger forget 0123456789abcdef --out reports[/]")
def forget_items(items: Items, out: Out, ledger: LedgerUrl = None, as_json: Json = False) -> None:
    """Take items off the record. Reports, quarantine and input files stay."""
    from flows.ledger import Ledger

    with Ledger(out, ledger) as open_ledger:
        changed = open_ledger.forget([_row(open_ledger, item).request for item in items])
    _tell("forgotten", changed, len(items), as_json)


@app.command("prune", epilog="Example: [cyan]scanscribe ledger prune --out reports --older-than 90 --yes[/]")
def prune_folder(
    out: Out,
    older_than: Annotated[float, typer.Option(min=0, help="Days that they are kept.", show_default=False)],
    archive: Annotated[
        Path | None, typer.Option(help="Folder that they are copied to before they go. (default none)")
    ] = None,
    yes: Annotated[bool, flag("--yes", "Do it; else it is only said what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove copies in quarantine and superseded versions of reports. Current reports and input files stay."""
    from flows.ledger.retention import prune

    check_folder(out)
    found = prune(out, older_than, archive=archive, dry_run=not yes)
    counts = {"superseded": found.count("superseded"), "quarantine": found.count("quarantine")}
    if as_json:
        _print({"done": yes, **counts, "bytes": found.size, "names": [each.name for each in found.expired]})
        return
    what = f"{counts['superseded']} superseded reports and the copies of {counts['quarantine']} items in quarantine"
    print(f"{what}, {found.size / (1 << 20):.1f} MiB, {'are gone' if yes else 'would go: give --yes to do it'}.")


def check_folder(out: Path) -> None:
    """Raises UnknownItemError where there is no such output folder."""
    if not out.is_dir():
        raise UnknownItemError(f"There is no folder {out}: give the output folder of reports with --out.")


def _row(ledger: Ledger, item: str) -> Row:
    found = ledger.rows(beginning=item)
    if len(found) != 1:
        how_many = "no item" if not found else f"{len(found)} items"
        raise UnknownItemError(f"There is {how_many} whose hash begins with {item}: see `scanscribe ledger list`.")
    return found[0]


def _tell(what: str, changed: int, asked: int, as_json: bool) -> None:
    """Items that somebody works on are left alone: exit code 1."""
    if as_json:
        _print({what: changed, "at_work": asked - changed})
    else:
        print(f"{changed} {what}." + (f" {asked - changed} at work: left alone." if changed < asked else ""))
    raise typer.Exit(0 if changed == asked else 1)


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
