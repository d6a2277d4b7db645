"""`scanscribe send`: the DICOM objects of reports to an archive."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scanscribe.options import Json, flag

if TYPE_CHECKING:
    from pipelines.send import SendSummary

OK, SOME_REFUSED, UNUSABLE = 0, 1, 2


def send(
    reports: Annotated[
        list[Path], typer.Argument(help="Report folders, or output folders of runs.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The archive: AET@host:port, or https://host/dicom-web.")],
    aet: Annotated[str, typer.Option(help="Our own AE title.")] = "SCANSCRIBE",
    tls: Annotated[bool, flag("--tls", "Talk TLS with the DICOM node.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Authorities to trust (PEM). (default the system's)")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Our own certificate (PEM), where the archive asks.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-cert (PEM), when it is not in there.")] = None,
    retry: Annotated[int, typer.Option(min=0, max=20, help="More tries when the network fails.")] = 3,
    again: Annotated[bool, flag("--again", "Send also what the archive has taken before.")] = False,
    as_json: Json = False,
) -> None:
    """Send the DICOM objects of reports to an archive (C-STORE or STOW-RS). Running it again sends what is missing.

    Credentials for a DICOMweb server come from SCANSCRIBE_SEND_USER and
    SCANSCRIBE_SEND_PASSWORD, or from SCANSCRIBE_SEND_TOKEN.
    """
    from pipelines.peers import Tls, peer_at
    from pipelines.send import send as send_reports
    from scanscribe import console

    wanted = tls or tls_ca or tls_cert or tls_key
    peer = peer_at(to, calling=aet, tls=Tls(tls_ca, tls_cert, tls_key) if wanted else None)
    with console.progress("Sending") as tell:
        summary = send_reports(
            reports, peer, retry=retry, again=again, listener=lambda done, total: tell("Sending", done, total)
        )
    if as_json:
        sys.stdout.write(json.dumps(summary.as_dict()) + "\n")
    else:
        _show(summary)
    raise typer.Exit(OK if summary.complete else UNUSABLE if summary.out_of_reach else SOME_REFUSED)


def _show(summary: SendSummary) -> None:
    from rich.table import Table
    from rich.text import Text

    from scanscribe.console import output, short

    table = Table(title=f"Sent to {summary.peer}", title_justify="left")
    for name in ("object", "outcome", "what the archive said"):
        table.add_column(name, overflow="fold")
    styles = {"refused": "red", "not-sent": "red"}
    for each in summary.objects:
        outcome = Text(each.state.replace("-", " "), styles.get(each.state, ""))
        table.add_row(Text(short(each.file)), outcome, Text(each.message))
    output().print(table)
