"""The ledger on SQLite and PostgreSQL, with several processes, dying owners and a clock that the tests turn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flows.ledger import Claim, LeaseLostError, Ledger, LedgerError, Seen
from flows.machine.mounts import network_type
from flows.machine.owners import is_gone, this_process
from tests.orthanc import free_port
from tests.test_cli import run
from tests.test_watch import until

ROOT = Path(__file__).parents[1]
REPORT = "0123456789abcdef"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def test_items_of_a_clock_that_was_ahead_are_due_when_it_is_right_again(url: str, tmp_path: Path) -> None:
    clock = Clock()
    with Ledger(tmp_path, url, clock=clock) as ledger:
        clock.now += 30 * 86400
        ledger.add([("waiting", []), ("claimed", []), ("to be forgotten", [])])
        assert ledger.claim(request="claimed") and ledger.claim(request="to be forgotten")
        clock.now -= 30 * 86400
        assert ledger.forget(["to be forgotten"]) == 1
        assert all(map(ledger.is_due, ledger.rows()))
        assert sorted(claim.request for claim in ledger.claim(9)) == ["claimed", "waiting"]
        assert not ledger.claim(9)  # they are ours now, for as long as a lease


def test_an_item_goes_from_waiting_to_done_once(url: str, tmp_path: Path) -> None:
    clock = Clock()
    with Ledger(tmp_path, url, clock=clock) as ledger, Ledger(tmp_path, url, owner="other", clock=clock) as other:
        ledger.add([("a" * 64, ["x.png", "y\n.png"])])
        ledger.add([("a" * 64, ["copy.png"]), ("b" * 64, [])])
        assert ledger.counts() == {"waiting": 2, "claimed": 0, "done": 0, "failed": 0, "quarantined": 0}
        clock.now += 1
        [claim] = ledger.claim()
        assert (claim.request, claim.files, claim.attempt) == ("a" * 64, ("x.png", "y\n.png"), 1)
        assert other.claim(request="a" * 64) == []
        ledger.done(claim, REPORT)
        row = other.get("a" * 64)
        assert row and (row.state, row.report, row.attempts, row.owner) == ("done", REPORT, 1, None)
        with pytest.raises(LeaseLostError):
            ledger.done(claim, "f" * 16)
        clock.now += 1e6
        ledger.add([("a" * 64, [])])
        assert [claim.request for claim in other.claim(10)] == ["b" * 64]
    with Ledger(tmp_path / "elsewhere", url, clock=clock) as elsewhere:
        assert elsewhere.rows() == []


def test_a_failed_item_waits_longer_each_time_and_ends_in_quarantine(url: str, tmp_path: Path) -> None:
    clock = Clock()
    with Ledger(tmp_path, url, tries=3, back_off_s=10, clock=clock) as ledger:
        ledger.add([("a", ["x"])])
        for wait in (10, 20):
            [claim] = ledger.claim()
            assert not claim.last
            ledger.failed(claim, "model-failed", "It failed.")
            clock.now += wait - 0.1
            assert ledger.claim() == []
            clock.now += 0.2
        [claim] = ledger.claim()
        assert claim.last and not claim.exhausted
        ledger.quarantined(claim, "model-failed", "It failed.")
        clock.now += 1e6
        assert ledger.claim() == []
        row = ledger.get("a")
        assert row and (row.state, row.code, row.reason) == ("quarantined", "model-failed", "It failed.")
        ledger.see([Seen("x", 1, 2)])
        assert ledger.retry(["a", "unknown"]) == 1
        assert ledger.seen() == []
        [claim] = ledger.claim()
        assert claim.attempt == 1
        ledger.release(claim)
        assert ledger.claim()[0].attempt == 1
        assert ledger.forget(["a"]) == 0  # somebody works on it
        clock.now += 61
        ledger.release(ledger.claim()[0])
        assert ledger.forget(["a"]) == 1
        assert ledger.rows() == []


def test_an_owner_that_falls_silent_loses_its_item_and_hears_of_it(url: str, tmp_path: Path) -> None:
    clock = Clock()
    with (
        Ledger(tmp_path, url, owner="slow", lease_s=60, clock=clock) as slow,
        Ledger(tmp_path, url, owner="quick", lease_s=60, tries=2, clock=clock) as quick,
    ):
        slow.add([("a", [])])
        [claim] = slow.claim()
        clock.now += 59
        slow.beat(claim)
        clock.now += 59
        assert quick.claim() == []
        clock.now += 2
        [taken] = quick.claim()
        for call in (slow.beat, slow.release, lambda c: slow.done(c, REPORT), lambda c: slow.failed(c, "", "")):
            with pytest.raises(LeaseLostError):
                call(claim)
        clock.now += 61  # the second process dies, too
        [taken] = quick.claim()
        assert taken.exhausted
        quick.quarantined(taken, "process-died", "Its process died each time.")


def test_holding_a_claim_keeps_it_longer_than_its_lease(tmp_path: Path) -> None:
    url, clock = f"sqlite:///{tmp_path / 'ledger.db'}", Clock()
    with (
        Ledger(tmp_path, url, lease_s=0.3, clock=clock) as ledger,
        Ledger(tmp_path, url, owner="other", clock=clock) as other,
    ):

        def extended() -> bool:
            row = ledger.get("a")
            return row is not None and row.due > clock.now + 0.25

        ledger.add([("a", [])])
        [claim] = ledger.claim()
        with ledger.holding(claim):
            for _ in range(5):
                clock.now += 0.2
                until(extended)
                assert other.claim() == []
        ledger.done(claim, REPORT)


def test_what_was_seen_of_files_is_kept(url: str, tmp_path: Path) -> None:
    with Ledger(tmp_path, url) as ledger:
        files = [Seen(f"{n}.dcm", n, n << 40, "study", str(n)) for n in range(1200)]
        ledger.see(files)
        ledger.see([Seen("7.dcm", 8, 9)])
        ledger.unsee(["8.dcm"])
        found = {file.path: file for file in ledger.seen()}
        assert len(found) == 1199
        assert found["7.dcm"] == Seen("7.dcm", 8, 9)
        assert found["9.dcm"] == files[9]


WORKER = """
import sys, time
from flows.ledger import Ledger
with Ledger(sys.argv[1], sys.argv[2], lease_s=float(sys.argv[3])) as ledger:
    sys.stdin.readline()
    while claims := ledger.claim(2):
        for claim in claims:
            if claim.request == "hang":
                print("hang", flush=True)
                time.sleep(60)
            print(claim.request, flush=True)
            ledger.done(claim, "f" * 16)
"""


def worker(out: Path, url: str, lease_s: float = 60, *, begin: bool = True) -> subprocess.Popen[str]:
    """A process that does all items; without `begin` it waits for a line."""
    arguments = [sys.executable, "-c", WORKER, str(out), url, str(lease_s)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    if begin:
        process.stdin.write("begin\n")
        process.stdin.flush()
    return process


def test_processes_share_the_items_and_none_is_done_twice(url: str, tmp_path: Path) -> None:
    with Ledger(tmp_path, url) as ledger:
        ledger.add((f"{n:04}", [f"{n}.png"]) for n in range(600))
        workers = [worker(tmp_path, url, begin=False) for _ in range(3)]
        time.sleep(1.5)  # all of them are up
        for each in workers:
            assert each.stdin
            each.stdin.write("begin\n")
            each.stdin.flush()
        did = [each.communicate(timeout=120)[0].split() for each in workers]
        assert all(each.returncode == 0 for each in workers)
        assert sorted(request for each in did for request in each) == [f"{n:04}" for n in range(600)]
        assert ledger.counts()["done"] == 600


def test_a_killed_worker_hands_over_within_its_lease(url: str, tmp_path: Path) -> None:
    with Ledger(tmp_path, url) as ledger:
        ledger.add([("hang", [])])
        killed = worker(tmp_path, url, lease_s=1.0)
        assert killed.stdout and killed.stdout.readline() == "hang\n"
        row = ledger.get("hang")
        assert row and row.owner and not is_gone(row.owner)
        assert ledger.hand_over() == 0
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert is_gone(row.owner)
        claims: list[Claim] = []
        until(lambda: bool(claims.extend(ledger.claim()) or claims), ledger.lease_s / 2)
        assert claims[0].attempt == 2


def test_a_dead_owner_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger(tmp_path, url) as ledger:
        ledger.add([("hang", []), ("b", [])])
        killed = worker(tmp_path, url, lease_s=600)
        assert killed.stdout and killed.stdout.readline() == "hang\n"
        killed.kill()
        killed.communicate()
        assert ledger.claim() == []
        assert ledger.hand_over() == 2
        assert len(ledger.claim(5)) == 2
    assert not is_gone(this_process())
    assert not is_gone("elsewhere/pid:[1]/1/2")
    assert not is_gone("nonsense")


class LedgerMachine(RuleBasedStateMachine):
    """Three owners work on a few items at random; a report is made once for each, whatever order things happen in."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = Path(f"/tmp/scanscribe-ledger-{os.getpid()}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        url = f"sqlite:///{self.folder / 'ledger.db'}"
        self.owners = [
            Ledger(self.folder, url, owner=f"owner {n}", tries=2, back_off_s=5, clock=self.clock) for n in range(3)
        ]
        self.claims: list[tuple[Ledger, object]] = []
        self.made: dict[str, int] = {}

    def teardown(self) -> None:
        for owner in self.owners:
            owner.__exit__(None, None, None)
        shutil.rmtree(self.folder)

    @rule(request=st.sampled_from("abc"))
    def add(self, request: str) -> None:
        self.owners[0].add([(request, [])])

    @rule(owner=st.integers(0, 2), limit=st.integers(1, 3))
    def claim(self, owner: int, limit: int) -> None:
        self.claims += [(self.owners[owner], claim) for claim in self.owners[owner].claim(limit)]

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(which=st.integers(0, 9), end=st.sampled_from(["done", "failed", "quarantined", "release", "beat"]))
    def end(self, which: int, end: str) -> None:
        if which >= len(self.claims):
            return
        ledger, claim = self.claims[which]
        words = {"done": (REPORT,), "failed": ("code", "why"), "quarantined": ("code", "why")}.get(end, ())
        try:
            getattr(ledger, end)(claim, *words)
        except LeaseLostError:
            return
        if end == "done":
            self.made[claim.request] = self.made.get(claim.request, 0) + 1

    @invariant()
    def each_is_made_at_most_once(self) -> None:
        rows = {row.request: row for row in self.owners[0].rows()}
        assert all(count == 1 and rows[request].state == "done" for request, count in self.made.items())
        tokens = [row.owner for row in rows.values() if row.state == "claimed"]
        assert all(tokens)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_what_cannot_serve_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("This is no data base at all, but a text. " * 40)
    port = free_port()
    for url, words in (
        (f"sqlite:///{tmp_path / 'text.db'}", "is damaged: move it away"),
        (f"sqlite:///{tmp_path}/absent/ledger.db", "There is no folder"),
        ("mysql://host/db", "There is no ledger on mysql"),
        ("nonsense", "URL cannot be read"),
        (f"postgresql://me:secret@127.0.0.1:{port}/db", "see that the server runs"),
    ):
        with pytest.raises(LedgerError, match=words) as caught:
            Ledger(tmp_path, url)
        assert "secret" not in str(caught.value)


def test_network_file_systems_are_told_by_their_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nnas:/x /mnt/in\\040box nfs4 rw 0 0\n//nas/y /srv/y cifs rw 0 0\n"
        "/dev/vdb /srv/y/local xfs rw 0 0\nme@far: /mnt/far fuse.sshfs rw 0 0\ntorn\n"
    )
    expected = {
        "/tmp": "",
        "/mnt/in box/a": "nfs4",
        "/srv/y": "cifs",
        "/srv/yy": "",
        "/srv/y/local/z": "",
        "/mnt/far": "fuse.sshfs",
    }
    assert {folder: network_type(Path(folder), mounts) for folder in expected} == expected
    assert network_type(tmp_path, tmp_path / "absent") == ""


def test_the_command_lists_shows_retries_and_forgets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SCANSCRIBE_LEDGER", raising=False)
    out = tmp_path / "out"
    out.mkdir()
    code, said, _ = run(capfd, monkeypatch, "ledger", "list", "--out", str(out))
    assert code == 0 and "has no items for" in said
    with Ledger(out) as ledger:
        ledger.add([("a" * 64, ["/in/x.png"]), ("ab" * 32, ["/in/1.dcm", "/in/2.dcm"])])
        ledger.add([("f" * 64, ["/in/\udcff\x1b[2J.png"])])  # a name that is no text, and one that a terminal obeys
        ledger.quarantined(ledger.claim(request="ab" * 32)[0], "truncated", "Its end is missing.")

    def command(*words: str) -> tuple[int, str]:
        code, said, err = run(capfd, monkeypatch, "ledger", words[0], *words[1:], "--out", str(out))
        return code, said + err

    code, said = command("list", "--json")
    assert code == 0
    assert json.loads(said)["counts"]["quarantined"] == 1
    code, said = command("list", "--state", "quarantined")
    assert "1.dcm and 1" in said and "truncated" in said and "x.png" not in said
    assert "choose one of" in command("list", "--state", "lost")[1]
    shown = command("show", "ab")[1]
    assert "Its end is missing." in shown and "None" not in shown and "due" not in shown
    code, said = command("show", "f")
    assert code == 0 and ".png" in said and "\x1b" not in said
    code, said = command("show", "a")
    assert code == 2 and "2 items" in said
    assert command("retry", "ab") == (0, "1 retried.\n")
    with Ledger(out) as ledger:
        assert ledger.claim(request="ab" * 32)
    assert command("forget", "ab")[0] == 1
    assert command("forget", "aa", "--json") == (0, '{"forgotten": 1, "at_work": 0}\n')
    assert command("show", "aa")[0] == 2


class Link:
    """The way to a PostgreSQL server, which can fall silent: what is sent is taken, and nothing comes back."""

    def __init__(self, port: int) -> None:
        self.silent, self._port, self._held = False, port, list[socket.socket]()
        self._door = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def url(self, server: str) -> str:
        return server.replace(f":{self._port}/", f":{self._door.getsockname()[1]}/")

    def _serve(self) -> None:
        while True:
            outer, inner = self._door.accept()[0], socket.create_connection(("127.0.0.1", self._port))
            self._held += [outer, inner]
            for ends in ((outer, inner), (inner, outer)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(1 << 16):
                if not self.silent:
                    there.sendall(data)
            if not self.silent:
                there.shutdown(socket.SHUT_WR)


def test_a_link_that_falls_silent_is_said_soon_and_used_again(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.ledger.database.ANSWER_S", 1.0)
    link = Link(int(postgres.rpartition(":")[2].partition("/")[0]))
    with Ledger(tmp_path / "out", link.url(postgres)) as ledger:
        ledger.add([("a" * 64, ["/in/Jane.png"])])
        link.silent = True
        for _ in range(2):  # on the link that there is, then on a new one
            started = time.monotonic()
            with pytest.raises(
                LedgerError, match=r"cannot be used \(it did not answer in 1 s\): see that the server runs"
            ):
                ledger.counts()
            assert time.monotonic() - started < 8
        link.silent = False
        assert ledger.counts()["waiting"] == 1
        link.silent = True
    started = time.monotonic()
    with pytest.raises(LedgerError, match="did not answer"):
        Ledger(tmp_path / "out", link.url(postgres))
    assert time.monotonic() - started < 8
