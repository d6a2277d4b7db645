"""How long a drop into a watched folder waits for its report, with the bundled model on an idle machine.

    .venv/bin/python benchmarks/watch_latency.py [--quick]

From the moment when a drop is complete (its rename, its last byte, its last slice) until its line is in `index.jsonl`,
by one watcher with its default settings. The last line of the output is one JSON object with each figure beside its
target. Medians and worst of several drops, wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.uid import generate_uid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.one_off import SAMPLES, draw  # noqa: E402

TARGET_S, WAIT_S = 5.0, 60.0
SLICES = ROOT / "examples" / "ct" / "phantom-series"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 drops of each kind instead of 10")
    asked = parser.parse_args()
    drops = 3 if asked.quick else 10
    claims = []
    with tempfile.TemporaryDirectory() as scratch:
        for what, seconds in measure(Path(scratch), drops).items():
            for name, value in (("median", statistics.median(seconds)), ("worst", max(seconds))):
                claims.append(
                    {
                        "claim": f"{what}, {name} of {len(seconds)} drops",
                        "value": round(value, 2),
                        "unit": "s",
                        "target": TARGET_S,
                        "met": value <= TARGET_S,
                    }
                )
                print(f"{claims[-1]['claim']}: {value:.2f} s (target: at most {TARGET_S:g})")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "watch_latency", "machine": machine, "claims": claims}))


def measure(scratch: Path, drops: int) -> dict[str, list[float]]:
    """Seconds from complete to reported, by how the drop came. One more drop of each kind warms up."""
    inbox, out = scratch / "in", scratch / "out"
    inbox.mkdir()
    photos = [Path(path) for path in draw(scratch / "photos", SAMPLES["magnetic tile"], 2 * (drops + 1))]
    found: dict[str, list[float]] = {}
    with (scratch / "log").open("wb") as log:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "scanscribe.cli", "watch", str(inbox), "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "SCANSCRIBE_HOME": str(scratch / "home")},
            stderr=log,
        )
        try:
            _until(lambda: " watching " in (scratch / "log").read_text(), 120)
            for number in range(drops + 1):
                ways = {
                    "a photo by rename": lambda n=number: photos[n].rename(inbox / photos[n].name),
                    "a photo in slow chunks": lambda n=number: _in_chunks(photos[-1 - n], inbox),
                    "a counted CT study, slice by slice": lambda n=number: _slices(inbox / f"study-{n}"),
                }
                for what, drop in ways.items():
                    before = _lines(out)
                    drop()
                    complete = time.perf_counter()
                    _until(lambda before=before: _lines(out) > before, WAIT_S)
                    found.setdefault(what, []).append(time.perf_counter() - complete)
        finally:
            watcher.terminate()
            watcher.wait()
    return {what: seconds[1:] for what, seconds in found.items()}


def _in_chunks(photo: Path, inbox: Path) -> None:
    data = photo.read_bytes()
    with (inbox / photo.name).open("wb", buffering=0) as file:
        for start in range(0, len(data), len(data) // 10 + 1):
            file.write(data[start : start + len(data) // 10 + 1])
            time.sleep(0.1)


def _slices(folder: Path) -> None:
    """The sample series as a study of its own, whose headers say how many images it has."""
    away = folder.parent.parent / f"{folder.name}-made"
    away.mkdir()
    study, series = generate_uid(), generate_uid()
    paths = sorted(SLICES.iterdir())
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.ImagesInAcquisition = study, series, len(paths)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.save_as(away / f"{number:03}.dcm")
    folder.mkdir()
    for path in sorted(away.iterdir()):
        shutil.copyfile(path, folder / path.name)
        time.sleep(0.02)


def _lines(out: Path) -> int:
    index = out / "index.jsonl"
    return index.read_bytes().count(b"\n") if index.exists() else 0


def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            sys.exit("waited in vain")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
