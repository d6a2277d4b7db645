"""Which files there are and what each one is, told by its first bytes: folders, zip archives, single files.

Nothing is extracted to disk and nothing is passed over in silence: every path that is met becomes a `Found`, a
`Rejection` or a `PassedOver` with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Literal, cast

from pipelines.ingest.refusals import Refusal, rejected, rejection
from pipelines.study import Rejection

MAX_FILE_BYTES: Final = 4 << 30  # a file is read into memory as a whole
MAX_ARCHIVE_MEMBERS: Final = 200_000
MAX_ARCHIVE_BYTES: Final = 64 << 30  # all members together, unpacked
MAX_ARCHIVE_RATIO: Final = 200  # unpacked to packed; only asked of archives that unpack to more than a GiB

# Companions of images that people keep beside them. Met in a folder or archive they are passed over; named by the
# user, or holding an image after all, they are treated like any other file.
SIDECAR_SUFFIXES: Final = (".csv", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".py", ".toml", ".txt", ".xml")
SIDECAR_NAMES: Final = ("DICOMDIR", "LICENSE", "README")
DOCUMENT_SUFFIXES: Final = (".txt", ".md")  # a text with such a name may say something about the images beside it
NO_DOCUMENTS: Final = (  # and what people keep there that does not
    *("authors", "changelog", "changes", "cmakelists", "contributing", "copying", "install", "licence", "license"),
    *("notice", "readme", "requirements", "robots", "todo"),
)
LITTER_NAMES: Final = ("Thumbs.db", "desktop.ini", "__MACOSX")

Format = Literal["dicom", "picture", "zip", "pdf", "text", "dicomdir"]
HEAD_BYTES: Final = 132
MEDIA_STORAGE_DIRECTORY: Final = b"1.2.840.10008.1.3.10"  # the SOP class of a DICOMDIR
DIRECTORY_HEAD_BYTES: Final = 512  # its file meta information stands there

_TIFFS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURES: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", *_TIFFS)
_KNOWN_BUT_UNREAD: Final = (
    (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\0\x0cjP  ", "a bare JPEG 2000 file"),
)


FIRST_MEMBERS: Final = 16  # of an archive, looked at for a DICOM file: beside slices lie a DICOMDIR, a viewer, texts


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file on disk, or a member of a zip archive on disk. Small and picklable."""

    place: str  # its path; a run that plans many files keeps them all, and a Path takes 290 bytes more
    member: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.place)

    @property
    def name(self) -> str:
        """What people and reports call it: `folder/file.png` or `archive.zip!folder/file.png`."""
        path = os.fsencode(self.place).decode("utf-8", "replace")
        return path if self.member is None else f"{path}!{self.member}"

    @property
    def parent(self) -> str:
        """The folder or archive that holds it."""
        if self.member is None:
            return FileRef(str(self.path.parent)).name
        folder = str(PurePosixPath(self.member).parent)
        return FileRef(self.place, None if folder == "." else folder).name

    @property
    def basename(self) -> str:
        name = self.member or os.fsencode(self.place).decode("utf-8", "replace")
        return name.rpartition("/")[2]

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file as a seekable stream. Raises OSError, BadZipFile, or Refusal for a locked or exotic member."""
        if self.member is None:
            with open(self.place, "rb") as stream:
                yield stream
            return
        try:
            member = _archive(self.path).open(self.member)
        except RuntimeError as error:
            raise Refusal("damaged-archive", "The member is locked or packed in a way that cannot be read.") from error
        with member:
            yield cast(BinaryIO, member)

    def read(self) -> bytes:
        """All bytes. Raises as `open` does, and Refusal for an empty or much too large file."""
        if self.member is None and self.path.stat().st_size <= MAX_FILE_BYTES:
            with open(self.path, "rb", buffering=0) as file:  # unbuffered, all is read in one step
                data = file.read()
        else:
            with self.open() as stream:
                data = stream.read(MAX_FILE_BYTES + 1)
        if not data:
            raise Refusal("empty-file", "The file is empty (0 bytes).")
        if len(data) > MAX_FILE_BYTES:
            raise Refusal("too-large", f"The file is larger than {MAX_FILE_BYTES >> 30} GiB.")
        return data

    def state(self) -> tuple[int, ...]:
        """What tells that its content may be another one, without reading it: its time and size alone need not."""
        info = os.stat(self.place)
        return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def sha256(self) -> str:
        """Of all bytes, lower-case hex. A file that has not changed is not hashed anew for each of its pages."""
        return _sha256(self, self.state())


def digests(refs: Sequence[FileRef]) -> list[str]:
    """`sha256` of each, some at once: hashing lets other threads run."""
    if len(refs) == 1:
        return [refs[0].sha256()]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(FileRef.sha256, refs))


@dataclass(frozen=True, slots=True)
class Found:
    """A file that looks like something ingest can read."""

    ref: FileRef
    format: Format
    named: bool = False  # by the user, not met in a folder or archive


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file that is plainly not an input, with the reason why it was left alone."""

    path: str
    reason: str


def discover(inputs: Iterable[Path], *, named: bool = True) -> Iterator[Found | Rejection | PassedOver]:
    """Every file under `inputs` in a fixed order: inputs as given, folders and archives by name. Never raises.

    `named`: whether a person named them.

    Links are followed; a file or folder that is reached again is passed over, which also ends loops of links.
    """
    seen: dict[int, FileRef] = {}  # by device and number in one: where each file and folder was first met
    for path in inputs:
        yield from _walk(path, seen, named=named)


def _walk(path: Path, seen: dict[int, FileRef], *, named: bool) -> Iterator[Found | Rejection | PassedOver]:
    ref = FileRef(str(path))
    if not named and (litter := _litter(path.name)):
        yield PassedOver(ref.name, litter)
        return
    try:
        info = path.stat()
        place = info.st_dev << 64 | info.st_ino
        if first := seen.get(place):
            yield PassedOver(ref.name, f"the same as {first.name}")
            return
        seen[place] = ref
        if stat.S_ISDIR(info.st_mode):
            entries = sorted(os.listdir(path))
            if named and not entries:
                raise Refusal("empty-folder", "The folder is empty.")
            for entry in entries:
                yield from _walk(path / entry, seen, named=False)
            return
        if not stat.S_ISREG(info.st_mode):  # opening a pipe or a device could wait for ever
            raise Refusal("not-a-file", "It is a device, a pipe or a socket.")
        found = _recognise(ref, named=named)
        if isinstance(found, Found) and found.format == "zip":
            yield from _members(path)
        elif isinstance(found, Found) and found.format == "dicomdir":
            yield from _file_set(path, seen, named=named)
        else:
            yield found
    except Exception as error:  # zipfile answers damaged archives with errors of many types
        yield rejected(ref.name, error)


def _file_set(path: Path, seen: dict[int, FileRef], *, named: bool) -> Iterator[Found | Rejection | PassedOver]:
    """What a DICOMDIR names: read if the user named the DICOMDIR, else just looked for, as its folder is walked."""
    from pipelines.ingest.dicomdir import referenced_files

    ref = FileRef(str(path))
    yield PassedOver(ref.name, "a DICOM directory; the files that it names are read by themselves")
    for each in referenced_files(path):
        if isinstance(each, tuple):
            yield rejected(FileRef(str(path.parent / each[0])).name, each[1])
        elif named:
            yield from _walk(each, seen, named=False)


def _members(path: Path) -> Iterator[Found | Rejection | PassedOver]:
    archive = _archive(path)
    members = sorted((each for each in archive.infolist() if not each.filename.endswith("/")), key=lambda m: m.filename)
    if not members:
        raise Refusal("empty-folder", "The archive is empty.")
    if "[Content_Types].xml" in archive.namelist():
        raise Refusal("unsupported-format", "It is an office document.")
    if len(members) > MAX_ARCHIVE_MEMBERS:
        raise Refusal("archive-bomb", f"The archive has more than {MAX_ARCHIVE_MEMBERS:,} members.")
    unpacked = sum(info.file_size for info in members)
    packed = max(path.stat().st_size, 1)
    if unpacked > MAX_ARCHIVE_BYTES or (unpacked > 1 << 30 and unpacked / packed > MAX_ARCHIVE_RATIO):
        raise Refusal("archive-bomb", f"The archive would unpack to {unpacked / packed:,.0f} times its size.")
    if all(info.flag_bits & 1 for info in members):
        raise Refusal("password-locked", "The archive is locked with a password.")
    for info in members:
        ref = FileRef(str(path), info.filename)
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        litter = next(filter(None, map(_litter, parts)), None)
        if ".." in parts or info.filename.startswith(("/", "\\")) or ":" in info.filename.partition("/")[0]:
            yield rejection(ref.name, "path-traversal", "The archive names a file outside its own folder.")
        elif litter:
            yield PassedOver(ref.name, litter)
        elif archive.getinfo(info.filename) is not info:  # only the last of a name can be opened by it
            yield rejection(ref.name, "duplicate-member", "The archive holds another file of the same name.")
        elif info.flag_bits & 1:
            yield rejection(ref.name, "password-locked", "The member of the archive is locked with a password.")
        else:
            try:
                found = _recognise(ref, named=False)
                if isinstance(found, Found) and found.format == "zip":
                    raise Refusal("nested-archive", "It is an archive inside an archive.")
                if isinstance(found, Found) and found.format == "dicomdir":
                    found = PassedOver(ref.name, "a DICOM directory; the files beside it are read by themselves")
                yield found
            except Exception as error:
                yield rejected(ref.name, error)


def first_slice(path: Path) -> FileRef | None:
    """The first DICOM file of a zip archive, where there is one among its first members.

    Raises what zipfile raises, and Refusal for an archive that is not read.
    """
    first = itertools.islice(_members(path), FIRST_MEMBERS)
    return next((each.ref for each in first if isinstance(each, Found) and each.format == "dicom"), None)


def _recognise(ref: FileRef, *, named: bool) -> Found | PassedOver:
    """What the file is by content; raises Refusal where it is nothing that can be read."""
    with ref.open() as stream:
        head = stream.read(DIRECTORY_HEAD_BYTES)
    if head[128:132] == b"DICM":
        return Found(ref, "dicomdir" if MEDIA_STORAGE_DIRECTORY in head else "dicom", named)
    head = head[:HEAD_BYTES]
    suffix = PurePosixPath(ref.basename).suffix.lower()
    stem = PurePosixPath(ref.basename.lower()).stem
    if suffix in DOCUMENT_SUFFIXES and stem not in NO_DOCUMENTS and head and not sniff(head):
        return Found(ref, "text", named)
    sidecar = not named and (suffix in SIDECAR_SUFFIXES or ref.basename.upper() in SIDECAR_NAMES)
    if found := sniff(head):
        return Found(ref, found, named)
    if sidecar:
        return PassedOver(ref.name, "a companion file, not an image")
    if not head:
        raise Refusal("empty-file", "The file is empty (0 bytes).")
    for magic, title in _KNOWN_BUT_UNREAD:
        if head.startswith(magic):
            raise Refusal("unsupported-format", f"It is {title}, which is not read.")
    raise Refusal("not-an-image", "The content is not that of any image format that is read, whatever the file's name.")


def sniff(head: bytes) -> Format | None:
    """The format that the first `HEAD_BYTES` bytes of a file show, or None."""
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "picture"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"%PDF"):
        return "pdf"
    # A DICOM data set with no preamble opens with a tag of group 0002 or 0008 (PS3.10 section 7.1, PS3.5 section 7.1).
    if len(head) >= 8 and any(
        struct.unpack_from(order, head) in {(g, e) for g in (2, 8) for e in range(0x19)} for order in ("<HH", ">HH")
    ):
        return "dicom"
    return None


def _litter(name: str) -> str | None:
    if name in LITTER_NAMES:
        return "left by the operating system"
    return "hidden" if name.startswith(".") and name != ".." else None


def _archive(path: Path) -> zipfile.ZipFile:
    return _open_archive(path, FileRef(str(path)).state())


@functools.lru_cache(maxsize=256)
def _sha256(ref: FileRef, state: tuple[int, ...]) -> str:
    with ref.open() as stream:
        return hashlib.file_digest(cast(io.BufferedIOBase, stream), "sha256").hexdigest()


@functools.lru_cache(maxsize=4)
def _open_archive(path: Path, state: tuple[int, ...]) -> zipfile.ZipFile:
    """Kept open, because reading the directory of a large archive anew for each of its members is quadratic."""
    return zipfile.ZipFile(path)
