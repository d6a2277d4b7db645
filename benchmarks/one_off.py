"""How long a person waits: a one-off report from a cold process, each further photo, and (`--demo`) the demo.

    .venv/bin/python benchmarks/one_off.py --demo

The last line of the output is one JSON object with each figure beside its target. Times are wall clock; the process
is cold, the disk cache is warm. Photos are 1600 x 1200 JPEGs made from the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SCANSCRIBE = [sys.executable, "-m", "scanscribe.cli"]
REPEATS = 5
FURTHER = 10  # photos beside the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="time the demo's batch flow with an empty state folder too")
    asked = parser.parse_args()
    claims = one_off()
    if asked.demo:
        claims += demo()
    for claim in claims:
        print(f"{claim['claim']}: {claim['value']} {claim['unit']} (target: at most {claim['target']})")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "one_off", "machine": machine, "claims": claims}))


def one_off() -> list[dict[str, object]]:
    """A cold report of one photo, and what each of ten more adds to it. Medians of interleaved runs."""
    one, many = [], []
    with tempfile.TemporaryDirectory() as scratch:
        photos = draw_photos(Path(scratch), 1 + FURTHER)
        for repeat in range(REPEATS):
            one.append(wall(["report", photos[0], "--out", f"{scratch}/one-{repeat}"]))
            many.append(wall(["report", *photos, "--out", f"{scratch}/many-{repeat}"]))
    further = statistics.median((b - a) / FURTHER for a, b in zip(one, many, strict=True))
    return [
        claim("one-off report of one photo, cold process", statistics.median(one), 8),
        claim("each further photo of the same run", further, 1),
    ]


def demo() -> list[dict[str, object]]:
    """The demo's flow with an empty state folder, so that Prefect's data base is made in the measured time."""
    with tempfile.TemporaryDirectory() as scratch:
        listed = subprocess.run([sys.executable, ROOT / "examples" / "paths.py"], capture_output=True, check=True)
        inputs = listed.stdout.decode().splitlines()
        index = Path(scratch, "out", "index.jsonl")
        started = time.perf_counter()
        process = subprocess.Popen(
            [*SCANSCRIBE, "batch", *inputs, "--reference", ROOT / "examples" / "golden", "--out", index.parent],
            env={**os.environ, "SCANSCRIBE_HOME": f"{scratch}/home"},
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
        )
        while process.poll() is None and not index.exists():
            time.sleep(0.01)
        first = time.perf_counter() - started
        if process.wait() != 1 or not index.exists():  # 1: the broken samples are refused
            sys.exit("the demo failed")
        return [
            claim("demo: first report written", first, 20),
            claim("demo: whole flow", time.perf_counter() - started, 90),
        ]


def draw_photos(folder: Path, count: int) -> list[str]:
    """Distinct photos from the sample tile: each is rolled by some rows."""
    tile = Image.open(ROOT / "examples" / "tile" / "crack.png").convert("RGB").resize((1600, 1200))
    paths = [folder / f"photo-{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.roll(np.asarray(tile), 7 * number, axis=0)).save(path, quality=92)
    return list(map(str, paths))


def wall(arguments: list[str]) -> float:
    """Seconds that a command takes; it must report everything."""
    started = time.perf_counter()
    subprocess.run([*SCANSCRIBE, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - started


def claim(what: str, seconds: float, target: float) -> dict[str, object]:
    return {"claim": what, "value": round(seconds, 2), "unit": "s", "target": target, "met": seconds <= target}


if __name__ == "__main__":
    main()
