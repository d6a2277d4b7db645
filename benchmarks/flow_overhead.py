"""What the Prefect flow adds to a run, and whether its memory stays flat from 2,000 to 50,000 photos.

    .venv/bin/python benchmarks/flow_overhead.py            # 2,000 photos; --many 50000 measures memory besides
    .venv/bin/python benchmarks/flow_overhead.py --quick    # 100 photos, once

The photos are small, and a dummy stands for the model: it takes the same time for each. The same job runs by
`pipelines.run.execute` and as a flow, by turns, each in a process of its own. The clock runs from the call until its
summary is there; the flow starts a server each time, whose data base the first run made (told apart). Fixed is what
the flow adds to a run of 16 photos, and an item costs what it adds beyond that to one of many. The last line of the
output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from racing import claim, machine

import pipelines.run
from pipelines.reading import ModelIdentity, Reading
from pipelines.run import Job, execute
from pipelines.sight import Sight
from pipelines.store import Calibration, StoredModel

COST_S = 0.002  # of the dummy, a photo
FEW, SIDE = 16, 64
AN_ITEM_MS, FIXED_S, MEMORY_BYTES = 5, 15, 1024
Arm = Literal["run", "flow"]
ARMS: tuple[Arm, ...] = ("run", "flow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 photos, once")
    parser.add_argument("--photos", type=int, help="how many (default 2,000)")
    parser.add_argument("--repeats", type=int, help="of each (default 5)")
    parser.add_argument("--many", type=int, default=0, help="photos of the run whose memory is compared")
    parser.add_argument("--arm", choices=("run", "flow"), help=argparse.SUPPRESS)  # one run, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(one(asked.arm, asked.folder)))
        return
    count = asked.photos or (100 if asked.quick else 2000)
    repeats = asked.repeats or (1 if asked.quick else 5)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        first = difference(place, FEW)
        fixed = statistics.median(difference(place, FEW) for _ in range(repeats))
        whole = statistics.median(difference(place, count) for _ in range(repeats))
        an_item = (whole - fixed) / (count - FEW) * 1000
        claims = [
            claim(f"the flow adds to each of {count} photos", an_item, AN_ITEM_MS, unit="ms", most=True),
            claim("the flow adds to a run", fixed, FIXED_S, unit="s", most=True),
            claim("the flow adds to the first run on a machine", first, unit="s"),
        ]
        if asked.many:
            little, much = (measure("flow", place, number) for number in (count, asked.many))
            print(f"Peak memory of the flow: {little['memory'] >> 20} and {much['memory'] >> 20} MiB")
            grown = (much["memory"] - little["memory"]) / (asked.many - count)
            what = f"memory that each photo takes from {count} to {asked.many}"
            claims.append(claim(what, grown, MEMORY_BYTES, unit="bytes", most=True))
    for each in claims:
        target = "" if each["target"] is None else f" (target: at most {each['target']})"
        print(f"{each['claim']}: {each['value']} {each['unit']}{target}")
    print(json.dumps({"benchmark": "flow_overhead", "machine": machine(["cpu"]), "claims": claims}))


def difference(place: Path, count: int) -> float:
    """Seconds that the flow takes beyond a plain run."""
    plain, flow = (measure(arm, place, count) for arm in ARMS)
    print(f"{count} photos: {plain['seconds']:.2f} s (processor: {plain['processor']:.2f} s), ", end="")
    print(f"as a flow {flow['seconds']:.2f} s ({flow['processor']:.2f} s), peak {flow['memory'] >> 20} MiB", flush=True)
    return flow["seconds"] - plain["seconds"]


def measure(arm: Arm, place: Path, count: int) -> dict[str, Any]:
    """One run over so many photos, in a process of its own."""
    photos = place / f"photos-{count}"
    if not photos.is_dir():
        photos.mkdir()
        for number in range(count):
            draw(photos / f"{number:06}.png", number)
    command = [sys.executable, __file__, "--arm", arm, "--folder", str(photos)]
    environment = os.environ | {"SCANSCRIBE_HOME": str(place / "home")}
    environment.pop("PREFECT_API_URL", None)
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def one(arm: Arm, folder: Path) -> dict[str, Any]:
    """One run in this process: seconds, processor seconds, and the peak memory in bytes."""
    from flows.jobs import run_batch

    dummy = Dummy()
    pipelines.run.find = lambda model: dummy.stored
    pipelines.run.load_reader = lambda model, device: dummy
    with tempfile.TemporaryDirectory() as out:
        job = Job((folder,), Path(out), device="cpu")
        started, worked = time.perf_counter(), time.process_time()
        summary = execute(job) if arm == "run" else run_batch(job)
        seconds, processor = time.perf_counter() - started, time.process_time() - worked
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # before thousands of folders are removed
        assert summary.complete and len(summary.reported) == sum(1 for _ in folder.iterdir())
    return {"seconds": seconds, "processor": processor, "memory": memory}


class Dummy:
    """The door of `pipelines.reader.Reader`; it takes `COST_S` for a photo and finds nothing."""

    def __init__(self) -> None:
        self.stored = StoredModel(Path(), "dummy", "1", {}, Calibration(), "1" * 64, "0" * 64)
        self.info = ModelIdentity("dummy", "1", self.stored.weights_sha256, self.stored.config_sha256, "cpu")

    def read_many(self, sights: Sequence[Sight]) -> list[Reading]:
        time.sleep(COST_S * len(sights))
        return [Reading("defect", 1.0, "steel", {}, (), "No defect.") for _ in sights]


def draw(path: Path, number: int) -> None:
    """A small photo of its own."""
    pixels = np.full((SIDE, SIDE), 90, np.uint8)
    pixels[0, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)


if __name__ == "__main__":
    main()
