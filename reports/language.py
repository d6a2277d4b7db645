"""Refuses sentences that contradict the structured findings: the report's own, or a language model's.

`contradictions` compares what sentences say with what was found: types, negations, places, sides, counts, sizes,
severities, numbers, and claims that something is normal. `agreeing` keeps the sentences that may stand. English is read
in full, Chinese in the words of the catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal

from reports import taxonomy
from reports.grammar import SCATTERED, ZONES, Draft, count_word
from reports.mentions import (
    CT_STEMS,
    DEFECT_STEMS,
    FOREIGN,
    STEMS,
    Clause,
    Mention,
    clauses,
    is_chinese,
)
from reports.schema import Measurement, Report
from reports.texts import words

Code = Literal[
    "not-found",  # a type that is not among the findings
    "negated",  # a type that is
    "cleared",  # normal, or absent, where that was not assessed
    "word",  # another word than the finding's
    "place",
    "side",
    "count",
    "size",
    "severity",
    "disposition",
    "technique",
    "number",  # that is not among the measurements
]
Refuse = Callable[[Code, str, str], None]  # takes a contradiction down: code, words, reason


@dataclass(frozen=True, slots=True)
class Sentence:
    """Text that speaks of one finding (its id, F1, ...), or of the whole image."""

    text: str
    finding: str | None = None


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Why a sentence may not stand."""

    code: Code
    sentence: str
    said: str  # the words at fault
    reason: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A finding as far as sentences can speak of it; None is what the report does not say."""

    id: str
    type: str
    word: str
    zone: str | None
    extent: str | None
    severity: str | None
    side: str | None
    values: tuple[tuple[float, str], ...]  # measured, with unit


@dataclass(frozen=True, slots=True)
class _Facts:
    kind: str
    findings: tuple[_Found, ...]
    assessed: frozenset[str]  # types whose absence the report may state
    values: tuple[tuple[float, str], ...] = ()  # of the whole image
    counts: frozenset[int] = frozenset()  # bare numbers that stand in the report
    disposition: str | None = None
    plane: str | None = None
    side: str | None = None
    covid19: bool = False
    stems: Mapping[str, str] = field(default_factory=dict)


def contradictions(
    report: Report | Draft, sentences: Iterable[str | Sentence], *, assessed: bool = True
) -> list[Contradiction]:
    """What in the sentences does not agree with the findings, in the order of the text; empty when all may stand.

    A draft has no measurements, so that no number may be given; of one whose image was not `assessed` nothing may be
    denied either.
    """
    facts = _of_report(report) if isinstance(report, Report) else _of_draft(report, assessed=assessed)
    found: list[Contradiction] = []
    for each in sentences:
        sentence = each if isinstance(each, Sentence) else Sentence(each)
        stems = _chinese_stems() if is_chinese(sentence.text) else facts.stems
        for clause in clauses(sentence.text, stems):
            found += _in_clause(facts, clause, sentence.finding)
    return list(dict.fromkeys(found))


def agreeing(report: Report, text: str) -> tuple[str, list[Contradiction]]:
    """A free text without its sentences that contradict the report, and why those went."""
    refused = contradictions(report, [text])
    gone = {each.sentence for each in refused}
    kept = [s for s in dict.fromkeys(clause.sentence for clause in clauses(text, {})) if s not in gone]
    return words("zh-CN" if is_chinese(text) else "en").join(kept), refused


# What is known


def _of_report(report: Report) -> _Facts:
    side = report.fields["laterality"].value if "laterality" in report.fields else None
    findings = tuple(
        _Found(
            f.id,
            f.type,
            f.word or "",
            f.location,
            f.extent,
            f.severity,
            f.laterality or side,
            (
                *_values(f.measurements),
                *((100 * f.confidence, "%"), (f.confidence, "1")),
                *((edge, "1") for e in f.evidence for edge in e.bbox),
            ),
        )
        for f in report.findings
    )
    technique = report.technique
    numbers = {len(findings), technique.slice_count or 1, *technique.image_size_px, *technique.slices_read}
    numbers |= {e.slice_index + 1 for f in report.findings for e in f.evidence}
    numbers |= {int(f.id[1:]) for f in report.findings if f.id[1:].isdigit()}
    numbers |= {sum(f.type == name for f in findings) for name in {f.type for f in findings}}
    lengths = [*(technique.spacing_mm or ()), technique.slice_spacing_mm, technique.slice_thickness_mm]
    probabilities = [p for value in report.fields.values() for p in value.probabilities.values()]
    values = [*_values(report.measurements), *((length, "mm") for length in lengths if length is not None)]
    values += [(100 * p, "%") for p in probabilities]
    line = technique.product_line
    known = "out-of-domain" not in report.quality_flags and line in taxonomy.LINES
    return _Facts(
        report.kind,
        findings,
        frozenset(taxonomy.line(line).types) if known and line else frozenset({"owner"} if line else ()),
        tuple(values),
        frozenset(numbers),
        report.disposition,
        technique.plane.value if technique.plane else None,
        side,
        "covid19" in report.fields and report.fields["covid19"].value == "true",
        _stems(report.kind, findings),
    )


def _of_draft(draft: Draft, *, assessed: bool) -> _Facts:
    findings = tuple(
        _Found(f"F{n}", f.type, f.word, f.zone, f.extent or None, None, draft.fields.get("laterality"), ())
        for n, f in enumerate(draft.findings, start=1)
    )
    line = draft.line if draft.line in taxonomy.LINES else None
    return _Facts(
        draft.kind,
        findings,
        frozenset(taxonomy.line(line).types if assessed and line else {"owner"} if assessed and draft.line else ()),
        counts=frozenset({len(findings)} | {sum(f.type == g.type for g in findings) for f in findings}),
        plane=draft.fields.get("plane"),
        side=draft.fields.get("laterality"),
        covid19=draft.fields.get("covid19") == "true",
        stems=_stems(draft.kind, findings),
    )


_UNITS: Final = {"{pixel}": "px", "[hnsf'U]": "HU", "mm2": "mm²", "cm2": "cm²", "mm3": "mm³", "cm3": "cm³", "mL": "ml"}
_IN: Final = {  # a value of the first unit in the second
    **{("mm", "cm"): 0.1, ("cm", "mm"): 10.0, ("mm²", "cm²"): 0.01, ("cm²", "mm²"): 100.0, ("mm", "µm"): 1000.0},
    **{("ml", "cm³"): 1.0, ("cm³", "ml"): 1.0, ("mm³", "cm³"): 0.001, ("mm³", "ml"): 0.001},
}


def _values(measured: Sequence[Measurement]) -> tuple[tuple[float, str], ...]:
    return tuple((m.value, _UNITS.get(m.unit, m.unit)) for m in measured)


def _stems(kind: str, findings: Sequence[_Found]) -> dict[str, str]:
    """Patterns by type or word; an owner's types go by the names that their owner gave."""
    known: dict[str, str] = CT_STEMS | STEMS if kind == "ct" else dict(DEFECT_STEMS)
    listed = (*taxonomy.CT_TYPES, *taxonomy.DEFECT_TYPES)
    own = {f.type for f in findings if f.type not in listed}
    known |= {name: rf"\b{re.escape(name.lower())}(?:e?s)?\b" for name in own if name.strip()}
    return known | {"foreign": FOREIGN, "covid19": r"\bcovid(?:[- ]?19)?\b"}


@cache
def _chinese_stems() -> dict[str, str]:
    say = words("zh-CN")
    names = (*taxonomy.CT_TYPES, *taxonomy.DEFECT_TYPES, *taxonomy.TYPE_OF_WORD)
    return {name: "|".join(dict.fromkeys((say.noun(name), say.term("type", name)))) for name in names}


# What is said

_ROWS: Final = {"upper": 0, "top": 0, "superior": 0, "lower": 2, "bottom": 2, "inferior": 2}
_COLUMNS: Final = {"left": 0, "right": 2}
_IMAGE: Final = re.compile(
    r"\b(?P<row>upper|top|lower|bottom|middle|mid|centre|center)[- ](?:the )?"
    r"(?P<column>left|right|middle|centre|center)\b"
    r"(?! (?:lobe|lung|kidney|hemi|breast|ventric|atri|abdom|quadrant|extremit))"
    r"|\b(?P<column2>left|right)[- ](?P<row2>upper|lower|middle)\b(?! (?:lobe|lung|pole|abdom|quadrant))"
    r"|\b(?P<half>upper|top|lower|bottom|left|right|left-hand|right-hand)"
    r"(?: (?:half|side|edge|part|third|border|corner))? (?:of (?:the )?)?"
    r"(?:image|picture|photo|frame|view|strip|tile|board|sheet|surface)\b"
    r"|\b(?P<centre>(?:in|at|near) the (?:very )?(?:centre|center|middle)|central(?:ly)?)\b"
    r"(?! (?:left|right)| (?:lobe|mediast|venous|line))"
)
_SIDE: Final = re.compile(
    r"\b(?P<both>bilateral(?:ly)?|both (?:sides|lungs|kidneys|lobes))\b|\b(?P<one>left|right)(?:[- ]sided|-hand)?\b"
)
_COUNT: Final = (
    r"\b(?P<n>no fewer than \w+|exactly one|only one|a single|single|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|several|multiple|many|numerous|a couple of|\d{1,3})(?! of (?:the|these|those|them)\b)"
    r"(?: (?!and\b|or\b)[\w-]+){0,3}? $"
)
_NUMBERS: Final = {
    **{"one": 1, "two": 2, "three": 3, "four": 4, "five": 5},
    **{"six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
}
_EXTENTS: Final = {
    "small": {"small", "tiny", "minute", "little", "minuscule"},
    "medium": {"medium", "medium-sized", "moderately-sized", "mid-sized"},
    "large": {"large", "big", "huge", "extensive", "sizeable", "sizable", "massive"},
}
_SEVERITIES: Final = {
    **dict.fromkeys(("critical", "critically"), ("critical",)),
    **dict.fromkeys(("severe", "severely", "serious"), ("critical", "major")),
    **dict.fromkeys(("major", "moderate"), ("major",)),
    **dict.fromkeys(("minor", "mild", "mildly", "slight", "negligible", "harmless", "cosmetic"), ("minor",)),
}
_NORMAL: Final = re.compile(
    r"\b(?:normal|normally|unremarkable|healthy|flawless|intact|defect[- ]free|disease[- ]free|fault[- ]free"
    r"|free (?:of|from) (?:any )?(?:defects?|disease|findings?|abnormalit\w+|faults?|damage)"
    r"|no (?:(?:other|further|acute|cardiopulmonary|significant|visible|obvious|relevant|suspicious|remarkable"
    r"|evidence of|signs? of|pathologic(?:al)?|additional|any) ){0,3}"
    r"(?:abnormal\w*|findings?|defects?|disease|patholog\w+|process|problems?|issues?|faults?|damage|flaws?)"
    r"|without (?:any )?(?:abnormal\w*|findings?|defects?|disease|patholog\w+|flaws?)"
    r"|nothing (?:abnormal|suspicious|wrong)"
    r"|(?:is|are|looks?|appears?) (?:clear|clean|fine|good|perfect|sound)\b)"
)
_SEARCHED: Final = re.compile(
    r"\bno (?:defect|finding)s? (?:of the assessed types )?(?:was|were|is|are)? ?(?:found|reported)\b"
)
_CHINESE_SEARCHED: Final = re.compile("未(?:发现|报告)所评估类型的(?:缺陷|所见)|未报告所见")
_CHINESE_NORMAL: Final = re.compile("正常|未见异常|无异常|无缺陷|未见缺陷|完好")
_DISPOSITION: Final = re.compile(
    r"\b(?:(?:be|is|was|are|were|to) (?P<done>accept|reject|rework|scrapp)(?:ed|able)?\b"
    r"|(?P<noun>rework|scrap|rejection|acceptance) (?:is )?(?:recommended|needed|required|proposed)"
    r"|(?:recommend|propose)\w* (?P<other>rework|scrap|rejection|acceptance)"
    r"|\b(?P<verdict>pass|fail)(?:es|s|ed)? (?:the )?(?:inspection|control|quality)\b)"
)
_VALUE: Final = re.compile(
    r"(?<![a-z\d.,])(?P<n>[−-]?\d+(?:,\d{3})*(?:\.\d+)?)(?!\d)(?P<x>\s*(?:x|×|by|to|-|–)\s*(?=\d))?"
    r"(?:\s*(?P<unit>mm²|mm2|mm³|mm3|cm²|cm2|cm³|cm3|mm|cm|µm|um|px|pixels?|hu|ml|%|percent|per cent)(?!\w))?"
)
_SPELLED: Final = {
    **{"mm2": "mm²", "cm2": "cm²", "mm3": "mm³", "cm3": "cm³", "um": "µm", "pixel": "px", "pixels": "px", "hu": "HU"},
    **{"percent": "%", "per cent": "%"},
}
_CHINESE_COUNT: Final = {"一处": "one", "两处": "two", "三处": "three", "多处": "several"}


def _in_clause(facts: _Facts, clause: Clause, tied: str | None) -> list[Contradiction]:
    found: list[Contradiction] = []

    def refuse(code: Code, said: str, reason: str) -> None:
        found.append(Contradiction(code, clause.sentence, said.strip(), reason))

    text = clause.text
    of_tied = [f for f in facts.findings if f.id == tied]
    named: list[_Found] = []
    for mention in clause.mentions:
        said = text[mention.start : mention.end]
        if mention.status == "open":
            continue
        if mention.name == "covid19":
            if facts.covid19 != (mention.status == "asserted"):
                refuse("not-found", said, "the report does not say so")
            continue
        if mention.name == "foreign":
            refuse("not-found", said, "no type of finding that is assessed")
            continue
        kind = taxonomy.TYPE_OF_WORD.get(mention.name, mention.name)
        of_type = [f for f in of_tied or facts.findings if f.type == kind]
        if mention.status == "denied":
            if any(f.type == kind for f in facts.findings):
                refuse("negated", said, "it was found")
            elif kind not in facts.assessed:
                refuse("cleared", said, "its absence was not assessed")
            continue
        if not of_type:
            refuse("not-found", said, "this finding is of another type" if of_tied else "it is not among the findings")
            continue
        if mention.name != kind:
            worded = [f for f in of_type if f.word in ("", mention.name)]
            if not worded:
                refuse("word", said, f"the finding is called {of_type[0].word.replace('-', ' ')}")
                continue
            of_type = worded
        placed = _placed(text, of_type)
        if not placed:
            refuse("place", said, f"it lies elsewhere: {', '.join(sorted({str(f.zone) for f in of_type}))}")
        named += placed or of_type
        _details(text, mention, placed or of_type, of_type, refuse)
    if of_tied and not named:
        named = of_tied
        if not clause.mentions and not _placed(text, named):
            refuse("place", text, f"it lies elsewhere: {named[0].zone}")
    _as_a_whole(facts, clause, named, refuse)
    return found


def _placed(text: str, findings: Sequence[_Found]) -> list[_Found]:
    """Those of the findings that lie where the text says; all where it names no place."""
    if is_chinese(text):
        say = words("zh-CN")
        for zone in (*ZONES, SCATTERED):
            if say.term("place", zone) in text:
                if zone == SCATTERED:
                    return list(findings) if len({f.zone for f in findings}) > 1 else []
                return [f for f in findings if f.zone == zone]
        return list(findings)
    zones = {f.zone for f in findings}
    if re.search(r"\bin (?:several|many|various|multiple|different) (?:places|locations|areas|spots)\b", text):
        return list(findings) if len(zones) > 1 else []
    if re.search(
        r"\bthroughout\b|\ball over\b|\bthe (?:whole|entire) (?:image|picture|surface)\b|\beverywhere\b", text
    ):
        return [f for f in findings if f.zone == "throughout"] or (list(findings) if len(zones) > 2 else [])
    places = [_cells(match) for match in _IMAGE.finditer(text)]
    if not places:
        return list(findings)
    return [f for f in findings if f.zone is None or any(f.zone in cells for cells in places)]


def _cells(match: re.Match[str]) -> set[str]:
    """The zones that a phrase can mean."""
    if match["centre"]:
        return {"centre"}
    row, column = match["row"] or match["row2"], match["column"] or match["column2"]
    if half := match["half"]:
        side = half.removesuffix("-hand")
        row, column = (None, side) if side in _COLUMNS else (side, None)
    return {
        ZONES[3 * r + c]
        for r in range(3)
        for c in range(3)
        if (row is None or r == _ROWS.get(row, 1)) and (column is None or c == _COLUMNS.get(column, 1))
    }


def _details(text: str, mention: Mention, placed: list[_Found], of_type: list[_Found], refuse: Refuse) -> None:
    """How many, how large, how severe."""
    if is_chinese(text):
        _chinese_details(text, placed, refuse)
        return
    before = text[: mention.start]
    if match := re.search(_COUNT, before):
        said, options = match["n"], {len(placed), len(of_type)}
        if said in ("several", "multiple", "many", "numerous"):
            right = max(options) >= (2 if said == "multiple" else 3)
        elif said == "a couple of":
            right = 2 in options
        else:
            number = int(said) if said.isdigit() else _NUMBERS.get(said.split()[-1], 1)
            right = number in options or not re.fullmatch(r"[\w ]+", said)
        if not right:
            refuse("count", match[0], f"there are {len(of_type)}")
    near = set(re.findall(r"[a-z]+(?:-sized)?", " ".join(before.split()[-4:])))
    behind = text[mention.end :]
    near |= set(re.findall(r"^\w*[^,]{0,30}?\b(?:is|are|was|were) (?:\w+ )?([a-z]+)", behind))
    for extent, said_so in _EXTENTS.items():
        if (used := near & said_so) and not any(f.extent == extent for f in placed):
            refuse("size", used.pop(), f"the report says {placed[0].extent or 'nothing of its size'}")
    for adjective in near & set(_SEVERITIES):
        if not any(f.severity in _SEVERITIES[adjective] for f in placed):
            refuse("severity", adjective, f"the report says {placed[0].severity or 'nothing of its severity'}")


def _chinese_details(text: str, placed: list[_Found], refuse: Refuse) -> None:
    for said, count in _CHINESE_COUNT.items():
        if said in text and count_word(len(placed)) != count:
            refuse("count", said, f"there are {len(placed)}")
    say = words("zh-CN")
    for extent in _EXTENTS:
        if say.term("extent", extent) in text and not any(f.extent == extent for f in placed):
            refuse("size", say.term("extent", extent), f"the report says {placed[0].extent}")


def _as_a_whole(facts: _Facts, clause: Clause, named: list[_Found], refuse: Refuse) -> None:
    """Claims that need no finding: that all is well, sides, technique, dispositions, numbers."""
    text = clause.text
    chinese = is_chinese(text)
    searched = (_CHINESE_SEARCHED if chinese else _SEARCHED).search(text)
    if searched and (facts.findings or (facts.kind == "defect" and not facts.assessed)):
        refuse("cleared", searched[0], "there are findings" if facts.findings else "nothing was assessed")
    elif not searched and (normal := (_CHINESE_NORMAL if chinese else _NORMAL).search(text)):
        refuse("cleared", normal[0], "what was not assessed cannot be called normal")
    if chinese:
        return
    sides = {f.side for f in named} | {facts.side}
    if facts.kind == "ct" and not re.search(r"\bimage\b|\bpicture\b", text):
        for match in _SIDE.finditer(_IMAGE.sub(" ", text)):
            said = "bilateral" if match["both"] else match["one"]
            if said not in sides and "bilateral" not in sides:
                refuse("side", match[0], "the report gives another side, or none")
    for plane in taxonomy.CT_FIELDS["plane"]:
        if facts.kind == "ct" and re.search(rf"\b{plane}\b", text) and facts.plane != plane:
            refuse("technique", plane, f"the plane is {facts.plane or 'not known'}")
    if proposal := _DISPOSITION.search(text):
        said = proposal["done"] or proposal["noun"] or proposal["other"] or proposal["verdict"]
        meant = "accept" if said.startswith(("accept", "pass")) else "rework" if said == "rework" else "reject"
        if facts.disposition != meant:
            refuse("disposition", proposal[0], f"the disposition is {facts.disposition or 'not given'}")
    _numbers(facts, text, named, refuse)


def _numbers(facts: _Facts, text: str, named: list[_Found], refuse: Refuse) -> None:
    values = [*facts.values, *(value for f in named or facts.findings for value in f.values)]
    matches = list(_VALUE.finditer(re.sub(r"covid[- ]?19|\bf\d+\b", " ", text)))
    unit = ""
    for match in reversed(matches):  # "3 x 4 mm": the last one's unit is that of all
        unit = match["unit"] or (unit if match["x"] else "")
        digits = match["n"].replace("−", "-").replace(",", "")
        given, name = float(digits), _SPELLED.get(unit, unit)
        step = 10.0 ** -len(digits.partition(".")[2])
        name = name or "1"
        if name == "1" and given in facts.counts:
            continue
        known = [value * _IN.get((mine, name), 1.0) for value, mine in values if mine == name or (mine, name) in _IN]
        if not any(abs(value - given) <= 0.501 * step for value in known):
            refuse("number", match[0], "no such number is among the measurements")
