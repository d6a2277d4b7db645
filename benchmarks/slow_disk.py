"""What a slow disk costs: for how many syncs a report waits that others do not wait for at the same time.

    .venv/bin/python benchmarks/slow_disk.py [--quick] [--sync-ms 20] [--processes 14]

Small photos are reported with a dummy for the model, on the disk as it is and with each `fsync` taking `--sync-ms`
longer: once with that many processes that open and write, as beside a GPU, and once with none, as on two cores.
What a report takes longer then, over that time, is the figure. Runs by turns, each in a process of its own; medians.
The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from flow_overhead import Dummy, draw
from racing import claim, machine

import pipelines.desk
import pipelines.run
from pipelines.run import Job, execute

BESIDE, ALONE = 0.5, 3  # syncs, with processes that write and with none
EVERYWHERE = """
import os, time
_fsync, _longer = os.fsync, float(os.environ["SYNC_S"])
def fsync(file):
    time.sleep(_longer)
    _fsync(file)
os.fsync = fsync
os.sched_getaffinity = lambda process: set(range(int(os.environ["CORES"])))
"""  # a module that each Python process imports when it starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 photos, once")
    parser.add_argument("--photos", type=int, help="how many (default 400)")
    parser.add_argument("--repeats", type=int, help="of each (default 3)")
    parser.add_argument("--sync-ms", type=float, default=20, help="default 20")
    parser.add_argument("--processes", type=int, default=14, help="default 14")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)  # photos and reports, in this process
    asked = parser.parse_args()
    if asked.run:
        print(one(*asked.run))
        return
    count = asked.photos or (200 if asked.quick else 400)
    claims = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "sitecustomize.py").write_text(EVERYWHERE)
        (place / "photos").mkdir()
        for number in range(count):
            draw(place / "photos" / f"{number:06}.png", number)
        for processes, target in ((asked.processes, BESIDE), (0, ALONE)):
            slow: list[float] = []
            plain: list[float] = []
            for _ in range(asked.repeats or (1 if asked.quick else 3)):
                plain.append(measure(place, processes, 0.0))
                slow.append(measure(place, processes, asked.sync_ms / 1000))
            what = f"{processes or 'no'} processes that write"
            print(f"{count} photos, {what}: {[f'{s:.1f} s' for s in plain]}, slowed {[f'{s:.1f} s' for s in slow]}")
            waited = (statistics.median(slow) - statistics.median(plain)) / count / (asked.sync_ms / 1000)
            claims.append(
                claim(f"syncs that a report waits for, with {what}", max(waited, 0.0), target, unit="", most=True)
            )
    for each in claims:
        print(f"{each['claim']}: {each['value']} (target: at most {each['target']})")
    print(json.dumps({"benchmark": "slow_disk", "machine": machine(["cpu"]), "claims": claims}))


def measure(place: Path, processes: int, longer: float) -> float:
    """Seconds of a run in a process of its own, where each sync takes so many seconds longer."""
    path = os.pathsep.join([str(place), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "SYNC_S": str(longer), "CORES": str(processes + 2)}  # two have other work
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--run", str(place / "photos"), out]
        ran = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE)
    return float(ran.stdout)


def one(photos: Path, out: Path) -> float:
    """Seconds of a run in this process."""
    dummy = Dummy()
    pipelines.run.find = lambda model: dummy.stored
    pipelines.run.load_reader = lambda model, device: dummy
    pipelines.desk.may_be_gpu = pipelines.run.may_be_gpu = lambda device: True
    summary = execute(Job((photos,), out, device="cpu"))
    assert summary.complete and len(summary.reported) == sum(1 for _ in photos.iterdir())
    return summary.seconds


if __name__ == "__main__":
    main()
