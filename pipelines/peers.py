"""The archives that reports are sent to: DICOM nodes (C-STORE, PS3.4 annex B) and DICOMweb servers (STOW-RS, PS3.18).

Credentials come from the environment, never from the command line, which other users of a machine can read.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, Association
from pynetdicom.status import GENERAL_STATUS, STORAGE_SERVICE_CLASS_STATUS

USER, PASSWORD, TOKEN = "SCANSCRIBE_SEND_USER", "SCANSCRIBE_SEND_PASSWORD", "SCANSCRIBE_SEND_TOKEN"
VERIFICATION: Final = "1.2.840.10008.1.1"
CONNECT_SECONDS: Final = 10
ANSWER_SECONDS: Final = 120  # archives write an object to disk before they answer
OUT_OF_RESOURCES: Final = range(0xA700, 0xA800)  # may pass: worth another try
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_NODE: Final = re.compile(r"(?P<title>[^@\\]{1,16})@(?P<host>\[[^\]]+\]|[^:\[\]@/]+):(?P<port>[0-9]{1,5})")


class PeerError(Exception):
    """The archive cannot be used; no object will fare better. The message says what mends it."""

    code = "peer"


class TransportError(Exception):
    """The way to the archive failed; another try may do."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Who is trusted and who we are; both have defaults (the system's authorities, nobody)."""

    authorities: Path | None = None  # PEM file
    certificate: Path | None = None  # PEM file, with the key in it or in `key`
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises PeerError for files that cannot serve."""
        try:
            context = ssl.create_default_context(cafile=self.authorities)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise PeerError(f"the TLS files cannot be used ({error}): give PEM files that belong together") from None
        return context


@dataclass(frozen=True, slots=True)
class Answer:
    """What the archive said to one object."""

    accepted: bool
    message: str = ""  # empty when it was stored without remark


class Peer(Protocol):
    """An archive, to be used as a context manager."""

    name: str  # by which `sent.jsonl` knows it

    def expect(self, sop_classes: Collection[str]) -> None:
        """Says what kinds of objects will come, before the first one."""

    def store(self, path: Path) -> Answer:
        """Sends one DICOM file. Raises PeerError and TransportError."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def peer_at(address: str, *, calling: str = "SCANSCRIBE", tls: Tls | None = None) -> Peer:
    """The archive at `AET@host:port` or at the URL of a DICOMweb service. Raises PeerError for any other text.

    `tls` turns TLS on for a DICOM node; for a URL with https it only says who is trusted.
    """
    if address.lower().startswith(("http://", "https://")):
        return WebPeer(address, tls or Tls(), os.environ)
    match = _NODE.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise PeerError(f"{address} is no address of an archive: give AET@host:port or https://host/dicom-web")
    if not 0 < len(calling.strip()) <= 16 or not calling.isascii() or "\\" in calling:
        raise PeerError(f"{calling} is no AE title: give one of 1 to 16 ASCII characters")
    return NodePeer(match["title"], match["host"].strip("[]"), int(match["port"]), calling, tls)


class NodePeer:
    """A DICOM node."""

    def __init__(self, title: str, host: str, port: int, calling: str, tls: Tls | None) -> None:
        self.name = f"{title}@{host}:{port}"
        self._address = host, port
        self._title = title
        self._tls = (tls.context(), host) if tls else None
        self._entity = AE(ae_title=calling)
        self._entity.connection_timeout = CONNECT_SECONDS
        self._entity.acse_timeout = CONNECT_SECONDS
        self._entity.dimse_timeout = self._entity.network_timeout = ANSWER_SECONDS
        self._association: Association | None = None

    def expect(self, sop_classes: Collection[str]) -> None:
        self._entity.requested_contexts = []
        self._entity.add_requested_context(VERIFICATION)
        for each in sorted(sop_classes):
            self._entity.add_requested_context(each, ExplicitVRLittleEndian)  # which derived objects are written in

    def store(self, path: Path) -> Answer:
        dataset = dcmread(path)
        association = self._associated()
        if not any(context.abstract_syntax == dataset.SOPClassUID for context in association.accepted_contexts):
            kind = UID(dataset.SOPClassUID).name
            return Answer(False, f"the node takes no {kind}: switch that SOP class on in its configuration")
        try:
            status = association.send_c_store(dataset)
        except RuntimeError as error:  # the association ended meanwhile
            raise TransportError(str(error)) from None
        if "Status" not in status:
            raise TransportError("the node ended the association or did not answer in time")
        if status.Status in OUT_OF_RESOURCES:
            raise TransportError(explain(status.Status))
        warning = status.Status == 1 or status.Status >> 12 == 0xB
        return Answer(status.Status == 0 or warning, explain(status.Status) if status.Status else "")

    def _associated(self) -> Association:
        if self._association is not None and self._association.is_established:
            return self._association
        tls: dict[str, Any] = {"tls_args": self._tls} if self._tls else {}
        association = self._entity.associate(*self._address, ae_title=self._title, **tls)
        if association.is_rejected:
            reason = association.acceptor.primitive.reason_str  # type: ignore[union-attr]
            raise PeerError(f"{self.name} refused the association ({reason}): check both AE titles with its keeper")
        if not association.is_established:
            raise TransportError("no association: nothing answers there, or TLS is set on one side only")
        self._association = association
        self._echo(association)
        return association

    def _echo(self, association: Association) -> None:
        """Asks whether the node is at work (C-ECHO) before it gets anything."""
        if not any(context.abstract_syntax == VERIFICATION for context in association.accepted_contexts):
            raise PeerError(
                f"{self.name} takes no C-ECHO, so it is no archive that we can check: see its configuration"
            )
        status = association.send_c_echo()
        if "Status" not in status:
            raise TransportError("the node did not answer C-ECHO")
        if status.Status != 0:
            raise PeerError(f"{self.name} answers C-ECHO with {explain(status.Status)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._association is not None and self._association.is_established:
            self._association.release()


class WebPeer:
    """A DICOMweb server."""

    def __init__(self, url: str, tls: Tls, environment: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise PeerError(f"{url} names no host: give the URL of the DICOMweb service, as https://host/dicom-web")
        if parts.username or parts.password:
            raise PeerError(f"credentials do not belong in a URL: put them into {USER} and {PASSWORD}, or {TOKEN}")
        self.name = url.rstrip("/")
        headers, login = {"Accept": "application/dicom+json"}, None
        if token := environment.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        elif user := environment.get(USER):
            login = (user, environment.get(PASSWORD, ""))
        if parts.scheme == "http" and (token or login) and parts.hostname not in LOOPBACK:
            raise PeerError("credentials are not sent in clear: give the https URL of the service")
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        verify = tls.context() if parts.scheme == "https" else True
        self._client = httpx.Client(headers=headers, auth=login, timeout=timeout, verify=verify)

    def expect(self, sop_classes: Collection[str]) -> None:
        """Needs no preparation: a server says to each object whether it takes it."""

    def store(self, path: Path) -> Answer:
        boundary = uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = head + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        try:
            response = self._client.post(f"{self.name}/studies", content=body, headers={"Content-Type": kind})
        except httpx.TransportError as error:
            raise TransportError(f"{type(error).__name__}: {error}") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise TransportError(f"the server answers {response.status_code} {response.reason_phrase}")
        if response.status_code in (401, 403):
            raise PeerError(
                f"{self.name} does not let us in ({response.status_code}): set {USER} and {PASSWORD}, or {TOKEN}"
            )
        if response.status_code in (301, 302, 307, 308, 404, 405):
            raise PeerError(
                f"{self.name} offers no STOW-RS ({response.status_code}): give the root of the DICOMweb service"
            )
        return _stored(response)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()


def _stored(response: httpx.Response) -> Answer:
    """What a Store Instances Response (PS3.18 annex I) says of the one object that was sent."""
    try:
        said: Mapping[str, Any] = response.json()
    except ValueError:
        said = {}
    failed, warned = (_reason(said, *tags) for tags in (("00081198", "00081197"), ("00081199", "00081196")))
    if failed is not None or not response.is_success:
        return Answer(False, explain(failed) if failed else f"the server answers {response.status_code}")
    return Answer(True, explain(warned) if warned else "")


def _reason(said: Mapping[str, Any], sequence: str, reason: str) -> int | None:
    """The first code in a sequence of the response: 0 for an item without one, None where there is no item."""
    items = said.get(sequence, {}).get("Value") or ()
    return next((int((item.get(reason, {}).get("Value") or [0])[0]) for item in items), None)


def explain(status: int) -> str:
    """A status of the storage service (PS3.4 table B.2-1, PS3.7 annex C) in words."""
    known = {**GENERAL_STATUS, **STORAGE_SERVICE_CLASS_STATUS}.get(status)
    return f"{known[1] or known[0] if known else 'a failure of its own'} (0x{status:04X})"
