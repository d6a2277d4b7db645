"""The command line in a process of its own, with the tiny reader in place of the model."""

from __future__ import annotations

import os

import pipelines.run
from scanscribe import cli
from tests.tiny_reader import TinyReader

if __name__ == "__main__":
    reader = TinyReader(seconds=float(os.environ.get("TINY_READER_SECONDS", "0")))
    pipelines.run.find = lambda model: reader.stored  # type: ignore[assignment]
    pipelines.run.load_reader = lambda model, device: reader  # type: ignore[assignment]
    cli.main()
