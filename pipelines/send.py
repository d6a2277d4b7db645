"""Reports go to an archive: every DICOM object of a report folder, once, with another try where the network failed.

What the archive took is noted beside the report (`sent.jsonl`), so that the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from pipelines.peers import Peer, TransportError
from reports.bundle import REPORT

SENT: Final = "sent.jsonl"
OBJECTS: Final = "*.dcm"
LONGEST_WAIT: Final = 30.0  # seconds between two tries

State = Literal["accepted", "already-sent", "refused", "not-sent"]


class SendError(Exception):
    """Nothing can be sent from what was named. The message says what mends it."""

    code = "send"


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one object."""

    file: str
    sop_instance_uid: str
    state: State
    message: str = ""


@dataclass(frozen=True, slots=True)
class SendSummary:
    """What became of all objects."""

    peer: str
    objects: tuple[Sent, ...]

    @property
    def complete(self) -> bool:
        return all(each.state in ("accepted", "already-sent") for each in self.objects)

    @property
    def out_of_reach(self) -> bool:
        """The archive answered to nothing."""
        states = {each.state for each in self.objects}
        return "not-sent" in states and not states & {"accepted", "refused"}

    def as_dict(self) -> dict[str, Any]:
        states: tuple[State, ...] = ("accepted", "already-sent", "refused", "not-sent")
        counts = {state: sum(each.state == state for each in self.objects) for state in states}
        return {"peer": self.peer, "counts": counts, "objects": [asdict(each) for each in self.objects]}


@dataclass(frozen=True, slots=True)
class _Object:
    path: Path
    sop_class: str
    sop_instance_uid: str
    sha256: str
    taken: bool  # by this peer, in an earlier call

    def became(self, state: State, message: str = "") -> Sent:
        return Sent(str(self.path), self.sop_instance_uid, state, message)


def send(
    folders: Sequence[Path],
    peer: Peer,
    *,
    retry: int = 3,
    again: bool = False,
    wait: Callable[[float], object] = time.sleep,
    listener: Callable[[int, int], None] | None = None,
) -> SendSummary:
    """Sends the DICOM objects in report folders, or in all report folders of output folders.

    A failed transport is tried `retry` more times, after 1, 2, 4, ... seconds by `wait`; then the rest is left for the
    next call.  `again` sends also what this peer has taken before.  `listener` gets (done, total).  Raises SendError
    before anything is sent, and PeerError when the archive cannot be used.
    """
    objects = [each for folder in report_folders(folders) for each in _objects(folder, peer.name)]
    if not objects:
        raise SendError("the reports have no DICOM objects: make some with `scanscribe export --formats sr,sc`")
    peer.expect({each.sop_class for each in objects})
    done: list[Sent] = []
    out_of_reach = ""  # why, once the archive is
    with peer:
        for each in objects:
            if each.taken and not again:
                outcome = each.became("already-sent")
            elif out_of_reach:
                outcome = each.became("not-sent", out_of_reach)
            else:
                outcome = _send_one(each, peer, retry, wait)
                out_of_reach = outcome.message if outcome.state == "not-sent" else ""
            done.append(outcome)
            if listener:
                listener(len(done), len(objects))
    return SendSummary(peer.name, tuple(done))


def report_folders(folders: Sequence[Path]) -> Iterator[Path]:
    """The report folders among `folders` and right inside them. Raises SendError for one that has none."""
    for folder in folders:
        found = [folder] if (folder / REPORT).is_file() else sorted(each.parent for each in folder.glob(f"*/{REPORT}"))
        if not found:
            raise SendError(f"{folder} holds no report: name a report folder or the folder of a run")
        yield from found


def _objects(folder: Path, peer: str) -> Iterator[_Object]:
    taken = _taken(folder / SENT, peer)
    for path in sorted(folder.glob(OBJECTS)):
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
            uid, sop_class = str(header.SOPInstanceUID), str(header.SOPClassUID)
        except (InvalidDicomError, AttributeError):
            raise SendError(f"{path} is no DICOM file: export it again, or take it out of the folder") from None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield _Object(path, sop_class, uid, digest, taken=(uid, digest) in taken)


def _send_one(each: _Object, peer: Peer, retry: int, wait: Callable[[float], object]) -> Sent:
    failure = ""
    for attempt in range(retry + 1):
        if attempt:
            wait(min(2.0 ** (attempt - 1), LONGEST_WAIT))
        try:
            answer = peer.store(each.path)
        except TransportError as error:
            failure = str(error)
            continue
        if not answer.accepted:
            return each.became("refused", answer.message)
        _note(each, peer.name)
        return each.became("accepted", answer.message)
    return each.became("not-sent", f"{failure} (tries: {retry + 1})")


def _taken(path: Path, peer: str) -> set[tuple[str, str]]:
    """(SOP Instance UID, SHA-256) of what this peer took before; a line that was cut off counts as not sent."""
    taken = set()
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(line)
            if said["peer"] == peer:
                taken.add((said["sop_instance_uid"], said["sha256"]))
    return taken


def _note(each: _Object, peer: str) -> None:
    line = {
        "peer": peer,
        "sop_instance_uid": each.sop_instance_uid,
        "sha256": each.sha256,
        "file": each.path.name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = each.path.parent / SENT
    before = path.read_bytes() if path.is_file() else b""
    with path.open("ab") as file:
        if before and not before.endswith(b"\n"):  # a line that a crash tore: the new one stands alone
            file.write(b"\n")
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        file.flush()
        os.fsync(file.fileno())
