"""`scanscribe schedule serve`, or with arguments one run of it, with a slow tiny reader in place of the model."""

from __future__ import annotations

import sys
import time
from typing import Any

import flows.schedules.scheduler
import flows.schedules.timing
import pipelines.run
from flows.schedules import run
from scanscribe import cli
from tests.tiny_reader import TinyReader


class Slow(TinyReader):
    def read(self, study: Any, **options: Any) -> Any:
        time.sleep(0.15)
        return super().read(study, **options)


if __name__ == "__main__":
    reader = Slow()
    pipelines.run.find = lambda model: reader.stored  # type: ignore[assignment]
    pipelines.run.load_reader = lambda model, device: reader  # type: ignore[assignment]
    if sys.argv[1:]:
        run.main(*sys.argv[1:])
    flows.schedules.timing.FIRST_PAUSE_S = 1.0  # type: ignore[misc]
    flows.schedules.scheduler.RUN = (sys.executable, "-m", "tests.scheduler_process")  # type: ignore[misc]
    sys.argv = ["scanscribe", "schedule", "serve", "--log-json"]
    cli.main()
