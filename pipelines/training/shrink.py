"""Copies data sets at the size that training reads, to carry them to another machine.

    python -m pipelines.training.shrink DATA OUT [--quality 92]

OUT gets the same folders and manifests; pictures are scaled to the size at which their kind is inspected, boxes with
them. Masks and free texts stay behind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.inputs import LONGEST_SIDE, read_grey, resize, stretch
from pipelines.manifest import read_manifest

KEPT = (
    "id",
    "split",
    "group",
    "product",
    "region",
    "plane",
    "contrast",
    "laterality",
    "covid19",
    "lung_nodule",
    "caption",
)


def shrink(data: Path, out: Path, quality: int) -> None:
    """Writes the small copies of every data set below `data`."""
    for manifest in sorted(data.glob("*/manifest.jsonl")):
        folder = out / manifest.parent.name
        lines = [json.loads(line) for line in manifest.read_text().splitlines() if line]
        cases = {case.id: case for case in read_manifest(manifest)}
        rows = []
        for line in lines:
            case = cases[line["id"]]
            longest = LONGEST_SIDE[case.product_line or "ct"]
            row = {key: line[key] for key in KEPT if key in line}
            size: tuple[int, ...] = ()
            scale = 1.0
            for key, path in (("image", case.image), ("template", case.template)):
                if path is None:
                    continue
                grey = read_grey(path)
                if not size:
                    small = resize(grey, min(longest, max(grey.shape)))
                    size, scale = small.shape, max(small.shape) / max(grey.shape)
                small = stretch(grey, size)
                binary = set(np.unique(small)) <= {0, 255}
                target = folder / f"{key}s" / f"{case.id}.{'png' if binary else 'webp'}"
                target.parent.mkdir(parents=True, exist_ok=True)
                if binary:
                    Image.fromarray(small).convert("1").save(target, optimize=True)
                else:
                    Image.fromarray(small).save(target, quality=quality, method=6)
                row[key] = str(target.relative_to(folder))
            row["findings"] = line.get("findings")
            if case.boxes:
                row["findings"] = [{"type": b.type, "bbox": [v * scale for v in b.bbox]} for b in case.boxes]
            rows.append(json.dumps(row))
        (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quality", type=int, default=92)
    args = parser.parse_args()
    shrink(args.data, args.out, args.quality)
