"""Markdown and plain text state what the report states, and no text of a user becomes a mark."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import Phase, given, settings
from report_strategies import images_for, plain_report, reports

from reports.bundle import Bundle
from reports.page import page_of
from reports.schema import ContextNote, Report
from reports.text import render_markdown, render_text
from reports.texts import worded


def bare(text: str) -> str:
    """Without Markdown's escapes and the isolates around right-to-left text."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", re.sub("[\u2068\u2069]", "", text))


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(report=reports())
def test_markdown_is_read_back_as_the_findings(report: Report) -> None:
    markdown = render_markdown(Bundle(report, images_for(report))).decode()
    page = page_of(report)
    lines = markdown.splitlines()
    h = page.headings
    assert [bare(line) for line in lines if line.startswith("# ")] == [f"# {page.title}"]
    assert [bare(line[4:]) for line in lines if line.startswith("### ")] == [
        f"{f.id} {f.title}".strip() for f in page.findings
    ]
    rows = [bare(line) for line in lines if line.startswith("| ") and line != f"| {h['measurements']} | {h['value']} |"]
    measured = [m for finding in page.findings for m in finding.measurements] + list(page.measurements)
    assert rows == [f"| {m.name} | {m.text} |" for m in measured]
    dispositions = [line for line in lines if line.startswith(f"- **{h['disposition']}:** ")]
    assert dispositions == ([f"- **{h['disposition']}:** {page.disposition_title}"] if report.disposition else [])
    assert not re.search(r"(?<!\\)<", markdown)  # no tag
    assert not re.search(r"(?<!\\)\[", markdown)  # no link


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(report=reports())
def test_plain_text_is_read_back_as_the_findings(report: Report) -> None:
    text = bare_text(report)
    page = page_of(report)
    lines = text.splitlines()
    measured = [m for finding in page.findings for m in finding.measurements] + list(page.measurements)
    assert [line for line in lines if line.startswith("  ")] == [f"  {m.name}: {m.text}" for m in measured]
    for finding in page.findings:
        assert f"{finding.id} {finding.title}".strip() in lines
        assert f"{page.headings['confidence']}: {finding.sure}" in lines
    if report.disposition:
        assert f"{page.headings['disposition']}: {page.disposition_title}" in lines
    if report.supersedes:
        assert f"{page.headings['supersedes']}: {report.supersedes}" in lines


def bare_text(report: Report) -> str:
    return re.sub("[\u2068\u2069]", "", render_text(Bundle(report)).decode())


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(report=reports())
def test_nothing_reorders_or_controls_the_text(report: Report) -> None:
    for render in (render_text, render_markdown):
        for line in render(Bundle(report)).decode().split("\n"):
            assert line.count("\u2068") == line.count("\u2069")
            assert not [
                c for c in line if unicodedata.category(c) == "Cc" or c in "\u202a\u202b\u202d\u202e\u2066\u2067"
            ]
            if any(unicodedata.bidirectional(character) in ("R", "AL") for character in line):
                assert "\u2068" in line


def test_documents_are_quoted_line_by_line() -> None:
    note = ContextNote(text="Cough.\n- since May\n1. fever", kind="request", name="form.txt", sha256="d" * 64)
    report = worded(plain_report(context=(note,)), "zh-CN")
    assert "申请单 · form.txt · " in bare_text(report)
    assert "> Cough.\n> - since May\n> 1. fever\n" in bare_text(report)
    assert "> \\- since May  \n> 1\\. fever" in render_markdown(Bundle(report)).decode()


def test_many_inputs_are_counted_instead_of_listed() -> None:
    first = plain_report().source.inputs[0]
    source = plain_report().source.model_copy(update={"inputs": (first,) * 300})
    text = bare_text(plain_report(source=source))
    assert "300 input files; report.json names each with its SHA-256." in text
    assert text.count("a" * 64) == 0
