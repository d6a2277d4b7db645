"""Damaged files by the thousand, fed to `plan` and `load` in a child process that is watched: it must neither end nor
hang nor fill the memory.  A case is a kind of file and a seed, so that a failure can be repeated:

    .venv/bin/python tests/fuzz/fuzzing.py dcm-j2k 1234
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import picture_files
import pydicom
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

ROOT = Path(__file__).parents[2]
PHANTOM = ROOT / "examples" / "ct" / "phantom-series" / "IM0005.dcm"
SECONDS = 5.0  # of the processor, for one file
PATIENCE = 20  # times as long until an answer is given up: the machine may be busy
MAX_BYTES = 2 << 30
PICTURES = ("png", "jpeg", "tiff", "bmp", "webp", "gif")
DICOM = ("dcm", "dcm-implicit", "dcm-big", "dcm-rle", "dcm-deflated", "dcm-j2k", "dcm-jls", "dcm-jpeg8", "dcm-jpeg")
KINDS = (*PICTURES, *DICOM, "dcm-enhanced", "zip", "dicomdir", "noise", *picture_files.KINDS)
# What headers are made of, put where it does not belong.
PIECES = (
    *(b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xfe\xff\0\xe0", b"\xfe\xff\xdd\xe0", b"\xfe\xff\x0d\xe0", b"\xe0\x7f\x10\0"),
    *(b"SQ\0\0\xff\xff\xff\xff", b"UN\0\0\xff\xff\xff\xff", b"OW", b"DS", b"US", b"\x28\0\x10\0", b"\x28\0\x08\0IS"),
    *(
        b"\xff\xd8\xff",
        b"\xff\xd9",
        b"\xff\x4f\xff\x51",
        b"\xff\xc3",
        b"\xff\xda",
        b"1\\2\\3",
        b"-1e308",
        b"nan",
        b"99999999",
    ),
)
# Values for attributes that reading depends on.
ATTRIBUTES = (
    *("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelSpacing", "ImageType"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SOPClassUID", "SeriesInstanceUID", "InstanceNumber"),
    *("Modality", "WindowWidth", "SliceThickness", "PhotometricInterpretation", "SpecificCharacterSet"),
)
VALUES = (None, 0, 1, 7, 13, 65535, -1, "", "0", "1e400", "-0.0001", "nan", ["1", "2"], "x" * 300, [0.0] * 6, "1.2.3\0")


def jpeg_lossless(ds: pydicom.Dataset) -> bytes:
    """`ds` in JPEG Lossless (1.2.840.10008.1.2.4.70), which only GDCM can write."""
    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        ds.save_as(f"{folder}/plain", enforce_file_format=True)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(f"{folder}/plain")
        reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        change.Change()
        writer.SetFileName(f"{folder}/jpeg")
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.Write()
        return Path(folder, "jpeg").read_bytes()


@cache
def whole(kind: str) -> bytes:
    """A small intact file of each kind."""
    stream = io.BytesIO()
    if kind in picture_files.KINDS:
        return picture_files.whole(kind)
    if kind.startswith("dcm"):
        return _dicom(kind)
    if kind == "dicomdir":
        from pydicom.fileset import FileSet

        with tempfile.TemporaryDirectory() as folder:
            files, ds = FileSet(), pydicom.dcmread(PHANTOM)
            ds.StudyID = "1"
            files.add(ds)
            files.write(folder)
            return Path(folder, "DICOMDIR").read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as z:
            for member in ("png", "dcm"):
                z.writestr(member, whole(member))
        return stream.getvalue()
    picture = Image.fromarray((np.arange(1024, dtype=np.uint16).reshape(32, 32) % 256).astype(np.uint8))
    pages = {"save_all": True, "append_images": [picture.rotate(90)]} if kind in ("tiff", "gif") else {}
    picture.save(stream, kind, **pages)
    return stream.getvalue()


def _dicom(kind: str) -> bytes:
    stream = io.BytesIO()
    ds = pydicom.dcmread(PHANTOM)
    pixels = np.ascontiguousarray(ds.pixel_array[100:132, 40:72])
    ds.PixelData, ds.Rows, ds.Columns = pixels.tobytes(), 32, 32
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    match kind:
        case "dcm-rle":
            ds.compress(RLELossless, generate_instance_uid=False)
        case "dcm-jls":
            ds.compress(JPEGLSLossless, generate_instance_uid=False)
        case "dcm-j2k":
            ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        case "dcm-jpeg8":
            jpeg = io.BytesIO()
            Image.fromarray((pixels >> 4).astype(np.uint8)).save(jpeg, "jpeg")
            ds.PixelData = pydicom.encaps.encapsulate([jpeg.getvalue()])
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
            ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        case "dcm-jpeg":
            return jpeg_lossless(ds)
        case "dcm-deflated":
            ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        case "dcm-implicit":
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        case "dcm-big":
            ds.file_meta.TransferSyntaxUID, ds.PixelData = ExplicitVRBigEndian, pixels.byteswap().tobytes()
            plain = pydicom.Dataset()  # pydicom does not change the byte order of what it has read
            plain.update({tag: ds[tag] for tag in ds.keys()})  # noqa: SIM118
            plain.file_meta, ds = ds.file_meta, plain
        case "dcm-enhanced":
            _enhance(ds)
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _enhance(ds: pydicom.Dataset) -> None:
    """Turn a slice into an Enhanced CT of three frames."""

    def item(**values: object) -> pydicom.Dataset:
        one = pydicom.Dataset()
        for keyword, value in values.items():
            setattr(one, keyword, value)
        return one

    rescale = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    ds.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=5)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelValueTransformationSequence=[rescale],
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 5.0 * k])]) for k in range(3)
    ]
    ds.NumberOfFrames, ds.PixelData = 3, ds.PixelData * 3
    for keyword in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(ds, keyword)


def damaged(kind: str, seed: int) -> bytes:
    """The file of a case: an intact one with some bytes, or some attributes, changed."""
    chance = random.Random(f"{kind} {seed}")
    if kind == "noise":
        return chance.randbytes(chance.randrange(400))
    data = whole(kind)
    if kind.startswith("dcm") and chance.random() < 0.3:
        data = _with_odd_attributes(data, chance)
    data = bytearray(data)
    header = min(len(data), 1500)  # most of what is parsed stands in front
    for _ in range(chance.randint(0 if kind.startswith("dcm") else 1, 6)):
        at = chance.randrange(header) if chance.random() < 0.6 else chance.randrange(len(data))
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                data[at : at + 4] = chance.randbytes(4)
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(16))
            case 4:
                piece = chance.choice(PIECES)
                data[at : at + len(piece)] = piece
            case 5:
                del data[at : at + chance.randint(1, 64)]
        header = max(1, min(header, len(data)))
        if not data:
            break
    if chance.random() < 0.25:
        del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def _with_odd_attributes(data: bytes, chance: random.Random) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(data))
    for keyword in chance.sample(ATTRIBUTES, chance.randint(1, 3)):
        try:
            setattr(ds, keyword, chance.choice(VALUES))
            if chance.random() < 0.2:
                delattr(ds, keyword)
        except Exception:  # what cannot be put into a header is left
            continue
    stream = io.BytesIO()
    try:
        ds.save_as(stream)
    except Exception:
        return data
    return stream.getvalue()


@dataclass(frozen=True, slots=True)
class Watched:
    """What came of a batch of cases."""

    failures: tuple[str, ...]  # each names its case
    cases: int
    slowest: float  # seconds
    peak_bytes: int
    studies: int  # files that were read in spite of their damage


def watch(cases: Iterable[tuple[str, int]]) -> Watched:
    """Run cases in a child; after one that ends or hangs it, a new child goes on with the next."""
    left = list(cases)
    total, failures, slowest, peak, studies = len(left), [], 0.0, 0, 0
    while left:
        command = [sys.executable, __file__, "-"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            for case in list(left):
                child.stdin.write(json.dumps(case).encode() + b"\n")
                child.stdin.flush()
                answered = select.select([child.stdout], [], [], PATIENCE * SECONDS)[0]
                line = child.stdout.readline() if answered else b""
                left.pop(0)
                if not line:
                    failures.append(f"{case}: {'it ended the process' if answered else 'no answer in time'}")
                    child.kill()
                    break
                answer = json.loads(line)
                slowest, peak = max(slowest, answer["seconds"]), max(peak, answer["peak_bytes"])
                studies += answer["studies"]
                if answer["failure"] or answer["seconds"] > SECONDS:
                    failures.append(f"{case}: {answer['failure'] or 'slow'}")
            child.stdin.close()
    return Watched(tuple(failures), total, slowest, peak, studies)


def every_kind(count: int, first_seed: int = 0) -> Iterable[tuple[str, int]]:
    """`count` cases, the kinds in turn."""
    return ((kind, first_seed + n) for n, kind in zip(range(count), itertools.cycle(KINDS), strict=False))


def _run(kind: str, seed: int, folder: Path) -> dict[str, object]:
    """One case: what is wrong with the outcome, if anything, and how long it took."""
    from pipelines.ingest import load, plan
    from pipelines.study import ImageStudy, Rejection

    path = folder / ("DICOMDIR" if kind == "dicomdir" else f"{kind}-{seed}")
    data = damaged(kind, seed)
    path.write_bytes(data)
    started = sum(os.times()[:4])
    failure, studies = "", 0
    try:
        planned = plan([path])
        outcomes = [*planned.rejections, *map(load, planned.units)]
        studies = sum(isinstance(outcome, ImageStudy) for outcome in outcomes)
        if not outcomes and data and kind not in ("zip", "dicomdir"):  # these can lose all they name
            failure = "nothing came of it"
        for outcome in outcomes:
            if isinstance(outcome, ImageStudy) and not (outcome.pixels.size and np.isfinite(outcome.pixels).all()):
                failure = "pixels that are no numbers"
            if isinstance(outcome, Rejection) and not (outcome.code and outcome.reason and outcome.remedy):
                failure = "a rejection without words"
    except Exception as error:
        failure = f"{type(error).__name__} was raised"
    seconds = sum(os.times()[:4]) - started
    path.unlink()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"failure": failure, "seconds": seconds, "peak_bytes": peak, "studies": studies}


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(_run(*json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        _serve()
    else:
        print(watch([(sys.argv[1], int(sys.argv[2]))]))
