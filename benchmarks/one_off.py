"""How long a person waits: a one-off report from a cold process, each further picture, and (`--demo`) the demo.

    .venv/bin/python benchmarks/one_off.py --demo

The last line of the output is one JSON object with each figure beside its target. Times are wall clock; the process
is cold, the disk cache is warm. Pictures are 1600 x 1200 JPEGs made from the samples, each with noise of its own.
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
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

ROOT = Path(__file__).parents[1]
SCANSCRIBE = [sys.executable, "-m", "scanscribe.cli"]
REPEATS = 5
FURTHER = 10  # pictures beside the first
WITH_GOLDEN = "board with its golden sample"
SAMPLES = {
    "steel strip": "steel/scratches.png",
    "magnetic tile": "tile/crack.png",
    WITH_GOLDEN: "board/board.png",
    "CT slice": "ct/phantom-series/IM0006.dcm",
}


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
    """Cold reports of one picture of each kind, and what each of ten more adds. Medians of interleaved runs."""
    one, further = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = {kind: draw(Path(scratch, kind), sample, 1 + FURTHER) for kind, sample in SAMPLES.items()}
        golden = draw(Path(scratch, "golden"), "golden/board.png", 1)
        for _, (kind, paths) in product(range(REPEATS), pictures.items()):
            options = ["--reference", *golden] if kind == WITH_GOLDEN else []
            alone, all_of_them = (report(paths[:count], options) for count in (1, len(paths)))
            one[kind].append(alone)
            further[kind].append((all_of_them - alone) / FURTHER)
    return [
        *(claim(f"one-off report of a {kind}, cold process", statistics.median(one[kind]), 8) for kind in SAMPLES),
        *(claim(f"each further {kind}", statistics.median(further[kind]), 1) for kind in SAMPLES),
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


def draw(folder: Path, sample: str, count: int) -> list[str]:
    """Distinct pictures from a sample."""
    path = ROOT / "examples" / sample
    shades = soft_tissue(path) if path.suffix == ".dcm" else np.asarray(Image.open(path).convert("L"))
    pixels = np.asarray(Image.fromarray(shades).resize((1600, 1200)), np.int16)
    noise = np.random.default_rng(0).integers(-2, 3, (count, *pixels.shape))
    folder.mkdir()
    paths = [folder / f"{path.stem}-{number}.jpg" for number in range(count)]
    for each, off in zip(paths, noise, strict=True):
        Image.fromarray((pixels + off).clip(0, 255).astype(np.uint8)).save(each, quality=92)
    return list(map(str, paths))


def soft_tissue(path: Path) -> np.ndarray:
    """A CT slice from -160 to 240 HU in shades of grey, `[H, W]`."""
    slice_ = pydicom.dcmread(path)
    hounsfield = slice_.pixel_array * slice_.RescaleSlope + slice_.RescaleIntercept
    return ((hounsfield + 160) / 400 * 255).clip(0, 255).astype(np.uint8)


def report(paths: list[str], options: list[str]) -> float:
    """Seconds that the command takes; it must report everything."""
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        command = [*SCANSCRIBE, "report", *paths, *options, "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - started


def claim(what: str, seconds: float, target: float) -> dict[str, object]:
    return {"claim": what, "value": round(seconds, 2), "unit": "s", "target": target, "met": seconds <= target}


if __name__ == "__main__":
    main()
