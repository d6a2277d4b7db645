"""`scanscribe status`: how everything stands, in one screen."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scanscribe.commands.ledger import LedgerUrl, check_folder
from scanscribe.options import Json, MinFree

if TYPE_CHECKING:
    from rich.table import Table

    from flows.seeing.status import Scheduled, Status

STATE_STYLE = {"quarantined": "red", "failed": "yellow", "claimed": "cyan", "done": "green"}
RUN_STYLE = {"done": "green", "failed": "red", "died": "red", "stopped": "yellow"}
GIB = 1 << 30


def status(
    out: Annotated[
        Path | None, typer.Option(help="Only this output folder. (default all on the ledger)", show_default=False)
    ] = None,
    ledger: LedgerUrl = None,
    min_free: MinFree = 1024,
    as_json: Json = False,
) -> None:
    """Say how everything stands: ledger, services, schedules, server, disks. Exit code 1: something needs a person."""
    from flows.seeing.status import look

    found = look(out, ledger, min_free=min_free << 20)
    if out is not None and not any(any(each.counts.values()) for each in found.folders):
        check_folder(out)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict()) + "\n")
    else:
        show(found)
    raise typer.Exit(1 if found.trouble else 0)


def show(found: Status) -> None:
    """One screen."""
    from rich.text import Text

    from scanscribe.console import output, plain, short

    console = output()
    if found.folders:
        console.print(_folders(found))
    elif found.ledger:
        console.print("The ledger is empty: nothing was watched, and no batch went to workers.")
    if last := [(path.last, path.path) for path in found.folders if path.last]:
        newest = sorted((when, report) for reports, _ in last for report, when in reports)[:-6:-1]
        words = ", ".join(f"{report} {_ago(found.time - when)}" for when, report in newest)
        console.print(Text("last reports  ", "bold") + plain(words), soft_wrap=True)
    if found.schedules:
        console.print(schedule_table(found.schedules, found.time))
    if found.services:
        for each in found.services:
            where = f" on {each.detail}" if each.detail else ""
            port = f", metrics on port {each.metrics}" if each.metrics else ""
            words = f"{each.name}{where}, process {each.pid}, for {_span(found.time - each.since)}{port}"
            console.print(Text("service   ", "bold") + plain(words), soft_wrap=True)
    else:
        console.print(Text("service   ", "bold") + Text("none runs"))
    server = found.server.removesuffix("/api") if found.server else "none runs; one is started when it is needed"
    console.print(Text("server    ", "bold") + plain(server))
    console.print(
        Text("disk      ", "bold") + plain(f"{found.state_free / GIB:.1f} GiB free for {short(found.state_folder)}"),
        soft_wrap=True,
    )
    for words in found.trouble:
        console.print(Text(f"! {words}", "bold red"), soft_wrap=True)


def _folders(found: Status) -> Table:
    from rich.table import Table
    from rich.text import Text

    from scanscribe.console import plain, short

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("reports in", overflow="fold")
    for name in ("waiting", "claimed", "failed", "quarantined", "done", "oldest waits", "free"):
        table.add_column(name, justify="right")
    for each in found.folders:
        cells = []
        for state in ("waiting", "claimed", "failed", "quarantined", "done"):
            count = each.counts[state]
            cells.append(Text(str(count), STATE_STYLE.get(state, "") if count else "dim"))
        oldest = _span(found.time - each.oldest) if each.oldest is not None else "-"
        free = f"{each.free / GIB:.1f} GiB" if each.free is not None else "elsewhere"
        table.add_row(plain(short(each.path)), *cells, oldest, free)
    return table


def schedule_table(schedules: Sequence[Scheduled], now: float) -> Table:
    """A line a schedule."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("schedule", "when", "next", "state", "last"):
        table.add_column(name, overflow="fold")
    for each in schedules:
        when = f"{each.when} {each.zone}" + (f" within {each.window}" if each.window else "")
        due = "-" if each.next is None else local_time(each.next, each.zone)
        last = Text("-")
        if each.last:
            last = Text(each.last.result, RUN_STYLE.get(each.last.result, ""))
            last += Text(f" {_ago(now - each.last.ended)}" + (f": {each.last.words}" if each.last.words else ""))
        table.add_row(each.name, when, due, each.state, last)
    return table


def local_time(moment: float, zone: str) -> str:
    """By the clocks of a time zone, with its offset, so that the hour that comes twice can be told."""
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return datetime.fromtimestamp(moment, ZoneInfo(zone)).strftime("%a %d %b %H:%M %z")


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    """The two largest units: `2d 3h`."""
    left = int(max(seconds, 0))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])
