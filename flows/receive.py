"""The DICOM receiver: a storage SCP (PS3.4 annex B) that puts each instance whole into a folder, for a watcher.

An instance is written to disk as it comes in (`.incoming`), checked, synced and renamed; only then the sender hears
that it was stored. Nothing of a header appears in a name or a log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import os
import socket
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pydicom
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import A_RELEASE
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from flows.machine.space import MIN_FREE, Room
from flows.seeing.log import EventLog
from pipelines.ingest.dicom import check_deflated

INCOMING: Final = ".incoming"
SYNTAXES: Final = tuple(
    uid
    for uid in pydicom.uid.AllTransferSyntaxes
    if uid != "1.2.840.10008.1.2.4.95"  # JPIP: the pixels lie elsewhere
)
SILENCE_S: Final = 60.0  # of a peer, before its association is ended
END_S: Final = 10.0  # that associations have to end when the receiver stops
STORED, NO_RESOURCES, NO_MATCH, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000  # PS3.4 table B.2-1


class ReceiveError(Exception):
    """The receiver cannot start. The message says how to mend it."""

    code = "receiver"


@dataclass(frozen=True, slots=True)
class Node:
    """How the receiver is reached, and by whom."""

    aet: str
    port: int  # 0: a free one
    bind: str = "127.0.0.1"
    callers: tuple[str, ...] = ()  # AE titles that may call; none: all
    associations: int = 10  # at a time
    min_free: int = MIN_FREE  # bytes; with less, instances are refused as out of resources
    certificate: Path | None = None  # PEM; turns TLS on
    key: Path | None = None  # PEM, where it is not in the certificate's file
    authorities: Path | None = None  # PEM; who must have signed the peers' certificates


class Receiver:
    """A running receiver; a context manager. Leaving lets associations end, then cuts those that do not."""

    def __init__(self, node: Node, inbox: Path, log: EventLog) -> None:
        """Raises ReceiveError."""
        self._node, self._inbox, self._log = node, inbox, log
        self._incoming = inbox / INCOMING
        self._lock = threading.Lock()
        self._counts: dict[int, list[int]] = {}  # association, once it is asked for -> stored, refused
        self._released: set[int] = set()  # associations that their peer ended in order
        self._lost = False  # the folder is not there
        self._room = Room({"inbox": inbox}, node.min_free, log)
        self._tls = _tls(node)
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReceiveError(f"{inbox} cannot be used ({error.strerror}): give a folder to write to.") from None
        for title in (node.aet, *node.callers):
            if not 0 < len(title.strip()) <= 16 or not title.isascii() or not title.isprintable() or "\\" in title:
                raise ReceiveError(f"{title!r} is no AE title: give 1 to 16 ASCII characters.")
        self._entity = AE(ae_title=node.aet)
        self._entity.maximum_associations = node.associations
        self._entity.network_timeout = self._entity.acse_timeout = self._entity.dimse_timeout = SILENCE_S
        self._entity.require_calling_aet = list(node.callers)
        contexts = [build_context(str(each.abstract_syntax), list(SYNTAXES)) for each in AllStoragePresentationContexts]
        self._entity.supported_contexts = [build_context(Verification), *contexts]

    def __enter__(self) -> Receiver:
        self._folder = self._have_folder()
        self._disk = self._inbox.stat().st_dev
        self.clear_incoming(all_of_it=True)
        self._before = _config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir
        _config.STORE_RECV_CHUNKED_DATASET = True  # straight to a file: memory does not grow with the instance
        tempfile.tempdir = str(self._incoming)  # where the files are made: renaming stays within the file system
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_ACSE_RECV, self._asked_to_release),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        try:
            server = self._entity.start_server(
                (self._node.bind, self._node.port), block=False, evt_handlers=handlers, ssl_context=self._tls
            )
        except OSError as error:
            self._restore()
            raise ReceiveError(_no_port(self._node, error)) from None
        assert isinstance(server, ThreadedAssociationServer)
        self._server = server
        tls = str(self._tls is not None).lower()
        self._log("listening", aet=self._node.aet, address=self._node.bind, port=self.port, tls=tls)
        return self

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __exit__(self, *what: object) -> None:
        self._server.shutdown()
        end = time.monotonic() + END_S
        while self._entity.active_associations and time.monotonic() < end:
            time.sleep(0.05)
        self._entity.shutdown()
        self.clear_incoming(all_of_it=True)
        self._restore()
        self._log("stopped")

    def clear_incoming(self, *, all_of_it: bool = False) -> None:
        """Remove what aborted associations left: what grows no more for longer than peers may be silent.

        A folder that was removed is made again; on a disk that is no longer mounted, it is waited for.  Raises
        ReceiveError where another receiver has it by then.
        """
        try:
            left = list(self._incoming.iterdir())
        except OSError:
            self._find_again()
            return
        if self._lost:
            self._lost = False
            self._log("folder-lost-over")
        for path in left:
            with contextlib.suppress(OSError):  # it is gone, or no file of ours
                if all_of_it or time.time() - path.stat().st_mtime > 2 * SILENCE_S:
                    path.unlink()

    def _have_folder(self) -> int:
        """Lock it, as its one receiver. Raises ReceiveError, OSError."""
        folder = os.open(self._incoming, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(folder)
            raise ReceiveError(f"Another receiver writes to {self._inbox}: give each a folder of its own.") from None
        return folder

    def _find_again(self) -> None:
        if not self._lost:
            self._lost = True
            self._log("folder-lost", message="The inbox is not there: what is sent is refused until it is.")
        there = next(each for each in (self._inbox, *self._inbox.absolute().parents) if each.exists())
        with contextlib.suppress(OSError):
            if there.stat().st_dev == self._disk:
                self._incoming.mkdir(parents=True, exist_ok=True)
                folder = self._have_folder()
                os.close(self._folder)
                self._folder = folder

    def _restore(self) -> None:
        _config.STORE_RECV_CHUNKED_DATASET, tempfile.tempdir = self._before
        os.close(self._folder)

    def _store(self, event: evt.Event) -> int:
        path, request = event.dataset_path, event.request
        assert isinstance(request, C_STORE)
        try:
            status = self._keep(path, str(request.AffectedSOPInstanceUID or ""))
        except OSError:
            status = NO_RESOURCES
        if status != STORED:
            path.unlink(missing_ok=True)
        with self._lock:
            counts = self._counts.setdefault(id(event.assoc), [0, 0])
            counts[status != STORED] += 1
        return status

    def _keep(self, path: Path, instance: str) -> int:
        """Move a received file to its place; its DIMSE status. Raises OSError."""
        if not self._room():
            return NO_RESOURCES
        try:
            with path.open("rb") as stream:
                check_deflated(stream)
                header = pydicom.dcmread(
                    stream, stop_before_pixels=True, specific_tags=["StudyInstanceUID", "SOPInstanceUID"]
                )
            study, named = str(header.get("StudyInstanceUID") or ""), str(header.get("SOPInstanceUID") or "")
        except OSError:
            raise
        except Exception:  # pydicom meets damaged bytes with errors of many types
            return NOT_UNDERSTOOD
        if not study or not instance or named != instance:
            return NO_MATCH
        # Not of the 16 digits that a report's folder has: the inbox may be the output folder, too.
        place = self._inbox / _name(study, 24) / f"{_name(instance, 32)}.dcm"
        place.parent.mkdir(exist_ok=True)
        if place.exists() and filecmp.cmp(path, place, shallow=False):  # sent again
            path.unlink()
            return STORED
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(0o640)  # a temporary file is made for its owner only
        os.replace(path, place)
        for folder in (place.parent, self._inbox):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return STORED

    def _opened(self, event: evt.Event) -> None:
        """Of a connection: in a thread of its own, before its association starts."""
        assert event.assoc.dul.socket is not None
        connection: socket.socket = event.assoc.dul.socket.socket  # type: ignore[assignment]
        # pynetdicom's time-outs are between messages: a peer whose line is cut within one would keep its place.
        connection.settimeout(SILENCE_S)
        if isinstance(connection, ssl.SSLSocket):
            try:
                connection.do_handshake()
            except (ssl.SSLEOFError, ConnectionError):
                pass  # somebody looked whether the port is open
            except OSError as error:  # the association ends where it would read
                self._log("association-refused", reason="tls", peer=event.assoc.requestor.address, message=_why(error))

    def _rejected(self, event: evt.Event) -> None:
        peer, callers = event.assoc.requestor, self._node.callers
        reason, words = "associations", "All places are taken: it may call again, or give more by --associations."
        if callers and peer.ae_title not in [each.strip() for each in callers]:
            reason, words = "caller", "Only those may call that --caller names: add its AE title if it is to."
        self._log("association-refused", reason=reason, peer=peer.address, caller=peer.ae_title, message=words)

    def _requested(self, event: evt.Event) -> None:
        with self._lock:
            self._counts[id(event.assoc)] = [0, 0]

    def _asked_to_release(self, event: evt.Event) -> None:
        if isinstance(event.primitive, A_RELEASE):  # type: ignore[attr-defined]  # of this kind of event
            self._released.add(id(event.assoc))

    def _closed(self, event: evt.Event) -> None:
        with self._lock:
            counts = self._counts.pop(id(event.assoc), None)
        cut_off = id(event.assoc) not in self._released
        self._released.discard(id(event.assoc))
        if counts is None or event.assoc.is_rejected:  # None: somebody looked whether the port is open
            return
        stored, refused = counts
        if stored or refused or cut_off:
            self._log("received", files=stored, refused=refused, cut_off=str(cut_off).lower())


def _name(uid: str, digits: int) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:digits]


class _Context(ssl.SSLContext):
    """Leaves the handshake to the connection's own thread: one that is silent would keep all others waiting."""

    def wrap_socket(self, *what: Any, **how: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*what, **how | {"do_handshake_on_connect": False})


def _tls(node: Node) -> ssl.SSLContext | None:
    if node.certificate is None:
        if node.key or node.authorities:
            raise ReceiveError("TLS needs a certificate: give --tls-cert.")
        return None
    context = _Context(ssl.PROTOCOL_TLS_SERVER)
    for path in filter(None, (node.certificate, node.key, node.authorities)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ReceiveError(f"The TLS file {path} cannot be read ({error.strerror}): give a PEM file.") from None
    try:
        context.load_cert_chain(node.certificate, node.key, password=lambda: "")  # else OpenSSL asks at the terminal
    except ssl.SSLError as error:
        files = " and ".join(map(str, filter(None, (node.certificate, node.key))))
        raise ReceiveError(
            f"{files} cannot be used for TLS ({_why(error)}): give a certificate and its key, unencrypted PEM."
        ) from None
    if node.authorities:
        try:
            context.load_verify_locations(node.authorities)
        except ssl.SSLError as error:
            raise ReceiveError(
                f"{node.authorities} names no authorities ({_why(error)}): give their certificates as PEM."
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_port(node: Node, error: OSError) -> str:
    where, why = f"Port {node.port} of {node.bind}", error.strerror or type(error).__name__
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use: end what listens there, or give another one with --port."
    if error.errno == errno.EACCES:
        return f"{where} cannot be used ({why}): give one above 1023 with --port."
    return f"{where} cannot be used ({why}): give an address of this machine with --bind."


def _why(error: OSError) -> str:
    """OpenSSL's reason, such as CERTIFICATE_VERIFY_FAILED, in words."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not what it should be, or encrypted").replace("_", " ").lower()
    return error.strerror or type(error).__name__
