"""Every stored value becomes the right Hounsfield unit, whatever its encoding; other readers agree pixel for pixel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_doors import read, refusal
from phantom import Edit, item, one, phantom_slices, series
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from pipelines.ingest import FileRef, load, plan
from pipelines.ingest.dicom import forget_headers, read_header
from pipelines.ingest.refusals import Refusal
from pipelines.ingest.scan import scan
from pipelines.study import ImageStudy

ODD = ("CT_small.dcm", "693_J2KI.dcm", "explicit_VR-UN.dcm", "bad_sequence.dcm", "693_UNCI.dcm", "693_UNCR.dcm")


def store(values: np.ndarray, **header: object) -> Edit:
    """Put stored values and what describes them into a slice."""

    def edit(ds: Dataset) -> None:
        ds.Rows, ds.Columns = values.shape
        ds.PixelRepresentation = int(values.dtype.kind == "i")
        ds.BitsAllocated = ds.BitsStored = 8 * values.dtype.itemsize
        for keyword, value in header.items():
            setattr(ds, keyword, value)
        ds.HighBit = header.get("HighBit", ds.BitsStored - 1)
        ds.PixelData = values.tobytes()

    return edit


RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


# ---------------------------------------------------------------- stored values


@pytest.mark.parametrize("bits", [10, 12, 15])
def test_dirt_above_the_bits_stored_is_taken_off(tmp_path: Path, bits: int) -> None:
    clean = RAMP % (1 << bits)
    dirty = clean | np.uint16(0xFFFF << bits & 0xFFFF)
    study = read(one(tmp_path, store(dirty, BitsStored=bits)))
    np.testing.assert_array_equal(study.pixels[0], clean.astype(int) - 1024)
    assert "unused-bits-masked" in study.quality_flags


def test_signed_values_of_twelve_bits_get_their_sign(tmp_path: Path) -> None:
    signed = (RAMP % 4096).astype(np.int16) - 2048
    path = one(tmp_path, store(signed & np.int16(0x0FFF), BitsStored=12, RescaleIntercept=1000))
    np.testing.assert_array_equal(read(path).pixels[0], signed + 1000)


def test_values_in_the_high_bits_are_shifted_down(tmp_path: Path) -> None:
    path = one(tmp_path, store((RAMP % 4096) << np.uint16(4), BitsStored=12, HighBit=15))
    np.testing.assert_array_equal(read(path).pixels[0], (RAMP % 4096).astype(int) - 1024)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("slope", [1, 2, -1, 0.5])
def test_any_width_sign_and_slope(tmp_path: Path, dtype: type, slope: float) -> None:
    values = (RAMP % 100).astype(dtype)
    study = read(one(tmp_path, store(values, RescaleSlope=str(slope), RescaleIntercept=-100)))
    np.testing.assert_array_equal(study.pixels[0], values.astype(float) * slope - 100)
    assert study.pixels.dtype == (np.float32 if slope == 0.5 else np.int16)


def test_values_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    values = RAMP.astype(np.uint16) * 16
    study = read(one(tmp_path, store(values, RescaleIntercept=-1000)))
    np.testing.assert_array_equal(study.pixels[0], values.astype(float) - 1000)
    assert study.pixels.dtype == np.float32
    assert "implausible-hu" in study.quality_flags


def test_modality_lut_is_followed_and_its_ends_extended(tmp_path: Path) -> None:
    table = [int(v) for v in 3 * np.arange(1000)]

    def edit(ds: Dataset) -> None:
        store(RAMP)(ds)
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType
        lut = item(LUTDescriptor=[1000, 500, 16], ModalityLUTType="HU")
        lut.add_new("LUTData", "OW", np.array(table, "<u2").tobytes())
        ds.ModalityLUTSequence = [lut]

    expected = np.array(table)[np.clip(RAMP.astype(int) - 500, 0, 999)]
    np.testing.assert_array_equal(read(one(tmp_path, edit)).pixels[0], expected)


def test_modality_lut_to_another_unit_is_refused(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        ds.ModalityLUTSequence = [item(LUTDescriptor=[2, 0, 16], ModalityLUTType="OD")]

    assert refusal(one(tmp_path, edit)).code == "no-hounsfield-units"


def test_noise_below_air_is_no_padding(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 60, (64, 64)).astype(np.int16) - 30
    study = read(one(tmp_path, store(noise)))
    np.testing.assert_array_equal(study.pixels[0], noise - 1024)
    assert study.quality_flags == ()


def test_padding_range_is_masked(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        store(RAMP.astype(np.int16))(ds)
        ds.add_new("PixelPaddingValue", "SS", 10)
        ds.add_new("PixelPaddingRangeLimit", "SS", 300)

    study = read(one(tmp_path, edit))
    hidden = (RAMP >= 10) & (RAMP <= 300)
    assert (study.pixels[0][hidden] == -1024).all()
    np.testing.assert_array_equal(study.pixels[0][~hidden], RAMP[~hidden].astype(int) - 1024)


def test_padding_that_hides_tissue_is_flagged(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        ds.add_new("PixelPaddingValue", "US", int(ds.pixel_array[128, 128]))

    assert "padding-looks-like-tissue" in read(one(tmp_path, edit)).quality_flags


def test_colour_floats_and_odd_widths_are_refused(tmp_path: Path) -> None:
    def floats(ds: Dataset) -> None:
        del ds.PixelData
        ds.FloatPixelData = np.zeros(256 * 256, np.float32).tobytes()

    assert refusal(one(tmp_path, floats)).code == "unsupported-pixel-format"
    assert refusal(one(tmp_path, lambda ds: setattr(ds, "BitsAllocated", 12))).code == "unsupported-pixel-format"


# ---------------------------------------------------------------- compressed values


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_children_and_this_process_decode_alike(tmp_path: Path, syntax: str) -> None:
    slices = phantom_slices()
    plain = read(series(tmp_path / "plain", slices))
    for ds in slices:
        ds.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read(series(tmp_path / "packed", slices)).pixels, plain.pixels)
    alone = read(tmp_path / "packed" / "003.dcm")  # too few frames for a child
    np.testing.assert_array_equal(alone.pixels[0], plain.pixels[3])


def test_fragments_without_an_offset_table_are_joined(tmp_path: Path) -> None:
    ds = phantom_slices()[5]
    expected = ds.pixel_array.astype(int) - 1024
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([stream], fragments_per_frame=5, has_bot=False)
    ds.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read(tmp_path / "a.dcm").pixels[0], expected)


def test_compressed_pixels_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    ds = phantom_slices()[5]
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.save_as(tmp_path / "a.dcm")
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(data[:-5000])
    assert refusal(tmp_path / "a.dcm").code == "truncated"


def test_stream_of_another_size_is_refused(tmp_path: Path) -> None:
    ds = phantom_slices()[5]
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.Rows = 128
    ds.save_as(tmp_path / "a.dcm")
    assert refusal(tmp_path / "a.dcm").code == "damaged-image"


def test_a_child_that_dies_costs_its_frame_alone(tmp_path: Path) -> None:
    """GDCM ends its process on some streams; here the child is ended from outside, which it survives as little."""
    from pipelines.ingest import codecs

    slices = phantom_slices()
    for ds in slices:
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    folder = series(tmp_path / "s", slices)
    first = read(folder)
    for child in codecs._children._idle:
        child.kill()
    np.testing.assert_array_equal(read(folder).pixels, first.pixels)


CHILD = """
import os, time
from pipelines.ingest import decoders
from pipelines.ingest.decoders import decode
decoders.SECONDS = {seconds}
def slow(frame):
    {what}
    return decode(frame)
decoders.decode = slow
decoders._serve()
"""


@pytest.mark.parametrize(
    ("what", "seconds", "patience", "read_all_the_same"),
    [
        ("time.sleep(4)", 3, 20, True),  # as where the machine has other work
        ("while True: pass", 0.2, 200, False),
        ("time.sleep(60)", 0.2, 2, False),
    ],
    ids=["waits", "computes for ever", "hangs"],
)
def test_a_child_may_take_its_time_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, what: str, seconds: float, patience: int, read_all_the_same: bool
) -> None:
    from pipelines.ingest import codecs, decoders

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD.format(what=what, seconds=seconds)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(codecs, "_start", start)
    monkeypatch.setattr(codecs, "_children", codecs._Children())
    monkeypatch.setattr(codecs, "PATIENCE", patience)
    monkeypatch.setattr(decoders, "SECONDS", seconds)
    ds = phantom_slices()[0]
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    [stream] = generate_frames(ds.PixelData, number_of_frames=1)
    frame = decoders.Frame(JPEG2000Lossless, ds.Rows, ds.Columns, 16, ds.BitsStored, True, "gdcm", stream)
    try:
        if read_all_the_same:
            assert codecs._children.decode(frame) == decoders.decode(frame)
        else:
            with pytest.raises(Refusal) as refused:
                codecs._children.decode(frame)
            assert refused.value.code == "decoding-timed-out"
    finally:
        codecs._children.close()


# ---------------------------------------------------------------- the quick header scan


@pytest.mark.parametrize("name", ODD)
def test_scanned_header_is_that_of_the_full_parser(
    shared_data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = get_testdata_file(name, download=False)
    found = Path(path) if path else shared_data / "dicom" / "odd" / "data" / name
    agree(found, monkeypatch)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scanned_header_is_that_of_the_full_parser_for_any_attribute(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    texts = st.text("abc123 .\\-", max_size=12)

    def edit(ds: Dataset) -> None:
        for keyword in ("SeriesDescription", "ScanOptions", "ImageType", "RescaleType", "Manufacturer", "StudyID"):
            setattr(ds, keyword, data.draw(texts))
        ds.InstanceNumber = data.draw(st.integers(-5, 10**6))
        ds.ImagePositionPatient = [data.draw(st.floats(-1e4, 1e4).map(lambda v: round(v, 3))) for _ in range(3)]
        ds.RequestAttributesSequence = [item(StudyID="x") for _ in range(data.draw(st.integers(0, 2)))]
        ds["RequestAttributesSequence"].is_undefined_length = data.draw(st.booleans())

    with pytest.MonkeyPatch.context() as monkeypatch:
        agree(one(tmp_path_factory.mktemp("s"), edit), monkeypatch)


def agree(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_headers()
    quick = read_header(FileRef(str(path)))
    assert scan(path.read_bytes()[: 1 << 16]) is not None or "transfer" in str(quick)
    monkeypatch.setattr("pipelines.ingest.dicom.scan", lambda head: None)
    forget_headers()
    assert read_header(FileRef(str(path))) == quick
    monkeypatch.undo()


# ---------------------------------------------------------------- other readers

READ_WITH_GDCM = """
import sys, gdcm, numpy
folder, *paths = sys.argv[1:]
for number, path in enumerate(paths):
    reader = gdcm.ImageReader(); reader.SetFileName(path)
    assert reader.Read(), path
    image = reader.GetImage(); form = image.GetPixelFormat()
    kind = ("i" if form.GetPixelRepresentation() else "u") + str(form.GetBitsAllocated() // 8)
    values = numpy.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), kind)
    numpy.save(f"{folder}/{number}.npy", values * image.GetSlope() + image.GetIntercept())
"""


def real_files(shared_data: Path) -> list[Path]:
    """Real CT files in many encodings."""
    root = shared_data / "dicom"
    own = [Path(path) for name in ODD if (path := get_testdata_file(name, download=False))]
    return [
        *own,
        *sorted((root / "transfer-syntaxes" / "testImages").iterdir()),
        *sorted((root / "odd" / "data").iterdir()),
    ]


def agrees(study: ImageStudy, hu: np.ndarray) -> None:
    """All pixels but padding, which is -1024 HU here."""
    theirs = hu.reshape(study.pixels.shape)
    kept = study.pixels != -1024
    np.testing.assert_allclose(study.pixels[kept], theirs[kept], atol=1e-3)
    masked = theirs[~kept]
    assert ((masked == -1024) | (masked < -1100)).all()


def test_gdcm_agrees_pixel_for_pixel(shared_data: Path, tmp_path: Path) -> None:
    studies = {
        path: study
        for path in real_files(shared_data)
        for study in map(load, plan([path]).units)
        if isinstance(study, ImageStudy) and study.units == "HU"
    }
    assert len(studies) >= 18
    # GDCM may end its process, so it gets one of its own
    subprocess.run([sys.executable, "-c", READ_WITH_GDCM, tmp_path, *studies], check=True)
    for number, study in enumerate(studies.values()):
        agrees(study, np.load(tmp_path / f"{number}.npy"))


@pytest.mark.skipif(shutil.which("dcmdjpeg") is None, reason="DCMTK (dcmdjpeg, dcmdjpls, dcmdrle) is not installed")
@pytest.mark.parametrize(
    ("suffix", "tool"),
    [
        ("4.50", "dcmdjpeg"),
        ("4.51", "dcmdjpeg"),
        ("4.57", "dcmdjpeg"),
        ("4.70", "dcmdjpeg"),
        ("4.80", "dcmdjpls"),
        ("4.81", "dcmdjpls"),
        ("1.2.5", "dcmdrle"),
        ("1.2.2", "dcmconv"),
        ("1.99", "dcmconv"),
    ],
)
def test_dcmtk_agrees_pixel_for_pixel(shared_data: Path, tmp_path: Path, suffix: str, tool: str) -> None:
    folder = shared_data / "dicom" / "transfer-syntaxes" / "testImages"
    path = next(
        each for each in sorted(folder.iterdir()) if each.name.endswith(f"{suffix}.dcm") and "CTImage" in each.name
    )
    options = ["+te"] if tool == "dcmconv" else []
    subprocess.run([tool, *options, path, tmp_path / "plain.dcm"], check=True, capture_output=True)
    ds = pydicom.dcmread(tmp_path / "plain.dcm")
    agrees(read(path), ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept))
