"""A run of a schedule, in a process of its own: `python -m flows.schedules.run NAME FLOW_RUN`.

The last line on standard output says what came of it, in counts and codes. It ends, after the item at hand, on SIGTERM
and when standard input closes: with the scheduler that started it. Critical findings are told to the URL
that the scheduler notifies, by this process: before they are on record.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from uuid import UUID

from flows.jobs import Crewing, run_batch
from flows.schedules.files import load
from flows.seeing.log import EventLog
from flows.seeing.metrics import Metrics
from flows.seeing.notify import URL_VARIABLE, Notifier
from flows.seeing.seeing import Seeing


def main(name: str, flow_run: str) -> None:
    """Run the schedule's job as that flow run."""
    warnings.simplefilter("ignore")  # of the readers of files: they quote headers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def end_with_scheduler() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_scheduler, daemon=True).start()
    try:
        schedule = load(name)
        crewing = Crewing(schedule.lane, os.environ.get("SCANSCRIBE_LEDGER")) if schedule.lane else None
        url = os.environ.get(URL_VARIABLE)
        with Notifier(url) if url else contextlib.nullcontext() as notifier:
            # That a run failed is logged and told by the scheduler.
            seen = Seeing(EventLog(silent=True), notifier.tell, Metrics()) if notifier else None
            summary = run_batch(schedule.job, crewing=crewing, flow_run=UUID(flow_run), seen=seen)
    except KeyboardInterrupt:
        told: dict[str, str | int] = {"code": "interrupted"}
    except Exception as error:  # its words can name files: only the code leaves this process
        told = {"code": getattr(error, "code", "fault")}
    else:
        told = {
            "reported": len(summary.reported),
            "already": len(summary.already_reported),
            "refused": len(summary.rejected),
        }
    print(json.dumps(told), flush=True)
    os._exit(0)  # the thread that reads standard input would hold the process up


if __name__ == "__main__":
    main(*sys.argv[1:])
