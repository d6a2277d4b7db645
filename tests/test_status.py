"""One screen that says how everything stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.ledger import Ledger
from flows.schedules.files import Last, Progress, create, keep_progress, pause
from flows.schedules.timing import Standing, Timing
from flows.seeing.services import running, services
from pipelines.run import Job
from tests.test_cli import run
from tests.test_run import picture
from tests.test_watch import ROOT
from tests.tiny_reader import TinyReader


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    for name in ("SCANSCRIBE_LEDGER", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    TinyReader().install(monkeypatch)
    return tmp_path / "home"


def test_everything_stands_in_one_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path / "one") as ledger:
        ledger._clock = lambda: time.time() - 3 * 3600
        ledger.add([("a" * 64, ["/in/Jane.png"]), ("b" * 64, ["/in/2.png"])])
        ledger.done(ledger.claim(request="b" * 64)[0], "0123456789abcdef")
    with Ledger(tmp_path / "two") as ledger:
        ledger.add([("c" * 64, ["/in/3.png"])])
        ledger.quarantined(ledger.claim()[0], "truncated", "Its end is missing.")
    job = Job((picture(tmp_path / "in" / "x.png"),), tmp_path / "one")
    create("nightly", job, Timing("Europe/Berlin", time.time(), "0 22 * * *"))
    create("weekly", job, Timing("UTC", time.time(), "0 3 * * 0"))
    pause("weekly", paused=True)

    with running("watch", metrics=9464), running("schedule"):
        code, said, _ = run(capfd, monkeypatch, "status", "--min-free", "0")
        assert code == 0
        for words in ("22:00 +0", "paused", "metrics on port 9464"):
            assert words in said
        assert re.search(r"0123456789abcdef 3h( \ds)? ago", said) and len(re.findall(r"\b3h\b", said)) == 2, said
        assert "Jane" not in said and "!" not in said
        assert max(map(len, said.splitlines())) <= 140
        code, said, _ = run(capfd, monkeypatch, "status", "--out", str(tmp_path / "two"), "--json", "--min-free", "0")
        found = json.loads(said)
        assert [folder["counts"]["quarantined"] for folder in found["folders"]] == [1]
        assert {each["name"]: each["pid"] for each in found["services"]} == {
            "watch": os.getpid(),
            "schedule": os.getpid(),
        }

    now = time.time()
    keep_progress("nightly", Progress(Standing(now), last=Last(now, now, "failed", "output-folder")))
    with running("receive", detail="127.0.0.1:11112"), running("schedule"):  # neither reports what waits
        assert "Items wait, and no service reports" in run(capfd, monkeypatch, "status", "--min-free", "0")[1]
    with running("receive", detail="127.0.0.1:11112"):
        code, said, _ = run(capfd, monkeypatch, "status", "--min-free", str(1 << 40))
    assert code == 1 and "receive on 127.0.0.1:11112" in said
    troubles = ["Nothing runs the schedules", "Items wait, and no service reports", "are free in the state folder"]
    for trouble in (*troubles, "The last run of the schedule nightly failed (output-folder)"):
        assert trouble in said


def test_nothing_at_all_is_fine(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, _ = run(capfd, monkeypatch, "status", "--min-free", "0")
    assert code == 0 and "The ledger is empty" in said and "none runs" in said


def test_a_silent_ledger_or_server_hides_nothing_else(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://me:secret@127.0.0.1:1/api")
    with running("watch", metrics=9464):
        code, said, _ = run(capfd, monkeypatch, "status", "--min-free", "0", "--ledger", "postgresql://127.0.0.1:1/x")
    assert code == 1 and "metrics on port 9464" in said and "GiB free" in said
    assert "The ledger at postgresql://127.0.0.1:1/x cannot be used (Connection refused)" in said
    assert "127.0.0.1:1/api does not answer" in said
    assert "The ledger is empty" not in said and "secret" not in said


NOTED = """
import os, signal
from flows.seeing.services import running
with running("worker"):
    while not list(__import__("pathlib").Path(os.environ["SCANSCRIBE_HOME"], "services").glob("*.json")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_note_of_a_dead_or_silent_service_is_none(home: Path) -> None:
    subprocess.run([sys.executable, "-c", NOTED], cwd=ROOT, check=False)
    assert len(list((home / "services").iterdir())) == 1
    assert services() == []
    assert not list((home / "services").iterdir())
    note = {"name": "worker", "owner": "another/container/7/1", "since": 0.0, "metrics": None, "detail": "cuda:0"}
    path = home / "services" / "worker-elsewhere.json"
    path.write_text(json.dumps(note))
    assert [each.pid for each in services()] == [7]
    os.utime(path, (time.time() - 600,) * 2)
    assert services() == []
