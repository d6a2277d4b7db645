"""The PDF report inside a DICOM object (PS3.3 A.45.1), for archives that keep documents with the study."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from reports.bundle import Bundle
from reports.dicom.objects import Role, as_made, finish, new_object
from reports.dicom.source import source_series
from reports.dicom.text import line
from reports.formats import formats

ROLE: Final = Role("dicom-pdf", "DOC", 9005, "report")
SOP_CLASS: Final = "1.2.840.10008.5.1.4.1.1.104.1"


def render(bundle: Bundle) -> bytes:
    """The object as a DICOM file. Raises CannotCarryError, also when the PDF cannot be made."""
    report, source = bundle.report, source_series(bundle)
    made_of = replace(bundle, report=as_made(report)) if report.superseded_by else bundle
    (pdf,) = formats()["pdf"].render(made_of).values()
    document = new_object(report, source, ROLE, SOP_CLASS)
    made = source.local(report.created)
    document.ConversionType = "WSD"
    document.AcquisitionDateTime = f"{made:%Y%m%d%H%M%S}"
    document.BurnedInAnnotation = "YES"  # names of files and notes that came with the images may name the patient
    document.VerificationFlag = "UNVERIFIED"
    document.DocumentTitle = line(report.title)
    document.ConceptNameCodeSequence = [CodedConcept("11528-7", "LN", "Radiology Report")]
    document.SourceInstanceSequence = [_reference(each) for each in source.references()]
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocumentLength = len(pdf)
    document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    return finish(document, report, source)


def _reference(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item
