"""What is kept for how long: the dry run first, never a current report, and nothing half-done when it is killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from flows.ledger import Ledger
from flows.ledger.retention import prune
from pipelines.run import Job, execute
from pipelines.run_folder import OutputError, RunFolder
from tests.test_cli import run
from tests.test_run import lines, picture
from tests.test_watch import until, watching
from tests.tiny_reader import TinyReader

DAY_S = 86400


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reports of two pictures, one in three versions, and one broken input in quarantine; all of it 40 days old."""
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    TinyReader().install(monkeypatch)
    folder = tmp_path / "out"
    picture(tmp_path / "in" / "b.png", 9)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with watching(tmp_path) as running:
        until(lambda: running.heard("reported") and running.heard("quarantined"))
        for seed in (1, 2, 3):
            picture(tmp_path / "in" / "a.png", seed)
            until(lambda seed=seed: running.heard("reported", seed + 1))  # type: ignore[misc]
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 40 * DAY_S,) * 2)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_says_what_would_go_and_changes_nothing(out: Path, capfd, monkeypatch) -> None:
    before = everything(out)
    code, said, _ = run(capfd, monkeypatch, "ledger", "prune", "--out", str(out), "--older-than", "30")
    assert code == 0 and said.startswith("2 superseded reports and the copies of 1 items in quarantine, ")
    assert "give --yes to do it" in said
    after = everything(out)
    assert {name: data for name, data in after.items() if not name.startswith(".")} == {
        name: data for name, data in before.items() if not name.startswith(".")
    }
    assert prune(out, 50).expired == ()


def test_current_reports_and_reasons_stay_and_the_rest_goes_to_the_archive(out: Path, capfd, monkeypatch) -> None:
    versions = {line["version"]: line["id"] for line in lines(out / "index.jsonl") if "a.png" in line["title"]}
    kept = out.parent / "archive"
    words = ("ledger", "prune", "--out", str(out), "--older-than", "30", "--archive", str(kept), "--yes", "--json")
    code, said, _ = run(capfd, monkeypatch, *words)
    told = json.loads(said)
    assert code == 0 and told["done"] and (told["superseded"], told["quarantine"]) == (2, 1)
    index = lines(out / "index.jsonl")
    assert [line["superseded_by"] for line in index] == [None, None]
    assert versions[3] in {line["id"] for line in index}
    assert json.loads((out / versions[3] / "report.json").read_text())["version"] == 3
    for version in (1, 2):
        assert not (out / versions[version]).exists()
        assert json.loads((kept / versions[version] / "report.json").read_text())["version"] == version
    [reason] = (out / "quarantine").glob("*/*")
    assert reason.name == "reason.json"
    assert len(list((kept / "quarantine").glob("*/0001-broken.png"))) == 1
    with Ledger(out) as ledger:
        assert (ledger.counts()["done"], ledger.counts()["quarantined"]) == (4, 1)
    summary = execute(Job((out.parent / "in",), out))
    assert not summary.reported and len(summary.already_reported) == 2


def test_what_a_killed_call_left_goes_with_the_next(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flows.ledger.retention.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(out, 30, dry_run=False)
    assert len(lines(out / "index.jsonl")) == 2
    assert prune(out, 30, dry_run=False).count("superseded") == 2
    assert len([path for path in out.iterdir() if (path / "report.json").exists()]) == 2


def test_a_folder_in_use_is_left_alone(out: Path) -> None:
    with RunFolder(out), pytest.raises(OutputError, match="wait until it ends"):
        prune(out, 30, dry_run=False)
