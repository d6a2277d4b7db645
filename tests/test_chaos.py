"""Whatever is killed, each input ends with exactly one current report or one place in quarantine, all of it whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.chaos import Chaos

SEED = int(os.environ.get("SCANSCRIBE_CHAOS_SEED", "0")) or int(time.time()) % 100_000


def test_a_short_storm_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    Chaos(tmp_path, seed=4, inputs=40, kills=3, poll=False).run(200)


@pytest.mark.chaos
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("poll", [False, True], ids=["events", "polling"])
def test_a_long_storm_loses_nothing_and_makes_nothing_twice(tmp_path: Path, poll: bool) -> None:
    print(f"SCANSCRIBE_CHAOS_SEED={SEED}")
    Chaos(tmp_path, seed=SEED, inputs=2000, kills=50, poll=poll).run(1500)
