"""From files on disk to written reports: photos a second, CT studies a minute, one study, how long the device waits.

    .venv/bin/python benchmarks/end_to_end.py [--quick] [--device cuda] [--ct FOLDER] [--profile]

Photos are 1600 x 1200 JPEGs of steel, tiles and boards, made from the samples; CT studies have 64 slices of 512 x 512,
each a copy of the series in FOLDER under UIDs of its own, or of the phantom. Reports are JSON and HTML. The model is
loaded, and one run went before (it counts nowhere). A single study is a new one each time: what is known of files that
were read before does not help. Then the same by the batch flow, whose server is up, and by a worker that serves it
(left out where prefect is not installed). In the last runs readings are replayed: what is left is decoding and writing.
Medians of the runs; the last line of the output is a JSON object.

A machine needs torch, transformers, scipy, pillow and safetensors, and in the versions of requirements.lock pydantic,
pydicom and pypdfium2, and prefect for the flow; for a compressed series in FOLDER also pylibjpeg-openjpeg, pyjpegls or
python-gdcm. For one without a network (Python 3.12), fetch them elsewhere into a folder that travels with the
repository:

    sed -E '/^ *--hash/d; s/ \\\\$//' requirements.lock | grep -E '^[a-z0-9]' > pack/versions.txt
    python3 -m pip download --dest pack/wheels --only-binary :all: --python-version 3.12 \\
        --constraint pack/versions.txt prefect pydantic pydicom pypdfium2
    python3 -m pip install --no-index --find-links pack/wheels prefect pydantic pydicom pypdfium2 && \\
        PYTHONPATH=. python3 benchmarks/end_to_end.py --device cuda

With later versions than those of what prefect itself needs, its server may not start.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import importlib.util
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from unittest import mock

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import generate_uid

from pipelines import ingest
from pipelines.desk import Desk, Opened, Version
from pipelines.reading import Reading
from pipelines.run import Job, RunSummary, execute, load_reader
from pipelines.sight import sight
from pipelines.study import Rejection

if __name__ == "__main__":  # desks are processes that import this file anew, and have no use for torch
    import torch
    from racing import claim, machine

    from flows.jobs import Crewing, run_batch
    from flows.machine.server import LocalServer

ROOT = Path(__file__).parents[1]
SAMPLES = ("steel/scratches.png", "tile/crack.png", "board/board.png")
SLICES = 64
SERVE = """
import os, signal, sys
os.sched_setaffinity(0, map(int, sys.argv[2:]))
from flows.machine.server import import_prefect
import_prefect()
from flows.seeing.log import EventLog
from flows.worker import Work, Worker
worker = Worker(Work(sys.argv[1]), EventLog(as_json=True))
signal.signal(signal.SIGTERM, lambda *_: worker.stop())
worker.run()
"""  # as `scanscribe worker` does, where that is not installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few inputs, one run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--beside", help="another GPU: in the last runs by workers it has one, too; each on half the cores"
    )
    parser.add_argument("--ct", type=Path, help="folder of a CT series with 64 slices or more")
    parser.add_argument("--photos", type=int, help="how many (default 1,536 on a GPU, 24 on a CPU)")
    parser.add_argument("--studies", type=int, help="how many (default 64 on a GPU, 3 on a CPU)")
    parser.add_argument("--runs", type=int, help="of each (default 3)")
    parser.add_argument("--profile", action="store_true", help="say where the time of this process goes")
    asked = parser.parse_args()
    gpu = asked.device.startswith("cuda")
    count = asked.photos or (6 if asked.quick else 1536 if gpu else 24)
    studies = asked.studies or (1 if asked.quick else 64 if gpu else 3)
    runs = asked.runs or (1 if asked.quick else 3)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        with ProcessPoolExecutor() as pool:
            photos = list(pool.map(draw_photo, [place / "photos" / f"{n:05}.jpg" for n in range(count)], chunksize=16))
            made = list(pool.map(copy_study, [asked.ct] * studies, [place / "ct" / f"{n:04}" for n in range(studies)]))
            times = 1 if asked.quick else 5
            new = list(pool.map(copy_study, [asked.ct] * 2 * times, [place / "new" / f"{n}" for n in range(2 * times)]))
        claims: list[dict[str, object]] = []

        def tell(*more: dict[str, object]) -> None:
            """As soon as they are known: a run may be cut short."""
            claims.extend(more)
            for each in more:
                target = "" if each["target"] is None else f" (target: {each['target']})"
                print(f"{each['claim']}: {each['value']} {each['unit']}{target}", flush=True)

        warm = run(place / "photos" / photos[0].name, place / "out", asked.device)
        tell(claim("first report of a process, model and all", warm.first_report_seconds or 0, unit="s"))
        run(made[0], place / "out", asked.device)
        alone = [run(each, place / "out", asked.device) for each in new[:times]]
        entry = alone[-1].reported[0]
        timing = json.loads((place / "out" / entry.formats["json"]).read_text())["timing_s"]
        print("Within a CT study, in seconds:", ", ".join(f"{name} {value}" for name, value in timing.items()))
        seconds = statistics.median(each.seconds for each in alone)
        tell(claim(f"one CT study of {SLICES} slices", seconds, 1 if gpu else 10, unit="s", most=True))
        if asked.profile:
            profile(photos, made[:2], place / "out", asked.device)
        whole = [run(place / "ct", place / "out", asked.device) for _ in range(runs)]
        tell(*rates("CT studies", [60 * studies / each.seconds for each in whole], "studies/min", whole, gpu))
        before = cores()
        with at_work(asked.device) as samples:
            whole = [run(place / "photos", place / "out", asked.device) for _ in range(runs)]
        worked, waited, passed = (after - then for after, then in zip(cores(), before, strict=True))
        tell(
            claim("photos: share of the cores' time that they work", worked / passed),
            claim("photos: share of the cores' time that they wait for the disk", waited / passed),
        )
        if samples:
            tell(claim("photos: utilisation of the GPU over whole runs", statistics.mean(samples) / 100))
        tell(*rates("photos", [count / each.seconds for each in whole], "photos/s", whole, gpu))
        if importlib.util.find_spec("prefect"):
            with serving(place / "home"):
                for what, folder, many, unit in (
                    ("photos by the batch flow", place / "photos", count, "photos/s"),
                    ("CT studies by the batch flow", place / "ct", 60 * studies, "studies/min"),
                ):
                    whole = [run(folder, place / "out", asked.device, run_batch) for _ in range(runs)]
                    tell(*rates(what, [many / each.seconds for each in whole], unit, whole, gpu))
                crews = {"a worker": {asked.device: sorted(os.sched_getaffinity(0))}}
                if asked.beside:
                    half = len(crews["a worker"][asked.device]) // 2
                    one, other = (crews["a worker"][asked.device][part] for part in (slice(half), slice(half, None)))
                    crews |= {"one on half the cores": {asked.device: one}}
                    crews |= {"two workers": {asked.device: one, asked.beside: other}}
                for who, where in crews.items():
                    with contextlib.ExitStack() as stack:
                        by_worker, *_ = [stack.enter_context(worker(*each)) for each in where.items()]
                        for what, folder, many, unit in (
                            (f"photos by {who}", place / "photos", count, "photos/s"),
                            (f"CT studies by {who}", place / "ct", 60 * studies, "studies/min"),
                        ):
                            whole = [run(folder, place / "out", asked.device, by_worker) for _ in range(runs)]
                            tell(*rates(what, [many / each.seconds for each in whole], unit, whole, gpu))
        tell(*reading(photos[: 256 if gpu else 6], asked.device))
        seconds, _ = beside(made[0], new[times:], place / "out", asked.device)
        tell(claim("one CT study: processor time in the model's process beside it", seconds, unit="s"))
        _, taken = beside(made[0], [place / "ct"] * runs, place / "out", asked.device)
        tell(claim("CT studies: opened and written, without reading", 60 * studies / taken, unit="studies/min"))
        seconds, taken = beside(
            place / "photos" / photos[0].name, [place / "photos"] * runs, place / "out", asked.device
        )
        tell(claim("a photo: processor time in the model's process beside it", seconds / count * 1000, unit="ms"))
        tell(claim("photos: opened and written, without reading", count / taken, unit="photos/s"))
    print(json.dumps({"benchmark": "end_to_end", "machine": machine([asked.device]), "claims": claims}))


def rates(what: str, values: list[float], unit: str, runs: list[RunSummary], gpu: bool) -> list[dict[str, object]]:
    """How many of them in a time, and what share of it the device waits."""
    print(f"{what}: {', '.join(f'{value:.4g}' for value in values)} {unit}")
    waits = [each.device_wait or 0.0 for each in runs]
    target = 0.2 if gpu and len(os.sched_getaffinity(0)) >= 16 else None
    return [
        claim(f"{what}, from disk to written reports", statistics.median(values), unit=unit),
        claim(f"{what}: share of the run that the device waits", statistics.median(waits), target, most=True),
    ]


def cores() -> tuple[int, int, int]:
    """Ticks that this machine's cores have worked, have waited for a disk, and all that have passed (proc_stat(5))."""
    user, nice, system, idle, disk, *others = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    worked = user + nice + system + sum(others)
    return worked, disk, worked + disk + idle


@contextlib.contextmanager
def at_work(device: str) -> Iterator[list[int]]:
    """The GPU's utilisation in percent, sampled five times a second by nvidia-smi, filled in when the block is over."""
    samples: list[int] = []
    if not device.startswith("cuda") or not shutil.which("nvidia-smi"):
        yield samples
        return
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with tempfile.TemporaryFile("w+") as said:
        sampling = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            yield samples
        finally:
            sampling.terminate()
            sampling.wait()
        said.seek(0)
        samples += [int(line) for line in said if line.strip().isdigit()]


def reading(photos: list[Path], device: str) -> list[dict[str, object]]:
    """What the device does alone: photos that are decoded and framed, as many together as in a run on a GPU."""
    reader = load_reader("default", device)
    sights = []
    for path in photos:
        study = ingest.load(ingest.plan([path]).units[0])
        assert not isinstance(study, Rejection)
        sights.append(replace(sight(study), source=None))
    spent: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(4):
        whole = dict.fromkeys(spent, 0.0)
        for start in range(0, len(sights), 64):
            for each in reader.read_many(sights[start : start + 64]):
                assert not isinstance(each, Exception)
                for name in whole:
                    whole[name] += each.timing_s[name]
        for name, seconds in whole.items():
            spent[name].append(seconds / len(sights) * 1000)
    return [
        claim(f"a photo in memory: {name}", statistics.median(values[1:]), unit="ms") for name, values in spent.items()
    ]


def beside(first: Path, inputs: list[Path], out: Path, device: str) -> tuple[float, float]:
    """What inputs like `first`, whose reading is replayed, cost beside the model: medians of several runs.

    The processor seconds of the model's process, and the seconds of a run.
    """
    reader = load_reader("default", device)
    [read] = reader.read_many([sight(ingest.load(ingest.plan([first]).units[0]))])
    spent, whole = [], []
    with mock.patch.object(reader, "read_many", lambda sights: [read] * len(sights)):
        for each in inputs:
            started = time.process_time()
            whole.append(run(each, out, device).seconds)
            spent.append(time.process_time() - started)
    return statistics.median(spent), statistics.median(whole)


def profile(photos: list[Path], studies: list[Path], out: Path, device: str) -> None:
    """Says where the time goes: on a desk, in the reader by how many are read together, and in this process."""
    reader = load_reader("default", device)
    for what, inputs in (("photo", photos[:12]), ("CT study", studies)):
        desk = Desk(Job(tuple(inputs), out, device=device))
        spent: dict[str, list[float]] = {"open": [], "read": [], "report": []}
        for number, unit in enumerate(ingest.plan(inputs).units):
            started = time.perf_counter()
            opened = desk.open(unit, None, "0" * 64)
            assert isinstance(opened, Opened)
            spent["open"].append(time.perf_counter() - started)
            [reading] = reader.read_many([opened.sight])
            assert isinstance(reading, Reading)
            spent["read"].append(sum(reading.timing_s.values()))
            started = time.perf_counter()
            desk.report(opened, reading, reader.info, Version(f"{number:016x}"), 0.0)
            spent["report"].append(time.perf_counter() - started)
        desk.close()
        shares = ", ".join(f"{name} {statistics.median(values) * 1000:.1f} ms" for name, values in spent.items())
        print(f"A {what}, one at a time: {shares}")
    sights = [replace(sight(ingest.load(unit)), source=None) for unit in ingest.plan(photos[:64]).units]
    for count in (1, 4, 16, 64):
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            for start in range(0, len(sights), count):
                reader.read_many(sights[start : start + count])
            taken.append((time.perf_counter() - started) / len(sights) * 1000)
        print(f"Reading {count} photos together: {statistics.median(taken[1:]):.2f} ms a photo")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.startswith("cuda") else []
    with torch.profiler.profile(activities=activities) as device_time:
        reader.read_many(sights)
    order = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    print(device_time.key_averages().table(sort_by=order, row_limit=14, max_name_column_width=60))
    with cProfile.Profile() as host_time:
        reader.read_many(sights)
    pstats.Stats(host_time).sort_stats("tottime").print_stats(22)
    shutil.rmtree(out, ignore_errors=True)


@contextlib.contextmanager
def serving(home: Path) -> Iterator[None]:
    """A server for the flows of the block, with its state in `home`."""
    with mock.patch.dict(os.environ, {"SCANSCRIBE_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}):
        os.environ.pop("PREFECT_API_URL", None)
        with LocalServer() as server:
            server.url()
            yield


@contextlib.contextmanager
def worker(device: str, on: list[int]) -> Iterator[Callable[[Job], RunSummary]]:
    """How jobs are run by a worker, a process of its own on those cores that serves for as long as the block runs.

    As in the summaries of other runs, its device waits while nothing is read between its first reading and its last
    report.
    """
    serving = threading.Event()
    busy: list[tuple[float, float]] = []  # when an item was done, and seconds of reading

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith("{"):  # what stops it before it serves
                sys.stderr.write(line)
                continue
            said = json.loads(line)
            if said.get("event") == "serving":
                serving.set()
            elif said.get("event") == "reported":
                busy.append((datetime.fromisoformat(said["time"]).timestamp(), said["read"]))

    def by_worker(job: Job) -> RunSummary:
        busy.clear()
        summary = run_batch(job, crewing=Crewing())
        if not busy:  # another worker was first
            return summary
        (first, read), (last, _) = busy[0], busy[-1]
        waited = 1 - sum(each for _, each in busy) / (last - first + read)
        return replace(summary, device_wait=max(waited, 0.0))

    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, device, *map(str, on)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    listening = threading.Thread(target=listen)
    listening.start()
    try:
        assert serving.wait(60)
        yield by_worker
    finally:
        process.terminate()
        process.wait()
        listening.join()


def run(inputs: Path, out: Path, device: str, by: Callable[[Job], RunSummary] = execute) -> RunSummary:
    """Report into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    summary = by(Job((inputs,), out, device=device))
    assert summary.complete and summary.reported, (summary.left, [each.reason for each in summary.rejected])
    return summary


def draw_photo(path: Path) -> Path:
    """A photo of its own: a sample, larger and moved."""
    path.parent.mkdir(exist_ok=True)
    number = int(path.stem)
    with Image.open(ROOT / "examples" / SAMPLES[number % len(SAMPLES)]) as sample:
        pixels = np.asarray(sample.convert("RGB").resize((1600, 1200)))
    moved = np.roll(pixels, (7 * number % 1200, 11 * number % 1600), axis=(0, 1))
    Image.fromarray(moved).save(path, quality=92)
    return path


def copy_study(source: Path | None, folder: Path) -> Path:
    """A CT series of 64 slices under UIDs of its own."""
    files = sorted((source or ROOT / "examples" / "ct" / "phantom-series").rglob("*"))
    slices = [pydicom.dcmread(path) for path in files if path.is_file()]
    slices.sort(key=lambda each: float(each.ImagePositionPatient[2]))
    if len(slices) < SLICES:
        slices = [stretched(slices, k) for k in range(SLICES)]
    folder.mkdir(parents=True)
    study, series = generate_uid(), generate_uid()
    for k, each in enumerate(slices[:SLICES]):
        each.StudyInstanceUID, each.SeriesInstanceUID, each.SOPInstanceUID = study, series, generate_uid()
        each.file_meta.MediaStorageSOPInstanceUID = each.SOPInstanceUID
        each.save_as(folder / f"{k:03}.dcm", enforce_file_format=True)
    return folder


def stretched(slices: list[pydicom.Dataset], k: int) -> pydicom.Dataset:
    """Slice `k` of a volume that is taller and wider than the phantom."""
    from pydicom.uid import ExplicitVRLittleEndian

    found = copy.deepcopy(slices[k * len(slices) // SLICES])
    pixels = found.pixel_array
    factor = 512 // pixels.shape[0]
    found.PixelData = np.kron(pixels, np.ones((factor, factor), pixels.dtype)).tobytes()
    found.Rows, found.Columns = pixels.shape[0] * factor, pixels.shape[1] * factor
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found["PixelData"].VR = "OW"
    found.PixelSpacing = [value / factor for value in found.PixelSpacing]
    x, y, _ = found.ImagePositionPatient
    found.ImagePositionPatient = [x, y, 5.0 * k]
    found.SliceThickness, found.InstanceNumber = 5.0, k + 1
    return found


if __name__ == "__main__":
    main()
