"""Who works on an item: names of processes by which another one can tell whether they still live."""

from __future__ import annotations

import functools
import os
import socket
from contextlib import suppress
from pathlib import Path


@functools.cache
def this_process() -> str:
    """A name that no other process has: machine, process id and its name space, time of start."""
    return process_name(os.getpid())


def process_name(pid: int) -> str:
    """Such a name for another process of this machine."""
    return f"{_machine()}/{_name_space()}/{pid}/{_started(pid)}"


def process_id(owner: str) -> int:
    """The process id in such a name."""
    return int(owner.split("/")[-2])


def is_gone(owner: str) -> bool:
    """Whether `owner` is a process of this machine that has ended. Of other machines that cannot be told."""
    host, _, rest = owner.rpartition("/")[0].partition("/")
    space, _, pid = rest.rpartition("/")
    if not pid.isdigit() or (host, space) != (_machine(), _name_space()):
        return False
    return _started(int(pid)) != owner.rpartition("/")[2]


@functools.cache
def _machine() -> str:
    """This start of this machine: host names are not unique, and processes do not outlive a start (random(4))."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _name_space() -> str:
    """Containers can share a host name, and then not their process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where there is none (proc(5), field 22 of stat).

    One that has ended and that nobody has asked for is none.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
