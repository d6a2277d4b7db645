"""Which file system a folder lies on: network file systems send no events and cannot lock a data base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_NETWORK: Final = """
    9p afs afpfs beegfs ceph cifs coda davfs fuse.ceph fuse.davfs2 fuse.glusterfs fuse.rclone fuse.s3fs fuse.smbnetfs
    fuse.sshfs fuse.vmhgfs-fuse glusterfs gpfs lustre ncpfs nfs nfs4 orangefs prl_fs smb smb2 smb3 smbfs vboxsf virtiofs
    vmhgfs
"""
NETWORK: Final = frozenset(_NETWORK.split())
MOUNTS: Final = Path("/proc/mounts")


def network_type(folder: Path, mounts: Path = MOUNTS) -> str:
    """The type of the network file system that `folder` lies on; "" for a local one, or where it cannot be told."""
    here = os.path.realpath(folder)
    found = ("", "")
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:  # a later mount hides an earlier one at the same place
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = _unescape(fields[1])
        if (here == point or here.startswith(f"{point.rstrip('/')}/")) and len(point) >= len(found[0]):
            found = (point, fields[2])
    return found[1] if found[1] in NETWORK else ""


def _unescape(text: str) -> str:
    r"""Blanks, tabs, line ends and backslashes stand there as \040, \011, \012 and \134 (getmntent(3))."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
