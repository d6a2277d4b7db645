"""The words of reports in each language: one catalogue of terms and sentences (`catalogue/*.toml`), and its use.

A report's texts follow from its structured values: `worded` makes them, when a report is built and when it is wanted in
another language.  Types, zones, severities, names of measurements and other closed terms stay codes in the report
itself; formats for people look them up here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal, get_args

from reports import taxonomy
from reports.grammar import ZONES, DraftFinding, summarise
from reports.schema import Finding, NotAssessed, Report

Language = Literal["en", "zh-CN"]
LANGUAGES: Final[tuple[Language, ...]] = get_args(Language)
CATALOGUE: Final = Path(__file__).with_name("catalogue")


class Words:
    """The catalogue in one language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._tables = tomllib.loads((CATALOGUE / f"{language}.toml").read_text("utf-8"))

    def term(self, domain: str, key: str) -> str:
        """The word for a closed term; an unknown one is put in plain words."""
        return str(self._tables.get(domain, {}).get(key, key.replace("-", " ") if domain in _CODED else key))

    def heading(self, key: str) -> str:
        return str(self._tables["heading"][key])

    @property
    def headings(self) -> Mapping[str, str]:
        """All headings and labels, for templates."""
        return dict(self._tables["heading"])

    @property
    def sentences(self) -> Mapping[str, str]:
        """All sentences, for templates; those with values in braces have to be filled in."""
        return dict(self._tables["sentence"])

    def sentence(self, key: str, **values: object) -> str:
        return str(self._tables["sentence"][key]).format_map(values)

    def noun(self, finding_type: str, *, plural: bool = False) -> str:
        """A finding type inside a sentence; one that only its owner knows is quoted as the owner writes it."""
        listed = self._tables["noun"].get(finding_type)
        forms = (listed or self.sentence("owners-noun", name=self.term("type", finding_type))).split("|")
        return forms[-1 if plural else 0]

    def flag(self, flag: str) -> str:
        """The sentence of a quality flag."""
        return str(self._tables["flag"].get(flag) or capital(flag.replace("-", " ")) + ".")

    def list(self, words: Iterable[str]) -> str:
        return str(self._tables["punctuation"]["list"]).join(words)

    def clauses(self, parts: Iterable[str]) -> str:
        return str(self._tables["punctuation"]["clauses"]).join(parts)

    def join(self, sentences: Iterable[str]) -> str:
        return str(self._tables["punctuation"]["sentences"]).join(sentences)

    def bracketed(self, note: str) -> str:
        return str(self._tables["punctuation"]["note"]).format(note=note) if note else ""

    def not_assessed(self, item: NotAssessed) -> NotAssessed:
        """The item in this language; one without a code keeps its words."""
        template: Mapping[str, str] | None = self._tables["not-assessed"].get(item.code)
        if template is None:
            return item
        values = {name: self._value(name, value, item) for name, value in item.values.items()}
        words = {part: template[part].format_map(values) for part in ("what", "reason")}
        return item.model_copy(update=words)

    def _value(self, name: str, value: str | float | tuple[str, ...], item: NotAssessed) -> str:
        if isinstance(value, tuple):
            return self.list(self.term("type", each) for each in value)
        if name == "guess":
            return self.term(str(item.values["field"]), str(value))
        if name == "probability":
            return percent(float(value))
        return self.term(name, str(value))


_CODED: Final = {"type", "noun", "line", "field", "region", "plane", "contrast", "laterality", "covid19"}


@cache
def words(language: Language) -> Words:
    """The catalogue of a language, read once."""
    return Words(language)


def worded(report: Report, language: Language) -> Report:
    """The report with its texts made anew, in `language`, from its structured values."""
    say = words(language)
    subject = _subject(report, say)
    return report.model_copy(
        update={
            "language": language,
            "title": f"{subject} · {report.source.name}" if report.source.name else subject,
            "findings": tuple(
                f.model_copy(update={"description": _description(f, report, say)}) for f in report.findings
            ),
            "impression": _impression(report, say),
            "not_assessed": tuple(map(say.not_assessed, report.not_assessed)),
            "disclaimer": say.sentence("disclaimer"),
        }
    )


def _subject(report: Report, say: Words) -> str:
    if report.kind == "defect":
        line = report.technique.product_line
        return capital(
            say.sentence("subject-defect", line=say.term("line", line))
            if line
            else say.sentence("subject-defect-unknown")
        )
    region, plane = (
        say.term(name, field.value) if field and field.value != taxonomy.UNDETERMINED else ""
        for name, field in (("region", report.technique.region), ("plane", report.technique.plane))
    )
    known = "-".join(name for name, value in (("region", region), ("plane", plane)) if value)
    key = {"": "subject-ct-only", "region": "subject-ct-region", "plane": "subject-ct-plane"}.get(known, "subject-ct")
    return say.sentence(key, region=capital(region), plane=plane)


def _description(finding: Finding, report: Report, say: Words) -> str:
    extent = say.term("extent", finding.extent) if finding.extent else ""
    place = say.term("place", finding.location) if finding.location else ""
    slices = report.technique.slice_count or 1
    first = finding.evidence[0] if finding.evidence else None
    on_slice = {"slice": first.slice_index + 1, "slices": slices} if first and slices > 1 else {}
    key = "finding-on-slice" if on_slice else "finding"
    noun = say.noun(_word(finding) or finding.type)
    sentence = say.sentence(key, extent=extent, noun=noun, place=place, **on_slice)
    sentences = [capital(" ".join(sentence.split()))]
    if any(evidence.localisation == "weak" for evidence in finding.evidence):
        sentences.append(say.sentence("weak"))
    return say.join(sentences)


def _word(finding: Finding) -> str:
    """The finding's word, where it is one of its type: a text never says what the finding is not."""
    return finding.word if finding.word in taxonomy.WORDS_OF_TYPE.get(finding.type, ()) else ""


def _impression(report: Report, say: Words) -> str:
    drafts = [DraftFinding(0, f.type, f.location or ZONES[-1], word=_word(f)) for f in report.findings]
    if sentences := summary(report.kind, drafts, say.language):
        return sentences
    if "out-of-domain" in report.quality_flags:
        return say.sentence("out-of-domain")
    return nothing_found(report.kind, report.technique.product_line, say.language)


def summary(kind: str, findings: Sequence[DraftFinding], language: Language = "en") -> str:
    """A sentence for each type, how many of it and where; empty when there is none."""
    return words(language).join(statements(kind, summarise(findings), findings, language))


def statements(
    kind: str, rows: Iterable[tuple[str, str, str]], findings: Sequence[DraftFinding], language: Language = "en"
) -> list[str]:
    """The sentences of an impression (`reports.grammar.Draft`).

    CT findings are put as possibilities: one image rarely proves one. They are named by the word that all of a type
    share, else by the type's noun.
    """
    say = words(language)
    sentences = []
    for count, name, zone in rows:
        place = say.term("place", zone)
        if kind == "ct":
            shared = {finding.word for finding in findings if finding.type == name}
            word = shared.pop() if len(shared) == 1 else ""
            sentences.append(say.sentence("possible", noun=say.noun(word or name), place=place))
        else:
            noun = say.noun(name, plural=count != "one")
            sentences.append(say.sentence("counted", count=capital(say.term("count", count)), noun=noun, place=place))
    return sentences


def nothing_found(kind: str, line: str | None, language: Language = "en") -> str:
    """What is said where no finding is reported: never that all is well."""
    say = words(language)
    if kind == "ct":
        return say.sentence("no-finding-ct")
    return say.sentence("no-finding-defect", line=say.term("line", line)) if line else say.sentence("product-unknown")


def capital(text: str) -> str:
    """With a capital first letter; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def number(value: float) -> str:
    """A measured value with three significant digits, or all digits before the point; a real minus sign."""
    size = abs(value)
    if value == int(value) or size >= 99.95:
        text = f"{value:,.0f}" if size < 1e12 else f"{value:.3g}"
    elif size >= 0.01:
        text = f"{value:.{1 if size >= 9.995 else 2}f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−")


def decimal(value: float) -> str:
    """A coordinate: one digit after the point, a real minus sign."""
    return f"{value:.1f}".replace("-", "−")


# C0 and C1 controls, line and paragraph separators, embeddings, overrides and isolates (UAX #9), tags, byte order mark,
# halves of surrogate pairs and what Unicode calls no character: nothing of it has a look of its own, and some of it
# makes other text look like what it is not.
_UNSEEN: Final = {
    point: "\ufffd"
    for low, high in (
        (0x00, 0x1F),
        (0x7F, 0x9F),
        (0x061C, 0x061C),
        (0x200E, 0x200F),
        (0x2028, 0x202E),
        (0x2060, 0x206F),
        (0xD800, 0xDFFF),
        (0xFDD0, 0xFDEF),
        (0xFEFF, 0xFEFF),
        (0xFFF9, 0xFFFB),
        (0xE0000, 0xE007F),
        *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(17)),
    )
    for point in range(low, high + 1)
}


def percent(probability: float) -> str:
    """A probability (0 to 1) in whole per cent; only what is certain, or impossible, is shown as such."""
    shown = f"{probability:.0%}"
    if shown == "100%" and probability < 1:
        return ">99%"
    return "<1%" if shown == "0%" and probability > 0 else shown


def visible(text: str) -> str:
    """User text as it may be shown: controls and characters that reorder text become U+FFFD, white space one space."""
    return " ".join(text.split()).translate(_UNSEEN)


def visible_lines(text: str) -> str:
    """As `visible`, line by line."""
    return "\n".join(visible(line) for line in text.splitlines())
