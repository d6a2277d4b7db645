"""The batch flow against a real Prefect server of its own: same reports as a one-off run, nothing private on record."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flows.jobs import load_job, run_batch, save_job
from flows.machine.server import LocalServer, ServerError, import_prefect
from flows.seeing.log import EventLog, Fact
from flows.seeing.metrics import Metrics
from flows.seeing.seeing import Seeing
from pipelines.ingest import FileRef, Unit
from pipelines.run import Job, UsageError, execute
from pipelines.run_folder import OutputError
from tests.chaos import kill_server
from tests.test_cli import run
from tests.test_run import lines, picture
from tests.test_watch import until
from tests.tiny_reader import CURSED, TinyReader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def state_folder(new_state_folder: Callable[[], Path]) -> Iterator[Path]:
    """One state folder for the module."""
    home = new_state_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCANSCRIBE_HOME", str(home))
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        yield home


def test_the_flow_gives_the_reports_of_a_one_off_run_and_tells_prefect_no_names(
    tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    TinyReader().install(monkeypatch)
    for number in range(66):
        picture(tmp_path / "in" / f"Jane-Doe-{number:02}.png", seed=number, first=CURSED if number == 3 else 0)
    (tmp_path / "in" / "John-Roe.png").touch()
    monkeypatch.chdir(tmp_path)

    summary = run_batch(Job((Path("in"),), Path("flow-out")))
    alone = execute(Job((tmp_path / "in",), tmp_path / "alone"))

    assert [entry.id for entry in summary.reported] == [entry.id for entry in alone.reported]
    assert [r.code for r in summary.rejected] == [r.code for r in alone.rejected] == ["empty-file", "model-failed"]
    assert len(lines(tmp_path / "flow-out" / "index.jsonl")) == 65
    assert capfd.readouterr() == ("", "")

    private = (b"Jane", b"John", str(tmp_path).encode())
    for file in filter(Path.is_file, (state_folder / "prefect").iterdir()):  # `ui` is its page
        assert not any(word in file.read_bytes() for word in private), file.name
    assert not list((state_folder / "jobs").iterdir())
    with sqlite3.connect(state_folder / "prefect" / "prefect.db") as database:
        tasks = dict(database.execute("select name, state_name from task_run"))
        [(flow, table)] = database.execute(
            "select f.state_name, a.data from flow_run f join artifact a on a.flow_run_id = f.id"
        )
    assert tasks["batch 1: pictures"] == tasks["batch 2: pictures"] == flow == "Completed"
    assert summary.reported[0].id in table and table.count("](data:image/jpeg;base64,") == 12


def test_the_summary_links_to_reports_that_are_served(
    tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TinyReader().install(monkeypatch)
    monkeypatch.setenv("SCANSCRIBE_REPORTS_URL", "https://host.example/all/")
    summary = run_batch(Job((picture(tmp_path / "Jane.png"),), tmp_path / "line 3 (b)"))
    [entry] = summary.reported
    with sqlite3.connect(state_folder / "prefect" / "prefect.db") as database:
        [(table,)] = database.execute("select data from artifact order by created desc limit 1")
    place = "https://host.example/all/line%203%20%28b%29"
    assert f"open its [index.html]({place}/index.html)." in table
    assert f"| [{entry.id}]({place}/{entry.formats['html']}) |" in table


def test_what_every_run_of_a_job_refuses_is_notified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyReader().install(monkeypatch)
    inputs, heard = tmp_path / "in", list[dict[str, Fact]]()
    picture(inputs / "whole.png")
    logged: list[str] = []
    log = EventLog(silent=True, hearers=(lambda event, facts: logged.append(event),))
    seen = Seeing(log, lambda event, **facts: heard.append({"event": event, **facts}), Metrics())

    def told() -> list[dict[str, Fact]]:
        heard.clear()
        run_batch(Job((inputs,), tmp_path / "out"), seen=seen)
        return [each for each in heard if each.pop("event") == "inputs-refused"]

    with LocalServer() as server:  # for all runs
        server.url()
        (inputs / "one.png").touch()
        assert told() == [{"count": 1, "new": 1, "codes": "empty-file 1"}]
        assert told() == []
        (inputs / "two.jpg").write_text("none")
        assert told() == [{"count": 2, "new": 1, "codes": "empty-file 1, not-an-image 1"}]
    assert logged.count("inputs-refused") == 3  # the log has it each time


def test_a_flow_that_cannot_write_ends_with_the_run_s_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    TinyReader().install(monkeypatch)
    monkeypatch.setattr("pipelines.desk.write_report", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run_batch(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_flow_stops_before_the_disk_is_full_and_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    TinyReader().install(monkeypatch)
    picture(tmp_path / "in" / "Jane-Doe.png")
    (tmp_path / "in" / "John-Roe.png").touch()
    words = ("batch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--log-json", "--metrics", "0")
    code, _, said = run(capfd, monkeypatch, *words, "--min-free", str(1 << 40))
    assert code == 2 and "MiB are free for the reports: no work is taken until there is." in said
    assert not (tmp_path / "out" / "index.jsonl").exists()
    code, _, said = run(capfd, monkeypatch, *words, "--min-free", "0")
    events = {each["event"]: each for each in map(json.loads, said.splitlines())}
    assert code == 1 and events.keys() == {"metrics", "reported", "refused", "inputs-refused"}
    assert events["refused"]["code"] == "empty-file" and events["reported"]["read"] <= events["reported"]["seconds"]


def test_ctrl_c_while_tasks_are_handed_over_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_prefect()
    import flows.batch

    def interrupt(**options: object) -> None:
        raise KeyboardInterrupt

    TinyReader().install(monkeypatch)
    monkeypatch.setattr(flows.batch.read_and_report, "with_options", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_batch(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))
    assert (tmp_path / "out" / "index.html").exists()


def test_wrong_usage_is_told_before_a_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.jobs.LocalServer", lambda: pytest.fail("a server was started"))
    with pytest.raises(UsageError):
        run_batch(Job((tmp_path / "nowhere",), tmp_path / "out"))


def test_a_job_comes_back_as_it_was_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job((Path("a b.png"), Path("/x/ü.dcm")), Path("out"), ("json",), "m", "cpu", "ct", Path("golden"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert load_job(save_job(replace(job, model="own"))).model == str(tmp_path / "own")
    name = save_job(job)
    monkeypatch.chdir("/")
    assert save_job(job, "one") != save_job(job, "other")  # a run that ends removes its own only
    again = load_job(name)
    assert again.inputs == (tmp_path / "a b.png", Path("/x/ü.dcm"))
    assert (again.out, again.reference) == (tmp_path / "out", tmp_path / "golden")
    assert (again.formats, again.model, again.device, again.kind) == (("json",), "m", "cpu", "ct")


def test_batches_keep_studies_apart_and_pictures_in_order() -> None:
    from flows.batch import group

    def unit(name: str, kind: str) -> Unit:
        return Unit(name, kind, (FileRef(Path(name)),))  # type: ignore[arg-type]

    units = [*(unit(f"p{n}", "picture") for n in range(65)), unit("s1", "series"), unit("s2", "series")]
    batches = group(units)
    assert [len(each.units) for each in batches] == [64, 1, 1, 1]
    assert [u for each in batches for u in each.units] == units
    assert group([]) == ()
    assert [len(each.units) for each in group(units, studies=2)] == [64, 1, 2]


def test_all_flows_of_a_machine_share_one_server_and_the_last_one_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalServer() as first:
        with LocalServer() as second:
            assert first.url() == second.url()
        port = int(first.url().split(":")[2].split("/")[0])
        assert listening(port) == ["127.0.0.1"]
    assert listening(port) == []


OWNER = """
import time
from flows.machine.server import LocalServer
with LocalServer() as server:
    print(server.url(), flush=True)
    time.sleep(60)
"""


def test_the_server_listens_on_loopback_only_and_ends_with_its_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert owner.stdout is not None
    port = int(owner.stdout.readline().split(b":")[2].split(b"/")[0])
    assert listening(port) == ["127.0.0.1"]
    owner.kill()
    owner.wait()
    until(lambda: not listening(port))


def listening(port: int) -> list[str]:
    """The IPv4 addresses on which someone listens on `port`."""
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [".".join(map(str, bytes.fromhex(ip)[::-1])) for ip, each in local if int(each, 16) == port]


def test_a_server_that_does_not_come_up_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with LocalServer() as server, pytest.raises(ServerError, match=r"server\.log"):
        server.url()


def test_a_server_of_the_user_s_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with LocalServer() as server:
        assert server.url() == "http://127.0.0.1:1/api"


def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyReader().install(monkeypatch)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1/api does not answer \(ConnectError\)"):
        run_batch(Job((picture(tmp_path / "a.png"),), tmp_path / "out"))


@contextmanager
def server_killed(home: Path, index: Path) -> Iterator[None]:
    """The server dies as soon as two reports are there."""

    def kill() -> None:
        until(lambda: index.exists() and len(index.read_bytes().splitlines()) >= 2, seconds=60)
        assert kill_server(home)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


def test_a_server_that_dies_is_started_again_and_the_flow_goes_on(
    tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    TinyReader(seconds=0.1).install(monkeypatch)
    inputs = tuple(picture(tmp_path / f"{number}.png", seed=number) for number in range(20))
    with server_killed(state_folder, tmp_path / "out" / "index.jsonl"):
        summary = run_batch(Job(inputs, tmp_path / "out"))
    assert len(summary.reported) == 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_server_of_the_user_s_own_that_dies_is_told_and_what_is_done_stays(
    tmp_path: Path, state_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    TinyReader(seconds=0.1).install(monkeypatch)
    job = Job(tuple(picture(tmp_path / f"{number}.png", seed=number) for number in range(20)), tmp_path / "out")
    with LocalServer() as server, server_killed(state_folder, tmp_path / "out" / "index.jsonl"):
        monkeypatch.setenv("PREFECT_API_URL", server.url())
        with pytest.raises(ServerError, match="does not answer"):
            run_batch(job)
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("PREFECT_API_URL")
    assert len(run_batch(job).already_reported) >= 2


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
import pipelines.run
from flows.jobs import run_batch
from tests.test_watch import until
from tests.tiny_reader import TinyReader

class Slow(TinyReader):
    def read(self, study, **options):
        time.sleep(0.2 if len(self.read_names) < 3 else 2)  # so that it is not done before it is interrupted
        return super().read(study, **options)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background ignores it
reader = Slow()
pipelines.run.find = lambda model: reader.stored
pipelines.run.load_reader = lambda model, device: reader
try:
    run_batch(pipelines.run.Job((Path(sys.argv[1]),), Path(sys.argv[2])))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_flow_stops_quietly_and_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number)
    index = tmp_path / "out" / "index.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "in"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    while not index.exists() or len(index.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said == b""
    done = len(lines(index))
    assert done < 40

    TinyReader().install(monkeypatch)
    summary = execute(Job((tmp_path / "in",), tmp_path / "out"))
    assert len(summary.already_reported) == done
    assert len(lines(index)) == 40
    assert json.loads((tmp_path / "out" / summary.reported[0].formats["json"]).read_text())
