"""A run of a schedule, in a process of its own: `python -m flows.schedules.run NAME FLOW_RUN`.

The last line on standard output says what came of it, in counts and codes. It ends, after the item at hand, on SIGTERM
and when standard input closes: with the scheduler that started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from uuid import UUID

from flows.jobs import Crewing, run_batch
from flows.schedules.files import load


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
        summary = run_batch(schedule.job, crewing=crewing, flow_run=UUID(flow_run))
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
