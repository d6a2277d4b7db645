"""Schedules: the commands, and the process that runs them against a real Prefect server while it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.machine.server import LocalServer
from flows.schedules.files import create, load, progress
from flows.schedules.scheduler import Scheduler
from flows.schedules.timing import ScheduleError, Timing, Window
from flows.seeing.log import EventLog
from flows.seeing.metrics import Metrics
from flows.seeing.notify import Notifier
from pipelines.run import Job
from tests.orthanc import free_port
from tests.test_cli import run
from tests.test_run import lines, picture
from tests.test_seeing import SECRET, Hook, scrape
from tests.test_watch import ROOT, until
from tests.tiny_reader import TinyReader


@pytest.fixture(scope="module")
def state(new_state_folder: Callable[[], Path]) -> Path:
    return new_state_folder()


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[str]:
    """One Prefect server for the module, with a data base of its own, and its page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCANSCRIBE_HOME", str(state))
        for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_SERVER_UI_STATIC_DIRECTORY"):
            patch.delenv(name, raising=False)
        with LocalServer() as local:
            yield local.url()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SCANSCRIBE_LEDGER", raising=False)
    TinyReader().install(monkeypatch)


class Serving:
    """`scanscribe schedule serve` in a process, and what it says."""

    def __init__(self, url: str) -> None:
        self.said: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scheduler_process"],
            cwd=ROOT,
            env={**os.environ, "PREFECT_API_URL": url},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr
        lines = self.process.stderr
        self.reading = threading.Thread(target=lambda: self.said.extend(map(json.loads, lines)))
        self.reading.start()

    def heard(self, event: str, count: int = 1) -> bool:
        assert self.process.poll() is None or event == "stopped", self.said
        return len(self.said_of(event)) >= count

    def said_of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in list(self.said) if each["event"] == event]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.reading.join()
        return code


@contextlib.contextmanager
def serving(url: str) -> Iterator[Serving]:
    it = Serving(url)
    try:
        yield it
        assert it.end() == 0
        assert it.said[-1]["event"] == "stopped"
    finally:
        if it.process.poll() is None:
            it.process.kill()
            it.process.wait()


def due_since(minutes: float, **rules: Any) -> Timing:
    """Due each minute since then, so that one or more runs are waiting."""
    return Timing("UTC", time.time() - 60 * minutes, "* * * * *", **rules)


def asked(url: str, path: str, **what: Any) -> Any:
    for _ in range(20):
        answer = httpx.post(f"{url}/{path}", json=what, timeout=30)
        if not answer.is_server_error:  # SQLite can be busy
            break
        time.sleep(0.5)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def runs(url: str, deployment: str) -> dict[str, list[str]]:
    """The ids of a deployment's flow runs, by state."""
    found: dict[str, list[str]] = {}
    for each in asked(url, "flow_runs/filter", deployments={"id": {"any_": [deployment]}}):
        found.setdefault(each["state"]["name"], []).append(each["id"])
    return found


def deployment(url: str, name: str) -> dict[str, Any]:
    [found] = asked(url, "deployments/filter", deployments={"name": {"any_": [name]}})
    return dict(found)


def drawn(folder: Path, count: int) -> Path:
    for number in range(count):
        picture(folder / f"Jane-{number:03}.png", seed=number)
    return folder


def test_missed_runs_are_made_up_for_once_and_prefect_s_page_works(tmp_path: Path, server: str) -> None:
    inputs = drawn(tmp_path / "in", 3)
    create("night-1", Job((inputs,), tmp_path / "out"), due_since(5.5, window=Window.parse("00:00-23:59")))
    create("night-3", Job((inputs,), tmp_path / "other"), Timing("UTC", time.time(), every_s=86400.0))
    with serving(server) as it:
        until(lambda: asked(server, "deployments/filter", deployments={"name": {"any_": ["night-3"]}}) != [])
        other = deployment(server, "night-3")
        asked(server, f"deployments/{other['id']}/create_flow_run")  # as the button of the page does
        asked(server, f"deployments/{other['id']}/pause_deployment")
        # In the last minute of a day the window is shut.
        until(lambda: {"night-1", "night-3"} <= {each["schedule"] for each in it.said_of("run-done")}, 150)
        shown = deployment(server, "night-1")
        until(lambda: runs(server, shown["id"]).get("Completed", []) != [])
        until(lambda: load("night-3").paused)
        last = progress(load("night-1")).last  # the next minute's run may be stopped with the scheduler
    assert [shown["schedules"][0]["schedule"][key] for key in ("cron", "timezone")] == ["* * * * *", "UTC"]
    assert shown["schedules"][0]["active"] and not shown["paused"]
    coming = asked(server, "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}})
    assert any(each["deployment_id"] == shown["id"] and each["auto_scheduled"] for each in coming)  # on its page
    assert "only within 00:00-23:59" in shown["description"]
    assert sum(each.get("count", 1) for each in it.said_of("run-skipped")) >= 4
    done = {each["schedule"]: each for each in reversed(it.said_of("run-done"))}  # the first of each
    assert done["night-1"]["reported"] == done["night-3"]["reported"] == 3
    assert len(lines(tmp_path / "out" / "index.jsonl")) == len(lines(tmp_path / "other" / "index.jsonl")) == 3
    assert "Jane" not in json.dumps([it.said, shown, asked(server, "flow_runs/filter")])
    assert last and last.result == "done"
    assert last.words in ("3 reported", "0 reported, 3 already there")


def test_prefect_s_page_is_kept_in_the_state_folder(server: str, state: Path) -> None:
    """The package's own folder, Prefect's choice, may be read-only."""
    assert "<title>Prefect" in httpx.get(server.removesuffix("api")).text
    assert (state / "prefect" / "ui" / "v1" / "index.html").exists()


@pytest.mark.chaos
def test_a_killed_run_and_a_killed_scheduler_go_on_where_they_were(tmp_path: Path, server: str) -> None:
    inputs = drawn(tmp_path / "in", 24)
    create("night-2", Job((inputs,), tmp_path / "out"), due_since(1.5))
    index = tmp_path / "out" / "index.jsonl"

    def reported(count: int) -> bool:
        return index.exists() and len(index.read_bytes().splitlines()) >= count

    it = Serving(server)
    try:
        until(lambda: reported(2), 60)
        owner = progress(load("night-2")).owner
        assert owner
        os.kill(int(owner.split("/")[-2]), signal.SIGKILL)
        until(lambda: it.heard("run-failed") and it.heard("run-started", 2))
        until(lambda: reported(6), 60)
    finally:
        it.end(signal.SIGKILL)
    assert not reported(24)
    with serving(server) as second:
        until(lambda: second.heard("run-done"), 90)
        states = runs(server, deployment(server, "night-2")["id"])
    assert len(states["Crashed"]) == 2 and len(states["Completed"]) >= 1
    entries = lines(index)
    assert len({line["inputs"][0]["sha256"] for line in entries}) == len(entries) == 24


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_waited_for(tmp_path: Path, server: str) -> None:
    create("night-4", Job((drawn(tmp_path / "in", 1),), tmp_path / "out"), due_since(1.5))
    port = free_port()
    with serving(f"http://127.0.0.1:{port}/api") as it:
        until(lambda: it.heard("broken"), 60)
        passing = subprocess.Popen([sys.executable, "-c", FORWARD, str(port), server.split(":")[2].split("/")[0]])
        try:
            until(lambda: it.heard("broken-over") and it.heard("run-done"), 90)
        finally:
            passing.kill()
            passing.wait()
    assert len(lines(tmp_path / "out" / "index.jsonl")) == 1


FORWARD = """
import asyncio, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def serve(reader, writer):
    other = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, other[1]), pump(other[0], writer))
async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""


def test_the_commands_create_list_pause_resume_and_delete(
    tmp_path: Path, server: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = drawn(tmp_path / "in", 1)
    monkeypatch.setenv("PREFECT_API_URL", server)

    def command(*words: str) -> tuple[int, str]:
        code, said, err = run(capfd, monkeypatch, "schedule", *words)
        return code, said + err

    new = ("create", "nightly", str(inputs), "--out", str(tmp_path / "out"))
    code, said = command(*new, "--cron", "0 22 * * *", "--time-zone", "Europe/Berlin", "--window", "22:00-06:00")
    assert code == 0 and "nightly: 0 22 * * *, next" in said and "22:00 +0" in said
    assert "nothing runs the schedules" in said
    assert "give another name, or --replace" in command(*new, "--every", "2h")[1]
    assert command(*new, "--every", "2h", "--replace")[0] == 0
    assert command("pause", "nightly") == (0, "nightly is paused.\n")
    code, said, _ = run(capfd, monkeypatch, "schedule", "list", "--json")
    [each] = json.loads(said)["schedules"]
    assert (each["name"], each["when"], each["state"], each["next"]) == ("nightly", "every 2h", "paused", None)
    assert "every 2h, next" in command("resume", "nightly")[1]
    code, said = command("run", "nightly")
    assert code == 0 and "1 reported" in said
    assert command("delete", "nightly") == (0, "nightly is deleted.\n")
    for words, why in (
        (("pause", "nightly"), "There is no schedule nightly. Those that there are: none yet"),
        ((*new, "--cron", "0 25 * * *"), "is no cron line"),
        ((*new, "--cron", "0 22 * * *", "--time-zone", "Mars/Base"), "There is no time zone"),
        ((*new,), "a cron line or an interval"),
        (("create", "a/b", *new[2:], "--every", "1d"), "is no name"),
        (("create", "n", "/nowhere", *new[3:], "--every", "1d"), "There is no file or folder"),
    ):
        code, said = command(*words)
        assert code == 2 and why in said, said


@pytest.mark.parametrize(
    "text", ["{torn", "{}", "[]", "null", '{"timing": 1}', '{"timing": {"window": null}, "job": {}, "lane": null}']
)
def test_a_damaged_file_costs_its_schedule_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    from flows.schedules.files import schedules

    job = Job((drawn(tmp_path / "in", 1),), tmp_path / "out")
    create("one", job, due_since(0))
    create("two", job, due_since(0))
    (tmp_path / "home" / "schedules" / "one.json").write_text(text)
    (tmp_path / "home" / "schedules" / "two.standing.json").write_text(text)
    assert [each.name for each in schedules()] == ["two"]
    assert progress(load("two")).running is None
    with pytest.raises(ScheduleError, match="is damaged: delete"):
        load("one")
    code, said, err = run(capfd, monkeypatch, "schedule", "list")
    assert code == 0 and "two" in said and "one.json is damaged" in err
    assert run(capfd, monkeypatch, "schedule", "delete", "one")[:2] == (0, "one is deleted.\n")
    with pytest.raises(ScheduleError, match="There is no schedule one"):
        load("one")


class Clock:
    """A clock that is put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Here:
    """A scheduler in this process, by a clock that is put forward. Its runs are what `run` says, in Python."""

    def __init__(
        self, run: str, monkeypatch: pytest.MonkeyPatch, *hearers: Callable[..., None], notify: str | None = None
    ) -> None:
        self.clock, self.said = Clock(), list[dict[str, Any]]()
        monkeypatch.setattr("flows.schedules.scheduler.TICK_S", 0.1)
        monkeypatch.setattr("flows.schedules.scheduler.RUN", (sys.executable, "-c", run))
        keep = lambda event, facts: self.said.append({"event": event, **facts})  # noqa: E731
        self.scheduler = Scheduler(EventLog(silent=True, hearers=(*hearers, keep)), notify=notify, clock=self.clock)
        self.thread = threading.Thread(target=self.scheduler.run)

    def __enter__(self) -> Here:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.stop()
        self.thread.join()

    def count(self, event: str, schedule: str = "") -> int:
        return sum(each["event"] == event and schedule in each.get("schedule", "") for each in list(self.said))

    def quiet(self, event: str, count: int) -> None:
        """No more of them come, though the scheduler looks at its schedules and at Prefect's page."""
        self.clock.ahead += 6
        time.sleep(1.5)
        assert self.count(event) == count, self.said


FAILS = 'print("{\\"code\\": \\"usage\\"}")'
WORKS = 'print("{\\"reported\\": 1}")'
DIES = "import os; os.kill(os.getpid(), 9)"


def create_daily(name: str, tmp_path: Path) -> None:
    """One whose last due time was a minute and a half ago."""
    job = Job((drawn(tmp_path / "in", 1),), tmp_path / "out")
    create(name, job, Timing("UTC", time.time() - 86400 - 90, every_s=86400.0))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    """A receiver of notifications."""
    monkeypatch.setenv("SCANSCRIBE_NOTIFY_SECRET", SECRET)
    hook = Hook()
    hook.up()
    yield hook
    hook.down()


def test_a_run_that_fails_is_tried_again_after_growing_pauses(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, told: Hook
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    create_daily("night-5", tmp_path)
    with Notifier(told.url) as notifier, Here(FAILS, monkeypatch, notifier.hear) as it:
        for count, pause in enumerate((60, 120, 240), 1):
            until(lambda count=count: it.count("run-failed") == count)  # type: ignore[misc]
            it.quiet("run-started", count)
            it.clock.ahead += pause - 20
            it.quiet("run-started", count)
            it.clock.ahead += 20
        until(lambda: it.count("run-failed") == 4)
        assert len(runs(server, deployment(server, "night-5")["id"])["Failed"]) == 4  # none is left for Prefect
        # A person does not wait for the pause.
        asked(server, f"deployments/{deployment(server, 'night-5')['id']}/create_flow_run")
        it.clock.ahead += 6
        until(lambda: it.count("run-failed") == 5)
        it.quiet("run-started", 5)
        monkeypatch.setattr("flows.schedules.scheduler.RUN", (sys.executable, "-c", WORKS))
        it.clock.ahead += 60
        until(lambda: it.count("run-done") == 1)
        it.clock.ahead += 3600
        it.quiet("run-started", 6)
        until(lambda: len(told.heard) >= 2)
    # That it fails is told once, until it works.
    assert [(each["event"], each.get("code")) for each in told.heard] == [
        ("run-failed", "usage"),
        ("run-failed-over", None),
    ]
    assert [each.get("repeats") for each in it.said if each["event"] == "run-failed"] == [None, 1, 2, 3, 4]


def test_a_run_whose_process_is_killed_again_and_again_is_given_up_until_the_next_due_time(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, told: Hook
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    create_daily("night-6", tmp_path)
    with Notifier(told.url) as notifier, Here(DIES, monkeypatch, notifier.hear) as it:
        for count in range(1, 6):
            until(lambda count=count: it.count("run-failed") == count)  # type: ignore[misc]
            it.quiet("run-started", count)
            it.clock.ahead += 1800
        it.quiet("run-started", 5)
        assert len(runs(server, deployment(server, "night-6")["id"])["Crashed"]) == 5
        monkeypatch.setattr("flows.schedules.scheduler.RUN", (sys.executable, "-c", WORKS))
        it.clock.ahead += 86400 - 5 * 1800
        until(lambda: it.count("run-done") == 1)
        until(lambda: len(told.heard) >= 3)
    assert [(each["event"], each.get("given_up")) for each in told.heard] == [
        ("run-failed", None),
        ("run-failed", "true"),
        ("run-failed-over", None),
    ]


def test_what_was_missed_in_days_of_downtime_is_one_line_and_counted(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    begin = time.time() - 3 * 86400 - 30
    job, metrics = Job((drawn(tmp_path / "in", 1),), tmp_path / "out"), Metrics()
    create("night-7", job, Timing("UTC", begin, every_s=60.0))
    with Here(WORKS, monkeypatch, metrics.hear) as it:
        until(lambda: it.count("run-done") == 1)
    [line] = [each for each in it.said if each["event"] == "run-skipped"]
    assert abs(line["count"] - 3 * 1440) <= 1
    first, last = (datetime.fromisoformat(line[name]).timestamp() for name in ("first", "last"))
    assert abs(first - begin - 60) < 2 and last - first == 60 * (line["count"] - 1)
    assert metrics.registry.get_sample_value("scanscribe_runs_total", {"result": "skipped"}) == line["count"]


def test_a_clock_that_was_a_month_ahead_holds_nothing_up_when_it_is_right_again(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    create_daily("night-8", tmp_path)
    it = Here(FAILS, monkeypatch)
    it.clock.ahead = 30 * 86400
    with it:
        until(lambda: it.count("run-failed") == 1)
        it.clock.ahead = 0
        until(lambda: it.count("run-failed") == 2)  # it is tried again, for all the pause would end in a month
        monkeypatch.setattr("flows.schedules.scheduler.RUN", (sys.executable, "-c", WORKS))
        it.clock.ahead = 30 * 86400
        until(lambda: it.count("run-done") == 1)
        it.clock.ahead = 0
        it.quiet("run-done", 1)
        it.clock.ahead = 86400
        until(lambda: it.count("run-done") == 2)


def create_alpha_and_beta(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schedules of one job that are due."""
    monkeypatch.setenv("PREFECT_API_URL", server)
    job = Job((drawn(tmp_path / "in", 1),), tmp_path / "out")
    for name in ("alpha", "beta"):
        create(name, job, due_since(1.5))


def test_a_deployment_that_was_deleted_on_prefect_s_page_is_put_again(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_alpha_and_beta(tmp_path, server, monkeypatch)
    with Here(WORKS, monkeypatch) as it:
        until(lambda: it.count("run-done", "alpha") == it.count("run-done", "beta") == 1)
        httpx.delete(f"{server}/deployments/{deployment(server, 'alpha')['id']}", timeout=30).raise_for_status()
        it.clock.ahead += 60
        until(lambda: it.count("run-done", "alpha") > 1 and it.count("run-done", "beta") > 1)
        assert deployment(server, "alpha") and not it.count("broken")


def test_what_goes_wrong_with_one_schedule_keeps_no_other_from_running(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_alpha_and_beta(tmp_path, server, monkeypatch)
    (tmp_path / "home" / "schedules" / "alpha.standing.json").mkdir()  # nothing can be kept there
    (tmp_path / "home" / "schedules" / "aleph.json").write_text("{}")
    with Here(WORKS, monkeypatch) as it:
        until(lambda: it.count("run-done", "beta") == 1 and it.count("broken") == 1)
        (tmp_path / "home" / "schedules" / "alpha.standing.json").rmdir()
        until(lambda: it.count("run-done", "alpha") == 1)
        until(lambda: "aleph.json is damaged" in [each for each in it.said if each["event"] == "broken"][-1]["message"])
        (tmp_path / "home" / "schedules" / "aleph.json").unlink()
        until(lambda: it.count("broken-over") == 1)
        with monkeypatch.context() as patch:
            patch.setattr("flows.schedules.scheduler.next_due", lambda *_: {}["Jane"])
            patch.setattr("flows.schedules.scheduler.step", lambda *_, **__: {}["Jane"])
            until(lambda: it.count("broken") == 3)
        until(lambda: it.count("broken-over") == 2)
    fault = [each for each in it.said if each["event"] == "broken"][-1]
    assert fault["code"] == "fault" and "The schedule alpha cannot be run (KeyError at " in fault["message"]
    assert "Jane" not in fault["message"]


def test_a_run_tells_of_critical_findings_and_refused_inputs_and_its_reports_are_counted(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, told: Hook
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        'name: strict\nversion: "1"\nseverity:\n  - {rule: all, severity: critical}\n'
        "disposition:\n  - {rule: all, disposition: reject}\n"
    )
    inputs = drawn(tmp_path / "in", 1)
    for number in range(3):
        (inputs / f"John-{number}.png").touch()
    (inputs / "John.jpg").write_text("none")
    create("night-7", Job((inputs,), tmp_path / "out", rules=rules), due_since(1.5))
    metrics = Metrics()
    with (
        Notifier(told.url) as notifier,
        Here("", monkeypatch, metrics.hear, notifier.hear, notify=told.url) as it,
        metrics.serve(0) as endpoint,
    ):
        monkeypatch.setattr("flows.schedules.scheduler.RUN", (sys.executable, "-m", "tests.scheduler_process"))
        until(lambda: it.count("run-done") == 1)
        until(lambda: len(told.heard) == 2)
        figures = scrape(endpoint.port)
    [entry] = lines(tmp_path / "out" / "index.jsonl")
    critical, refused = sorted(told.heard, key=lambda each: each["event"])
    assert (critical["event"], critical["report"]) == ("critical-finding", entry["id"])
    assert (refused["event"], refused["schedule"]) == ("inputs-refused", "night-7")
    assert (refused["count"], refused["codes"]) == (4, "empty-file 3, not-an-image 1")
    assert figures["scanscribe_reports_total[defect]"] == figures["scanscribe_runs_total[done]"] == 1
    assert figures["scanscribe_failures_total[empty-file][true]"] == 3
    assert figures["scanscribe_device_seconds_total[busy]"] > 0.1  # so long the reader takes for a picture
    assert not any(name in json.dumps([it.said, told.heard]) for name in ("Jane", "John"))
