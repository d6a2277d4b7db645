"""From a study and its reading to a report: identity, geometry, measurements, rules, and what was not assessed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from pipelines.inputs import window
from pipelines.reading import FieldReading, FindingReading, ModelIdentity, Reading
from pipelines.reporting import box_in_patient, build_report, report_id, report_images
from pipelines.study import Geometry, ImageStudy, SourceFile
from reports import taxonomy
from reports.bundle import Bundle
from reports.codes import code_of
from reports.measurements import covered_share
from reports.rules import load_rules
from reports.schema import Report
from reports.writing import write_report

MODEL = ModelIdentity("small", "1.0", "a" * 64, "b" * 64, "cpu")


def photo(height: int = 100, width: int = 200, name: str = "a.png") -> ImageStudy:
    pixels = np.full((1, height, width), 90, np.uint8)
    return ImageStudy("1" * 64, name, "display", pixels, (SourceFile(name, "2" * 64, "image/png"),))


def volume(slices: int = 6) -> ImageStudy:
    """An axial series 2 mm apart; the lower right quarter of each slice has 100 HU, the rest -1000."""
    pixels = np.full((slices, 40, 50), -1000, np.int16)
    pixels[:, 20:, 25:] = 100
    files = tuple(
        SourceFile(f"{n}.dcm", f"{n}" * 64, "application/dicom", sop_instance_uid=f"1.2.{n}") for n in range(slices)
    )
    positions = tuple((-10.0, -20.0, 2.0 * n) for n in range(slices))
    geometry = Geometry((0.5, 0.8), (1, 0, 0, 0, 1, 0), positions, slice_spacing_mm=2.0)
    return ImageStudy("3" * 64, "series 3", "HU", pixels, files, geometry, series_uid="1.2", kernel="B70f")


def defect(*findings: FindingReading, line: str | None = "steel", **changes: object) -> Reading:
    return replace(Reading("defect", 1.0, line, {}, findings, "The decoder's words."), **changes)


def ct(*findings: FindingReading, **fields: str) -> Reading:
    readings = {name: FieldReading(value, {value: 0.9, "other": 0.1}) for name, value in fields.items()}
    return Reading("ct", 1.0, None, readings, findings, "The decoder's words.", slices_read=(1, 4))


def found(kind: str, *bbox: float, **changes: object) -> FindingReading:
    return replace(FindingReading(kind, bbox, 0, 0.9, True, "box"), **changes)


# Identity


def test_the_same_content_and_model_give_the_same_id_on_any_device() -> None:
    first = report_id("k", None, MODEL, "auto", "r1")
    assert first == report_id("k", None, replace(MODEL, device="cuda:0"), "auto", "r1")
    assert len(first) == 16
    assert int(first, 16) >= 0


def test_anything_that_could_change_the_report_changes_its_id() -> None:
    others = [("l", None, MODEL, "auto", "r1"), ("k", "r", MODEL, "auto", "r1"), ("k", None, MODEL, "ct", "r1")]
    others += [("k", None, MODEL, "auto", "r2")]
    others += [
        ("k", None, replace(MODEL, **{name: "z"}), "auto", "r1")
        for name in ("name", "version", "weights_sha256", "config_sha256")
    ]
    ids = {report_id(*each) for each in others} | {report_id("k", None, MODEL, "auto", "r1")}
    assert len(ids) == len(others) + 1


def test_the_report_carries_the_id_of_its_inputs() -> None:
    study, golden = photo(), replace(photo(), key="9" * 64)
    report = build_report(study, defect(line="board"), MODEL, kind="defect", reference=golden)
    assert report.id == report_id(study.key, golden.key, MODEL, "defect", load_rules().digest)


# Evidence and geometry


def test_a_box_on_an_oblique_slice_lies_where_a_hand_calculation_puts_it() -> None:
    # Rows run along (0.8, 0.6, 0), columns along (0, 0, -1); 2 mm between rows, 0.5 mm between columns.
    # First corner: pixel edge 0, 0 is half a pixel before the first centre: - 0.25 row - 1 column.
    # Last corner (4, 3): 3.5 columns on = 1.75 mm along the row, 2.5 rows on = 5 mm along the column.
    geometry = Geometry((2.0, 0.5), (0.8, 0.6, 0, 0, 0, -1), ((0, 0, 0), (10, 20, 30)))
    first, last = box_in_patient((0, 0, 4, 3), 1, geometry) or ((), ())
    assert first == pytest.approx((10 - 0.2, 20 - 0.15, 30 + 1))
    assert last == pytest.approx((10 + 1.4, 20 + 1.05, 30 - 5))


@pytest.mark.parametrize("missing", ["spacing_mm", "orientation", "positions_mm"])
def test_without_full_geometry_there_are_no_patient_coordinates(missing: str) -> None:
    study = volume()
    study = replace(study, geometry=replace(study.geometry, **{missing: None}))
    report = build_report(study, ct(found("nodule", 1, 1, 5, 5)), MODEL)
    assert report.findings[0].evidence[0].bbox_mm is None


def test_ct_findings_name_their_slice_and_measure_it() -> None:
    study = volume()
    report = build_report(study, ct(found("nodule", 30, 24, 40, 34, slice_index=4), region="chest"), MODEL)
    (finding,) = report.findings
    (evidence,) = finding.evidence
    assert (evidence.input_index, evidence.slice_index, evidence.sop_instance_uid) == (4, 4, "1.2.4")
    assert evidence.bbox_mm == ((13.6, -8.25, 8.0), (21.6, -3.25, 8.0))
    assert {m.name: (m.value, m.unit) for m in finding.measurements} == {
        "long axis": (pytest.approx(8.0), "mm"),
        "short axis": (pytest.approx(5.0), "mm"),
        "mean attenuation": (100, "[hnsf'U]"),
        "spread of attenuation": (0, "[hnsf'U]"),
    }
    assert finding.description == "Nodule in the lower right of the image, slice 5 of 6."
    assert finding.code == code_of("nodule")
    assert {m.name: m.value for m in report.measurements} == {
        "lowest attenuation": -1000,
        "highest attenuation": 100,
        "scanned length": 12,
    }


def test_weak_evidence_never_passes_for_an_outline() -> None:
    report = build_report(volume(), ct(found("nodule", 30, 24, 40, 34, localisation="weak")), MODEL)
    (finding,) = report.findings
    assert finding.evidence[0].localisation == "weak"
    assert "not an outline" in finding.description
    assert all("no outline" in m.method for m in finding.measurements)


def test_frames_of_one_file_are_one_input() -> None:
    study = volume()
    study = replace(study, sources=(study.sources[0],) * 6)
    report = build_report(study, ct(found("cyst", 1, 1, 9, 9, slice_index=5)), MODEL)
    assert len(report.source.inputs) == 1
    assert report.findings[0].evidence[0].input_index == 0


@given(st.tuples(*[st.floats(-500, 500)] * 4), st.integers(1, 40), st.integers(1, 40))
def test_any_box_becomes_evidence_inside_the_image(bbox: tuple[float, ...], height: int, width: int) -> None:
    report = build_report(photo(height, width), defect(found("scratches", *bbox)), MODEL)
    x0, y0, x1, y1 = report.findings[0].evidence[0].bbox
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert all(np.isfinite(m.value) for m in report.findings[0].measurements)


# Content


def test_candidates_below_the_line_are_not_findings() -> None:
    reading = defect(found("scratches", 0, 0, 9, 9), found("inclusion", 0, 0, 9, 9, reported=False))
    report = build_report(photo(), reading, MODEL)
    assert [(f.id, f.type) for f in report.findings] == [("F1", "scratches")]
    assert report.impression == "One scratch, in the upper left of the image."


def test_defects_are_measured_in_pixels_and_share() -> None:
    report = build_report(
        photo(), defect(found("scratches", 10, 20, 40, 60, extent="large", location="upper left")), MODEL
    )
    (finding,) = report.findings
    assert {m.name: (m.value, m.unit) for m in finding.measurements} == {
        "length": (40, "{pixel}"),
        "width": (30, "{pixel}"),
        "area": (1200, "{pixel}"),
        "share of the image": (6, "%"),
        "distance to the nearest edge": (10, "{pixel}"),
    }
    assert finding.description == "Large scratch in the upper left of the image."


@pytest.mark.parametrize(
    ("bbox", "extent", "description"),
    [
        ((90, 40, 110, 60), "medium", "Medium-sized inclusion in the centre of the image."),
        ((0, 0, 200, 100), "large", "Large inclusion throughout the image."),
        ((180, 0, 200, 10), "", "Inclusion in the upper right of the image."),
    ],
)
def test_a_description_reads_as_a_sentence(bbox: tuple[float, ...], extent: str, description: str) -> None:
    report = build_report(photo(), defect(found("inclusion", *bbox, extent=extent)), MODEL)
    assert report.findings[0].description == description


def test_overlapping_boxes_count_once() -> None:
    assert covered_share([(0, 0, 5, 10), (0, 0, 5, 5)], 10, 10).value == 50


@pytest.mark.parametrize("reading", [defect(), ct(region="chest")])
def test_no_finding_is_not_called_normal(reading: Reading) -> None:
    report = build_report(volume() if reading.kind == "ct" else photo(), reading, MODEL)
    assert report.impression.startswith("No ")
    assert "of the assessed types" in report.impression
    assert "normal" not in report.impression
    assert report.not_assessed


def test_an_unknown_product_is_held_and_nothing_is_claimed() -> None:
    report = build_report(photo(), defect(line=None), MODEL)
    assert report.impression == "The product could not be told, so no type of defect was assessed."
    assert report.disposition == "hold"
    assert len(report.not_assessed) == len(taxonomy.PRODUCT_LINES) + 2


def test_ct_names_what_was_not_assessed() -> None:
    reading = ct(region="abdomen", contrast="undetermined", covid19="false", laterality="right")
    report = build_report(volume(), reading, MODEL)
    stated = {item.what: item.reason for item in report.not_assessed}
    assert "4 of 6 slices: 1, 3–4, 6" in stated
    assert "could not tell" in stated["contrast medium"]
    assert "COVID-19 pattern" in stated
    assert "covid19" not in report.fields
    assert report.fields["laterality"].value == "right"
    assert report.disposition is None


def test_the_plane_comes_from_the_geometry_where_there_is_one() -> None:
    technique = build_report(volume(), ct(plane="coronal"), MODEL).technique
    assert technique.plane is not None
    assert (technique.plane.value, technique.read_from["plane"]) == ("axial", "geometry")
    assert technique.read_from["kernel"] == "header"


def test_a_side_speaks_of_a_finding_only_when_there_is_one() -> None:
    one, two = found("cyst", 1, 1, 9, 9), found("stone", 9, 9, 20, 20)
    assert build_report(volume(), ct(one, laterality="left"), MODEL).findings[0].laterality == "left"
    assert {f.laterality for f in build_report(volume(), ct(one, two, laterality="left"), MODEL).findings} == {None}


def test_of_a_study_unlike_those_the_model_was_made_for_nothing_is_reported() -> None:
    strange = ("out-of-domain",)
    report = build_report(photo(), defect(found("scratches", 1, 1, 9, 9), quality_flags=strange), MODEL)
    assert report.findings == () and report.technique.product_line is None and report.disposition == "hold"
    assert report.impression.startswith("Not assessed") and "the image as a whole" in [
        n.what for n in report.not_assessed
    ]
    scan = replace(ct(found("cyst", 1, 1, 9, 9), region="chest", covid19="true"), quality_flags=strange)
    report = build_report(volume(), scan, MODEL)
    assert report.findings == () and report.impression.startswith("Not assessed")
    assert [n.what for n in report.not_assessed].count("COVID-19 pattern") == 1
    assert report.technique.region is not None and report.technique.region.value == "undetermined"


def test_a_board_without_golden_sample_is_held() -> None:
    report = build_report(photo(), defect(line="board"), MODEL)
    assert "no-reference" in report.quality_flags
    assert "comparison with a golden sample" in [item.what for item in report.not_assessed]
    assert report.disposition == "hold"
    assert build_report(photo(), defect(line="board"), MODEL, reference=photo()).disposition == "accept"


def test_file_names_that_are_no_text_can_be_reported(tmp_path: Path) -> None:
    study = photo(name="caf\udce9.png")
    report = build_report(study, defect(), MODEL)
    files = write_report(tmp_path, Bundle(report, report_images(study, report)), ["json", "html"])
    assert Report.model_validate(json.loads(files["json"].read_text("utf-8"))) == report


# Pictures


def test_every_slice_with_evidence_gets_a_picture() -> None:
    study = volume()
    report = build_report(study, ct(found("cyst", 1, 1, 9, 9, slice_index=5), found("cyst", 1, 1, 9, 9)), MODEL)
    assert sorted(report_images(study, report).slices) == [0, 5]
    report = build_report(study, ct(), MODEL)
    assert sorted(report_images(study, report).slices) == [4]


def test_chest_is_shown_through_the_lung_window_unless_the_file_asks_otherwise() -> None:
    study = volume()
    report = build_report(study, ct(region="chest"), MODEL)
    assert report_images(study, report).slices[4].shown_as == "WL −600 · WW 1500 HU"
    asked = report_images(replace(study, window=(300.0, 1500.0)), report).slices[4]
    assert asked.shown_as == "WL 300 · WW 1500 HU"


def test_window_maps_its_edges_to_black_and_white() -> None:
    shown = window(np.array([[-2000, -160, 40, 240, 3000]], np.int16), 40, 400)
    assert shown.tolist() == [[0, 0, 128, 255, 255]]


def test_sixteen_bit_photos_are_scaled() -> None:
    study = replace(photo(), pixels=np.array([[[100, 200], [500, 200]]], np.uint16))
    report = build_report(study, defect(), MODEL)
    picture = report_images(study, report, reference=photo())
    assert picture.slices[0].pixels.tolist() == [[0, 64], [255, 64]]
    assert picture.reference is not None


# Codes


def test_codes_are_known_to_dicom_where_its_context_groups_have_them() -> None:
    named = {
        "mass-or-lesion": codes.SCT.Lesion,
        "calcification": codes.SCT.PathologicCalcification,
        "cyst": codes.SCT.Cyst,
        "inflammation": codes.SCT.Inflammation,
        "adenopathy": codes.SCT.Lymphadenopathy,
        "nodule": codes.SCT.Nodule,
        "effusion": codes.SCT.Effusion,
        "hemorrhage": codes.SCT.Hemorrhage,
    }
    for finding_type, expected in named.items():
        code = code_of(finding_type)
        assert code is not None
        assert (code.value, code.scheme) == (expected.value, expected.scheme_designator)
    assert not any(code_of(t) for t in taxonomy.DEFECT_TYPES)
