"""What a free text says about findings: which it names, and whether it asserts or denies them.

English is read by cues of negation and their scope, as NegEx does it (Chapman et al. 2001, J Biomed Inform 34:301):
a cue before a finding reaches to the end of its clause, one behind it back to the clause's beginning. Chinese, whose
reports deny by few words, is read the same way. Nothing here knows reports: `reports.language` compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["asserted", "denied", "open"]

# How texts name the types of CT findings, and the words for them (`reports.taxonomy.WORDS_OF_TYPE`).
STEMS: Final = {
    "mass": r"\bmass(?:es)?\b",
    "lesion": r"(?<!the )(?<!this )(?<!that )(?<!these )\blesions?\b",  # "the lesion" speaks of what was named before
    "obstruction": r"\bobstruct",
    "dilatation": r"\bdilat|\bdisten[ds]|\bectasia\b",
    "infiltrate": r"\binfiltrat",
    "ground-glass-opacity": r"\bground.?glass",
    "stranding": r"\bstranding",
    "thrombus": r"\bthromb",
    "embolus": r"\bembol",
    "enlarged-lymph-nodes": r"\blymph nodes?|\bnodes\b",
    "abscess": r"\babscess",
    "collection": r"\bcollections?\b",
    "hematoma": r"\bha?ematoma",
    "aneurysm": r"\baneurysm",
    "dissection": r"\bdissect",
    "calculus": r"\bcalcul(?:us|i)\b|lithiasis",
}
CT_STEMS: Final = {
    # Types of two words, named whole
    "mass-or-lesion": r"\bmass or lesion\b",
    "obstruction-or-dilatation": r"\bobstruction or dilatation\b",
    "thrombus-or-embolus": r"\bthrombus or embolus\b",
    "abscess-or-collection": r"\babscess or collection\b",
    "aneurysm-or-dissection": r"\baneurysm or dissection\b",
    "wall-thickening": r"\bwall[- ]thicken|\bthicken\w* (?:of the )?(?:\w+ )?walls?\b|\bmural thicken",
    "calcification": r"\bcalcif",
    "opacity": r"\bopacit|\bopacif|\bconsolidat",
    "cyst": r"\bcysts?\b|\bcystic\b",
    "inflammation": r"\binflam",
    "adenopathy": r"adenopath",
    "nodule": r"\bnodules?\b",
    "hernia": r"\bhernia",
    "fracture": r"\bfractur",
    "effusion": r"\beffusion|\bhydrothorax",
    "hemorrhage": r"\bha?emorrhag|\bbleed",
    "atelectasis": r"\batelecta",
    "stone": r"\bstones?\b",
    "laceration-or-injury": r"\blacerat|\binjur",
    "free-air": r"\bfree (?:\w+ )?(?:air|gas)\b|\bpneumoperitoneum",
    "emphysema-or-bulla": r"\bemphysem|\bbullae?\b|\bbullous",
}
DEFECT_STEMS: Final = {
    # Types of two words, named whole
    "mass-or-lesion": r"\bmass or lesion\b",
    "obstruction-or-dilatation": r"\bobstruction or dilatation\b",
    "thrombus-or-embolus": r"\bthrombus or embolus\b",
    "abscess-or-collection": r"\babscess or collection\b",
    "aneurysm-or-dissection": r"\baneurysm or dissection\b",
    "crazing": r"\bcraz(?:ing|ed)\b",
    "inclusion": r"\binclusions?\b",
    "patches": r"\bpatch(?:es)?\b",
    "pitted-surface": r"\bpitt(?:ed|ing)\b",
    "rolled-in-scale": r"\brolled[- ]in[- ]scale\b",
    "scratches": r"\bscratch(?:es|ing|ed)?\b",
    "blowhole": r"\bblow[- ]?holes?\b",
    "break": r"\bbreaks?\b|\bbreakage\b",
    "crack": r"\bcrack(?:s|ed|ing)?\b",
    "fray": r"\bfray(?:s|ed|ing)?\b",
    "uneven": r"\buneven",
    "open": r"\bopen[- ]circuits?\b|\bopens?\b",
    "short": r"\bshort[- ]circuits?\b|\bshorts?\b",
    "mousebite": r"\bmouse[- ]?bites?\b",
    "spur": r"\bspurs?\b",
    "copper": r"\bspurious copper\b|\b(?:excess|extra|residual) copper\b",
    "pin-hole": r"\bpin[- ]?holes?\b",
}
# What no report of ours can say: names outside the closed list of types.
FOREIGN: Final = (
    r"\bpneumonia|\btumou?r|\bcancer|\bcarcinoma|\bmalignan|\bmetasta|\blymphoma|\bpneumothora|\binfarct|\bcirrho"
    r"|\bappendicitis|\bdiverticul|\bpancreatitis|\bcolitis|\bfibrosis|\bo?edema\b|\bcardiomegaly|\bbronchiectas"
    r"|\btuberculosis|\bcorrosion|\brust\b|\bdelaminat|\bporosity|\bburrs?\b|\bdents?\b"
)

_ENGLISH_END: Final = re.compile(r"(?<=[.!?])[\"”')\]]*\s+|[\n\r;•]+|\s\"\s?")
_CHINESE_END: Final = re.compile(r"(?<=[。！？；])|\n+")
_CHINESE: Final = re.compile("[\u4e00-\u9fff]")
_CLAUSE: Final = re.compile(
    r"\b(?:but|however|although|though|except|whereas|while|despite|yet|aside from|apart from|other than)\b"
)
_VERB: Final = (
    r"(?:is|are|was|were|be|been|being)\b(?: also| still)? ?(?:\w+ )?"
    r"(?:observed|detected|seen|noted|identified|found|present|visible|shown|watched|monitored|demonstrated|visuali[sz]ed)"
)
_AFFIRMED: Final = re.compile(rf"\b{_VERB}|\bthere (?:is|are|was|were)\b(?! no\b| not\b)|\bshows?\b|\bhas\b|\bhave\b")
_BEFORE: Final = re.compile(
    r"\b(?:no|without|absence of|absent|free of|free from|negative for|lack of|lacks?|neither|nor|none of|never"
    r"|rules? out|ruled out|excludes?|resolved|fails? to (?:show|reveal)|(?:is|are|was|were|does|do|did|has|have) not"
    r"|not (?:show|have|see|observe|detect|find|contain))\b(?! (?:excluded|ruled out|be excluded))"
    r"|\b(?:isn|aren|wasn|weren|doesn|don|didn)['’]t\b"
)
_BEHIND: Final = re.compile(
    r"^-?free\b|\b(?:(?:is|are|was|were|has been|have been|can|could)(?: not|n['’]t)\b|cannot\b"
    r"|not (?:seen|observed|detected|found|present|identified|noted|visible|evident)"
    r"|(?:is|are|was|were) (?:absent|excluded|ruled out|negative|resolved|normal)"
    r"|within normal|none\b|neither\b|no longer\b)"
)
_OPEN: Final = re.compile(
    r"\b(?:(?:cannot|can not|could not|can't|not) (?:be )?(?:excluded|ruled out|assessed|evaluated|determined|judged)"
    r"|(?:not|un)[- ]?assessed|to (?:exclude|rule out)|rule out\?|if clinically|history of"
    r"|recommended|follow[- ]up for)\b"
)
_CHINESE_BEFORE: Final = re.compile("未见|未发现|未检出|未报告|没有|不存在|排除|无")
_CHINESE_OPEN: Final = re.compile("不排除|未评估|不能排除|无法评估")


@dataclass(frozen=True, slots=True)
class Mention:
    """A finding that a clause names."""

    name: str  # key of the stems
    status: Status
    start: int  # place in the clause
    end: int


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of a sentence in which one statement is made."""

    sentence: str
    text: str  # lower case
    mentions: tuple[Mention, ...]


def is_chinese(text: str) -> bool:
    return bool(_CHINESE.search(text))


def sentences(text: str) -> list[str]:
    """A text's sentences; bullets, lines and semicolons part them, too."""
    end = _CHINESE_END if is_chinese(text) else _ENGLISH_END
    return [part.strip() for part in end.split(text) if part and part.strip(" \"'")]


def clauses(text: str, stems: Mapping[str, str]) -> Iterator[Clause]:
    """Each clause of a text with the findings that it names.

    `stems` are patterns of lower-case text, by name. Where several fit at one place, the longest is meant.
    """
    for sentence in sentences(text):
        low = sentence.lower()
        if is_chinese(sentence):
            parts = [part for part in re.split("，|。|；|：|但", low) if part]
        else:
            parts = [piece for part in _CLAUSE.split(low) for piece in _statements(part)]
        for part in parts:
            yield Clause(sentence, part, tuple(_mentions(part, stems)))


def _statements(part: str) -> list[str]:
    """Cuts at commas (and "and") behind which a statement of its own begins: both sides have a verb, or a cue."""
    pieces, begun = [], 0
    for cut in re.finditer(r"(?<!\d),\s+(?:and |with )?|,\s*(?=no\b)|\band (?=no |there |without )", part):
        ahead, rest = part[begun : cut.start()], part[cut.end() :]
        following = re.split(r",\s", rest, maxsplit=1)[0]
        denies = re.match(r"(?:no|without|there)\b", following.strip())
        whole = _says_something(ahead) and _says_something(following) and not re.match(r"(?:or|nor)\b", following)
        listed = re.search(r"\b(?:no|without)\b", ahead) and not re.search(rf"\b{_VERB}|not \w+ed\b", ahead)
        if denies or (whole and not listed):
            pieces.append(ahead)
            begun = cut.end()
    return [piece for piece in (*pieces, part[begun:]) if piece.strip()]


def _says_something(text: str) -> bool:
    return bool(_AFFIRMED.search(text) or _BEHIND.search(text) or re.search(r"\b(?:is|are|was|were)\b", text))


def _mentions(clause: str, stems: Mapping[str, str]) -> list[Mention]:
    found: list[tuple[int, int, str]] = []
    for name, pattern in stems.items():
        found += [(m.start(), m.end(), name) for m in re.finditer(pattern, clause)]
    found.sort(key=lambda each: (each[0], -each[1]))
    kept: list[tuple[int, int, str]] = []
    for each in found:
        if not kept or each[0] >= kept[-1][1]:
            kept.append(each)
    return [Mention(name, _status(clause, start, end), start, end) for start, end, name in kept]


def _status(clause: str, start: int, end: int) -> Status:
    if is_chinese(clause):
        if _CHINESE_OPEN.search(clause):
            return "open"
        return "denied" if _CHINESE_BEFORE.search(clause[:start]) else "asserted"
    if _OPEN.search(clause):
        return "open"
    before = [m for m in _BEFORE.finditer(clause[:start])]
    if before and not re.search(r"\bno (?:significant )?change\b|\bnot only\b|\bno doubt\b", clause[:start]):
        return "denied"
    return "denied" if _BEHIND.search(clause[end:]) else "asserted"
