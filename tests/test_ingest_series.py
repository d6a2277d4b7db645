"""The series chooser: which files belong together, what each series is good for, and what it says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_doors import read
from phantom import Edit, one, phantom_slices, series
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.uid import EnhancedCTImageStorage, SecondaryCaptureImageStorage, XRayRadiationDoseSRStorage, generate_uid

from pipelines.ingest import Plan, SeriesVerdict, load, plan
from pipelines.study import ImageStudy


def verdicts(folder: Path) -> list[tuple[str, str, str | None, int]]:
    return [(each.kind, each.verdict, each.code, len(each.files)) for each in plan([folder]).series]


def only(planned: Plan) -> SeriesVerdict:
    assert len(planned.series) == 1
    return planned.series[0]


def test_volume_is_described_by_its_headers_alone(tmp_path: Path) -> None:
    slices = phantom_slices()
    verdict = only(plan([series(tmp_path / "s", slices[::-1])]))
    assert (verdict.verdict, verdict.code, verdict.shape) == ("volume", None, (12, 256, 256))
    assert verdict.spacing_mm == pytest.approx((5.0, 1.4, 1.4))
    assert [Path(name).name for name in verdict.files] == [f"{k:03d}.dcm" for k in range(11, -1, -1)]
    assert verdict.preferred and 50 < verdict.score <= 100
    assert (verdict.study_uid, verdict.series_uid) == (slices[0].StudyInstanceUID, slices[0].SeriesInstanceUID)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)))
def test_order_follows_positions_whatever_names_and_numbers_say(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    slices = phantom_slices()
    for k, place in enumerate(order):
        slices[place].InstanceNumber = k
        slices[place].SliceLocation = -k
    folder = series(tmp_path_factory.mktemp("s"), [slices[place] for place in order])
    files = only(plan([folder])).files
    z = [float(pydicom.dcmread(name).ImagePositionPatient[2]) for name in files]
    assert z == sorted(z)


def tilt(slices: list[Dataset]) -> None:
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[1] += 1.5 * k


def leave_a_gap(slices: list[Dataset]) -> None:
    del slices[4]


def move_one(slices: list[Dataset]) -> None:
    slices[6].ImagePositionPatient[2] += 1.3


def turn_each(slices: list[Dataset]) -> None:
    for k, ds in enumerate(slices):
        c, s = float(np.cos(k * 0.2)), float(np.sin(k * 0.2))
        ds.ImageOrientationPatient = [c, s, 0, 0, 0, -1]


def take_positions(slices: list[Dataset]) -> None:
    for ds in slices:
        del ds.ImagePositionPatient


def take_pixel_size(slices: list[Dataset]) -> None:
    for ds in slices:
        del ds.PixelSpacing


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (tilt, "gantry-tilt"),
        (leave_a_gap, "missing-slices"),
        (move_one, "irregular-spacing"),
        (turn_each, "mixed-orientation"),
        (take_positions, "missing-geometry"),
        (take_pixel_size, "missing-geometry"),
    ],
)
def test_what_is_no_volume_is_given_as_slices_with_its_code(tmp_path: Path, edit: Edit, code: str) -> None:
    slices = phantom_slices()
    edit(slices)
    planned = plan([series(tmp_path / "s", slices)])
    verdict = only(planned)
    assert (verdict.verdict, verdict.code) == ("slices", code)
    study = load(planned.units[0])
    assert isinstance(study, ImageStudy)
    assert code in study.quality_flags


def test_positions_rounded_to_a_tenth_still_make_a_volume(tmp_path: Path) -> None:
    slices = phantom_slices()
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[2] = round(-12.6 + 0.625 * k, 1)
    verdict = only(plan([series(tmp_path / "s", slices)]))
    assert verdict.verdict == "volume"
    assert verdict.spacing_mm is not None and verdict.spacing_mm[0] == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "TemporalPositionIdentifier", "AcquisitionTime", "KVP"])
def test_two_time_points_at_the_same_places_are_two_volumes(tmp_path: Path, keyword: str) -> None:
    early, late = phantom_slices(), phantom_slices()
    for ds, value in [*((ds, 1) for ds in early), *((ds, 2) for ds in late)]:
        setattr(ds, keyword, f"12000{value}" if keyword == "AcquisitionTime" else value)
    for ds in late:
        ds.SOPInstanceUID = generate_uid()
        ds.RescaleIntercept = -1000
    planned = plan([series(tmp_path / "s", [*early, *late])])
    assert [(each.verdict, len(each.files), each.part) for each in planned.series] == [
        ("volume", 12, 1),
        ("volume", 12, 2),
    ]
    assert planned.rejections == ()
    first, second = (load(unit) for unit in planned.units)
    assert isinstance(first, ImageStudy) and isinstance(second, ImageStudy)
    np.testing.assert_array_equal(second.pixels - first.pixels, 24)


def test_one_series_uid_in_two_studies_is_two_series(tmp_path: Path) -> None:
    here, there = phantom_slices(), phantom_slices()
    for ds in there:
        ds.StudyInstanceUID, ds.SOPInstanceUID = "1.2.3.4", generate_uid()
    assert verdicts(series(tmp_path / "s", [*here, *there])) == [("original", "volume", None, 12)] * 2


def test_all_kinds_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    def other(edit: Edit, count: int = 1) -> list[Dataset]:
        chosen, uid = phantom_slices()[:count], generate_uid()
        for ds in chosen:
            ds.SeriesInstanceUID, ds.SOPInstanceUID = uid, generate_uid()
            edit(ds)
        return chosen

    def put(**values: object) -> Edit:
        return lambda ds: [setattr(ds, keyword, value) for keyword, value in values.items()] and None

    def dose_report(ds: Dataset) -> None:
        put(SOPClassUID=XRayRadiationDoseSRStorage, Modality="SR")(ds)
        for keyword in ("Rows", "Columns", "PixelData"):
            delattr(ds, keyword)

    slices = [
        *other(put(), 12),
        *other(put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        *other(put(ScanOptions="SCOUT MODE")),
        *other(put(SOPClassUID=SecondaryCaptureImageStorage)),
        *other(put(SOPClassUID=SecondaryCaptureImageStorage, SeriesDescription="Dose Report")),
        *other(dose_report),
        *other(put(ImageType=["DERIVED", "PRIMARY", "MPR"]), 12),
        *other(put(ImageType=["DERIVED", "PRIMARY", "PROJECTION IMAGE", "MIP"]), 3),
        *other(put(ImageType=["DERIVED", "SECONDARY", "AXIAL"]), 3),
        *other(put(Modality="MR")),
        *other(put(CompressionForce="90")),
        *other(put(Manufacturer="HOLOGIC, Inc.")),
        *other(put(DecayCorrection="START")),
        *other(put(ImageType=["DERIVED", "PRIMARY", "AXIAL", "CBF"], RescaleType="")),
    ]
    planned = plan([series(tmp_path / "s", slices)])
    assert [(each.kind, each.verdict, each.code) for each in planned.series] == [
        ("original", "volume", None),
        ("localizer", "refused", "localizer"),
        ("localizer", "refused", "localizer"),
        ("secondary-capture", "refused", "not-ct-image"),
        ("dose-report", "refused", "not-ct-image"),
        ("dose-report", "refused", "dose-report"),
        ("reformatted", "volume", None),
        ("projection", "volume", None),
        ("derived", "volume", None),
        ("not-ct", "refused", "not-ct"),
        ("not-ct", "refused", "not-ct"),
        ("not-ct", "refused", "not-ct"),
        ("not-ct", "refused", "not-ct"),
        ("derived", "refused", "no-hounsfield-units"),
    ]
    scores = [each.score for each in planned.series]
    assert scores[0] > scores[6] > scores[8] > scores[7] > scores[9] == 0
    assert [each.preferred for each in planned.series] == [True] + [False] * 13
    assert len(planned.rejections) == 10


@pytest.mark.parametrize(
    ("title", "agent", "phase"),
    [
        ("Thorax nativ", "", "non-contrast"),
        ("Abdomen ARTERIAL 1.0", "", "arterial"),
        ("Abd portal venous", "", "portal-venous"),
        ("Liver delayed 5min", "", "delayed"),
        ("Chest w/o contrast", "", "non-contrast"),
        ("Chest 5 mm", "Iohexol", "contrast-enhanced"),
        ("Chest 5 mm", "", ""),
    ],
)
def test_contrast_phase_is_told_from_the_header(tmp_path: Path, title: str, agent: str, phase: str) -> None:
    def edit(ds: Dataset) -> None:
        ds.SeriesDescription, ds.ContrastBolusAgent = title, agent

    assert only(plan([one(tmp_path, edit)])).contrast == phase


def test_enhanced_ct_with_two_stacks_gives_two_volumes(tmp_path: Path) -> None:
    slices = phantom_slices()
    ds = slices[0]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.PerFrameFunctionalGroupsSequence = []
    for phase in (1, 2):
        for each in slices:
            frame, position, content = Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = list(each.ImagePositionPatient)
            content.TemporalPositionIndex = phase
            frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
            ds.PerFrameFunctionalGroupsSequence.append(frame)
    ds.NumberOfFrames, ds.PixelData = 24, b"".join(each.PixelData for each in slices) * 2
    ds.save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    planned = plan([tmp_path / "multi.dcm"])
    assert [(each.verdict, each.shape) for each in planned.series] == [("volume", (12, 256, 256))] * 2
    assert [unit.frames for unit in planned.units] == [(tuple(range(12)),), (tuple(range(12, 24)),)]
    keys = {study.key for study in map(load, planned.units) if isinstance(study, ImageStudy)}
    assert len(keys) == 2


# ---------------------------------------------------------------- DICOMDIR


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    files = FileSet()
    for ds in phantom_slices():
        ds.StudyID = "1"
        files.add(ds)
    files.write(tmp_path / "disc")
    return tmp_path / "disc"


def test_dicomdir_leads_to_its_files(medium: Path) -> None:
    study = read(medium / "DICOMDIR")
    assert study.pixels.shape[0] == 12
    planned = plan([medium])
    assert [each.verdict for each in planned.series] == ["volume"]
    assert [Path(each.path).name for each in planned.passed_over] == ["DICOMDIR"]


def test_files_that_a_dicomdir_names_in_vain_are_refused(medium: Path) -> None:
    gone = sorted(path for path in medium.rglob("*") if path.is_file() and path.name != "DICOMDIR")[3]
    gone.unlink()
    for start in (medium, medium / "DICOMDIR"):
        planned = plan([start])
        assert [(each.path, each.code) for each in planned.rejections] == [(str(gone), "missing-from-file-set")]
        assert only(planned).code == "missing-slices"


def test_names_of_a_dicomdir_are_matched_in_any_case(medium: Path) -> None:
    for path in sorted(medium.rglob("*"), reverse=True):
        if path.name != "DICOMDIR":
            path.rename(path.with_name(path.name.lower()))
    assert read(medium / "DICOMDIR").pixels.shape[0] == 12


def test_a_dicomdir_leads_nowhere_else(medium: Path, tmp_path: Path) -> None:
    shutil.copy(next(path for path in medium.rglob("*") if path.is_file()), tmp_path / "outside")
    ds = pydicom.dcmread(medium / "DICOMDIR")
    for record in ds.DirectoryRecordSequence:
        if "ReferencedFileID" in record:
            record.ReferencedFileID = ["..", "outside"]
    ds.save_as(medium / "DICOMDIR")
    assert {each.code for each in plan([medium / "DICOMDIR"]).rejections} == {"path-traversal"}
