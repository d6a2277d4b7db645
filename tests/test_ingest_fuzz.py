"""Damaged bytes of every format: `plan` and `load` answer with a study or a rejection, soon, and never raise."""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from functools import cache
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from pipelines.ingest import load, plan
from pipelines.study import ImageStudy, Rejection

PHANTOM = Path(__file__).parents[1] / "examples" / "ct" / "phantom-series"
SECONDS = 3.0
PICTURES = ("png", "jpeg", "tiff", "bmp", "webp", "gif")
FORMATS = (*PICTURES, "dcm", "dcm-rle", "dcm-deflated", "dcm-j2k", "dcm-jls", "dcm-jpeg", "zip")


@cache
def whole(kind: str) -> bytes:
    """A small intact file of each format."""
    stream = io.BytesIO()
    if kind.startswith("dcm"):
        ds = pydicom.dcmread(PHANTOM / "IM0005.dcm")
        ds.PixelData = np.ascontiguousarray(ds.pixel_array[100:132, 40:72]).tobytes()
        ds.Rows = ds.Columns = 32
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        match kind:
            case "dcm-rle":
                ds.compress(RLELossless, generate_instance_uid=False)
            case "dcm-jls":
                ds.compress(JPEGLSLossless, generate_instance_uid=False)
            case "dcm-j2k":
                codestream = io.BytesIO()
                Image.fromarray(ds.pixel_array).save(codestream, "jpeg2000", no_jp2=True)
                ds.PixelData = pydicom.encaps.encapsulate([codestream.getvalue()])
                ds.BitsStored, ds.HighBit = 16, 15
                ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
            case "dcm-jpeg":
                return jpeg_lossless(ds)
            case "dcm-deflated":
                ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(stream, enforce_file_format=True)
    elif kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as z:
            for member in ("png", "dcm"):
                z.writestr(member, whole(member))
    else:
        picture = Image.fromarray((np.arange(1024, dtype=np.uint16).reshape(32, 32) % 256).astype(np.uint8))
        pages = {"save_all": True, "append_images": [picture.rotate(90)]} if kind in ("tiff", "gif") else {}
        picture.save(stream, kind, **pages)
    return stream.getvalue()


def jpeg_lossless(ds: pydicom.Dataset) -> bytes:
    """`ds` in JPEG Lossless (1.2.840.10008.1.2.4.70), which only GDCM can write."""
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


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(FORMATS))
    data = bytearray(whole(kind))
    header = min(len(data), 700)  # most of what is parsed stands in front
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, header - 1) | st.integers(0, len(data) - 1))
        match draw(st.sampled_from(("flip", "value", "word", "insert", "delete"))):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "value":
                data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
            case "word":
                data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "delete":
                del data[at : at + draw(st.integers(1, 64))]
        header = max(1, min(header, len(data)))
        if not data:
            break
    cut = draw(st.just(len(data)) | st.integers(0, len(data)))
    return kind, bytes(data[:cut])


def outcomes(path: Path) -> list[ImageStudy | Rejection]:
    planned = plan([path])
    return [*planned.rejections, *map(load, planned.units)]


@given(damaged())
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_damaged_files_give_a_study_or_a_rejection(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, bytes]
) -> None:
    kind, data = case
    path = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    path.write_bytes(data)
    started = time.perf_counter()
    results = outcomes(path)
    assert time.perf_counter() - started < SECONDS
    assert results or not data or kind == "zip"  # an archive's directory can lose every member but litter
    for result in results:
        assert isinstance(result, ImageStudy | Rejection)
        if isinstance(result, ImageStudy):
            assert result.pixels.size
            assert np.isfinite(result.pixels).all()


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_bytes_give_a_study_or_a_rejection(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-any"
    path.write_bytes(data)
    assert outcomes(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_intact_files_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).write_bytes(whole(kind))
    results = outcomes(tmp_path / kind)
    assert results
    assert all(isinstance(result, ImageStudy) for result in results)
