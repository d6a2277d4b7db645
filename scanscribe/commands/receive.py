"""`scanscribe receive`: takes DICOM instances from the network into a folder."""

from __future__ import annotations

import signal
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from scanscribe.options import LogJson, MetricsPort, MinFree, NotifyUrl


def receive(
    inbox: Annotated[Path, typer.Option(help="Folder for what is received; `scanscribe watch` takes it from there.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 11112,
    aet: Annotated[str, typer.Option(help="Our own AE title.")] = "SCANSCRIBE",
    bind: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    caller: Annotated[
        list[str] | None, typer.Option(help="AE title that may call; repeat it for several. (default all)")
    ] = None,
    associations: Annotated[int, typer.Option(min=1, help="Associations at a time.")] = 10,
    min_free: MinFree = 1024,
    tls_cert: Annotated[Path | None, typer.Option(help="Our certificate (PEM); turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-cert (PEM), when it is not in there.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities (PEM); callers then need a certificate of theirs.")
    ] = None,
    log_json: LogJson = False,
    metrics: MetricsPort = None,
    notify: NotifyUrl = None,
) -> None:
    """Receive DICOM instances (C-STORE, C-ECHO) into a folder, until SIGTERM or Ctrl-C."""
    from flows.receive import Node, Receiver
    from flows.seeing.seeing import seeing
    from pipelines.store import home

    warnings.simplefilter("ignore")  # of pydicom: they quote headers
    node = Node(aet, port, bind, tuple(caller or ()), associations, min_free << 20, tls_cert, tls_key, tls_ca)
    over: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: over.append(number))
    disks, detail = {"inbox": inbox, "state": home()}, f"{bind}:{port}" if port else bind
    with (
        seeing("receive", detail=detail, log_json=log_json, port=metrics, notify=notify, disks=disks) as seen,
        Receiver(node, inbox, seen.log) as receiver,
    ):
        while not over:
            receiver.clear_incoming()
            time.sleep(0.5)
