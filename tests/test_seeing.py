"""What services show while they run: metrics by a real scrape, notifications to a real receiver that fails at first."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flows.ledger import Ledger
from flows.seeing.metrics import Metrics, MetricsError
from flows.seeing.notify import SIGNATURE, Notifier, NotifyError
from tests.orthanc import free_port
from tests.test_run import picture
from tests.test_watch import ROOT, command, until
from tests.tiny_reader import CURSED

SECRET = "a secret"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCANSCRIBE_NOTIFY_SECRET", SECRET)
    for name in ("SCANSCRIBE_LEDGER", "SCANSCRIBE_NOTIFY"):
        monkeypatch.delenv(name, raising=False)


class Hook:
    """A receiver of notifications that answers as it is told."""

    def __init__(self) -> None:
        self.status, self.slow, self.port = 204, 0.0, free_port()
        self.refuses = ""  # the event that it does not want
        self.heard: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(hook.slow)
                seconds, digest = (part.split("=")[1] for part in self.headers[SIGNATURE].split(","))
                due = hmac.new(SECRET.encode(), seconds.encode() + b"." + body, hashlib.sha256).hexdigest()
                assert hmac.compare_digest(digest, due) and abs(time.time() - int(seconds)) < 30
                said = json.loads(body)
                status = 422 if said["event"] == hook.refuses else hook.status
                (hook.heard if status < 300 else hook.refused).append(said)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.handler = Handler
        self.server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def up(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def down(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


@pytest.fixture
def hook() -> Iterator[Hook]:
    it = Hook()
    yield it
    it.down()


def scrape(port: int) -> dict[str, float]:
    """The samples of an endpoint, by name and labels, as Prometheus' own parser reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f"[{value}]" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_watcher_is_scraped_and_tells_what_failed_without_a_name(tmp_path: Path, hook: Hook) -> None:
    picture(tmp_path / "in" / "Jane-Doe.png", 1)
    picture(tmp_path / "in" / "b.png", 2)
    (tmp_path / "in" / "John-Roe.png").touch()
    options = ("--metrics", "0", "--notify", hook.url, "--log-json")
    process = subprocess.Popen(command(tmp_path, *options), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said: list[dict[str, Any]] = []
    assert process.stderr
    reading = threading.Thread(target=lambda: said.extend(map(json.loads, process.stderr)))  # type: ignore[arg-type]
    reading.start()
    try:
        until(lambda: sum(each["event"] in ("reported", "quarantined") for each in said) == 3)
        [port] = [each["port"] for each in said if each["event"] == "metrics"]
        # The metrics hear of an event after the log.
        until(lambda: scrape(port)["scanscribe_attempts_total[quarantined]"] == 1)
        figures = scrape(port)
        until(lambda: any(each["event"] == "notify-failed" for each in said))
        assert scrape(port)["scanscribe_notifications_waiting"] == 1
        hook.up()
        until(lambda: bool(hook.heard))
        until(lambda: any(each["event"] == "notify-failed-over" for each in said))
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://{_other_address()}:{port}/metrics", timeout=2)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reading.join()
    assert figures["scanscribe_reports_total[defect]"] == figures["scanscribe_items[done]"] == 2
    assert figures["scanscribe_failures_total[empty-file][true]"] == figures["scanscribe_items[quarantined]"] == 1
    assert figures["scanscribe_attempts_total[reported]"] == figures["scanscribe_report_seconds_count[defect]"] == 2
    assert figures["scanscribe_items[waiting]"] == figures["scanscribe_oldest_item_age_seconds"] == 0
    assert figures["scanscribe_ledger_up"] == 1
    assert figures["scanscribe_disk_free_bytes[reports]"] > 1 << 20
    assert 0 < figures["scanscribe_device_seconds_total[busy]"] < figures["scanscribe_report_seconds_sum[defect]"]
    [told] = hook.heard
    assert (told["event"], told["code"], told["attempts"]) == ("quarantined", "empty-file", 1)
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.rows("quarantined")[0].request.startswith(told["item"])
    everything = json.dumps([said, hook.heard, list(figures)])
    assert not any(word in everything for word in ("Jane", "Roe", str(tmp_path)))


def _other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "192.0.2.1"
        return str(probe.getsockname()[0])


def test_figures_stand_while_the_ledger_does_not_answer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "out") as ledger:
        clock = time.time()
        ledger._clock = lambda: clock - 100
        ledger.add([("a" * 64, ["x"])])
        metrics = Metrics()
        metrics.show_ledger(ledger)
        with metrics.serve(0) as endpoint:
            assert 99 < scrape(endpoint.port)["scanscribe_oldest_item_age_seconds"] < 130
            ledger._database.close()
            for file in (tmp_path / "home").glob("ledger.db*"):
                file.write_text("torn " * 1000)
            figures = scrape(endpoint.port)
            assert figures["scanscribe_ledger_up"] == 0
            assert "scanscribe_items[waiting]" not in figures
            with pytest.raises(MetricsError, match="give --metrics a free one"):
                Metrics().serve(endpoint.port)


def test_a_failing_receiver_is_tried_again_and_never_waited_for(hook: Hook) -> None:
    hook.status, hook.slow = 500, 1.0
    hook.up()
    heard: list[str] = []
    with Notifier(hook.url, lambda event, **facts: heard.append(event), first_pause_s=0.05) as notifier:
        started = time.monotonic()
        for number in range(20):
            notifier.tell("quarantined", item=f"{number:016}", code="truncated", attempts=1)
        assert time.monotonic() - started < 10  # waiting for each would take 20 s
        hook.slow = 0.1
        until(lambda: len(hook.refused) >= 3)
        hook.status, hook.slow = 200, 0.0
        until(lambda: notifier.waiting == 0)
        until(lambda: heard == ["notify-failed", "notify-failed-over"])
    assert [each["item"] for each in hook.heard] == [f"{number:016}" for number in range(20)]
    assert len({each["id"] for each in hook.heard}) == 20


TELLER = """
import os, signal, sys
from flows.seeing.notify import Notifier
with Notifier(sys.argv[1]) as notifier:
    notifier.tell("quarantined", item="a" * 16, code="truncated", attempts=5)
    notifier.tell("critical-finding", item="b" * 16, report="c" * 16)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_that_the_receiver_refuses_holds_up_no_other_and_is_tried_after_a_pause(hook: Hook) -> None:
    hook.up()
    hook.refuses = "quarantined"
    with Notifier(hook.url, first_pause_s=60) as notifier:
        notifier.tell("quarantined", item="1")
        until(lambda: bool(hook.refused))
        for number in range(3):
            notifier.tell("critical-finding", item=f"{number}")
            until(lambda number=number: len(hook.heard) == number + 1, 10)  # type: ignore[misc]
    assert len(hook.refused) == notifier.waiting == 1
    with Notifier(hook.url, first_pause_s=0.5) as notifier:
        until(lambda: len(hook.refused) >= 3, 10)
        hook.refuses = ""
        until(lambda: notifier.waiting == 0, 10)
    assert [each["event"] for each in hook.heard] == ["critical-finding"] * 3 + ["quarantined"]


def test_what_a_killed_process_could_not_send_the_next_one_does(hook: Hook) -> None:
    subprocess.run([sys.executable, "-c", TELLER, hook.url], cwd=ROOT, check=False)
    hook.up()
    with Notifier(hook.url) as first, Notifier(hook.url) as second:
        until(lambda: first.waiting == second.waiting == 0)
    assert [each["event"] for each in hook.heard] == ["quarantined", "critical-finding"]


def test_a_wrong_address_is_said_at_the_start() -> None:
    for url in ("host.example", "ftp://host/x", "http://"):
        with pytest.raises(NotifyError, match="give one like https"):
            Notifier(url)


def test_poison_counts_each_attempt(tmp_path: Path) -> None:
    from tests.test_watch import watching
    from tests.tiny_reader import TinyReader

    with pytest.MonkeyPatch.context() as patch:
        TinyReader().install(patch)
        metrics = Metrics()
        picture(tmp_path / "in" / "x.png", 1, first=CURSED)
        with watching(tmp_path) as running:
            until(lambda: running.heard("quarantined"))
        for event, facts in running.said:
            metrics.hear(event, facts)
        with metrics.serve(0) as endpoint:
            figures = scrape(endpoint.port)
    assert figures["scanscribe_failures_total[model-failed][false]"] == 1
    assert figures["scanscribe_failures_total[model-failed][true]"] == 1


def test_a_watcher_that_leaves_files_says_how_many_and_does_not_end_with_0(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "Jane.png", 1)
    (tmp_path / "in" / "coming.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for left, code in ((1, 1), (0, 0)):
        asked = command(tmp_path, "--once", "--refuse-after", "600", "--log-json")
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        said = [json.loads(line) for line in done.stderr.splitlines()]
        [stopped] = [each for each in said if each["event"] == "stopped"]
        assert (done.returncode, stopped["left"]) == (code, left)
        told = [(each["files"], each["message"]) for each in said if each["event"] == "left"]
        assert [files for files, _ in told] == [1] * left
        assert all("run the same command later" in words for _, words in told)
        (tmp_path / "in" / "coming.png").unlink(missing_ok=True)
