"""What is claimed of speed, by the benchmarks that show it: each figure that has a target meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["end_to_end", "flow_overhead", "ledger", "slow_disk", "watch_latency"])
def test_each_figure_meets_its_target(tmp_path: Path, name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "SCANSCRIBE"))}
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"],
        env=environment | {"SCANSCRIBE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    claims = [each for each in json.loads(ran.stdout.splitlines()[-1])["claims"] if each["target"] is not None]
    missed = [f"{each['claim']}: {each['value']} {each['unit']}" for each in claims if not each["met"]]
    assert claims and not missed
