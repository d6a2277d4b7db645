"""The report for the hospital's record: an HL7 FHIR bundle, R4B (4.3.0), or R5 (5.0.0) by option.

The bundle is a `collection`: a draft handed over as one piece. A `document` would need a Composition that somebody
attests, and nobody has read this report yet.  Ids follow from the report's id and language: the same report gives the
same bundle.  Every literal reference resolves inside it; the patient is named by the identifier in the source, never
made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from typing import Any, Final

from pydantic import ValidationError

from reports.bundle import Bundle
from reports.dicom import concepts
from reports.dicom_source import DicomSource
from reports.formats import CannotCarryError
from reports.page import Page, Row, page_of
from reports.pdf import render as render_pdf
from reports.schema import Finding, Measurement, Report
from reports.texts import Words, visible, words

DCM: Final = "http://dicom.nema.org/resources/ontology/DCM"
SCT: Final = "http://snomed.info/sct"
LOINC: Final = "http://loinc.org"
UCUM: Final = "http://unitsofmeasure.org"
URI: Final = "urn:ietf:rfc:3986"
# The product's own code system: the closed terms of `reports.taxonomy` and the names of measurements.
OWN: Final = "urn:uuid:6a1f3d0e-5d5c-5c7e-9b53-7f6f0d1c2e58"
SYSTEMS: Final = {"SCT": SCT, "DCM": DCM, "LN": LOINC, "RADLEX": "http://www.radlex.org"}
REPLACES: Final = "http://hl7.org/fhir/StructureDefinition/diagnosticReport-replaces"
ABSENT: Final = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
STUDY_CODES: Final = {"chest": ("24627-2", "CT Chest"), "abdomen": ("41806-1", "CT Abdomen")}
ANY_STUDY: Final = ("18748-4", "Diagnostic imaging study")

UID: Final = re.compile(r"[0-9.]{1,64}")

Resource = dict[str, Any]


def render_r4b(bundle: Bundle) -> bytes:
    """The bundle in FHIR R4B. Raises CannotCarryError for a report that is not on a patient."""
    from fhir.resources.R4B.bundle import Bundle as FhirBundle

    return _validated(FhirBundle, _Writer(bundle, r5=False).bundle())


def render_r5(bundle: Bundle) -> bytes:
    """The bundle in FHIR R5. Raises CannotCarryError for a report that is not on a patient."""
    from fhir.resources.bundle import Bundle as FhirBundle

    return _validated(FhirBundle, _Writer(bundle, r5=True).bundle())


def _validated(model: Any, bundle: Resource) -> bytes:
    """The bundle as JSON, after the library has checked each resource against its definition."""
    try:
        model.model_validate(bundle)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]  # what is wrong and where, never the value: it may name a patient
        raise CannotCarryError(f"FHIR cannot hold {'.'.join(map(str, fault['loc']))}: {fault['msg']}.") from None
    return (json.dumps(bundle, ensure_ascii=False, indent=1) + "\n").encode()


class _Writer:
    """One report on its way into resources."""

    def __init__(self, bundle: Bundle, *, r5: bool) -> None:
        if bundle.report.kind != "ct":
            raise CannotCarryError(
                "FHIR reports are on patients, this one is on a part: choose html, pdf, csv, coco or lot."
            )
        self.source = bundle
        self.report: Report = bundle.report
        self.dicom: DicomSource | None = bundle.dicom
        self.page: Page = page_of(bundle.report)
        self.say: Words = words(bundle.report.language)
        self.r5 = r5

    def bundle(self) -> Resource:
        observations = list(self._observations())
        study = [self._imaging_study()] if self.report.source.study_uid else []
        resources = [self._diagnostic_report(observations), *study, self._device(), *observations]
        return {
            "resourceType": "Bundle",
            "id": self._id("bundle"),
            "type": "collection",
            "timestamp": self.report.created.isoformat(),
            "entry": [{"fullUrl": f"urn:uuid:{each['id']}", "resource": each} for each in resources],
        }

    # Identity

    def _id(self, part: str) -> str:
        name = f"{self.report.id}/{self.report.language}/{part}"
        return str(uuid.uuid5(uuid.UUID(OWN.removeprefix("urn:uuid:")), name))

    def _reference(self, part: str) -> Resource:
        return {"reference": f"urn:uuid:{self._id(part)}"}

    def _resource(self, kind: str, part: str) -> Resource:
        return {"resourceType": kind, "id": self._id(part), "language": self.report.language}

    def _header(self, tag: str) -> str:
        """An attribute of the source's header, as text; empty where there is none."""
        element: Mapping[str, Any] = self.dicom.header.get(tag, {}) if self.dicom else {}
        return visible(str(next((v for v in element.get("Value", ()) if v), "")))

    def _subject(self) -> Resource:
        """The patient by the identifier in the source (PS3.3 C.7.1.1), or that there is none."""
        if not (patient := self._header("00100020")):
            return {"type": "Patient", "extension": [{"url": ABSENT, "valueCode": "unknown"}]}
        issuer = self._header("00100021")
        assigner = {"assigner": {"display": issuer}} if issuer else {}
        return {"type": "Patient", "identifier": {"value": patient} | assigner}

    def _started(self) -> str:
        """Date of the study, with its time where the header names the time zone that it is in."""
        date, time, zone = (self._header(tag) for tag in ("00080020", "00080030", "00080201"))
        try:
            day = datetime.strptime(date, "%Y%m%d")
        except ValueError:
            return ""
        try:
            whole = f"{time[:6]:0<6}"  # minutes and seconds may be left out (PS3.5 6.2, TM)
            return datetime.strptime(f"{date}{whole}{zone}", "%Y%m%d%H%M%S%z").isoformat()
        except ValueError:
            return day.date().isoformat()

    # Resources

    def _diagnostic_report(self, observations: list[Resource]) -> Resource:
        report, page = self.report, self.page
        region = report.technique.region.value if report.technique.region else ""
        code, display = STUDY_CODES.get(region, ANY_STUDY)
        pdf = render_pdf(self.source)
        made = self._resource("DiagnosticReport", "report") | {
            "text": {"status": "generated", "div": self._narrative()},
            "identifier": [{"system": URI, "value": f"urn:uuid:{self._id('report')}"}, {"value": report.id}],
            "status": report.status,
            "category": [_concept("http://terminology.hl7.org/CodeSystem/v2-0074", "CT", "CAT Scan")],
            "code": _concept(LOINC, code, display),
            "subject": self._subject(),
            "issued": report.created.isoformat(),
            "result": [self._reference_to(each) for each in observations],
            "presentedForm": [
                {
                    "contentType": "application/pdf",
                    "language": report.language,
                    "data": base64.b64encode(pdf).decode("ascii"),
                    "hash": base64.b64encode(hashlib.sha1(pdf, usedforsecurity=False).digest()).decode("ascii"),
                    "title": page.title,
                    "creation": report.created.isoformat(),
                }
            ],
        }
        if page.impression:
            made["conclusion"] = page.impression
        if report.disposition:
            made["conclusionCode"] = [_concept(OWN, report.disposition, page.disposition_title)]
        if started := self._started():
            made["effectiveDateTime"] = started
        if report.source.study_uid:
            made["study" if self.r5 else "imagingStudy"] = [self._reference("study")]
        if report.supersedes:
            former = {"type": "DiagnosticReport", "identifier": {"value": report.supersedes}}
            made["extension"] = [{"url": REPLACES, "valueReference": former}]
        if not made["result"]:
            del made["result"]
        return made

    def _narrative(self) -> str:
        """What a person reads where a system shows no PDF: never the findings without what was not assessed."""
        page = self.page
        lines = [
            page.title,
            *(f"{fact.title}: {fact.value}" for fact in page.identity),
            page.disclaimer,
            page.impression,
        ]
        lines += [f"{row.id} {row.title}: {row.description}" for row in page.findings]
        lines.append(page.headings["not-assessed"])
        lines += [f"{item.text} {item.reason}" for item in page.not_assessed]
        lines += [item.text for item in page.quality]
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
        return f'<div xmlns="http://www.w3.org/1999/xhtml" lang="{page.language}">{paragraphs}</div>'

    def _imaging_study(self) -> Resource:
        """The series that was read (DICOM PS3.3 C.7.2, C.7.3)."""
        report = self.report
        identifiers: list[Resource] = [{"system": "urn:dicom:uid", "value": f"urn:oid:{_uid(report.source.study_uid)}"}]
        if accession := visible(report.source.accession or ""):
            kind = _concept("http://terminology.hl7.org/CodeSystem/v2-0203", "ACSN", "Accession ID")
            identifiers.append({"type": kind, "value": accession})
        modality = {"system": DCM, "code": "CT", "display": "Computed Tomography"}
        made = self._resource("ImagingStudy", "study") | {
            "identifier": identifiers,
            "status": "available",
            "subject": self._subject(),
            "modality": [{"coding": [modality]} if self.r5 else modality],
        }
        if started := self._started():
            made["started"] = started
        if report.source.series_uid and self.dicom:
            instances = {each.sop_instance_uid: each for each in self.dicom.instances}.values()
            made["series"] = [
                {
                    "uid": _uid(report.source.series_uid),
                    "modality": {"coding": [modality]} if self.r5 else modality,
                    "numberOfInstances": len(instances),
                    "instance": [
                        {
                            "uid": _uid(each.sop_instance_uid),
                            "sopClass": {"system": URI, "code": f"urn:oid:{_uid(each.sop_class_uid)}"},
                        }
                        | ({"number": each.instance_number} if (each.instance_number or -1) >= 0 else {})
                        for each in instances
                    ],
                }
            ]
        return made

    def _device(self) -> Resource:
        """The algorithm; its weights and configuration are named by their hashes (RFC 6920)."""
        model = self.report.model
        name = {"type": "user-friendly-name"}
        named = visible(model.name) or "?"
        hashes = (bytes.fromhex(each) for each in (model.weights_sha256, model.config_sha256))
        names = (base64.urlsafe_b64encode(each).decode("ascii").rstrip("=") for each in hashes)
        software = {"text": self.say.heading("model")}
        made = self._resource("Device", "device") | {
            "identifier": [{"system": URI, "value": f"ni:///sha-256;{each}"} for each in names],
            "status": "active",
            "type": [software] if self.r5 else software,
            ("name" if self.r5 else "deviceName"): [name | {"value" if self.r5 else "name": named}],
        }
        if version := visible(model.version):
            made["version"] = [{"value": version}]
        return made

    # Observations

    def _observations(self) -> Iterator[Resource]:
        for finding, row in zip(self.report.findings, self.page.findings, strict=True):
            yield self._finding(finding, row)
        if self.report.measurements:
            yield self._observation("measurements") | {
                "code": {"text": self.say.heading("measurements-ct")},
                "component": [self._measured(each) for each in self.report.measurements],
            }

    def _observation(self, part: str) -> Resource:
        category = "http://terminology.hl7.org/CodeSystem/observation-category"
        made = self._resource("Observation", part) | {
            "status": self.report.status,
            "category": [_concept(category, "imaging", "Imaging")],
            "subject": self._subject(),
            "issued": self.report.created.isoformat(),
            "device": self._reference("device"),
        }
        if self.report.source.study_uid:
            made["derivedFrom"] = [self._reference("study")]
        return made

    def _finding(self, finding: Finding, row: Row) -> Resource:
        components = [
            {
                "code": _concept(DCM, "111012", "Certainty of Finding"),
                "valueQuantity": {
                    "value": round(100 * finding.confidence, 4),
                    "unit": "%",
                    "system": UCUM,
                    "code": "%",
                },
            },
            *({"code": _concept(DCM, "111030", "Image Region"), "valueString": place} for place in row.places),
        ]
        if finding.laterality:
            side = concepts.SIDES.get(finding.laterality)
            value = _of(side, row.side) if side else {"text": row.side or "?"}
            components.append({"code": _concept(SCT, "272741003", "Laterality"), "valueCodeableConcept": value})
        if row.location:
            where = {"text": self.say.heading("location")}
            components.append({"code": where, "valueString": row.location})
        if finding.severity:
            severity = _concept(OWN, finding.severity, row.severity_title)
            components.append({"code": {"text": self.say.heading("severity")}, "valueCodeableConcept": severity})
        components += [self._measured(each) for each in finding.measurements]
        made = self._observation(f"finding/{finding.id}") | {
            "identifier": [{"system": f"urn:uuid:{self._id('report')}", "value": row.id or "?"}],
            "code": _concept(DCM, "121071", "Finding"),
            "valueCodeableConcept": self._type(finding, row),
            "component": components,
        }
        if row.description:
            made["note"] = [{"text": row.description}]
        if site := self._body_site():
            made["bodySite"] = site
        return made

    def _type(self, finding: Finding, row: Row) -> Resource:
        coding = [{"system": OWN, "code": row.type}] if row.type else []
        if finding.code and finding.code.scheme in SYSTEMS and (value := visible(finding.code.value)):
            standard = {"system": SYSTEMS[finding.code.scheme], "code": value}
            meaning = visible(finding.code.meaning)
            coding.insert(0, standard | ({"display": meaning} if meaning else {}))
        return ({"coding": coding} if coding else {}) | {"text": row.title or "?"}

    def _body_site(self) -> Resource | None:
        region = self.report.technique.region
        if region is None or region.value not in concepts.REGIONS:
            return None
        return _of(concepts.REGIONS[region.value], self.say.term("region", region.value))

    def _measured(self, measurement: Measurement) -> Resource:
        name = visible(measurement.name)
        known = concepts.quantity(measurement.name)
        coding = [{"system": OWN, "code": name}] if name else []
        if known.derivation is known.site is None and known.concept.scheme_designator in SYSTEMS:
            system = SYSTEMS[known.concept.scheme_designator]
            coding.insert(0, {"system": system, "code": known.concept.value, "display": known.concept.meaning})
        unit = visible(measurement.unit)
        quantity: Resource = {"value": measurement.value}
        if unit:
            quantity |= {"unit": self.say.term("unit", unit) or unit, "system": UCUM, "code": unit}
        text = visible(self.say.term("measurement", name)) or "?"
        return {"code": ({"coding": coding} if coding else {}) | {"text": text}, "valueQuantity": quantity}

    @staticmethod
    def _reference_to(resource: Resource) -> Resource:
        return {"reference": f"urn:uuid:{resource['id']}"}


def _uid(uid: str | None) -> str:
    """A DICOM unique identifier (PS3.5 9.1), which FHIR takes for a name."""
    if not UID.fullmatch(uid or ""):
        raise CannotCarryError("FHIR names studies by their UIDs, and one of the source's is none: mend its header.")
    return str(uid)


def _concept(system: str, code: str, display: str) -> Resource:
    return {"coding": [{"system": system, "code": code, "display": display}]}


def _of(code: Any, text: str) -> Resource:
    """A code of pydicom's tables as a CodeableConcept."""
    coding = {"system": SYSTEMS[code.scheme_designator], "code": code.value, "display": code.meaning}
    return {"coding": [coding], "text": text}
