"""`scanscribe worker` serves the batches of flows with one device; `scanscribe server` is what brings them."""

from __future__ import annotations

import signal
import warnings
from typing import Annotated

from scanscribe.commands.ledger import LedgerUrl
from scanscribe.options import Device, LogJson, MetricsPort, MinFree, Model, NotifyUrl, flag


def worker(
    device: Device = None,
    model: Model = None,
    ledger: LedgerUrl = None,
    wait: Annotated[bool, flag("--wait", "Wait for a device that another worker has.")] = False,
    min_free: MinFree = 1024,
    log_json: LogJson = False,
    metrics: MetricsPort = None,
    notify: NotifyUrl = None,
) -> None:
    """Load the model once and report the batches that `scanscribe batch --workers` hands out, until SIGTERM or Ctrl-C.

    Start one for each device. With PREFECT_API_URL set they work for that
    server, also from several machines; these must see inputs, output folder and
    PREFECT_RESULTS_LOCAL_STORAGE_PATH under the same paths, and share a ledger.
    """
    from flows.machine.server import import_prefect
    from flows.seeing.seeing import seeing
    from pipelines.store import home
    from scanscribe.settings import settings

    warnings.simplefilter("ignore")  # of the readers of files: they quote headers
    import_prefect()
    from flows.worker import Work, Worker

    chosen = settings(device=device, model=model)
    work = Work(chosen.device, chosen.model, ledger, wait, min_free << 20)
    with seeing(
        "worker", detail=chosen.device, log_json=log_json, port=metrics, notify=notify, disks={"state": home()}
    ) as seen:
        serving = Worker(work, seen.log, seen.tell)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: serving.stop())
        serving.run()


def server() -> None:
    """Keep this machine's Prefect server and its page running, until SIGTERM or Ctrl-C.

    Flows, workers and schedules start it by themselves, and stop it when the last of them ends.
    """
    import threading

    from flows.machine.server import LocalServer

    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with LocalServer() as local:
        print(f"The Prefect server is at {local.url()}, its page at {local.url().removesuffix('/api')}", flush=True)
        while not over.wait(2):
            local.keep()
