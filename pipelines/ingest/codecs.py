"""Which transfer syntaxes are read, and compressed frames to arrays: in this process or in child processes.

Measured on one 512 x 512 slice: JPEG Baseline (Pillow) runs twice as fast on two threads; JPEG 2000, JPEG-LS, RLE and
GDCM's JPEG Lossless gain nothing, because their bindings keep the global lock.  Those go to children, if there are
several frames.  A frame's way to a child and back costs 0.5 ms, a child's start 0.1 s (GDCM) to 0.5 s.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from typing import Final

import numpy as np

from pipelines.ingest import decoders
from pipelines.ingest.decoders import CODECS, Frame, receive, send
from pipelines.ingest.jpeg_stream import checked_stream, size_of
from pipelines.ingest.refusals import Refusal

CORES: Final = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
PATIENCE: Final = 20  # times what a child may compute on a frame, until it is taken for dead: the machine may be busy
MARGIN: Final = 4096  # bytes of an answer beside its values
MANY: Final = 8  # frames: from here on children are worth their start
NATIVE: Final = {  # transfer syntaxes of pixels that are not compressed -> byte order
    "1.2.840.10008.1.2": "<",
    "1.2.840.10008.1.2.1": "<",
    "1.2.840.10008.1.2.1.99": "<",
    "1.2.840.10008.1.2.2": ">",
}
LOSSY: Final = frozenset((decoders.JPEG_BASELINE, decoders.JPEG_EXTENDED, "1.2.840.10008.1.2.4.81"))  # by themselves
_PACKAGES: Final = {
    "pydicom": "pydicom",
    "pillow": "PIL",
    "pyjpegls": "jpeg_ls",
    "pylibjpeg": "openjpeg",
    "gdcm": "gdcm",
}
END_OF_IMAGE: Final = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 alike


@functools.cache
def reads(syntax: str) -> bool:
    """Whether pixels in this transfer syntax can be decoded here."""
    return syntax in NATIVE or (syntax in CODECS and importlib.util.find_spec(_PACKAGES[CODECS[syntax]]) is not None)


def decode(frame: Frame, *, frames: int) -> np.ndarray:
    """Stored values `[H, W]` of one frame out of `frames` that are asked for. Raises Refusal."""
    _check(frame)
    if frame.codec == "gdcm":
        stream = checked_stream(frame.stream, frame.rows, frame.columns, frame.bits_allocated)
        answer = _children.decode(replace(frame, stream=stream))
    elif frame.codec != "pillow" and frames >= MANY and CORES > 1:
        # GDCM takes two thirds of OpenJPEG's own time, and is safe in a child.
        swift = replace(frame, codec="gdcm") if frame.syntax.startswith(decoders.JPEG_2000) else frame
        answer = _children.decode(swift) or _here(frame)
    else:
        answer = _here(frame)
    if answer is None:
        raise Refusal("damaged-image", "The pixel data could not be decoded.")
    kind, values = answer
    array = np.frombuffer(values, kind)
    if array.size != frame.rows * frame.columns:
        raise Refusal("damaged-image", "The compressed image is of another size than the header says.")
    return array.reshape(frame.rows, frame.columns)


def _check(frame: Frame) -> None:
    """Refuse streams that would be decoded in part, or into an image of another size."""
    if frame.syntax == decoders.RLE:
        # Two bytes make 128 at most (PS3.5 G.3); a longer image would only be room set aside.
        fits = frame.rows * frame.columns * frame.bits_allocated // 8 <= 64 * len(frame.stream)
    else:
        if END_OF_IMAGE not in frame.stream[-64:]:
            raise Refusal("truncated", "The compressed pixel data ends too early.")
        fits = size_of(frame.stream) == (frame.rows, frame.columns)
    if not fits:
        raise Refusal("damaged-image", "The compressed image is of another size than the header says.")


def _here(frame: Frame) -> tuple[str, bytes] | None:
    try:
        return decoders.decode(frame)
    except MemoryError:
        raise
    except Exception:  # every codec has its own types of error
        return None


class _Children:
    """Child processes that decode, started when first needed; one that fails or hangs is replaced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.Semaphore(CORES)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._owner = os.getpid()

    def decode(self, frame: Frame) -> tuple[str, bytes] | None:
        """What `decoders.decode` gives; None where it fails."""
        with self._lock:
            if self._owner != os.getpid():  # after a fork the children are the parent's
                self._idle, self._owner = [], os.getpid()
        with self._places:
            return self._ask(frame)

    def _ask(self, frame: Frame) -> tuple[str, bytes] | None:
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or _start()
        assert child.stdin is not None and child.stdout is not None
        try:
            facts = asdict(frame)
            send(child.stdin, {k: v for k, v in facts.items() if k != "stream"}, frame.stream)
            if not select.select([child.stdout], [], [], PATIENCE * decoders.seconds(frame))[0]:
                raise Refusal("decoding-timed-out", "Decoding the pixel data took too long.")
            kind, values = receive(child.stdout, most=8 * frame.rows * frame.columns + MARGIN)
        except (OSError, EOFError, ValueError, TypeError) as error:  # it ended, or what it writes is no answer
            _end(child)
            if child.returncode == -signal.SIGPROF:
                raise Refusal("decoding-timed-out", "Decoding the pixel data took too long.") from error
            return None
        except BaseException:
            _end(child)
            raise
        with self._lock:
            self._idle.append(child)
        return None if kind is None else (str(kind), values)

    def close(self) -> None:
        with self._lock:
            children, self._idle = self._idle, []
        if self._owner == os.getpid():
            for child in children:
                _end(child)


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", decoders.__file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be flushed is lost with the child
                pipe.close()


_children = _Children()
atexit.register(_children.close)
