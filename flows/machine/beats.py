"""What is done again and again beside other work, such as to say that one still lives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def regularly(act: Callable[[], None], every_s: float) -> Iterator[None]:
    """Calls `act` in a thread for as long as the block runs, for the first time after `every_s` seconds."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every_s):
            act()

    thread = threading.Thread(target=beat, name="heart-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
