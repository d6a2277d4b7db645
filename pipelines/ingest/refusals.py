"""Why an input is refused: every code that ingest can give, each with the sentence that says how to mend it.

Codes are stable: users filter `rejected.jsonl` by them. Reasons never quote header values that could name a patient.
"""

from __future__ import annotations

import zipfile
import zlib
from typing import Final

from pipelines.study import Rejection

REMEDIES: Final[dict[str, str]] = {
    # files and folders
    "not-found": "Check the path: there is no such file or folder.",
    "decoding-timed-out": "Run again when the machine is less busy; if it ends the same way, export it uncompressed.",
    "unreadable": "Check the permissions of the file and of the disk that it is on, then run again.",
    "empty-file": "Copy the file again from where it came from: it holds no bytes.",
    "empty-folder": "Name a folder that holds images.",
    "not-a-file": "Name a regular file, a folder or a zip archive.",
    "not-an-image": "Give a PNG, JPEG, TIFF, BMP, WebP, GIF, PDF or DICOM CT file; leave this one out.",
    "unsupported-format": "Convert it to PNG, TIFF or DICOM first.",
    "too-large": "Cut or scale the image below the limit, or split the file.",
    # archives
    "damaged-archive": "Make the archive again, or unpack it and name the folder.",
    "password-locked": "Unpack the archive with its password and name the folder.",
    "nested-archive": "Unpack the inner archive and name its folder.",
    "duplicate-member": "Rename or leave out one of the two and make the archive again.",
    "archive-bomb": "If the content is genuine, unpack the archive and name the folder.",
    # documents
    "document-alone": "Put it into the folder of the images that it speaks of, or leave it out.",
    "encrypted-document": "Save the PDF without a password, then run again.",
    "damaged-document": "Open it in a PDF viewer and print or export it to a new PDF.",
    "not-text": "Save it as plain text in UTF-8, or leave it out.",
    # pictures
    "truncated": "Copy or export the file again: its end is missing.",
    "damaged-image": "Open it in an image viewer and save it again, or export it again from its source.",
    "damaged-file": "Copy or export the file again: its content breaks the rules of its format.",
    "no-pixels": "Give a file that holds an image; leave this one out.",
    "too-small": "Give the picture at its full size.",
    "blank-image": "Take or export the picture again; leave this one out.",
    "unsupported-pixel-format": "Save it as 8 or 16 bit grey, or as 8 bit RGB.",
    # DICOM
    "not-ct": "Give CT series only; this modality cannot be reported.",
    "not-ct-image": "Give the original CT slices; screenshots and captures carry no Hounsfield units.",
    "dose-report": "Nothing to mend: dose reports go with the study. Leave it out to silence this line.",
    "localizer": "Nothing to mend: localizers (scouts) only plan the scan. Leave it out to silence this line.",
    "no-hounsfield-units": "Give the original series with Rescale Slope and Intercept to Hounsfield units.",
    "unsupported-transfer-syntax": "Convert it to Explicit VR Little Endian or JPEG 2000 Lossless, then run again.",
    "duplicate-slice": "Leave out one of the two copies, or give each phase of the scan its own series.",
    "missing-from-file-set": "Copy the whole medium again, or make its DICOMDIR anew.",
    "path-traversal": "Make the archive or the DICOMDIR again with names that stay inside its own folder.",
}


class Refusal(Exception):  # noqa: N818 - a refused input is an expected outcome, not a fault of the program
    """Raised inside ingest where an input cannot be used; becomes a `Rejection` at the door."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class MissingPackageError(Exception):
    """A package that reading needs is not installed: no fault of any input."""

    code = "environment"

    def __init__(self, package: str | None) -> None:
        super().__init__(package)
        self.package = package

    def __str__(self) -> str:
        return f"The package {self.package} is not installed: run `make setup`, then `scanscribe doctor`."


def rejection(path: str, code: str, reason: str) -> Rejection:
    """The rejection of `path`, with the remedy that belongs to `code`."""
    return Rejection(path, code, reason, REMEDIES[code])


def rejected(path: str, error: Exception) -> Rejection:
    """What went wrong with `path`, whatever was raised. Texts of foreign errors stay out: they can quote headers.

    Raises MissingPackageError: then nothing is wrong with `path`.
    """
    match error:
        case MissingPackageError():
            raise error
        case ModuleNotFoundError():
            raise MissingPackageError(error.name) from error
        case Refusal():
            return rejection(path, error.code, error.reason)
        case PermissionError():
            return rejection(path, "unreadable", "Reading the file is not permitted.")
        case FileNotFoundError():
            return rejection(path, "not-found", "The file does not exist, or is a link to nothing.")
        case zipfile.BadZipFile() | zlib.error():
            return rejection(path, "damaged-archive", "The compressed data is damaged.")
        case OSError():
            return rejection(path, "unreadable", f"The file could not be read ({type(error).__name__}).")
        case MemoryError():
            return rejection(path, "too-large", "There is not enough memory to decode it.")
    return rejection(path, "damaged-file", f"The content could not be decoded ({type(error).__name__}).")
