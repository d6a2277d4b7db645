"""FHIR bundles are valid for the library, hold together, and are read back as the report."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from fhir.resources.bundle import Bundle as R5Bundle
from fhir.resources.R4B.bundle import Bundle as R4BBundle
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from report_strategies import plain_report, reports
from test_reports_building import MODEL, ct, found, volume

from pipelines.reporting import build_report, report_images
from reports.bundle import Bundle
from reports.dicom_source import DicomSource, Instance
from reports.fhir import OWN, render_r4b, render_r5
from reports.formats import CannotCarryError
from reports.schema import Report
from reports.texts import visible, worded

VERSIONS = pytest.mark.parametrize(("render", "model"), [(render_r4b, R4BBundle), (render_r5, R5Bundle)])
CHEST_CT = "1.2.840.10008.5.1.4.1.1.2"


def source(**header: str) -> DicomSource:
    elements = {tag.removeprefix("t"): {"vr": "LO", "Value": [value]} for tag, value in header.items()}
    return DicomSource(elements, tuple(Instance(f"1.2.3.{n}", CHEST_CT, n + 1) for n in range(6)))


def chest(**header: str) -> Bundle:
    one = found("nodule", 30, 24, 40, 34, slice_index=4)
    study = volume()
    report = build_report(study, ct(one, region="chest", laterality="left"), MODEL)
    uids = {"study_uid": "1.2.826.0.1", "series_uid": "1.2.826.0.1.7", "accession": "A-77"}
    report = report.model_copy(update={"source": report.source.model_copy(update=uids)})
    return Bundle(report, report_images(study, report), source(**header))


def resources(data: bytes, kind: str) -> list[dict[str, Any]]:
    return [e["resource"] for e in json.loads(data)["entry"] if e["resource"]["resourceType"] == kind]


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["reference"]] if isinstance(value.get("reference"), str) else []
        return own + [each for part in value.values() for each in references(part)]
    return [each for part in value for each in references(part)] if isinstance(value, list) else []


def own_code(concept: dict[str, Any]) -> str:
    return next((c["code"] for c in concept.get("coding", ()) if c["system"] == OWN), "")


@VERSIONS
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_any_ct_report_is_valid_and_read_back(render: Any, model: Any, data: st.DataObject) -> None:
    report: Report = data.draw(reports()).model_copy(update={"kind": "ct"})
    made = render(Bundle(report))
    model.model_validate_json(made)
    (main,) = resources(made, "DiagnosticReport")
    assert [own_code(each) for each in main.get("conclusionCode", ())] == [report.disposition] * bool(
        report.disposition
    )
    observed = [o for o in resources(made, "Observation") if "valueCodeableConcept" in o]
    assert [own_code(each["valueCodeableConcept"]) for each in observed] == [visible(f.type) for f in report.findings]
    for each, finding in zip(observed, report.findings, strict=True):
        sure = next(c for c in each["component"] if c["code"].get("coding", [{}])[0].get("code") == "111012")
        assert sure["valueQuantity"]["value"] == pytest.approx(100 * finding.confidence, abs=1e-3)
        values = [c for c in each["component"] if "valueQuantity" in c and c is not sure]
        assert [(own_code(c["code"]), c["valueQuantity"]["value"], c["valueQuantity"]["code"]) for c in values] == [
            (visible(m.name), m.value, m.unit) for m in finding.measurements
        ]


@VERSIONS
def test_every_reference_resolves_inside_the_bundle(render: Any, model: Any) -> None:
    made = json.loads(render(chest(t00100020="P 1")))
    names = [entry["fullUrl"] for entry in made["entry"]]
    assert len(set(names)) == len(names)
    assert set(references(made)) <= set(names)
    assert len(references(made)) >= 5
    for entry in made["entry"]:
        assert entry["fullUrl"] == f"urn:uuid:{entry['resource']['id']}"


@VERSIONS
def test_the_same_report_is_the_same_bundle(render: Any, model: Any) -> None:
    bundle = chest()
    assert render(bundle) == render(bundle)
    other = bundle.report.model_copy(update={"id": "1" * 16})
    ids = [{e["fullUrl"] for e in json.loads(render(Bundle(r)))["entry"]} for r in (bundle.report, other)]
    assert not ids[0] & ids[1]


@VERSIONS
def test_codes_study_and_pdf_of_a_chest_ct(render: Any, model: Any) -> None:
    made = render(
        chest(t00100020="P 1", t00100021="North", t00080020="20250131", t00080030="101500.5", t00080201="+0100")
    )
    (report,) = resources(made, "DiagnosticReport")
    (study,) = resources(made, "ImagingStudy")
    (device,) = resources(made, "Device")
    finding, whole = resources(made, "Observation")
    assert (report["status"], finding["status"]) == ("preliminary", "preliminary")
    assert report["code"]["coding"][0]["code"] == "24627-2"
    assert report["subject"] == {"type": "Patient", "identifier": {"value": "P 1", "assigner": {"display": "North"}}}
    assert report["effectiveDateTime"] == study["started"] == "2025-01-31T10:15:00+01:00"
    assert report["conclusion"] == "Possible nodule, in the lower right of the image."
    assert base64.b64decode(report["presentedForm"][0]["data"]).startswith(b"%PDF-")
    assert report["study" if render is render_r5 else "imagingStudy"][0]["reference"] == f"urn:uuid:{study['id']}"
    assert [i["value"] for i in study["identifier"]] == ["urn:oid:1.2.826.0.1", "A-77"]
    assert [i["uid"] for i in study["series"][0]["instance"]] == [f"1.2.3.{n}" for n in range(6)]
    assert device["version"] == [{"value": "1.0"}]
    assert finding["valueCodeableConcept"]["coding"][0] == {
        "system": "http://snomed.info/sct",
        "code": "27925004",
        "display": "Nodule",
    }
    assert finding["bodySite"]["coding"][0]["system"] == "http://snomed.info/sct"
    side = next(c for c in finding["component"] if c["code"].get("coding", [{}])[0].get("code") == "272741003")
    assert side["valueCodeableConcept"]["coding"][0]["code"] == "7771000"
    quantities = {own_code(c["code"]): c["valueQuantity"] for c in finding["component"] if own_code(c["code"])}
    assert (quantities["long axis"]["value"], quantities["long axis"]["code"]) == (8.0, "mm")
    assert quantities["mean attenuation"]["code"] == "[hnsf'U]"
    assert {own_code(c["code"]) for c in whole["component"]} >= {"lowest attenuation", "scanned length"}


def test_a_day_without_time_zone_stays_a_day() -> None:
    assert (
        resources(render_r4b(chest(t00080020="20250131", t00080030="1015")), "ImagingStudy")[0]["started"]
        == "2025-01-31"
    )
    assert "started" not in resources(render_r4b(chest(t00080020="yesterday")), "ImagingStudy")[0]


def test_a_time_may_leave_out_minutes_and_seconds() -> None:
    for time, told in (("0930", "09:30:00"), ("09", "09:00:00")):
        made = render_r4b(chest(t00080020="20250131", t00080030=time, t00080201="+0100"))
        assert resources(made, "ImagingStudy")[0]["started"] == f"2025-01-31T{told}+01:00"


def test_an_unknown_patient_is_said_to_be_unknown() -> None:
    (study,) = resources(render_r4b(chest()), "ImagingStudy")
    assert study["subject"]["extension"][0]["valueCode"] == "unknown"
    assert "identifier" not in study["subject"]


def test_a_ct_picture_without_dicom_has_no_study() -> None:
    assert not resources(render_r4b(Bundle(plain_report(kind="ct"))), "ImagingStudy")


def test_a_later_version_names_the_former_and_says_what_was_not_assessed() -> None:
    bundle = chest()
    report = worded(bundle.report.model_copy(update={"supersedes": "f" * 16, "version": 2}), "zh-CN")
    (made,) = resources(render_r4b(Bundle(report, bundle.images, bundle.dicom)), "DiagnosticReport")
    assert made["extension"][0]["valueReference"]["identifier"]["value"] == "f" * 16
    assert made["language"] == "zh-CN"
    assert "<p>版本: 2</p><p>取代报告: " + "f" * 16 in made["text"]["div"]
    assert "未评估内容" in made["text"]["div"]


@pytest.mark.parametrize("field", ["study_uid", "series_uid"])
@pytest.mark.parametrize("uid", ["1.2.3 4", "<b>", "1." * 40, "Doe^Jane"])
@VERSIONS
def test_an_identifier_that_is_none_is_named_and_not_repeated(render: Any, model: Any, uid: str, field: str) -> None:
    bundle = chest()
    broken = bundle.report.source.model_copy(update={field: uid})
    report = bundle.report.model_copy(update={"source": broken})
    with pytest.raises(CannotCarryError, match="UID") as caught:
        render(Bundle(report, bundle.images, bundle.dicom))
    assert uid not in str(caught.value)


def test_a_report_on_a_part_is_refused() -> None:
    with pytest.raises(CannotCarryError, match="choose html"):
        render_r4b(Bundle(plain_report()))
