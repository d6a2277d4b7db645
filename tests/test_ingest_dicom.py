"""CT series through `plan` and `load`: which files are taken, in which order, and that every HU is right."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from ingest_doors import read, refusal
from phantom import PHANTOM, Edit, item, one, phantom_slices, series
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from pipelines.ingest import load, plan
from pipelines.study import ImageStudy


@pytest.fixture(scope="module")
def phantom() -> ImageStudy:
    return read(PHANTOM)


# ---------------------------------------------------------------- order and geometry


def test_gap_is_flagged_and_spacing_withheld(tmp_path: Path) -> None:
    slices = phantom_slices()
    del slices[4:6]
    study = read(series(tmp_path / "s", slices))
    assert study.quality_flags == ("missing-slices",)
    assert study.geometry.slice_spacing_mm is None
    assert study.pixels.shape[0] == 10


def test_uneven_slices_are_flagged(tmp_path: Path) -> None:
    slices = phantom_slices()
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[2] += 0.07 * k * k
    assert read(series(tmp_path / "s", slices)).quality_flags == ("irregular-spacing",)


def test_sheared_series_is_flagged(tmp_path: Path) -> None:
    slices = phantom_slices()
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[1] += 1.0 * k
    study = read(series(tmp_path / "s", slices))
    assert study.quality_flags == ("gantry-tilt",)
    assert study.geometry.slice_spacing_mm == pytest.approx(5.0)


def test_coronal_series_is_ordered_along_its_own_normal(tmp_path: Path) -> None:
    slices = phantom_slices()[::-1]
    for k, ds in enumerate(slices):
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        ds.ImagePositionPatient = [-178.5, -20.0 - 3 * k, 100.0]
    study = read(series(tmp_path / "s", slices))
    assert study.geometry.positions_mm is not None
    y = [position[1] for position in study.geometry.positions_mm]
    assert y == sorted(y)
    assert study.geometry.slice_spacing_mm == pytest.approx(3.0)


def test_identical_copy_of_an_instance_is_passed_over_with_a_note(tmp_path: Path, phantom: ImageStudy) -> None:
    slices = phantom_slices()
    folder = series(tmp_path / "s", [*slices, slices[3]])
    planned = plan([folder])
    assert [(each.path, each.reason) for each in planned.passed_over] == [
        (str(folder / "012.dcm"), f"a copy of {folder / '003.dcm'}, byte for byte")
    ]
    study = read(folder)
    assert study.quality_flags == ()
    np.testing.assert_array_equal(study.pixels, phantom.pixels)


def test_another_slice_at_the_same_place_is_left_out_and_named(tmp_path: Path, phantom: ImageStudy) -> None:
    slices, other = phantom_slices(), phantom_slices()[3]
    other.SOPInstanceUID, other.InstanceNumber = generate_uid(), 99
    study = load(plan([series(tmp_path / "s", [*slices, other])]).units[0])
    assert isinstance(study, ImageStudy)
    assert study.quality_flags == ("duplicate-slices",)
    assert [(Path(r.path).name, r.code) for r in study.rejected_sources] == [("012.dcm", "duplicate-slice")]
    np.testing.assert_array_equal(study.pixels, phantom.pixels)


def test_lossless_copy_wins_over_a_lossy_one(tmp_path: Path) -> None:
    lossy, lossless = phantom_slices()[5], phantom_slices()[5]
    lossy.LossyImageCompression = "01"
    study = load(plan([series(tmp_path / "s", [lossy, lossless])]).units[0])
    assert isinstance(study, ImageStudy)
    assert study.quality_flags == ("duplicate-slices",)
    assert study.sources[0].path.endswith("001.dcm")


def test_without_positions_instance_numbers_give_the_order(tmp_path: Path, phantom: ImageStudy) -> None:
    slices = phantom_slices()
    for ds in slices:
        del ds.ImagePositionPatient
    study = read(series(tmp_path / "s", slices[::-1]))
    assert study.quality_flags == ("missing-geometry",)
    assert study.geometry.positions_mm is None
    np.testing.assert_array_equal(study.pixels, phantom.pixels)


def test_orientations_and_sizes_within_a_series_become_units_of_their_own(tmp_path: Path) -> None:
    slices = phantom_slices()
    for ds in slices[8:]:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    for ds in slices[:2]:
        ds.Rows, ds.PixelData = 128, ds.PixelData[: 128 * 256 * 2]
    units = plan([series(tmp_path / "s", slices)]).units
    assert [(unit.name, len(unit.files)) for unit in units] == [
        ("series 1 part 1", 2),
        ("series 1 part 2", 6),
        ("series 1 part 3", 4),
    ]


def test_two_series_in_one_folder_are_two_units(tmp_path: Path) -> None:
    slices, uid = phantom_slices(), generate_uid()
    for ds in slices[::2]:
        ds.SeriesInstanceUID, ds.SeriesNumber = uid, 2
    assert {(u.name, len(u.files)) for u in plan([series(tmp_path / "s", slices)]).units} == {
        ("series 1", 6),
        ("series 2", 6),
    }


def test_key_depends_on_content_alone(tmp_path: Path, phantom: ImageStudy) -> None:
    for k, path in enumerate(sorted(PHANTOM.iterdir(), reverse=True)):
        shutil.copy(path, tmp_path / f"renamed-{k}")
    assert read(tmp_path).key == phantom.key


# ---------------------------------------------------------------- Hounsfield units


def test_rescale_is_applied_slice_by_slice(tmp_path: Path, phantom: ImageStudy) -> None:
    slices = phantom_slices()
    stored = slices[3].pixel_array.astype(np.uint16)
    slices[3].PixelData = (stored + 1000).astype("<u2").tobytes()
    slices[3].BitsStored, slices[3].HighBit, slices[3].RescaleIntercept = 16, 15, -2024
    study = read(series(tmp_path / "s", slices))
    assert study.pixels.dtype == np.int16
    np.testing.assert_array_equal(study.pixels, phantom.pixels)


def test_fractional_rescale_gives_float32(tmp_path: Path) -> None:
    path = one(tmp_path, lambda ds: setattr(ds, "RescaleSlope", "0.5"))
    study = read(path)
    assert study.pixels.dtype == np.float32
    np.testing.assert_allclose(study.pixels[0], phantom_slices()[5].pixel_array * 0.5 - 1024)


def test_monochrome1_leaves_hounsfield_units_alone(tmp_path: Path, phantom: ImageStudy) -> None:
    study = read(one(tmp_path, lambda ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1")))
    np.testing.assert_array_equal(study.pixels[0], phantom.pixels[5])


@pytest.mark.parametrize("declared", [True, False])
def test_padding_becomes_air(tmp_path: Path, declared: bool, phantom: ImageStudy) -> None:
    def pad(ds: Dataset) -> None:
        stored = ds.pixel_array.astype(np.int16)
        stored[:40] = 4000 if declared else -2000
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
        ds.PixelData = stored.astype("<i2").tobytes()
        if declared:
            ds.add_new("PixelPaddingValue", "SS", 4000)

    study = read(one(tmp_path, pad))
    assert study.quality_flags == ("padding-masked",)
    assert (study.pixels[0, :40] == -1024).all()
    np.testing.assert_array_equal(study.pixels[0, 40:], phantom.pixels[5, 40:])


def test_padding_that_is_written_unsigned_for_signed_pixels(tmp_path: Path) -> None:
    def pad(ds: Dataset) -> None:
        stored = ds.pixel_array.astype(np.int16)
        stored[:40] = -20
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
        ds.PixelData = stored.astype("<i2").tobytes()
        ds.add_new("PixelPaddingValue", "US", 65516)  # the bits of -20

    assert (read(one(tmp_path, pad)).pixels[0, :40] == -1024).all()


def test_window_kernel_and_identity_come_from_the_header(phantom: ImageStudy) -> None:
    ds = phantom_slices()[0]
    assert phantom.window == (-600.0, 1500.0)
    assert phantom.kernel == "PHANTOM"
    assert phantom.study_uid == ds.StudyInstanceUID
    assert phantom.series_uid == ds.SeriesInstanceUID
    assert phantom.sources[0].sop_instance_uid == ds.SOPInstanceUID


def test_data_set_without_preamble_meta_and_sop_class(tmp_path: Path, phantom: ImageStudy) -> None:
    ds = phantom_slices()[5]
    ds.SOPClassUID = ds.SeriesInstanceUID = ""
    bare = Dataset()
    bare.update(ds)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, bare, implicit_vr=True, little_endian=True, enforce_file_format=False)
    path = tmp_path / "IM0001"
    path.write_bytes(stream.getvalue())
    np.testing.assert_array_equal(read(path).pixels[0], phantom.pixels[5])


def test_unspecified_rescale_type_on_original_slices_is_flagged(tmp_path: Path) -> None:
    study = read(one(tmp_path, lambda ds: setattr(ds, "RescaleType", "US")))
    assert study.quality_flags == ("unspecified-rescale-type",)


# ---------------------------------------------------------------- enhanced CT


def enhanced() -> Dataset:
    """The phantom as one Enhanced CT file, its frames in falling order and with rescales of their own."""
    slices = phantom_slices()[::-1]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "Rows", "Columns"):
        setattr(ds, keyword, slices[0][keyword].value)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.NumberOfFrames = EnhancedCTImageStorage, generate_uid(), len(slices)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    shared = Dataset()
    shared.PixelMeasuresSequence = [item(PixelSpacing=[1.4, 1.4], SliceThickness=5)]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.FrameVOILUTSequence = [item(WindowCenter=40, WindowWidth=400)]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames, pixels = [], b""
    for k, s in enumerate(slices):
        frame = Dataset()
        frame.PlanePositionSequence = [item(ImagePositionPatient=list(s.ImagePositionPatient))]
        rescale = item(RescaleSlope=1, RescaleIntercept=-1024 - k, RescaleType="HU")
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
        pixels += (s.pixel_array + k).astype("<u2").tobytes()
    ds.PerFrameFunctionalGroupsSequence, ds.PixelData = frames, pixels
    return ds


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_enhanced_ct_equals_the_single_slices(tmp_path: Path, syntax: str, phantom: ImageStudy) -> None:
    ds = enhanced()
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    study = read(tmp_path / "multi.dcm")
    np.testing.assert_array_equal(study.pixels, phantom.pixels)
    assert study.geometry == phantom.geometry
    assert study.window == (40.0, 400.0)
    assert [source.page for source in study.sources] == list(range(11, -1, -1))
    assert len({source.path for source in study.sources}) == 1


def test_enhanced_frame_of_another_orientation_is_a_unit_of_its_own(tmp_path: Path) -> None:
    ds = enhanced()
    ds.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence = [
        item(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    ]
    ds.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    planned = plan([tmp_path / "multi.dcm"])
    studies = [load(unit) for unit in planned.units]
    assert [s.pixels.shape[0] for s in studies if isinstance(s, ImageStudy)] == [1, 11]
    assert len({s.key for s in studies if isinstance(s, ImageStudy)}) == 2


# ---------------------------------------------------------------- what is refused


def drop(*keywords: str) -> Edit:
    def edit(ds: Dataset) -> None:
        for keyword in keywords:
            delattr(ds, keyword)

    return edit


def put(**values: object) -> Edit:
    def edit(ds: Dataset) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (put(Modality="MR"), "not-ct"),
        (put(Modality="PT"), "not-ct"),
        (put(SOPClassUID=SecondaryCaptureImageStorage), "not-ct-image"),
        (put(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "not-ct-image"),
        (put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (drop("RescaleSlope", "RescaleIntercept"), "no-hounsfield-units"),
        (put(RescaleSlope=0), "no-hounsfield-units"),
        (put(RescaleType="US", ImageType=["DERIVED", "PRIMARY", "PERFUSION"]), "no-hounsfield-units"),
        (put(Rows=0), "no-pixels"),
        (put(SOPClassUID=BasicTextSRStorage, Modality="SR"), "not-ct"),
        (drop("Rows"), "no-pixels"),
        (put(Rows=65535, Columns=65535), "too-large"),
        (put(Rows=1, Columns=1, NumberOfFrames=2_000_000_000), "too-large"),
        (put(PixelData=b"\0" * 1000), "truncated"),
        (drop("PixelData"), "truncated"),
    ],
)
def test_what_is_no_ct_image_is_refused_with_its_code(tmp_path: Path, edit: Edit, code: str) -> None:
    assert refusal(one(tmp_path, edit)).code == code


def test_file_cut_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = one(tmp_path)
    path.write_bytes(path.read_bytes()[:60_000])
    assert refusal(path).code == "truncated"


def test_pixel_data_that_is_no_jpeg_is_refused(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        ds.PixelData = pydicom.encaps.encapsulate([b"no jpeg at all.."])
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit

    assert refusal(one(tmp_path, edit)).code == "truncated"


def test_series_is_reported_without_its_broken_slice(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", phantom_slices())
    broken = folder / "004.dcm"
    broken.write_bytes(broken.read_bytes()[:50_000])
    study = read(folder)
    assert study.pixels.shape[0] == 11
    assert study.quality_flags == ("missing-slices", "unreadable-slices")
    assert [(Path(r.path).name, r.code) for r in study.rejected_sources] == [("004.dcm", "truncated")]


def test_series_of_broken_slices_is_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", phantom_slices())
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:50_000])
    outcome = refusal(folder)
    assert (outcome.path, outcome.code) == (str(folder), "truncated")


def test_rejections_and_warnings_quote_no_patient_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def edit(ds: Dataset) -> None:
        put(PatientName="Secret^Name", PatientID="SECRET", Modality="SECRET")(ds)
        ds.add_new(0x00200052, "UI", "SECRET not a uid")

    outcome = refusal(one(tmp_path, edit))
    out, err = capsys.readouterr()
    assert "SECRET" not in f"{outcome}{out}{err}{caplog.text}".replace(str(tmp_path), "")


# ---------------------------------------------------------------- real files


def syntax_file(shared_data: Path, suffix: str) -> Path:
    folder = shared_data / "dicom" / "transfer-syntaxes" / "testImages"
    return next(path for path in sorted(folder.iterdir()) if path.name.endswith(f"1.2.840.10008.{suffix}.dcm"))


@pytest.mark.parametrize(
    "syntax", ["1.2", "1.2.1", "1.2.2", "1.2.1.99", "1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90"]
)
def test_lossless_transfer_syntaxes_give_the_same_hu(shared_data: Path, syntax: str) -> None:
    reference = read(shared_data / "dicom" / "transfer-syntaxes" / "testImages" / "CTImage.dcm")
    study = read(syntax_file(shared_data, syntax))
    np.testing.assert_array_equal(study.pixels, reference.pixels)
    assert (study.pixels.min(), study.pixels.max()) == (-1024, 1378)


@pytest.mark.parametrize(("syntax", "error"), [("1.2.4.81", 4), ("1.2.4.91", 20), ("1.2.4.51", 36), ("1.2.4.50", 65)])
def test_lossy_transfer_syntaxes_are_flagged(shared_data: Path, syntax: str, error: float) -> None:
    reference = read(shared_data / "dicom" / "transfer-syntaxes" / "testImages" / "CTImage.dcm")
    study = read(syntax_file(shared_data, syntax))
    assert np.abs(study.pixels - reference.pixels.astype(float)).max() <= error
    assert "lossy-compression" in study.quality_flags
    assert ("coarse-hu" in study.quality_flags) == (syntax == "1.2.4.50")


@pytest.mark.parametrize("syntax", ["1.2.4.53", "1.2.4.55"])
def test_syntaxes_that_no_codec_reads_are_refused(shared_data: Path, syntax: str) -> None:
    assert refusal(syntax_file(shared_data, syntax)).code == "unsupported-transfer-syntax"


def test_real_chest_series(shared_data: Path) -> None:
    root = shared_data / "dicom" / "lung-pet-ct-dx"
    for folder, name, window in (
        ("2.000000-5mm-40805", "series 2", (-600.0, 1600.0)),
        ("3.000000-5mm-41315", "series 3", (60.0, 350.0)),
    ):
        study = read(root / folder)
        assert study.name == name
        assert study.pixels.shape == (64, 512, 512)
        assert study.window == window
        assert study.geometry.slice_spacing_mm == pytest.approx(5.0)
        assert study.geometry.positions_mm is not None
        z = [position[2] for position in study.geometry.positions_mm]
        assert z == sorted(z)
        assert -900 < np.median(study.pixels[:, 200:300, 130:200]) < 100
        assert study.quality_flags == ()


def test_real_series_with_no_uids(shared_data: Path) -> None:
    study = read(shared_data / "dicom" / "abdomen-j2k")
    assert study.name == "example_ct_dicom"
    assert study.pixels.shape == (20, 512, 512)
    assert study.geometry.slice_spacing_mm == pytest.approx(2.0)
    assert study.quality_flags == ()
    assert all(source.sop_instance_uid for source in study.sources)


def test_real_odd_files(shared_data: Path) -> None:
    odd = shared_data / "dicom" / "odd" / "data"
    np.testing.assert_array_equal(read(odd / "693_J2KR.dcm").pixels, read(odd / "693_UNCR.dcm").pixels)
    assert read(odd / "bad_sequence.dcm").body_part == "NECK"
    assert read(odd / "explicit_VR-UN.dcm").pixels.min() == -1024


def test_real_blood_flow_maps_are_not_taken_for_hounsfield_units(shared_data: Path) -> None:
    root = shared_data / "dicom"
    maps = [root / "odd" / "data" / "eCT_Supplemental.dcm", *root.glob("transfer-syntaxes/*/CT0012.*")]
    assert [refusal(path).code for path in maps] == ["no-hounsfield-units"] * 2


def test_real_enhanced_ct_with_hounsfield_units(shared_data: Path, tmp_path: Path) -> None:
    ds = pydicom.dcmread(shared_data / "dicom" / "odd" / "data" / "eCT_Supplemental.dcm")
    ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleType = "HU"
    ds.save_as(tmp_path / "e.dcm")
    study = read(tmp_path / "e.dcm")
    assert study.pixels.shape == (2, 512, 512)
    assert study.geometry.slice_spacing_mm == pytest.approx(10.0)
    assert (study.contrast_agent, study.body_part) == ("Iohexol", "Brain")
    # The orientation is mirrored, so the normal points to the feet: the upper frame comes first.
    assert [source.page for source in study.sources] == [1, 0]


def test_real_screenshots_are_pictures_not_ct(shared_data: Path) -> None:
    units = plan([shared_data / "dicom" / "lung-pet-ct-dx" / "result"]).units
    assert {unit.kind for unit in units} == {"picture"}


# ---------------------------------------------------------------- deflated data sets


def deflated(path: Path, data: bytes, *, version: bytes = b"\0\1", implicit: bool = False) -> Path:
    """A file with a deflated data set; `version` is the first element of its meta information, ahead of the syntax."""

    def element(number: int, vr: bytes, value: bytes) -> bytes:
        if implicit:
            return struct.pack("<HHI", 2, number, len(value)) + value
        if vr == b"OB":
            return struct.pack("<HH2sHI", 2, number, vr, 0, len(value)) + value
        return struct.pack("<HH2sH", 2, number, vr, len(value)) + value

    meta = element(1, b"OB", version) + element(2, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    meta += element(0x10, b"UI", b"1.2.840.10008.1.2.1.99")
    packed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(
        bytes(128)
        + b"DICM"
        + element(0, b"UL", struct.pack("<I", len(meta)))
        + meta
        + packed.compress(data)
        + packed.flush()
    )
    return path


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("length", [2, 4_000, 70_000])
def test_a_deflated_data_set_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, implicit: bool
) -> None:
    monkeypatch.setattr("pipelines.ingest.dicom.MAX_INFLATED_BYTES", 1 << 20)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was inflated in one go"))
    path = deflated(tmp_path / "a.dcm", bytes(4 << 20), version=bytes(length), implicit=implicit)
    assert refusal(path).code in ("too-large", "damaged-file")
