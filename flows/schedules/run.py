"""A run of a schedule, in a process of its own: `python -m flows.schedules.run NAME FLOW_RUN`.

Standard output has a JSON object a line: events of reports and refusals for the scheduler, which logs and counts them,
and at the end what came of the run, in counts and codes. It ends, after the item at hand, on SIGTERM and when standard
input closes: with the scheduler that started it. Critical findings and refused inputs are told to the URL that the
scheduler notifies, by this process: before they are on record.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from uuid import UUID

from flows.jobs import Crewing, run_batch
from flows.schedules.files import load
from flows.seeing.log import EventLog, Fact
from flows.seeing.metrics import Metrics
from flows.seeing.notify import URL_VARIABLE, Notifier
from flows.seeing.seeing import Seeing


def relay(event: str, facts: Mapping[str, Fact]) -> None:
    """Let the scheduler log and count an event. That a run failed it says itself."""
    if event != "run-failed":
        with contextlib.suppress(OSError):  # it has died: this process ends after the item at hand
            sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
            sys.stdout.flush()


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
            log = EventLog(silent=True, hearers=(relay,))
            seen = Seeing(log, functools.partial(notifier.tell, schedule=name) if notifier else None, Metrics())
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
