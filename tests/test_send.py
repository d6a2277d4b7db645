"""`scanscribe send`: a real Orthanc takes every object both ways; what fails is tried again, named, and sent later."""

from __future__ import annotations

import http.server
import json
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt

from pipelines.peers import PASSWORD, TOKEN, USER, PeerError, Tls, peer_at
from pipelines.send import SENT, SendError, send
from reports.writing import write_report
from scanscribe import cli
from tests.ct_bundles import PHANTOM, ct_bundle
from tests.orthanc import Orthanc, free_port, running_orthanc

NAMES = ("sr", "sr-text", "sc", "seg", "dicom-pdf")
VERIFICATION = "1.2.840.10008.1.1"
CLASSES = {  # of the objects, by modality
    "SR": ("1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.11"),
    "OT": ("1.2.840.10008.5.1.4.1.1.7",),
    "SEG": ("1.2.840.10008.5.1.4.1.1.66.4",),
    "DOC": ("1.2.840.10008.5.1.4.1.1.104.1",),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with one report in all DICOM formats."""
    out = tmp_path_factory.mktemp("reports")
    write_report(out / "0123456789abcdef", ct_bundle(id="0123456789abcdef"), ["json", *NAMES])
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@contextmanager
def node(
    classes: tuple[str, ...],
    *,
    port: int = 0,
    answer: Callable[[], int] = lambda: 0,
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """A DICOM node in this process, and the SOP Instance UIDs that it got."""
    got: list[str] = []

    def store(event: evt.Event) -> int:
        got.append(event.request.AffectedSOPInstanceUID)
        return answer()

    entity = AE(ae_title="PACS")
    entity.require_called_aet = True
    for each in (VERIFICATION, *classes):
        entity.add_supported_context(each, ExplicitVRLittleEndian)
    server = entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)], ssl_context=tls
    )
    assert server is not None
    try:
        yield f"PACS@127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()


ALL = tuple(each for classes in CLASSES.values() for each in classes)


def objects(out: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in out.rglob("*.dcm"):
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        found.setdefault(dataset.Modality, set()).add(dataset.SOPInstanceUID)
    return found


@pytest.mark.parametrize("way", ["node", "url"])
def test_orthanc_takes_all_objects_and_shows_them_in_the_source_study(orthanc: Orthanc, out: Path, way: str) -> None:
    orthanc.clear()
    images = sorted(PHANTOM.iterdir())
    for file in images:
        orthanc.put(file)
    summary = send([out], peer_at(getattr(orthanc, way)))
    assert summary.complete, summary
    assert {each.state for each in summary.objects} == {"accepted"}
    study = orthanc.study(pydicom.dcmread(images[0]).StudyInstanceUID)
    assert len(study.pop("CT")) == len(images)
    assert study == objects(out)
    assert {modality: len(study[modality]) for modality in CLASSES} == {"SR": 2, "OT": 3, "SEG": 1, "DOC": 1}


def test_what_was_taken_is_not_sent_again_unless_asked(orthanc: Orthanc, out: Path) -> None:
    first = send([out], peer_at(orthanc.node))
    again = send([out / "0123456789abcdef"], peer_at(orthanc.node))
    assert {each.state for each in again.objects} == {"already-sent"} and len(again.objects) == len(first.objects)
    assert {each.state for each in send([out], peer_at(orthanc.node), again=True).objects} == {"accepted"}
    assert {each.state for each in send([out], peer_at(orthanc.url)).objects} == {"accepted"}  # another archive
    notes = [json.loads(line) for line in (out / "0123456789abcdef" / SENT).read_text().splitlines()]
    assert {note["peer"] for note in notes} == {orthanc.node, orthanc.url}


def test_a_line_that_was_cut_off_counts_as_not_sent(out: Path) -> None:
    with node(ALL) as (address, got):
        send([out], peer_at(address))
        notes = out / "0123456789abcdef" / SENT
        notes.write_bytes(notes.read_bytes()[:-20])
        states = [each.state for each in send([out], peer_at(address)).objects]
        after = {each.state for each in send([out], peer_at(address)).objects}
    assert states.count("accepted") == 1 and len(got) == len(states) + 1
    assert after == {"already-sent"}  # the note after the torn one can be read


def test_each_object_that_is_refused_says_why_and_the_others_go(out: Path) -> None:
    with node(CLASSES["SR"] + CLASSES["OT"]) as (address, got):
        summary = send([out], peer_at(address))
    refused = [each for each in summary.objects if each.state == "refused"]
    assert {Path(each.file).name for each in refused} == {"masks.seg.dcm", "report.pdf.dcm"}
    assert "Segmentation Storage" in "".join(each.message for each in refused)
    assert len(got) == 5 and not summary.complete
    with node(ALL, answer=lambda: 0x0124) as (address, _):
        assert "Not Authorised" in send([out], peer_at(address)).objects[0].message
    with node(ALL, answer=lambda: 0xB000) as (address, _):
        warned = send([out], peer_at(address)).objects[0]
        assert warned.state == "accepted" and "Coercion" in warned.message


def test_a_node_that_comes_back_gets_the_rest(out: Path) -> None:
    port, waited = free_port(), []
    with pytest.MonkeyPatch.context() as patch:
        started: list[Any] = []

        def start(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                running = node(ALL, port=port)
                started.append(running)
                running.__enter__()

        patch.setattr("pipelines.peers.CONNECT_SECONDS", 2)
        summary = send([out], peer_at(f"PACS@127.0.0.1:{port}"), wait=start)
        started[0].__exit__(None, None, None)
    assert summary.complete and waited == [1, 2]


def test_a_full_node_is_tried_again_and_then_left(out: Path) -> None:
    waited: list[float] = []
    with node(ALL, answer=lambda: 0xA700) as (address, got):
        summary = send([out], peer_at(address), retry=2, wait=waited.append)
    assert summary.out_of_reach and waited == [1, 2] and len(got) == 3
    assert {each.state for each in summary.objects} == {"not-sent"}
    assert "tries: 3" in summary.objects[0].message
    assert not (out / "0123456789abcdef" / SENT).exists()


def test_an_association_under_a_wrong_title_is_explained(orthanc: Orthanc, out: Path) -> None:
    with pytest.raises(PeerError, match="AE titles"):
        send([out], peer_at(orthanc.node.replace("ORTHANC", "OTHER")))


@pytest.mark.parametrize(
    "address", ["pacs", "PACS@host", "PACS@host:0", "PACS@host:99999", "A" * 17 + "@host:104", "http://", "ftp://x/y"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(PeerError):
        peer_at(address)


def test_folders_without_reports_or_objects_are_named(out: Path, tmp_path: Path) -> None:
    with node(ALL) as (address, _):
        with pytest.raises(SendError, match="holds no report"):
            send([tmp_path / "nowhere"], peer_at(address))
        for file in out.rglob("*.dcm"):
            file.unlink()
        with pytest.raises(SendError, match="scanscribe export"):
            send([out], peer_at(address))


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one PEM file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*make.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True
    )
    both = folder / "both.pem"
    both.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


def test_objects_go_over_tls_to_a_node_that_is_trusted_and_to_no_other(certificate: Path, out: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(certificate)
    with node(ALL, tls=server) as (address, got):
        tls = Tls(authorities=certificate, certificate=certificate)
        assert send([out], peer_at(address, tls=tls)).complete
        assert len(got) == 7
        for stranger in (Tls(certificate=certificate), None):
            assert send([out], peer_at(address, tls=stranger), again=True, retry=0).out_of_reach
    with pytest.raises(PeerError, match="PEM"):
        peer_at(address, tls=Tls(authorities=out / "no.pem"))


# ---------------------------------------------------------------- DICOMweb


@contextmanager
def web(*answers: tuple[int, object]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A DICOMweb server that gives `answers` (status, JSON) in turn, the last one for ever; and the headers it got."""
    left, got = list(answers), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            got.append(dict(self.headers))
            status, said = left.pop(0) if len(left) > 1 else left[0]
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dicom-web", got
    finally:
        server.shutdown()
        server.server_close()


def test_credentials_come_from_the_environment_only(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web((200, {})) as (url, got):
        monkeypatch.setenv(USER, "alice")
        monkeypatch.setenv(PASSWORD, "open sesame")
        send([out], peer_at(url))
        monkeypatch.setenv(TOKEN, "abc")
        send([out], peer_at(url), again=True)
        assert {headers["Authorization"] for headers in got} == {"Basic YWxpY2U6b3BlbiBzZXNhbWU=", "Bearer abc"}
        with pytest.raises(PeerError, match=USER):
            peer_at(url.replace("//", "//alice:secret@"))
        with pytest.raises(PeerError, match="in clear"):
            peer_at("http://pacs.example/dicom-web")
    assert "sesame" not in "".join(file.read_text("utf-8", "replace") for file in out.rglob(SENT))


def test_web_answers_become_outcomes(out: Path) -> None:
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0x0122]}}]}}
    with web((503, {}), (200, {}), (409, failed), (202, failed), (400, {}), (200, {})) as (url, _):
        summary = send([out], peer_at(url), wait=lambda seconds: None)
    states = [each.state for each in summary.objects]
    assert states == ["accepted", "refused", "refused", "refused", "accepted", "accepted", "accepted"]
    assert "SOP Class" in summary.objects[1].message and "400" in summary.objects[3].message
    for status in (401, 403, 404):
        with web((status, {})) as (url, _), pytest.raises(PeerError, match=str(status)):
            send([out], peer_at(url))


# ---------------------------------------------------------------- the command


def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["scanscribe", "send", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capfd.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_command_tells_what_became_of_each_object(
    out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with node(CLASSES["SR"]) as (address, _):
        code, said, _ = command(capfd, monkeypatch, out, "--to", address)
        assert code == 1
        assert "findings.sr.dcm" in said and "refused" in said
    with node(ALL, port=int(address.rpartition(":")[2])) as (address, _):
        code, said, _ = command(capfd, monkeypatch, out, "--to", address, "--json")
        assert code == 0
        assert json.loads(said)["counts"] == {"accepted": 5, "already-sent": 2, "refused": 0, "not-sent": 0}
    code, said, _ = command(capfd, monkeypatch, out, "--to", address, "--again", "--retry", 0, "--json")
    assert code == 2 and json.loads(said)["counts"]["not-sent"] == 7
    code, said, err = command(capfd, monkeypatch, out, "--to", "nonsense", "--json")
    assert code == 2 and json.loads(said)["error"]["code"] == "peer" and "AET@host:port" in err
