"""DICOM objects made from a report, judged by the field's own validators and read back by other readers."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
import pydicom.data
import pytest
from highdicom.seg import Segmentation
from highdicom.sr import MeasurementReport, srread
from hypothesis import given, settings
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from reports.bundle import Bundle, load_bundle
from reports.dicom_source import DicomSource
from reports.formats import CannotCarryError, formats
from reports.images import BOX_COLOUR
from reports.schema import Report
from reports.texts import visible, visible_lines, worded
from reports.writing import write_report
from tests.ct_bundles import PHANTOM, ct_bundle
from tests.report_strategies import images_for, plain_report, reports
from tests.test_ingest_dicom import enhanced

NAMES = ("sr", "sr-text", "sc", "seg", "dicom-pdf")
STUDY_DATE, PATIENT_NAME = "00080020", "00100010"


@pytest.fixture(scope="module")
def phantom() -> Bundle:
    return ct_bundle()


def rendered(name: str, bundle: Bundle) -> list[Dataset]:
    return [pydicom.dcmread(io.BytesIO(data)) for data in formats()[name].render(bundle).values()]


def check(bundle: Bundle, folder: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Writes the formats and lets dciodvfy judge them."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("needs dciodvfy from the Debian package dicom3tools")
    files = {folder / name: data for each in names for name, data in formats()[each].render(bundle).items()}
    for file, data in files.items():
        file.write_bytes(data)
        said = subprocess.run(["dciodvfy", file], capture_output=True, text=True, errors="replace").stderr
        assert "Error" not in said, f"{file.name}: {said}"
    return list(files)


def dump(file: Path) -> str:
    if shutil.which("dsrdump") is None:
        pytest.skip("needs dsrdump from the Debian package dcmtk")
    done = subprocess.run(["dsrdump", "+Pl", file], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "replace")


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_all_objects_are_valid(phantom: Bundle, language: Any, tmp_path: Path) -> None:
    report = worded(phantom.report.model_copy(update={"version": 2, "supersedes": "f" * 16}), language)
    files = check(replace(phantom, report=report), tmp_path)
    assert len(files) == len(NAMES) + 2  # three key images


def test_objects_of_real_series_are_valid(shared_data: Path, tmp_path: Path) -> None:
    folder = next((shared_data / "dicom" / "lung-pet-ct-dx").glob("2.*"))
    check(ct_bundle(folder), tmp_path, ("sr", "sr-text", "sc", "seg"))


def test_objects_of_a_tiny_picture_are_valid(tmp_path: Path) -> None:
    check(ct_bundle(Path(pydicom.data.get_testdata_file("CT_small.dcm"))), tmp_path, ("sr", "sr-text", "sc", "seg"))


@pytest.mark.parametrize("name", ["explicit_VR-UN.dcm", "693_UNCR.dcm"])
def test_objects_of_odd_files_are_valid(shared_data: Path, name: str, tmp_path: Path) -> None:
    check(ct_bundle(shared_data / "dicom" / "odd" / "data" / name), tmp_path, ("sr", "sr-text", "sc"))


def test_dsrdump_shows_the_findings(phantom: Bundle, tmp_path: Path) -> None:
    findings, narrative = map(dump, check(phantom, tmp_path, ("sr", "sr-text")))
    for fact in (
        '(27925004,SCT,"Nodule")',
        '(obstruction-or-dilatation,99SCANSCRIBE,"obstruction or dilatation")',
        '"Certainty of Finding")="81.25" (%,UCUM',
        '"Long axis")="12.345678" (mm,UCUM',
        "Verification Flag   : UNVERIFIED",
        "Preliminary Flag    : PRELIMINARY",
        "Completion Flag     : PARTIAL",
        '"Laterality")=(7771000,SCT,"Left")',
        "absence of disease",
    ):
        assert fact in findings, fact
    for words in (
        "F1 Nodule: Small nodule",
        "Confidence: 81%",
        "F3 Effusion",
        "Possible nodule.",
        "Absence of disease",
    ):
        assert words in narrative, words


def test_findings_read_back_as_they_were(phantom: Bundle) -> None:
    document = srread(io.BytesIO(formats()["sr"].render(phantom)["findings.sr.dcm"]))
    content = document.content
    assert isinstance(content, MeasurementReport)
    boxes = content.get_planar_roi_measurement_groups()
    expected = [(finding, e) for finding in phantom.report.findings for e in finding.evidence]
    assert len(boxes) == len(expected)
    for group, (finding, evidence) in zip(boxes, expected, strict=True):
        x0, y0, x1, y1 = evidence.bbox
        drawn = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
        np.testing.assert_allclose(group.roi.value, drawn, rtol=1e-6)
        source = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
        assert source.ReferencedSOPInstanceUID == evidence.sop_instance_uid
        assert group.tracking_identifier == f"{phantom.report.id}/{finding.id}"
    assert boxes[0].tracking_uid == boxes[1].tracking_uid != boxes[2].tracking_uid
    values = {m.name.meaning: (m.value, m.unit.value) for m in boxes[0].get_measurements()}
    assert values == {
        "Certainty of Finding": (81.25, "%"),
        "Long axis": (12.345678, "mm"),
        "Attenuation Coefficient": (-33.25, "[hnsf'U]"),
    }
    unplaced = content.get_image_measurement_groups(tracking_uid=None)
    assert [g.finding_type.value for g in unplaced if g.finding_type] == ["effusion"]
    assert f"weights SHA-256 {phantom.report.model.weights_sha256}" in texts_of(document)


def test_objects_lie_in_the_source_study_and_name_their_images(phantom: Bundle) -> None:
    source = pydicom.dcmread(next(PHANTOM.iterdir()))
    images = {pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in PHANTOM.iterdir()}
    seen: set[str] = {source.SeriesInstanceUID}
    for name in NAMES:
        objects = rendered(name, phantom)
        assert {each.StudyInstanceUID for each in objects} == {source.StudyInstanceUID}
        assert {(each.PatientID, str(each.PatientName)) for each in objects} == {
            (source.PatientID, str(source.PatientName))
        }
        (series,) = {each.SeriesInstanceUID for each in objects}
        assert series not in seen  # a series of its own
        seen.add(series)
    for name in ("sr", "sr-text"):
        (document,) = rendered(name, phantom)
        (study,) = document.CurrentRequestedProcedureEvidenceSequence
        (series,) = study.ReferencedSeriesSequence
        assert study.StudyInstanceUID == source.StudyInstanceUID
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        assert {each.ReferencedSOPInstanceUID for each in series.ReferencedSOPSequence} == images


def test_the_same_report_gives_the_same_objects_and_another_gives_others(phantom: Bundle) -> None:
    other = replace(phantom, report=phantom.report.model_copy(update={"id": "1" * 16}))
    for name in NAMES:
        first = formats()[name].render(phantom)
        assert formats()[name].render(phantom) == first
        ids = {pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID for data in first.values()}
        assert not ids & {each.SOPInstanceUID for each in rendered(name, other)}


def test_a_later_version_names_the_objects_of_the_former(phantom: Bundle) -> None:
    changes = {"id": "2" * 16, "version": 2, "supersedes": phantom.report.id}
    later = replace(phantom, report=phantom.report.model_copy(update=changes))
    for name in ("sr", "sr-text"):
        (former,), (document,) = rendered(name, phantom), rendered(name, later)
        (study,) = document.PredecessorDocumentsSequence
        (series,) = study.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == former.SeriesInstanceUID
        assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == former.SOPInstanceUID
        assert phantom.report.id in texts_of(document)
    assert phantom.report.id in rendered("seg", later)[0].ContentDescription
    assert all(phantom.report.id in each.DerivationDescription for each in rendered("sc", later))


def test_key_images_carry_the_boxes_and_say_what_is_in_them(phantom: Bundle) -> None:
    images = rendered("sc", phantom)
    assert [each.ImageComments.split(":")[0] for each in images] == [
        "F1 nodule (81%)",
        "F2 obstruction or dilatation (50%)",
        "F1 nodule (81%)",
    ]
    width = phantom.report.technique.image_size_px[0]
    x0, y0, x1, y1 = (round(v * 512 / width) for v in phantom.report.findings[0].evidence[0].bbox)
    drawn = images[0].pixel_array
    amber = (drawn == BOX_COLOUR).all(axis=-1)
    assert all(amber[y - 2 : y + 3, x - 2 : x + 3].any() for x in (x0, x1) for y in (y0, y1))
    assert not amber[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5].any()


def test_masks_read_back_bit_for_bit_and_boxes_do_not_become_masks(phantom: Bundle) -> None:
    (dataset,) = rendered("seg", phantom)
    segmentation = Segmentation.from_dataset(dataset)
    sources = [each.sop_instance_uid for each in phantom.dicom.instances] if phantom.dicom else []
    volume = segmentation.get_pixels_by_source_instance(sources)
    assert volume.shape[-1] == 2
    for number, mask in enumerate(phantom.segments.values()):
        np.testing.assert_array_equal(volume[..., number].astype(bool), mask)
    assert segmentation.segment_numbers == [1, 2]
    overlapping = replace(phantom, segments={name: phantom.segments["lung-left"] for name in phantom.segments})
    twice = Segmentation.from_dataset(rendered("seg", overlapping)[0])
    assert twice.SegmentsOverlap == "YES"
    with pytest.raises(CannotCarryError, match="no masks"):
        formats()["seg"].render(replace(phantom, segments={}))


def test_the_pdf_inside_is_the_pdf(phantom: Bundle) -> None:
    (pdf,) = formats()["pdf"].render(phantom).values()
    (document,) = rendered("dicom-pdf", phantom)
    assert document.EncapsulatedDocument[: document.EncapsulatedDocumentLength] == pdf


def test_frames_of_a_multi_frame_source_are_named_one_by_one(tmp_path: Path) -> None:
    dataset = enhanced()
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    bundle = ct_bundle(tmp_path / "enhanced.dcm")
    source = bundle.dicom
    assert source is not None and len({each.sop_instance_uid for each in source.instances}) == 1
    for group, evidence in zip(
        srread(
            io.BytesIO(formats()["sr"].render(bundle)["findings.sr.dcm"])
        ).content.get_planar_roi_measurement_groups(),
        [e for finding in bundle.report.findings for e in finding.evidence],
        strict=True,
    ):
        named = group.roi.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber
        assert named == source.instances[evidence.slice_index].frame
    segmentation = Segmentation.from_dataset(rendered("seg", bundle)[0])
    frames = [each.frame for each in source.instances]
    volume = segmentation.get_pixels_by_source_frame(source.instances[0].sop_instance_uid, frames)
    np.testing.assert_array_equal(volume[..., 0].astype(bool), bundle.segments["lung-left"])
    check(bundle, tmp_path)


def test_a_report_folder_gives_the_same_objects(phantom: Bundle, tmp_path: Path) -> None:
    write_report(tmp_path, phantom, ["json", *NAMES])
    kept = load_bundle(tmp_path)
    for name in ("sr", "sr-text", "seg"):
        assert formats()[name].render(kept) == formats()[name].render(phantom)


def test_without_a_dicom_source_nothing_is_made(phantom: Bundle) -> None:
    report = plain_report()
    for name in NAMES:
        with pytest.raises(CannotCarryError, match="DICOM"):
            formats()[name].render(Bundle(report, images_for(report)))
    with pytest.raises(CannotCarryError, match="nothing to draw"):
        formats()["sc"].render(replace(phantom, report=phantom.report.model_copy(update={"findings": ()})))


def with_header(bundle: Bundle, **elements: tuple[str, list[Any]]) -> Bundle:
    """The bundle with elements of its source's header replaced, by DICOM JSON."""
    source = bundle.dicom
    assert source is not None
    changed = {tag.removeprefix("t"): {"vr": vr, "Value": value} for tag, (vr, value) in elements.items()}
    return replace(bundle, dicom=DicomSource({**source.header, **changed}, source.instances, source.orientation))


def test_a_source_without_a_valid_study_is_refused(phantom: Bundle) -> None:
    for value in ([], ["1.2.x"], ["1.02.3"], ["1" * 65]):
        with pytest.raises(CannotCarryError, match="Study Instance UID"):
            formats()["sr"].render(with_header(phantom, t0020000D=("UI", value)))
    nameless = tuple(replace(each, sop_instance_uid="") for each in phantom.dicom.instances) if phantom.dicom else ()
    assert phantom.dicom is not None
    with pytest.raises(CannotCarryError, match="SOP Instance UID"):
        formats()["sr"].render(replace(phantom, dicom=replace(phantom.dicom, instances=nameless)))


def test_a_source_without_places_cannot_carry_masks_but_all_else(phantom: Bundle, tmp_path: Path) -> None:
    assert phantom.dicom is not None
    nowhere = tuple(replace(each, position_mm=None) for each in phantom.dicom.instances)
    bundle = replace(phantom, dicom=replace(phantom.dicom, instances=nowhere, orientation=None))
    with pytest.raises(CannotCarryError, match="where its slices lie"):
        formats()["seg"].render(bundle)
    check(bundle, tmp_path, ("sr", "sr-text", "sc"))


def test_what_is_wrong_in_the_source_header_stays_there(
    phantom: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = with_header(
        phantom,
        t00100010=("PN", [{"Alphabetic": "SECRETNAME" * 9}]),
        t00100020=("LO", ["SECRET\\ID " + "x" * 80]),
        t00100030=("DA", ["around 1950"]),
        t00100040=("CS", ["unknown"]),
        t00080020=("DA", ["2004.01.19"]),
        t00080050=("SH", ["accession number far too long"]),
        t00101010=("AS", ["57"]),
        t00080201=("SH", ["local time"]),
    )
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        check(odd, tmp_path)
    assert "SECRET" not in caplog.text + "".join(str(each.message) for each in said)


def test_a_source_without_a_patient_is_carried(phantom: Bundle, tmp_path: Path) -> None:
    assert phantom.dicom is not None
    header = {tag: value for tag, value in phantom.dicom.header.items() if not tag.startswith("0010")}
    check(replace(phantom, dicom=replace(phantom.dicom, header=header)), tmp_path)


def texts_of(dataset: Dataset) -> str:
    return "\n".join(str(each.value) for each in dataset.iterall() if each.keyword in ("TextValue", "ImageComments"))


@given(report=reports())
@settings(max_examples=10, deadline=None)
def test_any_report_is_stated_in_full(report: Report) -> None:
    """Awkward text and all: findings, their measurements and the disposition are read back from each object."""
    bundle = Bundle(report, images_for(report), source_of_three_slices())
    (findings,), (narrative,) = rendered("sr", bundle), rendered("sr-text", bundle)
    boxes = MeasurementReport.from_sequence([findings]).get_planar_roi_measurement_groups()
    assert len(boxes) == sum(len(finding.evidence) for finding in report.findings)
    values = [float(each.value) for each in findings.iterall() if each.keyword == "FloatingPointValue"]
    for finding in report.findings:
        assert visible_lines(finding.description).strip() in texts_of(findings)
        assert visible(finding.description).strip() in texts_of(narrative)
        assert {measured.value for measured in finding.measurements} <= set(values)
    assert visible_lines(report.impression).strip() in texts_of(findings)
    assert visible(report.impression).strip() in texts_of(narrative)
    if report.disposition:
        assert report.disposition in texts_of(findings)
    with TemporaryDirectory() as folder:
        check(bundle, Path(folder), ("sr", "sr-text"))


@cache
def source_of_three_slices() -> DicomSource:
    source = ct_bundle().dicom
    assert source is not None
    return replace(source, instances=source.instances[:3])
