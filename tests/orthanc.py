"""A real archive for tests: Debian's Orthanc with its DICOMweb plugin, on free ports, with a storage that goes away."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@dataclass(frozen=True)
class Orthanc:
    """A running archive."""

    dicom_port: int
    http_port: int

    @property
    def node(self) -> str:
        return f"ORTHANC@127.0.0.1:{self.dicom_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def get(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.http_port}{path}", timeout=60).raise_for_status().json()

    def put(self, file: Path) -> None:
        httpx.post(
            f"http://127.0.0.1:{self.http_port}/instances", content=file.read_bytes(), timeout=60
        ).raise_for_status()

    def study(self, uid: str) -> dict[str, set[str]]:
        """SOP Instance UIDs of a study, by modality."""
        found: dict[str, set[str]] = {}
        for study in self.get("/studies?expand"):
            if study["MainDicomTags"]["StudyInstanceUID"] == uid:
                modality = {
                    series["ID"]: series["MainDicomTags"]["Modality"]
                    for series in self.get(f"/studies/{study['ID']}/series")
                }
                for instance in self.get(f"/studies/{study['ID']}/instances"):
                    sop_instance_uid = instance["MainDicomTags"]["SOPInstanceUID"]
                    found.setdefault(modality[instance["ParentSeries"]], set()).add(sop_instance_uid)
        return found

    def clear(self) -> None:
        for study in self.get("/studies"):
            httpx.delete(f"http://127.0.0.1:{self.http_port}/studies/{study}", timeout=60).raise_for_status()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Starts an Orthanc that serves this machine alone, and stops it. Skips where it is not installed."""
    program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None or not DICOMWEB_PLUGIN.is_file():
        pytest.skip("needs the Debian packages orthanc and orthanc-dicomweb")
    archive = Orthanc(free_port(), free_port())
    configuration = folder / "orthanc.json"
    configuration.write_text(
        json.dumps(
            {
                "Name": "TEST",
                "StorageDirectory": str(folder / "storage"),
                "IndexDirectory": str(folder / "storage"),
                "HttpPort": archive.http_port,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False,
                "DicomAet": "ORTHANC",
                "DicomPort": archive.dicom_port,
                "DicomCheckCalledAet": True,
                "DicomAlwaysAllowEcho": False,
                "DicomAlwaysAllowStore": False,
                "DicomCheckModalityHost": True,
                "DicomModalities": {"us": ["SCANSCRIBE", "127.0.0.1", 104]},
                "Plugins": [str(DICOMWEB_PLUGIN)],
                "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full"},
            }
        )
    )
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(configuration)], stdout=log, stderr=log, cwd=folder)
    try:
        _await(archive, process, folder / "orthanc.log")
        yield archive
    finally:
        process.terminate()
        process.wait(timeout=60)


def _await(archive: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            archive.get("/system")
            with socket.create_connection(("127.0.0.1", archive.dicom_port), timeout=1):
                return
        except (httpx.HTTPError, OSError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise TimeoutError(log.read_text())
