"""Compressed frames to stored values; run as a script, the same in a child process.

A child is worth its start where the codec holds Python's global lock (all but Pillow's) and there are many frames, and
is a must for GDCM, which ends its whole process on some damaged streams.  Imports nothing of this project, so that a
child that serves GDCM alone starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import IO, Any, Final

MAX_BYTES: Final = 4 << 30  # of a child's memory
SIZE_BYTES: Final = 8
SECONDS: Final = 3.0  # of the processor that a child may take for one frame, and one more for each million pixels

RLE: Final = "1.2.840.10008.1.2.5"
JPEG_BASELINE: Final = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS: Final = "1.2.840.10008.1.2.4.57"
JPEG_LOSSLESS_SV1: Final = "1.2.840.10008.1.2.4.70"
JPEG_2000: Final = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
CODECS: Final = {  # transfer syntax -> the codec that reads it
    RLE: "pydicom",
    JPEG_BASELINE: "pillow",
    JPEG_EXTENDED: "gdcm",
    JPEG_LOSSLESS: "gdcm",
    JPEG_LOSSLESS_SV1: "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One compressed frame of one component, and what the header says of it."""

    syntax: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    codec: str
    stream: bytes


def codec_of(syntax: str, bits_stored: int) -> str:
    """The codec that reads such a frame in any process."""
    # GDCM reads the 12-bit streams of JPEG Extended, which Pillow does not.
    return "pillow" if syntax == JPEG_EXTENDED and bits_stored <= 8 else CODECS[syntax]


def decode(frame: Frame) -> tuple[str, bytes]:
    """(numpy type, values row by row). Raises whatever the codec raises."""
    if frame.codec == "gdcm" and not frame.syntax.startswith(JPEG_2000):
        return _with_gdcm(frame)
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    options: Any = dict(  # pydicom's own hints take no keywords
        rows=frame.rows,
        columns=frame.columns,
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=frame.bits_allocated,
        bits_stored=frame.bits_stored,
        pixel_representation=int(frame.signed),
        photometric_interpretation="MONOCHROME2",
        pixel_keyword="PixelData",
    )
    stream = encapsulate([frame.stream])
    array, _ = get_decoder(UID(frame.syntax)).as_array(stream, index=0, decoding_plugin=frame.codec, **options)
    return array.dtype.str, array.tobytes()


def _with_gdcm(frame: Frame) -> tuple[str, bytes]:
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame.stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((frame.columns, frame.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(frame.syntax)))
    high_bit = frame.bits_stored - 1
    image.SetPixelFormat(gdcm.PixelFormat(1, frame.bits_allocated, frame.bits_stored, high_bit, int(frame.signed)))
    values = image.GetBuffer()
    if values is None:
        raise ValueError("GDCM cannot read the stream")
    # GDCM hands bytes over as text
    return f"<{'i' if frame.signed else 'u'}{frame.bits_allocated // 8}", values.encode("utf-8", "surrogateescape")


def seconds(frame: Frame) -> float:
    """How long a child may compute on a frame: damaged streams make some codecs do so for ever."""
    return SECONDS + frame.rows * frame.columns / 1e6


def send(pipe: IO[bytes], facts: Any, data: bytes) -> None:
    """Write some plain values (JSON) and some bytes, each with its size in front."""
    for part in (json.dumps(facts).encode(), data):
        pipe.write(len(part).to_bytes(SIZE_BYTES, "little"))
        pipe.write(part)
    pipe.flush()


def receive(pipe: IO[bytes], most: int = MAX_BYTES) -> tuple[Any, bytes]:
    """Read what `send` wrote. Raises EOFError where the other side has gone, ValueError for a part above `most` bytes.

    Nothing but JSON and bytes passes: a codec that a damaged stream has taken over cannot run code on the other side.
    """
    parts = []
    for _ in range(2):
        size = pipe.read(SIZE_BYTES)
        if len(size) < SIZE_BYTES:
            raise EOFError
        length = int.from_bytes(size, "little")
        if length > most:
            raise ValueError("more than a frame can hold")
        parts.append(pipe.read(length))
    return json.loads(parts[0]), parts[1]


def _serve() -> None:
    """Answer frames from standard input with type and values, null where the codec fails, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for chatty in (1, 2):  # codecs print what they find odd
        os.dup2(quiet, chatty)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            facts, stream = receive(sys.stdin.buffer)
        except EOFError:
            return
        frame = Frame(stream=stream, **facts)
        signal.setitimer(signal.ITIMER_PROF, seconds(frame))  # by processor time; SIGPROF then ends the process
        try:
            dtype, values = decode(frame)
        except Exception:
            send(answers, None, b"")
        else:
            send(answers, dtype, values)


if __name__ == "__main__":
    _serve()
