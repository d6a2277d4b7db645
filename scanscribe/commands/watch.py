"""`scanscribe watch`: reports what comes to lie in a folder, for as long as it runs."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scanscribe.commands.ledger import LedgerUrl
from scanscribe.options import (
    Lane,
    LogJson,
    MetricsPort,
    MinFree,
    NotifyUrl,
    Out,
    Workers,
    flag,
    takes_settings,
)

if TYPE_CHECKING:
    from scanscribe.settings import Settings

OK, NOT_ALL = 0, 1
LEFT = "are not complete, or are to be tried again: run the same command later, or without --once."


@takes_settings
def watch(
    folder: Annotated[Path, typer.Argument(help="The folder that files are dropped into.", show_default=False)],
    out: Out,
    chosen: Settings,
    workers: Workers = False,
    lane: Lane = "normal",
    ledger: LedgerUrl = None,
    poll: Annotated[
        bool, flag("--poll", "Trust no events, look at everything. (always so on network file systems)")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks at a file.")] = 0.5,
    looks: Annotated[int, typer.Option(min=2, help="Looks that must find a file unchanged.")] = 3,
    quiet: Annotated[
        float, typer.Option(min=0, help="Seconds without news until a CT study without a known count is complete.")
    ] = 30,
    cap: Annotated[
        float, typer.Option(min=0, help="Seconds until a study is reported as it is; late slices make version 2.")
    ] = 600,
    refuse_after: Annotated[
        float, typer.Option(min=0, help="Seconds without change until a file that does not open is refused.")
    ] = 60,
    rescan: Annotated[float, typer.Option(min=1, help="Seconds between full looks where there are events.")] = 60,
    min_free: MinFree = 1024,
    once: Annotated[bool, flag("--once", "Report what is complete, then end.")] = False,
    log_json: LogJson = False,
    metrics: MetricsPort = None,
    notify: NotifyUrl = None,
) -> None:
    """Report what is dropped into a folder, until SIGTERM or Ctrl-C. Each content is reported once, whatever dies."""
    from flows.ledger import Ledger
    from flows.seeing.seeing import seeing
    from flows.settle import Patience
    from flows.watch import Watcher, Watching
    from pipelines.run import Job
    from pipelines.store import home

    warnings.simplefilter("ignore")  # of the readers of files: they quote headers
    watching = Watching(
        folder, Patience(interval, looks, quiet, cap, refuse_after), rescan, poll, min_free << 20, once=once
    )
    disks = {"reports": out, "state": home()}
    with (
        Ledger(out, ledger) as open_ledger,
        seeing("watch", log_json=log_json, port=metrics, notify=notify, disks=disks, ledger=open_ledger) as seen,
    ):
        job = Job((folder,), out, **dict(chosen))
        watcher = Watcher(job, watching, open_ledger, seen.log, seen.tell, lane=lane if workers else None)
        words = "Files in the watched folder that are not taken yet."
        seen.metrics.show("scanscribe_files_settling", words, lambda: watcher.settling)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: watcher.stop())
        watcher.run()
        if once and watcher.settling:
            seen.log("left", files=watcher.settling, message=f"{watcher.settling} files {LEFT}")
    raise typer.Exit(OK if watcher.complete or not once else NOT_ALL)
