"""How long exports take: 10,000 reports to CSV, Parquet, COCO and the lot report, their memory, and all formats of one.

    .venv/bin/python benchmarks/exports.py
    .venv/bin/python benchmarks/exports.py --quick      # 1,000 reports

The last line of the output is one JSON object with each figure beside its target. One core; imports are done before the
clock starts. The 10,000 reports are computed, with 0 to 4 findings each; the single ones are made
from samples, with 4 findings each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from pipelines.run import Job, execute
from reports.bundle import Bundle, load_bundle
from reports.formats import RunReports, formats
from reports.rules import Defect, load_rules
from reports.schema import (
    Evidence,
    Finding,
    Measurement,
    ModelInfo,
    NotAssessed,
    Report,
    Source,
    SourceInput,
    Technique,
)
from reports.taxonomy import PRODUCT_LINES
from reports.texts import worded
from reports.writing import FormatError, report_formats, run_formats, write_formats, write_run_formats

RUN_SECONDS, ONE_SECONDS, MEMORY_MIB = 20, 1, 60
REPEATS = 5
RULES = load_rules()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 reports; times are scaled to 10,000")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one export in a process of its own
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    count = 1_000 if asked.quick else 10_000
    with tempfile.TemporaryDirectory() as scratch:
        claims = over_a_run(Path(scratch), count)
        for sample in (SAMPLES / "ct" / "phantom-series", SAMPLES / "tile" / "crack.png"):
            claims.append(of_one_report(Path(scratch), sample))
    for claim in claims:
        print(f"{claim['claim']}: {claim['value']} {claim['unit']} (target: at most {claim['target']})")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "exports", "machine": machine, "claims": claims}))


def over_a_run(scratch: Path, count: int) -> list[dict[str, object]]:
    """All formats over a run of `count` reports, and the memory that a tenth of them and all of them take."""
    tenth, whole = scratch / "tenth", scratch / "whole"
    for folder, size in ((tenth, count // 10), (whole, count)):
        write_reports(folder, size)
    small, large = measured_apart(tenth), measured_apart(whole)
    scale = 10_000 / count
    tables = sum(large[name] for name in ("csv", "parquet", "coco"))
    return [
        *(claim(f"10,000 reports to {name}", scale * large[name], "s", RUN_SECONDS) for name in RUN_FORMATS),
        claim("10,000 reports to CSV, Parquet and COCO together", scale * tables, "s", RUN_SECONDS),
        claim(
            f"memory that {count:,} reports take beyond {count // 10:,}", large["mib"] - small["mib"], "MiB", MEMORY_MIB
        ),
    ]


def of_one_report(scratch: Path, source: Path) -> dict[str, object]:
    """All formats that a report on a sample, with 4 findings, can be written in: medians of the processor's time."""
    [entry] = execute(Job((source,), scratch / source.name)).reported
    directory = scratch / source.name / entry.id
    bundle = with_findings(load_bundle(directory), 4)
    names = report_formats(list(formats()))
    try:
        write_formats(directory, bundle, names)  # imports, fonts
    except FormatError as error:
        names = tuple(name for name in names if name not in error.errors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPEATS):
        bundle = replace(bundle)  # a PDF is kept for the other formats that carry it, of the same bundle only
        for name in names:
            started = time.process_time()
            write_formats(directory, bundle, [name])
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(", ".join(f"{name} {1000 * each:.0f} ms" for name, each in medians.items()))
    kind = {"ct": "CT series", "defect": "photo"}[bundle.report.kind]
    return claim(f"all {len(names)} formats of one report on a {kind}", sum(medians.values()), "s", ONE_SECONDS)


RUN_FORMATS = run_formats(list(formats()))


def with_findings(bundle: Bundle, count: int) -> Bundle:
    """The report with so many findings, on the picture that it shows: the model may have found none."""
    shown = min(bundle.images.slices)
    inputs = bundle.report.source.inputs
    owner = min(shown, len(inputs) - 1)
    width, height = bundle.report.technique.image_size_px
    found = []
    for index in range(count):
        box = (width * index / count, height / 4, width * (index + 0.8) / count, height / 2)
        place = {"input_index": owner, "slice_index": shown, "sop_instance_uid": inputs[owner].sop_instance_uid}
        evidence = Evidence(bbox=box, localisation="box", **place)
        kind = "nodule" if bundle.report.kind == "ct" else "crack"
        finding = Finding(id=f"F{index + 1}", type=kind, description="", evidence=(evidence,), confidence=0.7)
        found.append(finding.model_copy(update={"measurements": sizes(box), "location": "centre"}))
    report = worded(bundle.report.model_copy(update={"findings": tuple(found)}), "en")
    return replace(bundle, report=report)


SAMPLES = Path(__file__).parents[1] / "examples"


def measured_apart(folder: Path) -> dict[str, float]:
    """Seconds of each format over a run and the peak memory, from a process of its own."""
    command = [sys.executable, __file__, "--measure", folder]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def measure(folder: Path) -> dict[str, float]:
    ids = tuple(sorted(path.parent.name for path in folder.glob("*/report.json")))
    write_run_formats(RunReports(folder, ids[:1]), RUN_FORMATS)  # imports
    figures = {}
    for name in RUN_FORMATS:
        started = time.perf_counter()
        write_run_formats(RunReports(folder, ids), [name])
        figures[name] = time.perf_counter() - started
    return figures | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def write_reports(folder: Path, count: int) -> None:
    for number in range(count):
        report = draw_report(number)
        directory = folder / report.id
        directory.mkdir(parents=True)
        (directory / "report.json").write_bytes(report.model_dump_json(indent=2).encode())


def draw_report(number: int) -> Report:
    """An inspection report as the pipeline makes them: lots of 100 with drifting quality."""
    chance = random.Random(number)
    width, height = 1600, 1200
    line = PRODUCT_LINES[1]
    lot = number // 100
    many = chance.choices((0, 1, 2, 4), (80 - lot % 7 * 4, 12, 6, 2))[0]
    found = []
    for index in range(many):
        x, y = chance.betavariate(2, 3) * 1500, chance.betavariate(5, 2) * 1100
        box = (x, y, min(x + chance.uniform(9, 400), width), min(y + chance.uniform(9, 200), height))
        kind = chance.choices(line.types, (9, 1, 2, 4, 3))[0]
        found.append(
            Finding(
                id=f"F{index + 1}",
                type=kind,
                description="",
                location="centre",
                evidence=(Evidence(input_index=0, slice_index=0, bbox=box, localisation="box"),),
                measurements=sizes(box),
                confidence=round(chance.uniform(0.4, 1), 3),
            )
        )
    judged = RULES.judge([Defect(f.type, f.evidence[0].bbox, (width, height), None, f.confidence) for f in found], ())
    found = [f.model_copy(update={"severity": s}) for f, s in zip(found, judged.severities, strict=True)]
    digest = sha256(str(number).encode()).hexdigest()
    report = Report(
        id=digest[:16],
        kind="defect",
        created=datetime(2026, 3, 1, tzinfo=UTC) + timedelta(minutes=7 * number),
        title="",
        source=Source(
            name=f"{number:05}.png",
            inputs=(SourceInput(name=f"tiles/lot-{lot:03}/{number:05}.png", sha256=digest, media_type="image/png"),),
            lot=f"L{lot:03}",
        ),
        technique=Technique(image_size_px=(width, height), product_line=line.name, read_from={"product_line": "model"}),
        findings=tuple(found),
        measurements=(Measurement(name="defects reported", value=many, unit="1", method="count of findings"),),
        impression="",
        disposition=judged.disposition,
        disposition_rule=judged.rule,
        not_assessed=tuple(NotAssessed(what="", reason="", code=code) for code in ("other-defects", "scale")),
        model=ModelInfo(name="default", version="1", weights_sha256="a" * 64, config_sha256="b" * 64, device="cpu"),
    )
    return worded(report, "en")


def sizes(box: tuple[float, float, float, float]) -> tuple[Measurement, ...]:
    values = {"width": box[2] - box[0], "height": box[3] - box[1], "long side": max(box[2] - box[0], box[3] - box[1])}
    return tuple(
        Measurement(name=name, value=value, unit="{pixel}", method=f"{name} of the evidence box")
        for name, value in values.items()
    )


def claim(what: str, value: float, unit: str, target: float) -> dict[str, object]:
    return {"claim": what, "value": round(value, 2), "unit": unit, "target": target, "met": value <= target}


if __name__ == "__main__":
    main()
