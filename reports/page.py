"""What a report says to a person, in its language and ready to be set: HTML, PDF, Markdown and plain text show this.

All text in it has gone through `reports.texts.visible`: a format has only its own marks left to escape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from reports.schema import Evidence, FieldValue, Finding, Measurement, Report
from reports.taxonomy import UNDETERMINED
from reports.texts import Words, capital, decimal, number, percent, visible, visible_lines, words

FIELDS: Final = ("region", "plane", "contrast")
INPUTS_LISTED: Final = 24


@dataclass(frozen=True, slots=True)
class Fact:
    """A thing and its value."""

    title: str
    value: str
    note: str = ""
    confidence: float | None = None
    sure: str = ""  # the confidence in percent
    code: bool = False  # a hash or a UID


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement with its value in full, as it is written, and its unit in UCUM and as it is written."""

    code: str
    name: str
    value: float
    ucum: str
    number: str
    unit: str

    @property
    def text(self) -> str:
        return f"{self.number} {self.unit}".strip()


@dataclass(frozen=True, slots=True)
class Row:
    """A finding."""

    id: str
    type: str
    title: str
    description: str
    location: str
    severity: str | None
    severity_title: str
    confidence: float
    sure: str
    side: str
    concept: str  # the code of its type
    places: tuple[str, ...]
    measurements: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Remark:
    """Something said, and why or by what name."""

    text: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Quote:
    """A page of a document that came with the images."""

    kind: str
    source: str
    sha256: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Input:
    name: str
    note: str
    media_type: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Page:
    """A report in words."""

    language: str
    kind: str
    kind_title: str
    status: str
    title: str
    id: str
    created: str
    created_iso: str
    disclaimer: str
    identity: tuple[Fact, ...]  # report id, version, what it replaces, accession, lot, part, serial
    impression: str
    disposition: str | None
    disposition_title: str
    rule: str
    findings: tuple[Row, ...]
    finding_notes: tuple[str, ...]
    technique: tuple[Fact, ...]
    measurements: tuple[Measured, ...]
    methods: tuple[Remark, ...]
    segments: tuple[Remark, ...]
    context: tuple[Quote, ...]
    not_assessed: tuple[Remark, ...]
    quality: tuple[Remark, ...]
    provenance: tuple[Fact, ...]
    inputs: tuple[Input, ...]
    inputs_summary: str  # instead of a list that nobody reads on paper; empty where there are few
    closing: str
    headings: Mapping[str, str] = field(repr=False)
    sentences: Mapping[str, str] = field(repr=False)


def page_of(report: Report) -> Page:
    """The report in words, in `report.language`."""
    say = words(report.language)
    is_ct = report.kind == "ct"
    many_inputs = len(report.source.inputs) > INPUTS_LISTED
    return Page(
        language=report.language,
        kind=report.kind,
        kind_title=say.term("kind", report.kind),
        status=say.term("status", report.status),
        title=visible(report.title) or say.term("kind", report.kind),  # a document must have one
        id=report.id,
        created=report.created.strftime("%Y-%m-%d %H:%M %Z"),
        created_iso=report.created.isoformat(),
        disclaimer=visible(report.disclaimer),
        identity=tuple(_identity(report, say)),
        impression=visible(report.impression),
        disposition=report.disposition,
        disposition_title=say.term("disposition", report.disposition) if report.disposition else "",
        rule=visible(report.disposition_rule or ""),
        findings=tuple(_row(finding, report, say) for finding in report.findings),
        finding_notes=tuple(say.sentence(key) for key in ("confidence-is", *(["sides-are-of-the-image"] * is_ct))),
        technique=tuple(_technique(report, say)),
        measurements=tuple(_measured(m, say) for m in report.measurements),
        methods=tuple(_methods(report, say)),
        segments=tuple(
            Remark(capital(visible(say.term("segment", s.title))), visible(say.term("method", s.method)))
            for s in report.segments
        ),
        context=tuple(
            Quote(
                kind=say.term("context", note.kind),
                source=_named(visible(note.name), note.page, say),
                sha256=note.sha256,
                lines=tuple(visible_lines(note.text).split("\n")),
            )
            for note in report.context
        ),
        not_assessed=tuple(
            Remark(capital(visible(n.what)), say.bracketed(visible(n.reason))) for n in report.not_assessed
        ),
        quality=tuple(Remark(visible(say.flag(flag)), say.bracketed(visible(flag))) for flag in report.quality_flags),
        provenance=tuple(_provenance(report, say)),
        inputs=tuple(_inputs(report, say)),
        inputs_summary=say.sentence("inputs-in-json", count=len(report.source.inputs)) if many_inputs else "",
        closing=say.sentence("made-with", schema=report.schema_version),
        headings=say.headings,
        sentences=say.sentences,
    )


def _identity(report: Report, say: Words) -> Iterator[Fact]:
    yield Fact(say.heading("report"), report.id, code=True)
    yield Fact(say.heading("version"), str(report.version))
    if report.supersedes:
        yield Fact(say.heading("supersedes"), report.supersedes, code=True)
    if report.superseded_by:
        yield Fact(say.heading("superseded-by"), report.superseded_by, code=True)
    for name in ("accession", "lot", "part", "serial"):
        if value := visible(getattr(report.source, name) or ""):
            yield Fact(say.heading(name), value, visible(report.source.read_from.get(name, "")))


def _row(finding: Finding, report: Report, say: Words) -> Row:
    concept = finding.code
    return Row(
        id=visible(finding.id),
        type=visible(finding.type),
        title=capital(visible(say.term("type", finding.type))),
        description=visible(finding.description),
        location=capital(visible(say.term("location", finding.location or ""))),
        severity=finding.severity,
        severity_title=say.term("severity", finding.severity) if finding.severity else "",
        confidence=finding.confidence,
        sure=percent(finding.confidence),
        side=visible(say.term("laterality", finding.laterality or "")),
        concept=visible(f"{concept.scheme} {concept.value} {concept.meaning}") if concept else "",
        places=tuple(_place(evidence, report, say) for evidence in finding.evidence),
        measurements=tuple(_measured(m, say) for m in finding.measurements),
    )


def _place(evidence: Evidence, report: Report, say: Words) -> str:
    x0, y0, x1, y1 = map(decimal, evidence.bbox)
    parts = [say.sentence("box", box=say.sentence("corners", x0=x0, y0=y0, x1=x1, y1=y1))]
    if (report.technique.slice_count or 1) > 1:
        parts.insert(0, say.sentence("slice", slice=evidence.slice_index + 1))
    if evidence.bbox_mm:
        first, last = (", ".join(map(decimal, corner)) for corner in evidence.bbox_mm)
        parts.append(say.sentence("box-patient", first=first, last=last))
    return say.clauses(parts)


def _measured(measurement: Measurement, say: Words) -> Measured:
    return Measured(
        code=visible(measurement.name),
        name=capital(visible(say.term("measurement", measurement.name))),
        value=measurement.value,
        ucum=visible(measurement.unit),
        number=number(measurement.value),
        unit=visible(say.term("unit", measurement.unit)),
    )


def _methods(report: Report, say: Words) -> Iterator[Remark]:
    """How each kind of measurement was made, once."""
    measurements = [m for finding in report.findings for m in finding.measurements] + list(report.measurements)
    for name, method in dict.fromkeys((m.name, m.method) for m in measurements):
        yield Remark(capital(visible(say.term("measurement", name))), visible(say.term("method", method)))


def _technique(report: Report, say: Words) -> Iterator[Fact]:
    t = report.technique
    read_from = {name: say.term("read_from", source) for name, source in t.read_from.items()}
    fields = {name: value for name in FIELDS if (value := getattr(t, name))} | report.fields
    for name, value in fields.items():
        yield _field(name, value, t.read_from.get(name) == "geometry", read_from.get(name, ""), say)
    if t.product_line:
        note = read_from.get("product_line") or say.term("read_from", "model")
        yield Fact(say.heading("product"), capital(visible(say.term("line", t.product_line))), say.bracketed(note))
    yield Fact(say.heading("image-size"), "{} × {} px".format(*t.image_size_px))
    if t.slice_count:
        note = say.sentence("read-by-model", count=len(t.slices_read)) if t.slices_read else ""
        yield Fact(say.heading("slices"), str(t.slice_count), say.bracketed(note))
    if t.spacing_mm:
        spacing = "{:.3g} × {:.3g} mm".format(*t.spacing_mm)
        yield Fact(say.heading("pixel-spacing"), spacing, say.bracketed(read_from.get("spacing_mm", "")))
    for name, millimetres in (("slice-spacing", t.slice_spacing_mm), ("slice-thickness", t.slice_thickness_mm)):
        if millimetres:
            yield Fact(say.heading(name), f"{millimetres:.3g} mm")
    said = say.bracketed(say.sentence("as-header-says"))
    for name, text in (("kernel", t.kernel), ("contrast-agent", t.contrast_agent), ("body-part", t.body_part)):
        if text:
            yield Fact(say.heading(name), visible(text), said)
    if t.windows:
        yield Fact(say.heading("windows"), capital(say.list(visible(say.term("window", w)) for w in t.windows)))


def _field(name: str, field: FieldValue, known: bool, read_from: str, say: Words) -> Fact:
    title, value = visible(say.term("field", name)), visible(say.term(name, field.value))
    sure = None if known or field.value == UNDETERMINED else field.confidence
    shown = "" if sure is None else percent(sure)
    return Fact(capital(title), capital(value), say.bracketed(read_from) if known else "", sure, shown)


def _provenance(report: Report, say: Words) -> Iterator[Fact]:
    model = report.model
    device = say.sentence("on-device", device=visible(model.device))
    yield Fact(say.heading("model"), visible(f"{model.name} {model.version}"), say.bracketed(device))
    yield Fact(say.heading("weights"), model.weights_sha256, code=True)
    yield Fact(say.heading("configuration"), model.config_sha256, code=True)
    for name, uid in (("study-uid", report.source.study_uid), ("series-uid", report.source.series_uid)):
        if uid:
            yield Fact(say.heading(name), visible(uid), code=True)
    if report.timing_s:
        spent = (f"{visible(say.term('timing', name))} {seconds:.2f} s" for name, seconds in report.timing_s.items())
        yield Fact(say.heading("time-taken"), say.list(spent))


def _inputs(report: Report, say: Words) -> Iterator[Input]:
    for each in report.source.inputs:
        yield Input(_named(visible(each.name), each.page, say), "", visible(each.media_type), each.sha256)
    if golden := report.source.reference:
        note = say.heading("golden-sample")
        yield Input(_named(visible(golden.name), golden.page, say), note, visible(golden.media_type), golden.sha256)


def _named(name: str, page: int | None, say: Words) -> str:
    return name if page is None else f"{name} · {say.sentence('page', page=page + 1)}"
