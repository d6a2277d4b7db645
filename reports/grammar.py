"""The report as a token language: its vocabulary, its automaton, and the way between tokens and a draft.

    <bos> <defect> <line> (<pointer> <type> <extent> <zone>)* <impression> (<clear> | (<count> <type> <zone>)+) <end>
    <bos> <ct> <region> <plane> <contrast> <laterality> <covid19> (<pointer> <type|word> <zone>)* <impression> ... <end>

A pointer names an evidence item; pointers rise strictly within the findings, and types within the impression, so that
every sentence ends. A word names a finding more closely than its type, and stands for it. The language is regular:
`compile_grammar` gives one table of transitions, and a decoder that follows it cannot write a report that does not
parse.
Shapes: S states, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES, LINES, PRODUCT_LINES, TYPE_OF_WORD

POINTERS: Final = 32  # evidence items that a report can point at
ZONES: Final = (
    *("upper left", "upper middle", "upper right"),
    *("middle left", "centre", "middle right"),
    *("lower left", "lower middle", "lower right"),
    "throughout",
)
SCATTERED: Final = "several places"  # of an impression that sums up findings in different zones
EXTENTS: Final = ("small", "medium", "large")
COUNTS: Final = ("one", "two", "three", "several")

TOKENS: Final[tuple[str, ...]] = (
    *("<pad>", "<bos>", "<end>", "<impression>", "<clear>", "kind:ct", "kind:defect"),
    *(f"line:{name}" for name in LINES),
    *(f"{name}:{value}" for name, values in CT_FIELDS.items() for value in values),
    *(f"type:{name}" for name in (*DEFECT_TYPES, *CT_TYPES)),
    *(f"extent:{name}" for name in EXTENTS),
    *(f"zone:{name}" for name in (*ZONES, SCATTERED)),
    *(f"count:{name}" for name in COUNTS),
    *(f"evidence:{i}" for i in range(POINTERS)),
    *(f"word:{name}" for name in TYPE_OF_WORD),  # last: a decoder made before them knows all tokens but these
)
ID: Final = {token: i for i, token in enumerate(TOKENS)}
PAD, BOS, END = ID["<pad>"], ID["<bos>"], ID["<end>"]


@dataclass(frozen=True, slots=True)
class DraftFinding:
    """A finding as the decoder writes it; CT findings have no extent."""

    pointer: int
    type: str
    zone: str
    extent: str = ""
    word: str = ""  # of `reports.taxonomy.WORDS_OF_TYPE`; empty: the type's own noun


@dataclass(frozen=True, slots=True)
class Draft:
    """What a token sequence says."""

    kind: str
    line: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    findings: tuple[DraftFinding, ...] = ()
    impression: tuple[tuple[str, str, str], ...] = ()  # (count, type, zone), by the type's place in the taxonomy


def zone_of(bbox: Sequence[float], width: float, height: float) -> str:
    """The zone of a picture that holds the box's centre; "throughout" for a box over most of both sides."""
    x0, y0, x1, y1 = bbox
    if x1 - x0 > 0.7 * width and y1 - y0 > 0.7 * height:
        return "throughout"
    column = min(2, max(0, int(3 * (x0 + x1) / 2 / width)))
    row = min(2, max(0, int(3 * (y0 + y1) / 2 / height)))
    return ZONES[3 * row + column]


def extent_of(bbox: Sequence[float], width: float, height: float) -> str:
    """The box's share of the picture: small below 1%, large from 10%."""
    x0, y0, x1, y1 = bbox
    share = (x1 - x0) * (y1 - y0) / (width * height)
    return EXTENTS[int(share >= 0.01) + int(share >= 0.1)]


def count_word(n: int) -> str:
    """1 -> "one", ..., from 4 on "several"."""
    return COUNTS[min(n, len(COUNTS)) - 1]


def summarise(findings: Sequence[DraftFinding]) -> tuple[tuple[str, str, str], ...]:
    """The impression that follows from the findings: for each type how many, and where."""
    rows = []
    known = (*DEFECT_TYPES, *CT_TYPES)
    own = dict.fromkeys(f.type for f in findings if f.type not in known)  # of an owner's line, which no decoder writes
    for name in (*known, *own):
        zones = [f.zone for f in findings if f.type == name]
        if zones:
            rows.append((count_word(len(zones)), name, zones[0] if len(set(zones)) == 1 else SCATTERED))
    return tuple(rows)


def to_tokens(draft: Draft) -> list[str]:
    """The token sequence of a draft, from <bos> to <end>."""
    tokens = ["<bos>", f"kind:{draft.kind}"]
    if draft.kind == "ct":
        tokens += [f"{name}:{draft.fields[name]}" for name in CT_FIELDS]
    else:
        tokens.append(f"line:{draft.line}")
    for finding in draft.findings:
        tokens += [f"evidence:{finding.pointer}", f"word:{finding.word}" if finding.word else f"type:{finding.type}"]
        tokens += [f"extent:{finding.extent}"] if draft.kind == "defect" else []
        tokens.append(f"zone:{finding.zone}")
    tokens.append("<impression>")
    for count, name, zone in draft.impression:
        tokens += [f"count:{count}", f"type:{name}", f"zone:{zone}"]
    return [*tokens, *([] if draft.impression else ["<clear>"]), "<end>"]


def from_tokens(tokens: Sequence[str]) -> Draft:
    """The draft of a sequence of the language. Raises ValueError where it leaves the language."""
    state = 0
    table = compile_grammar()
    for position, token in enumerate(tokens):
        state = int(table[state, ID[token]]) if token in ID else -1
        if state < 0:
            raise ValueError(f"token {position} ({token!r}) is not allowed there")
    if not tokens or tokens[-1] != "<end>":
        raise ValueError("the sequence does not end")
    words = [token.partition(":")[::2] for token in tokens]
    kind = words[1][1]
    split = next(i for i, (name, _) in enumerate(words) if name == "<impression>")
    head = dict(words[2 : 3 if kind == "defect" else 2 + len(CT_FIELDS)])
    body = words[2 + len(head) : split]
    size = 4 if kind == "defect" else 3
    findings = []
    for i in range(0, len(body), size):
        values = dict(body[i : i + size])
        word = values.get("word", "")
        name = TYPE_OF_WORD[word] if word else values["type"]
        findings.append(DraftFinding(int(values["evidence"]), name, values["zone"], values.get("extent", ""), word))
    tail = [value for _, value in words[split + 1 : -1] if value]
    impression = tuple((tail[i], tail[i + 1], tail[i + 2]) for i in range(0, len(tail), 3))
    fields = {} if kind == "defect" else head
    return Draft(kind, head.get("line"), fields, tuple(findings), impression)


@lru_cache(maxsize=1)
def compile_grammar() -> np.ndarray:
    """The automaton: `[S, V]` int16, the state after a token, -1 where it is not allowed. State 0 is the start."""
    rows: list[dict[int, int]] = []

    def state() -> int:
        rows.append({})
        return len(rows) - 1

    def allow(source: int, tokens: Sequence[str], target: int) -> None:
        rows[source].update({ID[token]: target for token in tokens})

    start, kind, line, done = state(), state(), state(), state()
    allow(start, ["<bos>"], kind)
    allow(kind, ["kind:defect"], line)

    def body(types: Sequence[str], *, extent: bool) -> int:
        """Findings and impression over `types`; returns the state in which the first finding may begin."""
        # Impression: `typed[i]` waits for the zone of type i, after which only later types may be named.
        opening, closing = state(), state()
        allow(opening, ["<clear>"], closing)
        allow(closing, ["<end>"], done)
        typed = [state() for _ in types]
        source = opening
        for first in range(len(types)):
            counted = state()
            allow(source, [f"count:{c}" for c in COUNTS], counted)
            for i in range(first, len(types)):
                allow(counted, [f"type:{types[i]}"], typed[i])
            source = state()
            allow(typed[first], [f"zone:{z}" for z in (*ZONES, SCATTERED)], source)
            allow(source, ["<end>"], done)
        # Findings: `pointed[i]` waits for the type of item i, after which only later items may be pointed at.
        pointed = [state() for _ in range(POINTERS)]
        entry = source = state()
        for first in range(POINTERS + 1):
            allow(source, ["<impression>"], opening)
            for i in range(first, POINTERS):
                allow(source, [f"evidence:{i}"], pointed[i])
            if first < POINTERS:
                placed, source = state(), state()
                sized = state() if extent else placed
                words = [f"word:{word}" for word, name in TYPE_OF_WORD.items() if name in types]
                allow(pointed[first], [*(f"type:{t}" for t in types), *words], sized)
                if extent:
                    allow(sized, [f"extent:{e}" for e in EXTENTS], placed)
                allow(placed, [f"zone:{z}" for z in ZONES], source)
        return entry

    for product in PRODUCT_LINES:
        allow(line, [f"line:{product.name}"], body(product.types, extent=True))
    previous = state()
    allow(kind, ["kind:ct"], previous)
    for i, (name, values) in enumerate(CT_FIELDS.items()):
        target = body(CT_TYPES, extent=False) if i == len(CT_FIELDS) - 1 else state()
        allow(previous, [f"{name}:{value}" for value in values], target)
        previous = target

    table = np.full((len(rows), len(TOKENS)), -1, np.int16)
    for source, row in enumerate(rows):
        for token, target in row.items():
            table[source, token] = target
    return table
