"""The report as Markdown and as plain text, to paste into a RIS or an e-mail: the same lines, marked or bare."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Final, Literal

from reports.bundle import Bundle
from reports.page import Fact, Measured, Page, Remark, page_of

# What Markdown (CommonMark, and GitHub's tables) would read as a mark: anywhere, and at the start of a line.
_MARKS: Final = re.compile(r"[\\`*_{}\[\]<>#|~&$]")
_AT_START: Final = re.compile(r"^(\d{0,9})([-+=.)])")

Kind = Literal["title", "heading", "finding", "text", "fact", "item", "quote", "value"]
Line = tuple[Kind, str, str]  # kind, words, and the value of a fact


def render_markdown(bundle: Bundle) -> bytes:
    """The report in Markdown; measurements are tables."""
    lines: list[str] = []
    previous: Kind = "text"
    page = page_of(bundle.report)
    for kind, words, value in _lines(page):
        words, value = _marked(words), _marked(value)
        first = _AT_START.sub(r"\1\\\2", words)
        if kind == "value" and previous != "value":
            lines += ["", f"| {page.headings['measurements']} | {page.headings['value']} |", "|---|---:|"]
        elif kind != previous or kind in ("text", "title", "heading", "finding"):
            lines.append("")
        lines.append(
            {
                "title": f"# {words}",
                "heading": f"## {words}",
                "finding": f"### {words}",
                "text": first,
                "fact": f"- **{words}:** {value}",
                "item": f"- {words}",
                "quote": f"> {first}  ",
                "value": f"| {words} | {value} |",
            }[kind]
        )
        previous = kind
    return ("\n".join(lines).strip() + "\n").encode()


def render_text(bundle: Bundle) -> bytes:
    """The report as plain text, UTF-8; lines are as long as what they say."""
    lines: list[str] = []
    previous: Kind = "title"
    for kind, words, value in _lines(page_of(bundle.report)):
        words, value = _isolated(words), _isolated(value)
        starts = kind == "heading" or (kind == "finding" and previous != "heading")
        if starts or previous == "title" or (kind == "text" and previous in ("fact", "value", "item")):
            lines.append("")
        lines.append(
            {
                "fact": f"{words}: {value}",
                "item": f"- {words}",
                "quote": f"> {words}",
                "value": f"  {words}: {value}",
            }.get(kind, words)
        )
        if kind in ("title", "heading"):
            lines.append(("=" if kind == "title" else "-") * min(_columns(words), 78))
        previous = kind
    return ("\n".join(lines).strip() + "\n").encode()


def _lines(page: Page) -> Iterator[Line]:
    h, s = page.headings, page.sentences
    yield "title", page.title, ""
    yield "text", f"{page.kind_title} · {page.status}", ""
    yield "text", page.disclaimer, ""
    yield from map(_fact, page.identity)
    yield "fact", h["created"], page.created
    yield "heading", h["impression"], ""
    yield "text", page.impression, ""
    if page.disposition:
        yield "fact", h["disposition"], page.disposition_title
        if page.rule:
            yield "fact", h["rule"], page.rule
    yield "heading", h["findings"], ""
    for finding in page.findings:
        yield "finding", f"{finding.id} {finding.title}".strip(), ""
        yield "text", finding.description, ""
        if finding.severity:
            yield "fact", h["severity"], finding.severity_title
        yield "fact", h["confidence"], finding.sure
        for name, value in ((h["side"], finding.side), (h["code"], finding.concept)):
            if value:
                yield "fact", name, value
        for place in finding.places:
            yield "fact", h["evidence"], place
        yield from map(_value, finding.measurements)
    for sentence in page.finding_notes if page.findings else (s["none-reported"],):
        yield "text", sentence, ""
    yield "heading", h["technique"], ""
    yield from map(_fact, page.technique)
    if page.measurements:
        yield "heading", h[f"measurements-{page.kind}"], ""
        yield from map(_value, page.measurements)
    if page.segments:
        yield "heading", h["segments"], ""
        yield from map(_method, page.segments)
    if page.methods:
        yield "heading", h["methods"], ""
        yield from map(_method, page.methods)
    if page.context:
        yield "heading", h["context"], ""
        yield "text", s["quoted"], ""
        for quote in page.context:
            yield "text", f"{quote.kind} · {quote.source} · {quote.sha256}", ""
            yield from (("quote", line, "") for line in quote.lines)
    yield "heading", h["not-assessed"], ""
    yield from map(_item, page.not_assessed or [Remark(s["nothing-listed"])])
    yield "heading", h["quality"], ""
    yield from map(_item, page.quality or [Remark(s["no-quality-problem"])])
    yield "heading", h["provenance"], ""
    yield from map(_fact, page.provenance)
    if page.inputs_summary:
        yield "item", page.inputs_summary, ""
    else:
        for each in page.inputs:
            yield "fact", each.note or h["input"], f"{each.name} · {each.media_type} · {each.sha256}"
    yield "text", page.closing, ""


def _fact(fact: Fact) -> Line:
    return "fact", fact.title, " ".join(filter(None, (fact.value, fact.sure, fact.note)))


def _value(measured: Measured) -> Line:
    return "value", measured.name, measured.text


def _item(remark: Remark) -> Line:
    return "item", " ".join(filter(None, (remark.text, remark.reason))), ""


def _method(remark: Remark) -> Line:
    return "fact", remark.text, remark.reason


def _marked(words: str) -> str:
    return _MARKS.sub(r"\\\g<0>", _isolated(words))


def _isolated(words: str) -> str:
    """Text with right-to-left letters, kept from reordering what stands beside it (UAX #9, first strong isolate)."""
    mixed = any(unicodedata.bidirectional(character) in ("R", "AL") for character in words)
    return f"\u2068{words}\u2069" if mixed else words


def _columns(words: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in words)
