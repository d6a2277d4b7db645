"""What all derived objects share: identifiers that follow from the report, equipment, dates, and how they are written.

The same report always gives the same identifiers, so that sending an object twice gives the archive one object, and a
later version of the report can name the objects of the former without having seen them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID, uuid5

from highdicom.base import SOPClass
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from reports.dicom.concepts import SCHEME
from reports.dicom.source import SourceSeries
from reports.dicom.text import line
from reports.schema import Report

NAMESPACE: Final = UUID("9ae0fc63-e759-49ba-bdee-6cc5bbf0514e")
MANUFACTURER: Final = "ScanScribe"


@dataclass(frozen=True, slots=True)
class Role:
    """What an object is for; each role has a series of its own."""

    name: str
    modality: str
    series_number: int  # above what scanners use
    title: str


def uid(*parts: object) -> str:
    """A UID of the UUID form (PS3.5 B.2), by name: the same parts give the same UID."""
    return f"2.25.{uuid5(NAMESPACE, '/'.join(map(str, parts))).int}"


def series_uid(report_id: str, language: str, role: Role) -> str:
    return uid(report_id, language, role.name, "series")


def instance_uid(report_id: str, language: str, role: Role, number: int = 1) -> str:
    return uid(report_id, language, role.name, "instance", number)


def identity(report: Report, source: SourceSeries, role: Role, number: int = 1) -> dict[str, Any]:
    """The keyword arguments that every object of highdicom takes: its UIDs, numbers, dates and equipment."""
    made = source.local(report.created)
    return {
        "series_instance_uid": series_uid(report.id, report.language, role),
        "series_number": role.series_number,
        "series_description": line(f"ScanScribe {role.title}, draft" + later_version(report)),
        "series_date": made.date(),
        "series_time": made.time(),
        "sop_instance_uid": instance_uid(report.id, report.language, role, number),
        "instance_number": number,
        "content_date": made.date(),
        "content_time": made.time(),
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": line(report.model.name) or "unnamed model",
        "software_versions": [f"ScanScribe {version('scanscribe')}", line(f"model {report.model.version}")],
        "device_serial_number": report.model.weights_sha256[:16],
        "specific_character_set": "ISO_IR 192",
        "coding_schemes": [
            CodingSchemeIdentificationItem(SCHEME, name="Terms of ScanScribe", responsible_organization="ScanScribe")
        ],
    }


def new_object(report: Report, source: SourceSeries, role: Role, sop_class: str, number: int = 1) -> SOPClass:
    """An object of a class that highdicom has no constructor for: all but what is particular to the class."""
    return SOPClass(
        study_instance_uid=source.study_uid,
        sop_class_uid=sop_class,
        modality=role.modality,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        patient_birth_date="",
        **identity(report, source, role, number),
    )


def finish(dataset: Dataset, report: Report, source: SourceSeries) -> bytes:
    """The object as a DICOM file, with its patient and study and with dates that come from the report."""
    dataset.update(source.about)
    made = source.local(report.created)
    dataset.InstanceCreationDate = f"{made:%Y%m%d}"
    dataset.InstanceCreationTime = f"{made:%H%M%S}"
    for equipment in dataset.get("ContributingEquipmentSequence", ()):
        equipment.ContributionDateTime = f"{made:%Y%m%d%H%M%S}"
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def later_version(report: Report) -> str:
    """What short descriptions say of a report that is not the first; "" for the first."""
    return f", version {report.version}" if report.version > 1 else ""


def as_made(report: Report) -> Report:
    """The report without what came later: an instance that was sent never changes, its successor names it instead."""
    return report.model_copy(update={"superseded_by": None})


def superseding(report: Report) -> str:
    """That the report replaces an earlier one, in the 64 characters of a description; "" when it does not."""
    return f"Version {report.version}, replaces report {report.supersedes}" if report.supersedes else ""


def predecessor(report: Report, source: SourceSeries, role: Role, sop_class: str) -> list[Dataset] | None:
    """The same object of the report that this one supersedes (PS3.3 C.17.2), for highdicom; None for the first."""
    if report.supersedes is None:
        return None
    former = Dataset()
    former.StudyInstanceUID = source.study_uid
    former.SeriesInstanceUID = series_uid(report.supersedes, report.language, role)
    former.SOPClassUID = sop_class
    former.SOPInstanceUID = instance_uid(report.supersedes, report.language, role)
    return [former]
