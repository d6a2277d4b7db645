"""The receiver with DCMTK and pynetdicom as peers: what was stored is whole, what was cut off leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from pynetdicom import AE

from flows.receive import INCOMING, Node, ReceiveError, Receiver
from flows.seeing.log import EventLog
from flows.seeing.notify import EVENTS
from flows.seeing.services import services
from pipelines.run_folder import written_by_runs
from tests.phantom import PHANTOM, phantom_slices, series
from tests.test_seeing import scrape
from tests.test_send import certificate  # noqa: F401  # a fixture
from tests.test_watch import home, reports, until  # noqa: F401  # an autouse fixture

ROOT = Path(__file__).parents[1]
VERIFICATION = "1.2.840.10008.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
# An activated environment has pynetdicom's program of that name before DCMTK's.
OUTSIDE = [each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != Path(sys.executable).parent]
DCMTK = shutil.which("storescu", path=os.pathsep.join(OUTSIDE))


class Heard(EventLog):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **facts: Any) -> None:
        self.said.append((event, facts))


@contextlib.contextmanager
def receiving(inbox: Path, **how: Any) -> Iterator[tuple[Receiver, Heard]]:
    log = Heard()
    with Receiver(Node("INBOX", 0, **how), inbox, log) as receiver:
        yield receiver, log
    assert log.said[-1][0] == "stopped"
    assert not list((inbox / INCOMING).iterdir())


def storescu(port: int, *files: Path) -> int:
    if not DCMTK:
        pytest.skip("storescu is not installed (Debian: dcmtk)")
    command = [DCMTK, "-R", "-aet", "ME", "-aec", "INBOX", "127.0.0.1", str(port), *map(str, files)]
    return subprocess.run(command, capture_output=True, timeout=180).returncode


def received(inbox: Path) -> dict[str, Path]:
    """SOP Instance UID -> file; each can be read as a whole."""
    found = {}
    for path in inbox.glob("*/*.dcm"):
        dataset = pydicom.dcmread(path)
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.PixelData
        assert not written_by_runs(inbox, path)  # where reports go into the same folder
        found[str(dataset.SOPInstanceUID)] = path
    return found


def capture(path: Path, megabytes: int = 0) -> Path:
    """A secondary capture of that size."""
    ds = phantom_slices()[0]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    if megabytes:
        ds.Rows, ds.Columns, ds.BitsAllocated = 4096, 128 * megabytes, 16
        ds.PixelData = bytes(megabytes << 20)
    ds.save_as(path, enforce_file_format=True)
    return path


@contextlib.contextmanager
def first_part(most: int, port: int) -> Iterator[int]:
    """A port that leads to `port`, but no more than so many bytes of what is sent come through."""
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(("127.0.0.1", port)) as inner:

        def there(outer: socket.socket) -> None:
            left = most
            with contextlib.suppress(OSError):  # the test is over
                while left and (data := outer.recv(min(left, 1 << 16))):
                    inner.sendall(data)
                    left -= len(data)

        def back(outer: socket.socket) -> None:
            with contextlib.suppress(OSError):  # the sender is gone
                while data := inner.recv(1 << 16):
                    outer.sendall(data)

        def carry() -> None:
            outer = door.accept()[0]
            threading.Thread(target=back, args=(outer,), daemon=True).start()
            there(outer)

        threading.Thread(target=carry, daemon=True).start()
        try:
            yield door.getsockname()[1]
        finally:
            inner.shutdown(socket.SHUT_RDWR)  # closing alone ends nothing while a thread reads


def association(port: int, *contexts: tuple[str, str], title: str = "ME", tls: Any = None) -> Any:
    entity = AE(ae_title=title)
    for abstract, syntax in (*contexts, (VERIFICATION, ExplicitVRLittleEndian)):
        entity.add_requested_context(abstract, syntax)
    return entity.associate("127.0.0.1", port, ae_title="INBOX", **({"tls_args": (tls, "127.0.0.1")} if tls else {}))


def test_dcmtk_sends_a_study_and_each_instance_is_there_once_and_whole(tmp_path: Path) -> None:
    files = sorted(series(tmp_path / "uncompressed", phantom_slices()).iterdir())
    files.append(capture(tmp_path / "capture.dcm"))
    with receiving(tmp_path / "inbox") as (receiver, log):
        assert storescu(receiver.port, *files) == 0
        first = received(tmp_path / "inbox")
        stamps = {path: path.stat().st_mtime_ns for path in first.values()}
        assert storescu(receiver.port, *files) == 0  # again
        until(lambda: sum(event == "received" for event, _ in log.said) == 2)
    assert first.keys() == {str(pydicom.dcmread(file).SOPInstanceUID) for file in files}
    assert {path: path.stat().st_mtime_ns for path in received(tmp_path / "inbox").values()} == stamps
    assert ("received", {"files": len(files), "refused": 0, "cut_off": "false"}) in log.said
    for file in files:
        sent = pydicom.dcmread(file)
        assert pydicom.dcmread(first[str(sent.SOPInstanceUID)]).PixelData == sent.PixelData
    folders = {path.parent.name for path in first.values()}
    assert len(folders) == 1 and all(len(name) == 24 for name in folders)
    assert str(phantom_slices()[0].StudyInstanceUID) not in folders


def test_compressed_instances_come_in_as_they_are(tmp_path: Path) -> None:
    ds = pydicom.dcmread(next(PHANTOM.iterdir()))
    if not ds.file_meta.TransferSyntaxUID.is_compressed:
        ds.compress(JPEG2000Lossless)
    with receiving(tmp_path / "inbox") as (receiver, _):
        peer = association(receiver.port, (CT, ds.file_meta.TransferSyntaxUID))
        assert peer.send_c_echo().Status == 0
        assert peer.send_c_store(ds).Status == 0
        peer.release()
    [path] = received(tmp_path / "inbox").values()
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == ds.file_meta.TransferSyntaxUID


def test_an_association_that_is_cut_off_leaves_what_was_whole(tmp_path: Path) -> None:
    slices = phantom_slices()
    big = capture(tmp_path / "big.dcm", megabytes=16)
    with receiving(tmp_path / "inbox") as (receiver, log):
        peer = association(receiver.port, (CT, ExplicitVRLittleEndian))
        assert peer.send_c_store(slices[0]).Status == 0
        peer.abort()
        until(lambda: ("received", {"files": 1, "refused": 0, "cut_off": "true"}) in log.said)
        if DCMTK:
            with first_part(4 << 20, receiver.port) as port:
                command = [DCMTK, "-R", "-aec", "INBOX", "127.0.0.1", str(port), str(big)]
                sender = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                until(lambda: any(path.stat().st_size > 1 << 20 for path in (tmp_path / "inbox" / INCOMING).iterdir()))
                sender.kill()
                sender.wait()
    assert received(tmp_path / "inbox").keys() == {str(slices[0].SOPInstanceUID)}


def test_what_cannot_be_kept_is_refused_with_the_status_that_says_why(tmp_path: Path) -> None:
    other, nameless = phantom_slices()[:2]
    del nameless.StudyInstanceUID
    with receiving(tmp_path / "inbox") as (receiver, log):
        peer = association(receiver.port, (CT, ExplicitVRLittleEndian))
        assert peer.send_c_store(nameless).Status == 0xA900
        assert peer.send_c_store(other).Status == 0
        peer.release()
        until(lambda: ("received", {"files": 1, "refused": 1, "cut_off": "false"}) in log.said)
    with receiving(tmp_path / "full", min_free=1 << 60) as (receiver, _):
        peer = association(receiver.port, (CT, ExplicitVRLittleEndian))
        assert peer.send_c_store(other).Status == 0xA700
        peer.release()
    assert not received(tmp_path / "full")


def test_what_unpacks_to_far_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ingest.dicom.MAX_INFLATED_BYTES", 1 << 20)
    bomb = phantom_slices()[0]
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    bomb.PixelData = bytes(8 << 20)
    with receiving(tmp_path / "inbox") as (receiver, _):
        peer = association(receiver.port, (CT, DeflatedExplicitVRLittleEndian))
        assert peer.send_c_store(bomb).Status == 0xC000
        peer.release()


def test_an_inbox_that_is_removed_is_made_again(tmp_path: Path) -> None:
    slices = phantom_slices()
    with receiving(tmp_path / "inbox") as (receiver, log):
        shutil.rmtree(tmp_path / "inbox")
        receiver.clear_incoming()
        (tmp_path / "inbox" / INCOMING / "folder").mkdir()
        receiver.clear_incoming(all_of_it=True)
        peer = association(receiver.port, (CT, ExplicitVRLittleEndian))
        assert peer.send_c_store(slices[0]).Status == 0
        peer.release()
        with pytest.raises(ReceiveError, match="Another receiver"), Receiver(Node("B", 0), tmp_path / "inbox", log):
            pass
        (tmp_path / "inbox" / INCOMING / "folder").rmdir()
    said = [event for event, _ in log.said if event.startswith("folder")]
    assert said == ["folder-lost", "folder-lost-over"] and EVENTS.issuperset(said)
    assert received(tmp_path / "inbox").keys() == {str(slices[0].SOPInstanceUID)}


def test_only_peers_on_the_list_may_call_and_not_too_many_at_once(tmp_path: Path) -> None:
    with receiving(tmp_path / "inbox", callers=("ME", "YOU"), associations=1) as (receiver, log):
        stranger = association(receiver.port, title="STRANGER")
        assert stranger.is_rejected
        first = association(receiver.port)
        second = association(receiver.port, title="YOU")
        assert first.is_established and second.is_rejected
        first.release()

        def called() -> bool:
            peer = association(receiver.port, title="YOU")
            taken = bool(peer.is_established)
            peer.release()
            return taken

        until(called)
    refused = [facts for event, facts in log.said if event == "association-refused"]
    assert [each["caller"] for each in refused[:2]] == ["STRANGER", "YOU"]
    assert "--caller" in refused[0]["message"] and "--associations" in refused[1]["message"]
    assert not any(event == "received" for event, _ in log.said)


def test_peers_that_fall_silent_keep_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.receive.SILENCE_S", 1.0)
    with receiving(tmp_path / "inbox", associations=1) as (receiver, _):
        for begun in (b"", b"\x01\x00\x00", b"\x01\x00\x00\x00\x01\x00part of a request"):
            with socket.create_connection(("127.0.0.1", receiver.port)) as silent:
                silent.sendall(begun)

                def called() -> bool:
                    peer = association(receiver.port)
                    taken = bool(peer.is_established)
                    peer.release()
                    return taken

                until(called, seconds=20)


def test_tls_with_certificates_on_both_sides(tmp_path: Path, certificate: Path) -> None:  # noqa: F811
    with receiving(tmp_path / "inbox", certificate=certificate, authorities=certificate) as (receiver, log):
        silent = socket.create_connection(("127.0.0.1", receiver.port))  # holds up nobody
        trusting = ssl.create_default_context(cafile=certificate)
        trusting.load_cert_chain(certificate)
        peer = association(receiver.port, (CT, ExplicitVRLittleEndian), tls=trusting)
        assert peer.send_c_store(phantom_slices()[0]).Status == 0
        peer.release()
        assert not association(receiver.port).is_established
        nobody = ssl.create_default_context(cafile=certificate)
        unknown = association(receiver.port, (CT, ExplicitVRLittleEndian), tls=nobody)
        assert not unknown.is_established or not unknown.send_c_echo()
        silent.close()
    refused = [facts["message"] for event, facts in log.said if event == "association-refused"]
    assert len(refused) == 2 and "peer did not return a certificate" in refused[1]
    assert len(received(tmp_path / "inbox")) == 1


def test_tls_files_that_do_not_do_are_named(tmp_path: Path, certificate: Path) -> None:  # noqa: F811
    sealed, text = tmp_path / "sealed.pem", tmp_path / "text.pem"
    seal = ["openssl", "pkey", "-in", certificate, "-aes256", "-passout", "pass:secret", "-out", sealed]
    subprocess.run(seal, check=True, capture_output=True)
    text.write_text("no PEM")
    absent = Node("A", 0, certificate=certificate, key=tmp_path / "absent.pem")
    # Of an encrypted key OpenSSL would ask the password at the terminal.
    encrypted = Node("A", 0, certificate=certificate, key=sealed)
    nobody = Node("A", 0, certificate=certificate, authorities=text)
    for node, words in ((absent, "absent.pem cannot be read"), (encrypted, "sealed.pem.*encrypted"), (nobody, "text")):
        with pytest.raises(ReceiveError, match=words):
            Receiver(node, tmp_path / "inbox", Heard())


def test_what_cannot_work_is_said_at_the_start(tmp_path: Path) -> None:
    with receiving(tmp_path / "inbox") as (receiver, _):
        with (
            pytest.raises(ReceiveError, match=r"in use.*--port"),
            Receiver(Node("INBOX", receiver.port), tmp_path / "b", Heard()),
        ):
            pass
        elsewhere = Node("INBOX", 0, bind="192.0.2.1")
        with pytest.raises(ReceiveError, match="--bind"), Receiver(elsewhere, tmp_path / "b", Heard()):
            pass
        with pytest.raises(ReceiveError, match="Another receiver"), Receiver(Node("B", 0), tmp_path / "inbox", Heard()):
            pass
    for node in (Node("A TITLE THAT IS TOO LONG", 0), Node("A", 0, key=tmp_path), Node("A", 0, certificate=tmp_path)):
        with pytest.raises(ReceiveError):
            Receiver(node, tmp_path / "inbox", Heard())


def peak(pid: int) -> int:
    """The most memory that a process has had, in MiB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


def test_from_the_network_to_the_report(tmp_path: Path) -> None:
    slices: list[Dataset] = phantom_slices()
    for each in slices:
        each.ImagesInAcquisition = len(slices)
    files = sorted(series(tmp_path / "send", slices).iterdir())
    inbox, out = tmp_path / "in", tmp_path / "out"
    base = [sys.executable, "-m", "tests.watcher_process"]
    receiver = subprocess.Popen(
        [*base, "receive", "--inbox", inbox, "--port", "0", "--aet", "INBOX", "--log-json", "--metrics", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert receiver.stderr
    metrics, listening = (json.loads(receiver.stderr.readline()) for _ in range(2))
    assert (metrics["event"], listening["event"]) == ("metrics", "listening")
    port = listening["port"]
    watcher = subprocess.Popen(
        [*base, "watch", inbox, "--out", out, "--interval", "0.1", "--looks", "2"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        assert storescu(port, *files) == 0
        before = peak(receiver.pid)
        assert storescu(port, capture(tmp_path / "big.dcm", megabytes=128)) == 0
        assert peak(receiver.pid) - before < 40
        until(lambda: len(reports(out)) == 1)
        until(lambda: scrape(metrics["port"])["scanscribe_received_instances_total[stored]"] == len(files) + 1)
        nameless = association(port, (CT, ExplicitVRLittleEndian))
        del slices[0].StudyInstanceUID
        assert nameless.send_c_store(slices[0]).Status == 0xA900
        nameless.release()
        until(lambda: scrape(metrics["port"])["scanscribe_received_instances_total[refused]"] == 1)
        assert {each.name: each.metrics for each in services()}["receive"] == metrics["port"]
        assert len(reports(out)[0]["inputs"]) == len(files)
    finally:
        for process in (receiver, watcher):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in (receiver, watcher)]
    assert codes == [0, 0]
    said = receiver.stderr.read()
    assert '"stopped"' in said and str(slices[0].PatientName) not in said and os.fspath(inbox) not in said
