"""Workers that share a Prefect server, a ledger and an output folder: each item once, also when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from flows.crew import Crew, Handed
from flows.jobs import as_plain
from flows.ledger import Claim, Ledger, LedgerError
from flows.ledger.items import CHANGED, Items
from flows.ledger.quarantine import quarantine
from flows.machine.server import LocalServer, import_prefect
from flows.seeing.log import EventLog, Fact
from flows.settle import Patience
from flows.watch import Watcher, Watching
from pipelines.ingest import Unit, plan
from pipelines.reading import DeviceLostError
from pipelines.run import Heard, Job, Session, device_key
from pipelines.run_folder import IndexEntry, OutputError
from pipelines.store import ModelError
from pipelines.study import Rejection
from tests.test_cli import run
from tests.test_ledger import Clock
from tests.test_run import lines, picture
from tests.test_watch import names, until
from tests.tiny_reader import TinyReader

ROOT = Path(__file__).parents[1]
PICTURE_S = 0.3  # slow enough that neither of two workers has done all before the other begins


@pytest.fixture(scope="module")
def shared(new_state_folder: Callable[[], Path]) -> Iterator[dict[str, str]]:
    """What processes are told so that they share one server; it starts once."""
    home = new_state_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCANSCRIBE_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.delenv("PREFECT_HOME", raising=False)
        with LocalServer() as server:
            yield {"PREFECT_API_URL": server.url(), "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "exchange")}


class Machine:
    """Processes with a state folder of their own, as another machine would have it."""

    def __init__(self, home: Path, shared: dict[str, str]) -> None:
        self._environment = {**os.environ, **shared, "SCANSCRIBE_HOME": str(home)}
        self._environment.pop("PREFECT_HOME", None)
        self._home, self._processes = home, []

    def start(self, *command: str, seconds: float = 0.0) -> subprocess.Popen[bytes]:
        self._home.mkdir(exist_ok=True)
        log = self._home / f"{command[0]}-{len(self._processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.watcher_process", *command],
                env=self._environment | {"TINY_READER_SECONDS": str(seconds)},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        process.log = log  # type: ignore[attr-defined]
        self._processes.append(process)
        return process

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def machines(tmp_path: Path, shared: dict[str, str]) -> Iterator[tuple[Machine, Machine]]:
    both = Machine(tmp_path / "machine-1", shared), Machine(tmp_path / "machine-2", shared)
    try:
        yield both
    finally:
        for machine in both:
            machine.stop()


def here(monkeypatch: pytest.MonkeyPatch, home: Path, shared: dict[str, str]) -> None:
    """Let this process share the server, with a state folder of its own."""
    for name, value in {**shared, "SCANSCRIBE_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)


def wait_for(log: Path, word: str, *, count: int = 1, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while log.read_text().count(word) < count:
        assert time.monotonic() < deadline, f"{word} is not in the log:\n{log.read_text()}"
        time.sleep(0.05)


@pytest.mark.parametrize("count", [40, pytest.param(240, marks=pytest.mark.chaos)])
def test_two_workers_share_the_work_and_a_killed_one_hands_it_over_within_its_lease(
    tmp_path: Path, machines: tuple[Machine, Machine], postgres: str, count: int
) -> None:
    out = tmp_path / "out"
    for number in range(count):
        picture(tmp_path / "in" / f"{number:02}.png", seed=number)
    one, _ = machines
    workers = [machine.start("worker", "--ledger", postgres, seconds=PICTURE_S) for machine in machines]
    for worker in workers:
        wait_for(worker.log, " serving ")  # type: ignore[attr-defined]
    flow = one.start("batch", str(tmp_path / "in"), "--out", str(out), "--workers", "--ledger", postgres, "--json")
    for worker in workers:
        wait_for(worker.log, " reported ", count=2)  # type: ignore[attr-defined]
    workers[1].send_signal(signal.SIGKILL)
    assert flow.wait(120) == 0, flow.log.read_text()  # type: ignore[attr-defined]

    summary = json.loads(flow.log.read_text().splitlines()[-1])  # type: ignore[attr-defined]
    assert (len(summary["reported"]), summary["rejected"]) == (count, [])
    names = [Path(each["inputs"][0]["path"]).name for each in summary["reported"]]
    assert names == [unit.files[0].path.name for unit in plan([tmp_path / "in"]).units]  # whoever ends first
    index = lines(out / "index.jsonl")
    assert len({line["id"] for line in index}) == len(index) == count
    assert all((out / line["formats"]["json"]).is_file() for line in index)
    said = [line for worker in workers for line in worker.log.read_text().splitlines() if " reported " in line]  # type: ignore[attr-defined]
    items = [word for line in said for word in line.split() if word.startswith("item=")]
    assert len(items) == len(set(items))  # none was read twice
    with Ledger(out, postgres) as ledger:
        assert ledger.counts()["done"] == count
        # What it had claimed, and the next batch, which the server had sent it already, are taken without a pause: both
        # are processes of one machine, so that the lease need not run out.
        times = sorted(datetime.fromisoformat(line.split()[0]) for line in said)
        assert max(after - before for before, after in pairwise(times)).total_seconds() < ledger.lease_s / 2
    workers[0].send_signal(signal.SIGTERM)
    assert workers[0].wait(60) == 0


@pytest.mark.parametrize("replaced", [True, False])
def test_what_is_replaced_after_a_flow_handed_it_out_is_reported_as_what_it_is_now(
    tmp_path: Path, machines: tuple[Machine, Machine], postgres: str, replaced: bool
) -> None:
    out, (one, other) = tmp_path / "out", machines
    file = picture(tmp_path / "in" / "a.png", seed=1)
    shutil.copy(file, tmp_path / "in" / "b.png")
    flow = one.start("batch", str(tmp_path / "in"), "--out", str(out), "--workers", "--ledger", postgres, "--json")
    with Ledger(out, postgres) as ledger:
        until(lambda: ledger.counts()["waiting"] == 1)
        [claim] = ledger.claim()
        if replaced:
            picture(file, seed=2)
        why = Rejection(str(file), CHANGED, "It is not what was planned.", "Run again.")
        quarantine(out, claim.request, [file], why, attempts=5, spare=0)
        ledger.quarantined(claim, why.code, why.reason)
        worker = other.start("worker", "--ledger", postgres)
        code = flow.wait(60)
        states = sorted(row.state for row in ledger.rows())
    summary = json.loads(flow.log.read_text().splitlines()[-1])  # type: ignore[attr-defined]
    worker.terminate()
    kept = len(list((out / "quarantine").iterdir()))
    if replaced:
        assert (code, names(out), states, kept) == (0, ["a.png", "b.png"], ["done", "done"], 0)
        assert summary["rejected"] == []
    else:  # the worker had another model
        assert (code != 0, names(out), states, kept) == (True, [], ["quarantined"], 1)
        assert [each["code"] for each in summary["rejected"]] == [CHANGED, CHANGED]


def test_a_worker_takes_what_is_urgent_first_and_what_is_off_peak_last(
    tmp_path: Path, machines: tuple[Machine, Machine], shared: dict[str, str], postgres: str
) -> None:
    one, other = machines
    waiting = {"state": {"type": {"any_": ["SCHEDULED"]}}, "name": {"like_": "scanscribe-"}}
    lanes = ["off-peak", "normal", "urgent"]
    for number, lane in enumerate(lanes):
        picture(tmp_path / lane / "one.png", seed=number)
        one.start(
            *("batch", str(tmp_path / lane), "--out", str(tmp_path / f"out-{lane}"), "--lane", lane),
            *("--workers", "--ledger", postgres),
        )

    def all_are_at_the_server() -> bool:
        answer = httpx.post(f"{shared['PREFECT_API_URL']}/task_runs/filter", json={"task_runs": waiting})
        return len(answer.json()) == len(lanes)

    until(all_are_at_the_server)
    worker = other.start("worker", "--ledger", postgres)
    wait_for(worker.log, " reported ", count=3)  # type: ignore[attr-defined]
    said = [line for line in worker.log.read_text().splitlines() if " reported " in line]  # type: ignore[attr-defined]
    order = []
    for line in said:
        for lane in lanes:
            with Ledger(tmp_path / f"out-{lane}", postgres) as ledger:
                order += [lane for row in ledger.rows() if f"item={row.request[:16]}" in line]
    assert order == ["urgent", "normal", "off-peak"]


def test_what_was_deleted_meanwhile_or_lacks_a_format_is_not_handed_out_forever(
    tmp_path: Path, machines: tuple[Machine, Machine], postgres: str
) -> None:
    out = tmp_path / "out"
    for number in range(3):
        picture(tmp_path / "in" / f"{number}.png", seed=number)
    one, other = machines
    formats = ["--formats", "json,seg"]  # pictures have no masks
    flow = one.start(
        "batch", str(tmp_path / "in"), "--out", str(out), *formats, "--workers", "--ledger", postgres, "--json"
    )
    with Ledger(out, postgres) as ledger:
        until(lambda: ledger.counts()["waiting"] == 3, seconds=60)
    (tmp_path / "in" / "1.png").unlink()
    other.start("worker", "--ledger", postgres)
    assert flow.wait(120) == 1, flow.log.read_text()  # type: ignore[attr-defined]
    summary = json.loads(flow.log.read_text().splitlines()[-1])  # type: ignore[attr-defined]
    assert [Path(each["inputs"][0]["path"]).name for each in summary["reported"]] == ["0.png", "2.png"]
    assert all(each["errors"].keys() == {"seg"} for each in summary["reported"])
    assert [(Path(each["path"]).name, each["code"]) for each in summary["rejected"]] == [("1.png", "not-found")]

    # As if whoever had asked for one again, or had written its report, was killed before the ledger heard of that.
    with Ledger(out, postgres, lease_s=1) as ledger:
        first, second = ledger.rows("done")
        ledger.retry([first.request, second.request])
        assert ledger.claim(request=second.request)
        again = one.start(
            "batch", str(tmp_path / "in"), "--out", str(out), "--formats", "json", "--workers", "--ledger", postgres
        )
        until(lambda: ledger.counts()["done"] == 2, seconds=60)
    assert again.wait(60) == 0, again.log.read_text()  # type: ignore[attr-defined]  # nobody asks for masks now


@pytest.mark.slow
def test_what_a_worker_was_sent_and_had_not_claimed_when_it_died_goes_to_another_at_once(
    tmp_path: Path, shared: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, tmp_path, shared)
    url = shared["PREFECT_API_URL"]
    import_prefect()
    from prefect.client.schemas.objects import TaskRun
    from prefect.client.subscriptions import Subscription

    from flows.worker import TASKS

    def worker(name: str) -> Subscription[TaskRun]:
        return Subscription(TaskRun, "/task_runs/subscriptions/scheduled", [TASKS["off-peak"].task_key], name, url)

    async def hand_out(crew: Crew) -> None:
        doomed, heir = worker("doomed"), worker("heir")
        await asyncio.wait_for(anext(doomed), 20)  # it takes receipt
        crew.settled()
        waiting = asyncio.create_task(anext(heir))
        await asyncio.sleep(1.5)
        crew.settled()
        assert not waiting.done()  # it is on its way to one worker
        await doomed.websocket.close()
        async with asyncio.timeout(10):
            while not waiting.done():
                await asyncio.to_thread(crew.settled)
                await asyncio.sleep(0.1)
        await heir.websocket.close()

    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    job = Job((tmp_path / "in",), tmp_path / "out")
    with LocalServer() as server, Ledger(job.out) as ledger:
        crew = Crew(job, ledger, server, EventLog())
        crew.give([Handed("0" * 64, (str(unit.files[0].path),), unit)], "off-peak")
        asyncio.run(hand_out(crew))


def test_why_workers_cannot_work_is_told_where_the_work_comes_from(
    tmp_path: Path, shared: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, tmp_path, shared)
    TinyReader().install(monkeypatch)

    def load_reader(model: str, device: str) -> None:
        raise ModelError("the weights are damaged")

    monkeypatch.setattr("pipelines.run.load_reader", load_reader)
    monkeypatch.setattr("flows.crew._send", lambda *_: None)  # else the next test's workers would take it
    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    job = Job((tmp_path / "in",), tmp_path / "out")
    heard: list[str] = []
    log = EventLog(hearers=(lambda event, facts: heard.append(f"{event}: {facts.get('message')}"),))
    with LocalServer() as server, Ledger(job.out) as ledger, Session(job) as session:
        crew = Crew(job, ledger, server, log)
        handed = Handed(session.request(unit), (str(unit.files[0].path),), unit)
        crew.give([handed], "off-peak")
        for _ in range(2):
            with pytest.raises(ModelError):
                Items(ledger, log, job.out, 0, 1.0).settle_together(session, [(handed.request, [*handed.files], unit)])
            assert crew.settled() == []
        assert ledger.counts()["waiting"] == 1  # no try is counted
    assert heard == ["broken: the weights are damaged"]


def test_an_item_that_kills_its_process_costs_the_others_of_its_batch_no_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TinyReader().install(monkeypatch)
    job, clock = Job((tmp_path / "in",), tmp_path / "out"), Clock()
    units = plan([picture(tmp_path / "in" / f"{number}.png", seed=number) for number in range(4)]).units
    deadly, process, release = units[1], Session.process, Ledger.release
    dying: list[bool] = []

    class KilledError(BaseException):
        pass

    def process_or_die(self: Session, units: list[Unit], heard: Heard | None = None) -> None:
        if deadly in units:
            dying.append(True)
            raise KilledError
        process(self, units, heard)

    def release_if_alive(self: Ledger, claim: Claim, **why: str) -> None:
        if dying:
            raise LedgerError("what is dead gives nothing back")
        release(self, claim, **why)

    monkeypatch.setattr(Session, "process", process_or_die)
    monkeypatch.setattr(Ledger, "release", release_if_alive)
    deaths = 0
    with Ledger(job.out, f"sqlite:///{tmp_path / 'ledger.db'}", tries=3, clock=clock) as ledger:
        for _ in range(8):
            with Session(job, member=True) as session:
                batch = [(session.request(unit), [str(unit.files[0].path)], unit) for unit in units]
                with contextlib.suppress(KilledError):
                    Items(ledger, EventLog(silent=True), job.out, 0, 1.0).settle_together(session, batch)
            deaths += len(dying)
            dying.clear()
            clock.now += ledger.lease_s + 1
        rows = {Path(row.files[0]).name: (row.state, row.code, row.attempts) for row in ledger.rows()}
    assert deaths == ledger.tries
    done = ("done", None, 2)  # the one that they had together with the deadly one, and the one by themselves
    assert rows == {"0.png": done, "1.png": ("quarantined", "process-died", 4), "2.png": done, "3.png": done}


@pytest.mark.parametrize("together", [True, False])
def test_a_report_that_was_written_before_the_last_death_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    TinyReader().install(monkeypatch)
    job, clock = Job((tmp_path / "in",), tmp_path / "out"), Clock()
    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    with Ledger(job.out, f"sqlite:///{tmp_path / 'ledger.db'}", tries=1, clock=clock) as ledger:
        with Session(job) as session:
            request, files = session.request(unit), [str(unit.files[0].path)]
            ledger.add([(request, files)])
            assert ledger.claim(request=request)  # by whom wrote the report, and died
            session.process([unit])
        clock.now += ledger.lease_s + 1
        with Session(job, member=True) as session:
            items = Items(ledger, EventLog(silent=True), job.out, 0, 1.0)
            if together:
                items.settle_together(session, [(request, files, unit)])
            else:
                items.settle(session, request, files, lambda: pytest.fail("its tries are used up"))
        [row] = ledger.rows()
    assert (row.state, row.report) == ("done", lines(job.out / "index.jsonl")[0]["id"])
    assert not (job.out / "quarantine").exists()


def test_who_has_lost_an_item_puts_nothing_into_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyReader().install(monkeypatch)
    job, clock = Job((tmp_path / "in",), tmp_path / "out"), Clock()
    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    files, told = [str(unit.files[0].path)], list[str]()
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with (
        Ledger(job.out, url, clock=clock, owner="slow") as slow,
        Ledger(job.out, url, clock=clock, owner="quick") as quick,
        Session(job, member=True) as session,
    ):
        request, silent = session.request(unit), EventLog(silent=True)

        def stand_still() -> Rejection:
            clock.now += slow.lease_s + 1
            Items(quick, silent, job.out, 0, 1.0).settle(
                session, request, files, lambda: session.conclude(session.prepare(unit))
            )
            return Rejection(files[0], "truncated", "It ends in the middle.", "Copy it again.")

        items = Items(slow, silent, job.out, 0, 1.0, lambda event, **facts: told.append(event))
        assert items.settle(session, request, files, stand_still)  # to come back to
        [row] = quick.rows()
    assert row.state == "done"
    assert not told
    assert not (job.out / "quarantine").exists()


def test_who_has_lost_an_item_clears_nothing_from_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyReader().install(monkeypatch)
    job, clock = Job((tmp_path / "in",), tmp_path / "out"), Clock()
    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    files, url, silent = [str(unit.files[0].path)], f"sqlite:///{tmp_path / 'ledger.db'}", EventLog(silent=True)
    with (
        Ledger(job.out, url, clock=clock, owner="slow") as slow,
        Ledger(job.out, url, clock=clock, owner="quick", tries=1) as quick,
        Session(job, member=True) as session,
    ):
        request = session.request(unit)

        def stand_still() -> IndexEntry | Rejection:
            clock.now += slow.lease_s + 1
            refused = Rejection(files[0], "truncated", "It ends in the middle.", "Copy it again.")
            Items(quick, silent, job.out, 0, 1.0).settle(session, request, files, lambda: session.conclude(refused))
            return session.conclude(session.prepare(unit))

        items = Items(slow, silent, job.out, 0, 1.0)
        assert items.settle(session, request, files, stand_still)
        assert [row.state for row in quick.rows()] == ["quarantined"]
        assert len(list((job.out / "quarantine").iterdir())) == 1
        # It has a report all the same: with the next look that is what counts.
        assert items.settle(session, request, files, lambda: session.conclude(session.prepare(unit))) is None
        assert [row.state for row in quick.rows()] == ["done"]
        assert not list((job.out / "quarantine").iterdir())


@pytest.mark.parametrize(("error", "code"), [(DeviceLostError("Xid 79"), "device-lost"), (RuntimeError(), "fault")])
def test_a_worker_says_what_fails_and_leaves_a_lost_gpu_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    TinyReader().install(monkeypatch)
    import_prefect()
    from flows.worker import Work, Worker

    monkeypatch.setattr("flows.worker.PAUSE_S", 0.0)

    def fail(self: TinyReader, sights: list[object]) -> None:
        raise error

    monkeypatch.setattr(TinyReader, "read_many", fail)
    heard: list[tuple[str, object]] = []
    log = EventLog(hearers=(lambda event, facts: heard.append((event, facts.get("code"))),))
    [unit] = plan([picture(tmp_path / "in" / "0.png")]).units
    job = Job((tmp_path / "in",), tmp_path / "out", device="cpu")
    worker = Worker(Work("cpu"), log)
    worker._device = "cpu"
    with Session(job) as session, Ledger(job.out) as ledger:
        handed = Handed(session.request(unit), (str(unit.files[0].path),), unit)
        with pytest.raises(type(error)):
            worker.take(as_plain(job), [handed])
        [row] = ledger.rows()
    assert (row.state, row.attempts) == ("waiting", 0)
    assert heard == [("broken", code)]
    assert worker._stopping.is_set() == (code == "device-lost")


class Beside:
    """In place of `Session.process`: keeps what it is told to until it is let go, and notes what it is at together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *kept: Unit) -> None:
        self._process, self._kept, self._lock = Session.process, set(kept), threading.Lock()
        self._at_work: list[str] = []
        self.together: list[list[str]] = []  # the names of what was at work whenever more came
        self.let_go = threading.Event()
        monkeypatch.setattr(Session, "process", lambda session, units, heard=None: self(session, units, heard))

    def __call__(self, session: Session, units: list[Unit], heard: Heard | None) -> None:
        names = [unit.files[0].path.stem for unit in units]
        with self._lock:
            self._at_work += names
            self.together.append(sorted(self._at_work))
        if self._kept & set(units):
            assert self.let_go.wait(30)
        self._process(session, units, heard)
        with self._lock:
            self._at_work = [name for name in self._at_work if name not in names]


def test_what_may_end_the_process_is_tried_while_no_other_batch_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TinyReader().install(monkeypatch)
    job, clock = Job((tmp_path / "in",), tmp_path / "out"), Clock()
    first, later, suspect = plan(
        [picture(tmp_path / "in" / f"{name}.png", seed=seed) for seed, name in enumerate(("first", "later", "suspect"))]
    ).units
    beside = Beside(monkeypatch, first)
    with (
        Ledger(job.out, f"sqlite:///{tmp_path / 'ledger.db'}", clock=clock) as ledger,
        Session(job, member=True) as session,
        ThreadPoolExecutor() as pool,
    ):
        items = Items(ledger, EventLog(silent=True), job.out, 0, 1.0)

        def settle(unit: Unit) -> Future[None]:
            batch = [(session.request(unit), [str(unit.files[0].path)], unit)]
            return pool.submit(items.settle_together, session, batch)

        ledger.add([(session.request(suspect), [str(suspect.files[0].path)])])
        assert ledger.claim(request=session.request(suspect))  # by whom died at it
        clock.now += ledger.lease_s + 1
        batches = [settle(first)]
        until(lambda: len(beside.together) == 1)
        batches.append(settle(suspect))
        until(lambda: bool(items._turns._waiting))
        batches.append(settle(later))  # does not keep the suspect from its turn
        time.sleep(0.2)
        assert len(beside.together) == 1
        [row] = [row for row in ledger.rows() if row.request == session.request(suspect)]
        assert (row.state, row.attempts) == ("waiting", 1)  # what ends the process meanwhile costs it no try
        beside.let_go.set()
        for each in batches:
            each.result(30)
        assert ledger.counts()["done"] == 3
    assert beside.together == [["first"], ["suspect"], ["later"]]
    assert items.tally.reported == 3


def test_batches_of_one_job_are_at_work_together_and_those_of_another_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    TinyReader().install(monkeypatch)
    import_prefect()
    from flows.worker import Work, Worker

    monkeypatch.setattr("flows.worker.PAUSE_S", 0.0)
    names = ("broken", "kept", "late", "other", "second")
    units = plan([picture(tmp_path / "in" / f"{name}.png", seed=seed) for seed, name in enumerate(names)]).units
    unit_of = dict(zip(names, units, strict=True))
    beside = Beside(monkeypatch, unit_of["kept"])
    jobs = [Job((tmp_path / "in",), tmp_path / f"out-{number}", device="cpu") for number in range(2)]
    heard: list[str] = []
    worker = Worker(Work("cpu"), EventLog(silent=True, hearers=(lambda event, facts: heard.append(event),)))
    worker._device = "cpu"
    with Session(jobs[0]) as session, Session(jobs[1]) as another, ThreadPoolExecutor() as pool:

        def take(name: str, session: Session = session) -> Future[None]:
            unit = unit_of[name]
            handed = Handed(session.request(unit), (str(unit.files[0].path),), unit)
            return pool.submit(worker.take, as_plain(session.job), [handed])

        kept = take("kept")
        until(lambda: len(beside.together) == 1)
        take("second").result(30)
        other = take("other", another)
        until(lambda: len(worker._coming) == 1)
        late = take("late")  # does not overtake the other
        until(lambda: len(worker._coming) == 2)
        assert beside.together == [["kept"], ["kept", "second"]]
        beside.let_go.set()
        for each in (kept, other, late):
            each.result(30)
        assert beside.together[2:] == [["other"], ["late"]]

        # What breaks off one batch leaves the others to go on; the next begins anew.
        beside.let_go.clear()
        kept_desk = take("kept", another)
        until(lambda: len(beside.together) == 5)
        with monkeypatch.context() as patch:
            patch.setattr(Session, "refresh", lambda session: (_ for _ in ()).throw(OutputError("the disk is full")))
            with pytest.raises(OutputError):
                take("broken", another).result(30)
        again = take("broken", another)
        time.sleep(0.2)
        assert not again.done()
        beside.let_go.set()
        kept_desk.result(30)
        again.result(30)
        assert not worker._stopping.is_set()
        worker.stop()
        take("second", another).result(30)  # not any more
        assert len(beside.together) == 6
    assert heard.count("reported") == worker.tally.reported == 6 and heard.count("broken") == 1


@pytest.mark.parametrize(("gpu", "at_once"), [(True, 4), (False, 1)])
def test_a_worker_takes_as_many_batches_at_a_time_as_its_device_is_worth(
    tmp_path: Path, shared: dict[str, str], monkeypatch: pytest.MonkeyPatch, gpu: bool, at_once: int
) -> None:
    here(monkeypatch, tmp_path, shared)
    TinyReader().install(monkeypatch)
    import_prefect()
    from flows import worker

    at_work, taken, lock, full = 0, list[int](), threading.Lock(), threading.Event()

    def take(self: worker.Worker, plain: object, batch: object) -> None:
        nonlocal at_work
        with lock:
            at_work += 1
            taken.append(at_work)
            if at_work == at_once:
                full.set()
        assert full.wait(60)  # all places are taken, however slowly batches come
        time.sleep(0.5)
        with lock:
            at_work -= 1

    monkeypatch.setattr(worker.Worker, "take", take)
    monkeypatch.setattr(worker, "may_be_gpu", lambda device: gpu)
    job, count = Job((tmp_path / "in",), tmp_path / "out"), 2 * at_once + 1
    heard: list[str] = []
    one = worker.Worker(worker.Work("cpu"), EventLog(silent=True, hearers=(lambda event, facts: heard.append(event),)))
    thread = threading.Thread(target=one.run)
    with LocalServer() as server, Ledger(job.out) as ledger:
        thread.start()
        try:
            until(lambda: "serving" in heard, seconds=60)
            crew = Crew(job, ledger, server, EventLog(silent=True))
            for number in range(count):
                crew.give([handed_unit(tmp_path / "in" / f"{number}.png", f"{number:064}")])
            until(lambda: len(taken) == count, seconds=60)
        finally:
            one.stop()
            thread.join(60)
    assert not thread.is_alive() and max(taken) == at_once


def test_a_gpu_is_known_by_itself_whatever_processes_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"first process": ["a"], "second process": ["b"], "whole machine": ["a", "b"]}
    keys = {}
    for process, gpus in seen.items():
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: len(gpus))
        monkeypatch.setattr(
            "torch.cuda.get_device_properties", lambda place, gpus=gpus: SimpleNamespace(uuid=gpus[place.index or 0])
        )
        keys[process] = [device_key(name) for name in ("cuda:0", "cuda:1")]
    assert keys == {
        "first process": ["GPU-a", "cuda:1"],  # which is not there: that is for the model to say
        "second process": ["GPU-b", "cuda:1"],
        "whole machine": ["GPU-a", "GPU-b"],
    }
    assert device_key("cpu") == "cpu"


class Serverless:
    """In place of the server: nobody asks it for anything."""

    def url(self) -> str:
        return ""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Crew, Ledger, list[str], Clock]]:
    """A crew without a server, its ledger, the requests that it hands out, and the clock of all of them."""
    clock, sent = Clock(), list[str]()
    monkeypatch.setattr("flows.crew.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr("flows.crew.workers", lambda url: frozenset({"one"}))
    monkeypatch.setattr("flows.crew._send", lambda url, lane, plain, batch: sent.extend(each.request for each in batch))
    TinyReader().install(monkeypatch)
    with Ledger(tmp_path / "out", f"sqlite:///{tmp_path / 'ledger.db'}", clock=clock) as ledger:
        yield Crew(Job((tmp_path / "in",), tmp_path / "out"), ledger, Serverless(), EventLog()), ledger, sent, clock  # type: ignore[arg-type]


def handed_unit(path: Path, request: str) -> Handed:
    [unit] = plan([picture(path)]).units
    return Handed(request, (str(path),), unit)


def test_what_is_settled_is_told_although_the_ledger_fails_in_the_same_look(
    tmp_path: Path, alone: tuple[Crew, Ledger, list[str], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    crew, ledger, sent, clock = alone
    names = ("done", "gone", "open")
    crew.give([handed_unit(tmp_path / "in" / f"{name}.png", name) for name in names])
    [claim] = ledger.claim(request="done")
    ledger.done(claim, "f" * 16)
    (tmp_path / "in" / "gone.png").unlink()
    ledger.forget(["gone"])

    def fail() -> int:
        raise LedgerError("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "hand_over", fail)
        with pytest.raises(LedgerError):
            crew.settled()
    clock.now += 2
    told = {handed.request: row and row.state for handed, row in crew.settled()}
    assert told == {"done": "done", "gone": None}
    assert crew.settled() == [] and len(crew) == 1 and sent == [*names]  # none was handed out again


def test_what_a_worker_gave_back_is_handed_out_again_whatever_else_moves(
    tmp_path: Path, alone: tuple[Crew, Ledger, list[str], Clock]
) -> None:
    crew, ledger, sent, clock = alone
    crew.give([handed_unit(tmp_path / "in" / f"{name}.png", name) for name in ("given back", "at work", "queued")])
    clock.now += 1
    [given_back], [at_work] = (ledger.claim(request=name) for name in ("given back", "at work"))
    ledger.release(given_back)
    sent.clear()
    for _ in range(12):
        clock.now += 5
        ledger.beat(at_work)
        assert crew.settled() == [] and sent == []
    for _ in range(4):
        clock.now += 5
        ledger.beat(at_work)
        assert crew.settled() == []
    assert sent == ["given back"]  # once, and what is still in the server's queue is not


@pytest.mark.parametrize("other_model", [False, True])
def test_what_is_replaced_while_workers_have_it_leaves_nothing_in_quarantine(
    tmp_path: Path, alone: tuple[Crew, Ledger, list[str], Clock], other_model: bool
) -> None:
    crew, ledger, sent, _ = alone
    job, log = Job((tmp_path / "in",), tmp_path / "out"), EventLog(silent=True)
    file = picture(tmp_path / "in" / "a.png", seed=1)
    watcher = Watcher(job, Watching(tmp_path / "in", Patience(interval=0.05, looks=2)), ledger, log, lane="normal")
    watcher._crew = crew

    def step_until(true: Callable[[], bool]) -> None:
        until(lambda: (watcher._look(), watcher._work_with_crew(crew, session), time.sleep(0.05), true())[-1])

    with Session(job, member=True) as session:
        step_until(lambda: len(sent) == 1)
        if not other_model:
            picture(file, seed=2)
        why = Rejection(str(file), CHANGED, "It is not what was planned.", "Run again.")
        [claim] = ledger.claim(request=sent[0])
        quarantine(tmp_path / "out", claim.request, [file], why, attempts=5, spare=0)
        ledger.quarantined(claim, why.code, why.reason)
        step_until(lambda: not crew if other_model else len(sent) == 2)
    rows = {row.request: row.state for row in ledger.rows()}
    kept = list((tmp_path / "out" / "quarantine").iterdir())
    if other_model:  # of the worker: the file is what it was
        assert rows == {sent[0]: "quarantined"} and len(kept) == 1 and watcher._items.tally.refused == 1
    else:
        assert rows == {sent[1]: "waiting"} and not kept and watcher._items.tally.refused == 0


@pytest.mark.slow
def test_a_watcher_hands_what_is_dropped_to_workers_and_each_is_reported_once(
    tmp_path: Path, machines: tuple[Machine, Machine], postgres: str
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    workers = [machine.start("worker", "--ledger", postgres, seconds=PICTURE_S) for machine in machines]
    for worker in workers:
        wait_for(worker.log, " serving ")  # type: ignore[attr-defined]
    watch = ["watch", str(inbox), "--out", str(out), "--workers", "--ledger", postgres]
    watch += ["--interval", "0.1", "--looks", "2", "--refuse-after", "1"]
    watcher = machines[0].start(*watch)
    wait_for(watcher.log, " watching ")  # type: ignore[attr-defined]
    with Ledger(out, postgres) as ledger:
        for number in range(24):
            picture(inbox / f"{number:02}.png", seed=number)
        shutil.copy(inbox / "03.png", inbox / "copy.png")
        (inbox / "torn.png").write_bytes((inbox / "04.png").read_bytes()[:200])
        until(lambda: ledger.counts()["done"] >= 8, seconds=60)
        for worker in workers:
            wait_for(worker.log, " reported ")  # type: ignore[attr-defined]
        workers[1].kill()
        for number in range(24, 40):
            picture(inbox / f"{number:02}.png", seed=number)
        until(lambda: ledger.counts()["done"] == 40 and ledger.counts()["quarantined"] == 1, seconds=120)
        until(lambda: len(ledger.seen()) == 42)
    until(lambda: (out / "index.html").is_file() and (out / "index.html").read_text().count("report.html") >= 40)
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(60) == 0

    index = lines(out / "index.jsonl")
    assert len({line["id"] for line in index}) == len(index) == 40
    said = [line for worker in workers for line in worker.log.read_text().splitlines() if " reported " in line]  # type: ignore[attr-defined]
    items = [word for line in said for word in line.split() if word.startswith("item=")]
    assert len(items) == len(set(items))  # none was read twice
    assert [json.loads(path.read_text())["code"] for path in out.glob("quarantine/*/reason.json")] == ["truncated"]
    again = machines[0].start(*watch, "--once")
    assert again.wait(60) == 0
    assert " done " not in again.log.read_text() and len(lines(out / "index.jsonl")) == 40  # type: ignore[attr-defined]


def test_a_second_worker_on_a_device_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")  # none is there, and the device does not need it
    import_prefect()
    from flows import worker

    monkeypatch.setattr(worker, "PAUSE_S", 0.05)
    TinyReader().install(monkeypatch)
    loaded: list[str] = []
    monkeypatch.setattr("pipelines.run.load_reader", lambda model, device: loaded.append(device))
    heard: list[str] = []
    lost: list[str] = []

    def hear(event: str, facts: Mapping[str, Fact]) -> None:
        if event == "server-lost":
            lost.append(str(facts["message"]))
        else:
            heard.append(event)

    log = EventLog(hearers=(hear,))
    one, other = (worker.Worker(worker.Work("cpu", wait=wait), log) for wait in (False, True))
    threads = [threading.Thread(target=each.run) for each in (one, other)]
    try:
        threads[0].start()
        until(lambda: len(loaded) == 1)  # it has the device
        until(lambda: len(lost) == 1, seconds=30)  # it says so once, and waits
        assert "The Prefect server at http://127.0.0.1:1/api does not answer" in lost[0]
        code, _, said = run(capfd, monkeypatch, "worker", "--device", "cpu")
        assert code == 2 and f"Another worker (process {os.getpid()}) has the device cpu" in said
        threads[1].start()
        until(lambda: heard == ["waiting-for-device"])
        lock = tmp_path / "devices" / "cpu.lock"
        lock.write_text("12345\n")
        late = worker.Worker(worker.Work("cpu", wait=True), log)
        late.stop()
        late.run()
        assert lock.read_text() == "12345\n" and len(loaded) == 1  # it goes without having had the device
        heard.clear()
        one.stop()
        until(lambda: len(loaded) == 2)
    finally:
        one.stop()
        other.stop()
        for thread in threads:
            if thread.ident:
                thread.join(60)
    assert heard == ["stopped", "stopped"] and len(lost) <= 2


def test_workers_of_other_installations_know_the_tasks_by_the_same_keys(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    ask = (
        "from flows.machine.server import import_prefect; import_prefect(); import flows.worker as worker; "
        "print(worker.__file__, [task.task_key for task in worker.TASKS.values()])"
    )
    environment = {**os.environ, "SCANSCRIBE_HOME": str(tmp_path / "home")}
    told = [
        subprocess.run(
            [sys.executable, "-c", ask], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        for folder in (ROOT, tmp_path)
    ]
    (first, _, keys), (second, _, others) = (each.stdout.partition(" ") for each in told)
    assert first != second and keys == others
