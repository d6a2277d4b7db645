"""What the ledger costs an item: put on record, claimed and done, one at a time and 64 at a time.

    .venv/bin/python benchmarks/ledger.py [--quick] [--url postgresql://user:password@host/database]

The last line of the output is one JSON object with each figure beside its target. Without --url: SQLite in a temporary
folder. Medians of three runs, wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import uuid

from flows.ledger import Ledger

REPEATS, TARGET_MS = 3, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 items instead of 5,000")
    parser.add_argument("--url", help="URL of a PostgreSQL data base")
    asked = parser.parse_args()
    items = 500 if asked.quick else 5000
    claims = []
    with tempfile.TemporaryDirectory() as scratch:
        url = asked.url or f"sqlite:///{scratch}/ledger.db"
        for batch in (1, 64):
            value = statistics.median(an_item(url, items, batch) for _ in range(REPEATS))
            what = f"ledger, an item of {items}, {batch} at a time"
            claims.append({"claim": what, "value": round(value, 3), "unit": "ms", "target": TARGET_MS})
            claims[-1]["met"] = value <= TARGET_MS
            print(f"{what}: {value:.3f} ms (target: at most {TARGET_MS} ms)")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "ledger", "machine": machine, "claims": claims}))


def an_item(url: str, items: int, batch: int) -> float:
    """Milliseconds from waiting to done, in a scope of its own."""
    with Ledger(f"/{uuid.uuid4()}", url) as ledger:
        requests = [f"{number:064}" for number in range(items)]
        started = time.perf_counter()
        for first in range(0, items, batch):
            ledger.add((request, [f"/in/{request}.png"]) for request in requests[first : first + batch])
            for claim in ledger.claim(batch):
                ledger.beat(claim)  # as whoever settles an item does, to see that it is still theirs
                ledger.done(claim, claim.request[:16])
        seconds = time.perf_counter() - started
        assert ledger.counts()["done"] == items
    return seconds / items * 1000


if __name__ == "__main__":
    main()
