"""The report as prose: a Basic Text SR with the sections of TID 2000, for archives that show text and no graphics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from highdicom.sr import (
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    ImageContentItem,
    LanguageOfContentItemAndDescendants,
    TextContentItem,
)
from highdicom.sr.utils import collect_evidence
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from reports.bundle import Bundle
from reports.dicom import concepts
from reports.dicom.objects import Role, as_made, finish, new_object, predecessor
from reports.dicom.source import SourceSeries, source_series
from reports.dicom.sr import observation_context
from reports.dicom.text import prose
from reports.dicom_source import Instance
from reports.page import Fact, Page, Row, page_of
from reports.schema import Report
from reports.texts import percent

ROLE: Final = Role("sr-text", "SR", 9002, "narrative")
SOP_CLASS: Final = "1.2.840.10008.5.1.4.1.1.88.11"
TITLES: Final[dict[str, Code]] = {"chest": codes.LN.CTChestReport, "abdomen": codes.LN.CTAbdomenReport}
CONTEXT: Final[dict[str, Code]] = {  # kind of a quoted document -> what it is to the radiologist
    "request": codes.DCM.Request,
    "prior-report": codes.DCM.PreviousFinding,
    "text": codes.DCM.History,
}


def render(bundle: Bundle) -> bytes:
    """The SR document as a DICOM file. Raises CannotCarryError."""
    report, source = bundle.report, source_series(bundle)
    document = new_object(report, source, ROLE, SOP_CLASS)
    root = _content(report, source)
    document.update(root)
    document.CurrentRequestedProcedureEvidenceSequence, _ = collect_evidence(
        source.references(), root, source.study_uid
    )
    if former := predecessor(report, source, ROLE, SOP_CLASS):
        unreferenced = Dataset()
        unreferenced.ContentSequence = []
        document.PredecessorDocumentsSequence, _ = collect_evidence(former, unreferenced, source.study_uid)
    document.CompletionFlag = "PARTIAL" if report.not_assessed else "COMPLETE"
    document.VerificationFlag = "UNVERIFIED"
    document.PreliminaryFlag = "PRELIMINARY"
    document.ReferencedPerformedProcedureStepSequence = []
    document.PerformedProcedureCodeSequence = []
    return finish(document, report, source)


def _content(report: Report, source: SourceSeries) -> ContainerContentItem:
    region = report.technique.region.value if report.technique.region else ""
    title = TITLES.get(region, codes.LN.CTReport) if source.modality == "CT" else codes.LN.DiagnosticImagingReport
    root = ContainerContentItem(title, template_id="2000")
    page = page_of(as_made(report))
    root.ContentSequence = ContentSequence(
        [
            *LanguageOfContentItemAndDescendants(concepts.language(report.language)),
            *observation_context(report),
            *_section(codes.LN.ClinicalInformation, _context(report, page)),
            *_section(codes.LN.CurrentProcedureDescriptions, _technique(page)),
            *_section(codes.LN.Findings, _findings(report, page, source)),
            *_section(codes.LN.Impressions, _impressions(page)),
            *_section(concepts.private("not-assessed"), _not_assessed(page)),
            *_section(concepts.private("provenance"), _provenance(report, page)),
        ]
    )
    return root


def _section(heading: Code | CodedConcept, items: Iterable[ContentItem]) -> Iterator[ContainerContentItem]:
    """A section with its items; none when there is nothing to say."""
    content = list(items)
    if content:
        section = ContainerContentItem(heading, relationship_type="CONTAINS")
        section.ContentSequence = ContentSequence(content)
        yield section


def _fact(fact: Fact) -> str:
    sure = "" if fact.confidence is None else f" ({percent(fact.confidence)})"
    return f"{fact.title}: {fact.value}{fact.note and f' {fact.note}'}{sure}"


def _context(report: Report, page: Page) -> Iterator[TextContentItem]:
    for note, quote in zip(report.context, page.context, strict=True):
        yield _text(CONTEXT.get(note.kind, codes.DCM.History), "\n".join((f"{quote.source}:", *quote.lines)))


def _technique(page: Page) -> Iterator[TextContentItem]:
    lines = page.title, *map(_fact, page.technique), *(remark.text for remark in page.quality)
    yield _text(codes.DCM.ProcedureDescription, "\n".join(lines))


def _findings(report: Report, page: Page, source: SourceSeries) -> Iterator[TextContentItem]:
    for finding, row in zip(report.findings, page.findings, strict=True):
        item = _text(codes.DCM.Finding, _finding(row, page))
        images = dict.fromkeys(source.slice_of(evidence) for evidence in finding.evidence)
        if images:
            item.ContentSequence = ContentSequence([_image(each) for each in images])
        yield item
    if not page.findings:
        yield _text(codes.DCM.Finding, page.sentences["none-reported"])
    for measured in page.measurements:
        yield _text(codes.DCM.Finding, f"{measured.name}: {measured.text}")


def _finding(row: Row, page: Page) -> str:
    facts = [(page.headings["confidence"], percent(row.confidence))]
    if row.severity:
        facts.append((page.headings["severity"], row.severity_title))
    if row.side:
        facts.append((page.headings["side"], row.side))
    facts += [(measured.name, measured.text) for measured in row.measurements]
    return "\n".join((f"{row.id} {row.title}: {row.description}", *(f"{name}: {value}" for name, value in facts)))


def _image(instance: Instance) -> ImageContentItem:
    return ImageContentItem(
        name=codes.DCM.SourceImage,
        referenced_sop_class_uid=instance.sop_class_uid,
        referenced_sop_instance_uid=instance.sop_instance_uid,
        referenced_frame_numbers=[instance.frame] if instance.frames > 1 else None,
        relationship_type="INFERRED FROM",
    )


def _impressions(page: Page) -> Iterator[TextContentItem]:
    yield _text(codes.DCM.Impression, page.impression)
    if page.disposition:
        yield _text(codes.DCM.Conclusion, f"{page.headings['disposition']}: {page.disposition_title}")


def _not_assessed(page: Page) -> Iterator[TextContentItem]:
    for remark in page.not_assessed:
        yield _text(codes.DCM.Comment, f"{remark.text} {remark.reason}")


def _provenance(report: Report, page: Page) -> Iterator[TextContentItem]:
    if report.supersedes:
        yield _text(codes.DCM.Comment, page.sentences["superseded"].format(id=report.supersedes))
    lines = *map(_fact, (*page.identity, *page.provenance)), page.disclaimer
    yield _text(codes.DCM.Comment, "\n".join(lines))


def _text(concept: Code | CodedConcept, text: str) -> TextContentItem:
    return TextContentItem(concept, prose(text), "CONTAINS")
