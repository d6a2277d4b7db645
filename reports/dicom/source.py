"""The source series as derived objects need it: who and which study, the instances, and what is wrong with its header.

Headers of real archives break the standard. Only attributes of the patient and the study are taken over, each checked
against its value representation, so that a derived object is valid whatever its source is like.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import validate_value

from reports.bundle import Bundle
from reports.dicom.text import line
from reports.dicom_source import Instance
from reports.formats import CannotCarryError
from reports.schema import Evidence

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # it quotes names of patients that it finds odd

CT_IMAGE: Final = "1.2.840.10008.5.1.4.1.1.2"
INHERITED: Final = (  # PS3.3 C.7.1.1, C.7.2.1, C.7.2.2
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
    "TimezoneOffsetFromUTC",
)
# Type 2 of the modules above: present in every object, if need be empty.
ALWAYS: Final = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
TEXT_LENGTH: Final = {"LO": 64, "SH": 16, "PN": 64}
_OFFSET: Final = re.compile(r"[+-](0\d|1[0-4])[0-5]\d")  # PS3.3 C.12.1.1.8
_NOBODY: Final = Dataset()
for _keyword in ALWAYS:
    setattr(_NOBODY, _keyword, "")


@dataclass(frozen=True, slots=True)
class SourceSeries:
    """The series that a report was made from."""

    study_uid: str
    series_uid: str
    frame_of_reference_uid: str | None
    modality: str
    about: Dataset  # the valid attributes among `INHERITED`, those of `ALWAYS` if need be empty
    instances: tuple[Instance, ...]  # by slice
    orientation: tuple[float, float, float, float, float, float] | None

    def slice_of(self, evidence: Evidence) -> Instance:
        """The instance that the evidence lies on. Raises CannotCarryError."""
        if evidence.slice_index >= len(self.instances):
            raise CannotCarryError(
                f"evidence lies on slice {evidence.slice_index + 1}, but the source series has {len(self.instances)}"
            )
        return self.instances[evidence.slice_index]

    def references(self, slices: Sequence[int] = ()) -> list[Dataset]:
        """A data set for each instance under `slices` (all of them by default) that says which one it is.

        For highdicom, which takes the patient from the first one: it is given none to quote, `objects.finish` adds it.
        """
        shown = [self.instances[index] for index in slices if index < len(self.instances)] or self.instances
        return [self.reference(each) for each in {each.sop_instance_uid: each for each in shown}.values()]

    def reference(self, instance: Instance) -> Dataset:
        dataset = Dataset()
        dataset.update(_NOBODY)
        dataset.Modality = self.modality
        dataset.SOPClassUID = instance.sop_class_uid
        dataset.SOPInstanceUID = instance.sop_instance_uid
        dataset.StudyInstanceUID = self.study_uid
        dataset.SeriesInstanceUID = self.series_uid
        dataset.SpecificCharacterSet = "ISO_IR 192"
        return dataset

    def local(self, moment: datetime) -> datetime:
        """`moment` in the time zone of the source's dates; they name it seldom, then this machine's is taken."""
        offset = str(self.about.get("TimezoneOffsetFromUTC", ""))
        if not offset:
            return moment.astimezone()
        sign = -1 if offset[0] == "-" else 1
        return moment.astimezone(timezone(sign * timedelta(hours=int(offset[1:3]), minutes=int(offset[3:5]))))


def source_series(bundle: Bundle) -> SourceSeries:
    """The series behind a report. Raises CannotCarryError where nothing can be derived from it."""
    if bundle.dicom is None:
        raise CannotCarryError("the report was not made from DICOM files, so there is no study to put the object in")
    header = Dataset()
    for element in _elements(bundle.dicom.header):
        header.add(element)
    study, series = (str(header.get(keyword, "")) for keyword in ("StudyInstanceUID", "SeriesInstanceUID"))
    for name, uid in (("Study", study), ("Series", series)):
        if not _is_uid(uid):
            raise CannotCarryError(f"the source has no valid {name} Instance UID: correct its header and report again")
    if not bundle.dicom.instances or not all(_is_uid(each.sop_instance_uid) for each in bundle.dicom.instances):
        raise CannotCarryError("instances of the source have no valid SOP Instance UID: correct them and report again")
    frame_of_reference = str(header.get("FrameOfReferenceUID", ""))
    return SourceSeries(
        study_uid=study,
        series_uid=series,
        frame_of_reference_uid=frame_of_reference if _is_uid(frame_of_reference) else None,
        modality=str(header.get("Modality", "") or "OT"),
        about=_about(header),
        instances=tuple(_with_class(each) for each in bundle.dicom.instances),
        orientation=bundle.dicom.orientation,
    )


def _elements(header: Any) -> Iterator[DataElement]:
    """The elements of a DICOM JSON header that can be read."""
    for tag, described in header.items():
        try:
            yield DataElement.from_json(Dataset, tag, described["vr"], described.get("Value"), "Value")
        except Exception:  # pydicom meets values that break their VR with errors of many types
            continue


def _about(header: Dataset) -> Dataset:
    about = Dataset()
    for keyword in INHERITED:
        value = _valid(header[keyword]) if keyword in header else ""
        if value or keyword in ALWAYS:
            setattr(about, keyword, value)
    if about.PatientSex not in ("M", "F", "O"):
        about.PatientSex = ""
    if not _OFFSET.fullmatch(about.get("TimezoneOffsetFromUTC", "+0000")):
        del about.TimezoneOffsetFromUTC
    return about


def _valid(element: DataElement) -> str:
    """The value when its value representation allows it, else what is left of a text when it is mended, else ""."""
    value = str(element.value or "")
    mended = [line(value, TEXT_LENGTH[element.VR])] if element.VR in TEXT_LENGTH else []
    for candidate in (value, *mended):
        try:
            validate_value(element.VR, candidate, config.RAISE)
        except Exception:  # see `_elements`
            continue
        return candidate
    return ""


def _is_uid(uid: str) -> bool:
    return bool(uid) and UID(uid).is_valid


def _with_class(instance: Instance) -> Instance:
    """CT archives leave the SOP class out now and then; what ingest read as CT is one."""
    return instance if _is_uid(instance.sop_class_uid) else replace(instance, sop_class_uid=CT_IMAGE)
