"""What adapting gains on a product line that the base has never seen, by images and by what is trained.

The base is a detector trained without the line. On a machine with a GPU (torch, numpy and safetensors are enough):

    python -m pipelines.training --recipe detector --data DATA --out base --set streams.neu-det.batch=0
    python benchmarks/adapt_gain.py --base base/detector.safetensors --data DATA --line neu-det --out DETECTIONS.npz

Then, where pycocotools is installed:

    python benchmarks/adapt_gain.py --score DETECTIONS.npz --data DATA --line neu-det

Arms: `head` (heads alone), `lora` (heads and low-rank additions: what `scanscribe adapt` trains), `full` (every
weight), `scratch` (every weight, from nothing), each on the same images and views; `base` is the base as it is. The
last line of the output of `--score` is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from encoders import Detector, DetectorConfig
from encoders.adapter import AdapterConfig, load_adapter
from pipelines.adapted import evidence
from pipelines.inputs import channels, pad, read_grey, resize
from pipelines.manifest import Case, read_manifest
from pipelines.own_line import OwnLine, inspection_size
from pipelines.training.adapt import fitted, train_adapter, train_network
from pipelines.training.run import Run, load_recipe
from pipelines.training.streams import load_stream
from pipelines.weights import load_config, load_into

SIZES = (50, 100, 200, 500)
KEPT, LEAST = 60, 0.01  # detections of a picture that are kept, and their least score
# Arm, steps, learning rate (None: the recipe's).
ARMS: tuple[tuple[str, int, float | None], ...] = (
    ("head", 500, None),
    ("lora", 500, None),
    ("full", 500, None),
    ("scratch", 500, None),
    ("lora", 2000, None),
    ("full", 2000, None),
    ("scratch", 2000, None),
)
Task = tuple[str, int, float | None, int, int]  # arm, steps, rate, images, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--line", default="neu-det", help="the data set that the base was trained without")
    parser.add_argument("--base", type=Path, help="weights of that base")
    parser.add_argument("--out", type=Path, help="file for the detections (.npz)")
    parser.add_argument("--score", type=Path, help="such a file, to score")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=4, help="runs that share the GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one arm on 50 images, to see that it works"
    )
    asked = parser.parse_args()
    if asked.score:
        score(asked.score, asked.data / asked.line)
    else:
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    """Runs all arms and writes what each found on the validation pictures."""
    read_manifest(asked.data / asked.line / "manifest.jsonl")  # faults come here, not in every worker
    load_config(asked.base)
    deadline = time.time() + asked.seconds
    arms, sizes = (ARMS[1:2], SIZES[:1]) if asked.quick else (ARMS, SIZES)
    tasks = [
        (arm, 3 if asked.quick else steps, rate, images, seed)
        for seed in range(1, asked.seeds + 1)
        for arm, steps, rate in arms
        for images in sizes
    ]
    tasks.insert(0, ("base", 0, None, 0, 0))
    context = multiprocessing.get_context("spawn")
    shared = (asked.base, asked.data / asked.line, asked.device, deadline)
    with context.Pool(asked.jobs, initializer=_open, initargs=shared) as pool:
        found: dict[str, np.ndarray] = {}
        for task, arrays in pool.imap_unordered(_run, tasks):
            if arrays is None:
                print(f"{name_of(task)}: no time left", flush=True)
                continue
            print(f"{name_of(task)}: trained in {arrays['seconds']:.1f} s", flush=True)
            found |= {f"{name_of(task)}/{key}": value for key, value in arrays.items()}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(asked.out, **found)
    print(f"{asked.out}: {asked.out.stat().st_size / 2**20:.1f} MiB")


def name_of(task: Task) -> str:
    arm, steps, _, images, seed = task
    return f"{arm}/{steps}/{images}/{seed}"


def _open(base: Path, folder: Path, device: str, deadline: float) -> None:
    """What every run of a worker shares."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 8) if device != "cpu" else os.cpu_count() or 1)
    cases = read_manifest(folder / "manifest.jsonl")
    network = Detector(DetectorConfig(**load_config(base) | {"widths": tuple(load_config(base)["widths"])}))
    load_into(network, base)
    _SHARED.update(base=network, cases=cases, device=torch.device(device), deadline=deadline)


_SHARED: dict[str, Any] = {}


def _run(task: Task) -> tuple[Task, dict[str, np.ndarray] | None]:
    if time.time() > _SHARED["deadline"]:
        return task, None
    arm, *_, images, seed = task
    base: Detector = _SHARED["base"]
    device, cases = _SHARED["device"], _SHARED["cases"]
    chosen = choose([case for case in cases if case.split == "train"], images, seed)
    line = line_of(chosen or cases)
    started = time.perf_counter()
    network = base.to(device) if arm == "base" else train(task, chosen, line, base, device)
    seconds = time.perf_counter() - started
    found = look(network, [case for case in cases if case.split == "val"], line, device)
    about = {"seconds": np.array(seconds), "longest": np.array(line.longest), "types": np.array(line.types)}
    return task, found | about


def choose(cases: list[Case], images: int, seed: int) -> list[Case]:
    """So many images, whole groups at a time."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return [case for group in order for case in group][:images]


def line_of(cases: list[Case]) -> OwnLine:
    """How `scanscribe adapt` would look at these pictures. The types have names that no base knows."""
    sizes = {case.id: read_grey(case.image).shape for case in cases}
    shares = [min(b.bbox[2] - b.bbox[0], b.bbox[3] - b.bbox[1]) / max(sizes[c.id]) for c in cases for b in c.boxes]
    types = tuple(f"new {name}" for name in sorted({name for case in cases for name in case.finding_types or ()}))
    return OwnLine("new line", types, longest=inspection_size(shares, [max(size) for size in sizes.values()]))


def train(task: Task, cases: list[Case], line: OwnLine, base: Detector, device: torch.device) -> Detector:
    """One network, trained on the cases."""
    arm, steps, rate, _, seed = task
    overrides = [f"steps={steps}", f"seed={seed}", f"checkpoint_every={steps}", f"rank={0 if arm == 'head' else 8}"]
    overrides += [f"learning_rate={rate}"] if rate else []
    recipe = fitted(load_recipe("adapt", overrides), line.longest, whole=False)
    renamed = [
        replace(case, boxes=tuple(replace(b, type=f"new {b.type}") for b in case.boxes), finding_types=None)
        for case in cases
    ]
    stream = load_stream("own", renamed, longest=line.longest, own_types=line.types)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch), recipe, resume=False)
        if arm in ("head", "lora"):
            state = train_adapter(run, stream, base, line.types, device)
            config = AdapterConfig(len(line.types), recipe["rank"])
            return load_adapter(base, config, {k: v.cpu() for k, v in state.items()}).to(device)
        torch.manual_seed(seed)
        config = DetectorConfig(len(line.types), base.config.widths, base.config.neck, base.config.bins)
        network = Detector(config)
        if arm == "full":
            heads = ("boxes.types.", "presence.")
            network.load_state_dict(
                {k: v for k, v in base.state_dict().items() if not k.startswith(heads)}, strict=False
            )
        return train_network(run, stream, network.to(device).train(), device)


@torch.inference_mode()
def look(network: Detector, cases: list[Case], line: OwnLine, device: torch.device) -> dict[str, np.ndarray]:
    """The detections on every case: boxes in pixels of the picture, types as places in the line's."""
    network.eval()
    rows = []
    for i, case in enumerate(cases):
        grey = read_grey(case.image)
        golden = None if case.template is None else read_grey(case.template)
        small = resize(grey, line.longest)
        framed, (x, y) = pad(channels(small, None if golden is None else resize(golden, line.longest)), square=False)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            items = evidence(network, line, torch.from_numpy(framed[None]).to(device))
        boxes = items.boxes[0].float().cpu().numpy() - np.array([x, y, x, y])
        scores = items.scores[0].float().cpu().numpy()
        for n in np.flatnonzero(scores >= LEAST)[:KEPT]:
            rows.append((i, int(items.types[0, n]), scores[n], *(boxes[n] / (max(small.shape) / max(grey.shape)))))
    table = np.array(rows, np.float64).reshape(-1, 7)
    return {
        "where": table[:, :2].astype(np.uint8),
        "score": table[:, 2].astype(np.float32),
        "boxes": table[:, 3:].astype(np.float16),
    }


def score(detections: Path, folder: Path) -> None:
    """Prints the table and the claims."""
    from pipelines.evaluation.detection import match, mean_average_precision
    from pipelines.evaluation.figures import image_type, top_type
    from pipelines.evaluation.predictions import PredictedFinding
    from pipelines.evaluation.statistics import auroc, value_of
    from reports.taxonomy import DEFECT_TYPES

    cases = read_manifest(folder / "manifest.jsonl", split="val")
    data = np.load(detections)
    names = sorted({key.rpartition("/")[0] for key in data.files})
    rows: dict[tuple[str, int, int], list[dict[str, float]]] = defaultdict(list)
    for name in names:
        arm, steps, images, _ = name.split("/")
        types = DEFECT_TYPES if arm == "base" else [str(t).removeprefix("new ") for t in data[f"{name}/types"]]
        found: list[list[PredictedFinding]] = [[] for _ in cases]
        for (image, kind), p, box in zip(
            data[f"{name}/where"], data[f"{name}/score"], data[f"{name}/boxes"].astype(float), strict=True
        ):
            found[image].append(PredictedFinding(types[kind], tuple(box), float(p), True))
        labels = [list(case.boxes) for case in cases]
        any_type = [[replace(f, type="any") for f in of_image] for of_image in found]
        any_label = [[replace(b, type="any") for b in of_image] for of_image in labels]
        present = [case for case in cases if case.boxes]
        right = [top_type(f) == image_type(c) for f, c in zip(found, cases, strict=True) if c.boxes]
        surest = [max((f.confidence for f in of_image), default=0.0) for of_image in found]
        rows[arm, int(steps), int(images)].append(
            {
                "map_50": value_of(mean_average_precision(match(labels, found), [0.5]), len(cases)),
                "any": value_of(mean_average_precision(match(any_label, any_type), [0.5]), len(cases)),
                "type": sum(right) / max(1, len(present)),
                "presence": value_of(auroc([bool(case.boxes) for case in cases], surest), len(cases)),
                "seconds": float(data[f"{name}/seconds"]),
            }
        )
    print("arm, steps, images: mAP50, AP50 of any type, type of the defect, presence AUROC, seconds (means over seeds)")
    mean: dict[tuple[str, int, int], dict[str, float]] = {}
    for key in sorted(rows, key=lambda k: (k[2], k[1], k[0])):
        each = rows[key]
        mean[key] = {what: statistics.fmean(r[what] for r in each) for what in each[0]}
        spread = [f"{min(r['map_50'] for r in each):.3f}..{max(r['map_50'] for r in each):.3f}"]
        print(*key, *(f"{value:.3f}" for value in mean[key].values()), *spread, sep="  ")
    claims = []
    for images in sorted({key[2] for key in mean} - {0}):
        if ("lora", 500, images) in mean:
            gain = mean["lora", 500, images]["map_50"]
            best = max((v["map_50"] for (arm, _, n), v in mean.items() if (arm, n) == ("scratch", images)), default=0.0)
            claims.append(
                {
                    "claim": f"mAP50 with {images} images, adapter less the best network from scratch",
                    "value": round(gain - best, 3),
                    "unit": "",
                    "target": 0,
                    "met": gain > best,
                }
            )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "adapt_gain", "machine": machine, "claims": claims}))


if __name__ == "__main__":
    main()
