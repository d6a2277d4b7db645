"""Whatever is killed, each input ends with exactly one current report or one place in quarantine, all of it whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.ledger import Ledger
from pipelines.export import export
from tests.chaos import NO_FULL_DISK, Chaos, Inputs, check
from tests.test_run import lines, picture
from tests.test_watch import until, watching
from tests.tiny_reader import TinyReader

SEED = int(os.environ.get("SCANSCRIBE_CHAOS_SEED", "0")) or int(time.time()) % 100_000


def settled(tmp_path: Path) -> tuple[Path, Inputs]:
    """A folder as it must be in the end: two reports, one input in quarantine."""
    inbox, inputs = tmp_path / "in", Inputs()
    for name in ("a.png", "b.png", "broken.png"):
        data = picture(inbox / name, seed=len(name) + ord(name[0])).read_bytes()
        if name == "broken.png":
            (inbox / name).write_bytes(data := data[:200])
        (inputs.broken if name == "broken.png" else inputs.whole)[hashlib.sha256(data).hexdigest()] = name
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported", 2) and running.heard("quarantined"))
    export([running.out], ("json", "html", "csv"))
    return running.out, inputs


def tear(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def twice(out: Path, line: dict[str, Any]) -> None:
    """A second current report on the same content."""
    other = line | {"id": "f" * 16, "request": "f" * 64, "subject": "f" * 16, "formats": {}}
    shutil.copytree(out / line["id"], out / other["id"])
    with (out / "index.jsonl").open("a") as index:
        index.write(json.dumps(other) + "\n")


HARMS: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "lost folder": (lambda out, line: shutil.rmtree(out / line["id"]), "folders 1, lines 2"),
    "torn page": (lambda out, line: tear(out / line["formats"]["html"]), "is torn"),
    "torn picture": (lambda out, line: tear(out / line["thumbnail"]), "truncated"),
    "leftover": (lambda out, line: (out / line["id"] / ".1-ab.tmp").mkdir(), "tmp"),
    "twice": (lambda out, line: twice(out, line), "has 2 reports"),
    "no reason": (lambda out, line: shutil.rmtree(out / "quarantine"), "quarantine 0, on the ledger 1"),
    "lost line": (lambda out, line: (out / "index.jsonl").write_text(json.dumps(line) + "\n"), "0 reports, 0 places"),
    "lost row": (lambda out, line: forget(out, line), "is not on the ledger"),
    "old table": (lambda out, line: tear(out / "images.csv"), "lacks reports"),
}


def test_the_last_look_sees_what_was_lost_done_twice_or_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("SCANSCRIBE_HOME", str(work / "home"))
    TinyReader().install(monkeypatch)
    out, inputs = settled(work)
    shutil.copytree(work, tmp_path / "kept")
    for harm, words in HARMS.values():
        check(out, inputs, quarantine=True)
        harm(out, lines(out / "index.jsonl")[1])
        with pytest.raises((AssertionError, OSError), match=re.escape(words)):
            check(out, inputs, quarantine=True)
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "kept", work)


def forget(out: Path, line: dict[str, Any]) -> None:
    with Ledger(out) as ledger:
        assert ledger.forget([line["request"]]) == 1


def test_a_short_storm_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    Chaos(tmp_path, seed=4, inputs=30, kills=3, poll=False).run(200)


def test_a_storm_without_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.os.getuid", lambda: 1000)  # who may mount nothing
    storm = Chaos(tmp_path, seed=4, inputs=0, kills=0, poll=False)
    monkeypatch.setattr(storm, "_run", lambda patience, *, fill: None)
    with pytest.warns(UserWarning, match="THE DISK IS NOT FILLED"):
        storm.run(1)
    assert not storm.was_full


@pytest.mark.chaos
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("poll", "crew"), [(False, False), (True, False), (False, True)], ids=["events", "polling", "crew"]
)
def test_a_long_storm_loses_nothing_and_makes_nothing_twice(tmp_path: Path, poll: bool, crew: bool) -> None:
    print(f"SCANSCRIBE_CHAOS_SEED={SEED}")
    storm = Chaos(tmp_path, seed=SEED, inputs=2000, kills=50, poll=poll, crew=crew)
    storm.run(1500)
    if not storm.was_full:  # what else is claimed of it held
        pytest.skip(NO_FULL_DISK)
