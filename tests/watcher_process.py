"""The command line in a process of its own, with the tiny reader in place of the model."""

from __future__ import annotations

import os

import pipelines.desk
import pipelines.run
from scanscribe import cli
from tests.tiny_reader import TinyReader

if __name__ == "__main__":
    reader = TinyReader(seconds=float(os.environ.get("TINY_READER_SECONDS", "0")))
    pipelines.run.find = lambda model: reader.stored  # type: ignore[assignment]
    pipelines.run.load_reader = lambda model, device: reader  # type: ignore[assignment]
    if os.environ.get("TINY_READER_GPU"):  # all goes on as wide, and workers have as many batches, as for one
        pipelines.desk.may_be_gpu = pipelines.run.may_be_gpu = lambda device: True  # type: ignore[assignment]
    cli.main()
