"""How well sentences are held against the findings: what the check refuses, and what it lets stand.

    python benchmarks/language_check.py --data DATA [--pictures 40]

- Reports are drawn by chance, with the catalogue's texts in both languages and sentences of free patterns that are true
  of them; then one thing in each sentence is made wrong: type, negation, place, side, count, size, severity, number, or
  that all is well. The patterns were written by those who wrote the check.
- `ct-rate-reports` (sentences of radiologists, 18 labels a report) tells how well naming and denying are told apart:
  a label holds where its term is named and not denied. Terms of labels are one pattern each.
- `--pictures`: so many pictures of the validation splits are read by the bundled model: share of reports in which the
  decoder's own impression contradicts the findings, and share after the check.

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reports import taxonomy
from reports.grammar import EXTENTS, ZONES, count_word
from reports.language import Sentence, contradictions
from reports.mentions import clauses
from reports.schema import (
    FieldValue,
    Finding,
    Measurement,
    ModelInfo,
    NotAssessed,
    Report,
    Source,
    SourceInput,
    Technique,
)
from reports.texts import LANGUAGES, worded, words

SAY = words("en")
# How radiologists write what the 18 labels stand for.
LABELS = {
    "Medical material": r"\bcatheter|\bstent|\bpacemaker|\bprosthe|\bsutur|\bclips?\b|\btube\b|\bcannula|\bmetallic",
    "Arterial wall calcification": r"\bcalcif\w* (?:\w+ ){0,4}(?:athero|plaque|aort|arter)"
    r"|\b(?:aort|arter)\w* (?:\w+ ){0,5}calcif|\bathero",
    "Cardiomegaly": r"\bcardiomegal|\bheart size (?:has )?increas|\bheart (?:size )?(?:is|was) (?:large|enlarged)"
    r"|\bcardiothoracic (?:ratio|index) (?:has )?(?:increas|is in favor)"
    r"|\bincrease in (?:the )?(?:heart|cardiothoracic)",
    "Pericardial effusion": r"\bpericardial (?:\w+ )?(?:effusion|fluid)",
    "Coronary artery wall calcification": r"\bcoronary (?:\w+ ){0,4}(?:calcif|athero|plaque|stent)"
    r"|(?:calcif|athero)\w* (?:\w+ ){0,8}coronary",
    "Hiatal hernia": r"\bhiat\w+ hernia",
    "Lymphadenopathy": r"\blymphadenopath|\blymph nodes?\b|\blaps?\b",
    "Emphysema": r"\bemphysem",
    "Atelectasis": r"\batelecta",
    "Lung nodule": r"\bnodules?\b",
    "Lung opacity": r"\bopacit|\bground.?glass|\bconsolidat|\binfiltrat",
    "Pulmonary fibrotic sequela": r"\bsequela|\bfibro",
    "Pleural effusion": r"\bpleural (?:\w+ )?(?:effusion|fluid)|\bbilateral effusion",
    "Mosaic attenuation pattern": r"\bmosaic",
    "Peribronchial thickening": r"\bperibronch\w* (?:wall )?thick|\bbronchial wall thick",
    "Consolidation": r"\bconsolidat",
    "Bronchiectasis": r"\bbronchiecta",
    "Interlobular septal thickening": r"\binterlob\w+ sept\w* (?:\w+ )?thick|\bseptal thick",
}
OFTEN_DENIED = 100  # reports without a label that name its term: enough to see whether denials are understood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of data sets")
    parser.add_argument("--pictures", type=int, default=0, help="pictures of the validation splits to read")
    parser.add_argument("--reports", type=int, default=2000, help="reports to draw")
    parser.add_argument("--examples", action="store_true", help="print what the check got wrong")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    claims = drawn(200 if asked.quick else asked.reports, show=asked.examples)
    if asked.data and (asked.data / "ct-rate-reports" / "train.csv").is_file():
        claims += of_radiologists(asked.data / "ct-rate-reports" / "train.csv")
    if asked.data and asked.pictures:
        claims += of_the_writer(asked.data, asked.pictures)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "language_check", "machine": machine, "claims": claims}))


def claim(what: str, value: float, target: float | None = None, *, most: bool = False) -> dict[str, object]:
    met = None if target is None else value <= target if most else value >= target
    return {"claim": what, "value": round(value, 4), "unit": "share", "target": target, "met": met}


# Sentences about drawn reports


def drawn(count: int, *, show: bool = False) -> list[dict[str, object]]:
    """Shares of true sentences that are refused, and of wrong ones that are not."""
    said: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(number)
        report = draw(chance)
        for language in LANGUAGES:
            for sentence in of_catalogue(worded(report, language)):
                said[language] += 1
                if found := contradictions(report, [sentence]):
                    wrong[language] += 1
                    if show:
                        print("REFUSED", sentence.text, found[0].code, found[0].reason)
        for finding in report.findings:
            for text in true_of(report, finding, chance):
                said["free"] += 1
                if found := contradictions(report, [text]):
                    wrong["free"] += 1
                    if show:
                        print("REFUSED", text, found[0].code, found[0].reason)
            for how, text in untrue_of(report, finding, chance):
                said[how] += 1
                if not contradictions(report, [text]):
                    wrong[how] += 1
                    if show:
                        print("LET PASS", how, "|", text, "|", facts(report))
    rows = [f"{how}: {wrong[how]} of {n}" for how, n in said.items()]
    print("refused of true sentences (en, zh-CN, free), passed of altered ones:", *rows, sep="\n  ")
    true = (*LANGUAGES, "free")
    altered = [how for how in said if how not in true]
    texts = {"en": "catalogue's English", "zh-CN": "catalogue's Chinese", "free": "true free"}
    return [
        *(claim(f"{texts[how]} sentences that are refused", wrong[how] / said[how], 0.0, most=True) for how in true),
        *(claim(f"altered sentences caught: {how}", 1 - wrong[how] / said[how], 0.95) for how in altered),
        claim("altered sentences caught", 1 - sum(wrong[how] for how in altered) / sum(said[h] for h in altered), 0.95),
    ]


def draw(chance: random.Random) -> Report:
    """A report with up to four findings."""
    kind = chance.choice(["ct", "defect"])
    line = chance.choice(taxonomy.PRODUCT_LINES)
    types = taxonomy.CT_TYPES if kind == "ct" else line.types
    side = chance.choice(["left", "right"])
    found = []
    for n in range(1, chance.choices((0, 1, 2, 3, 4, 6), (1, 3, 2, 2, 1, 1))[0] + 1):
        name = chance.choice(types)
        long = round(chance.uniform(2, 90), 2)
        found.append(
            Finding(
                id=f"F{n}",
                type=name,
                word=chance.choice((None, *taxonomy.WORDS_OF_TYPE.get(name, ()))),
                description="",
                location=chance.choice(ZONES),
                extent=chance.choice(EXTENTS) if kind == "defect" else None,
                measurements=(
                    Measurement(name="long axis", value=long, unit="mm", method="outline"),
                    Measurement(name="area", value=round(long * 1.7, 1), unit="mm2", method="outline"),
                ),
                severity=chance.choice(("critical", "major", "minor")) if kind == "defect" else None,
                confidence=round(chance.uniform(0.3, 1), 3),
            )
        )
    ct = kind == "ct"
    return Report(
        id="0" * 16,
        kind="ct" if ct else "defect",
        created=datetime(2026, 3, 1, tzinfo=UTC),
        title="",
        source=Source(name="a.png", inputs=(SourceInput(name="a.png", sha256="a" * 64, media_type="image/png"),)),
        technique=Technique(
            image_size_px=(512, 512),
            product_line=None if ct else line.name,
            plane=FieldValue(value="axial", confidence=1, probabilities={"axial": 1}) if ct else None,
        ),
        fields={"laterality": FieldValue(value=side, confidence=0.9, probabilities={side: 0.9})} if ct else {},
        findings=tuple(found),
        measurements=(Measurement(name="defects reported", value=len(found), unit="1", method="count"),),
        impression="",
        disposition=None if ct else "reject" if found else "accept",
        not_assessed=(NotAssessed.of("absence"),) if ct else (),
        model=ModelInfo(name="m", version="1", weights_sha256="a" * 64, config_sha256="b" * 64, device="cpu"),
    )


def facts(report: Report) -> str:
    return "; ".join(
        f"{f.type} {f.word or ''} {f.extent or ''} {f.location} {f.severity or ''}" for f in report.findings
    )


def of_catalogue(report: Report) -> Iterator[Sentence]:
    yield Sentence(report.title)
    yield Sentence(report.impression)
    yield Sentence(report.disclaimer)
    for finding in report.findings:
        yield Sentence(finding.description, finding.id)


def alike(report: Report, finding: Finding) -> list[Finding]:
    return [f for f in report.findings if f.type == finding.type]


def noun(finding: Finding, *, plural: bool = False) -> str:
    return SAY.noun(finding.word or finding.type, plural=plural)


def place(zone: str | None) -> str:
    return SAY.term("place", zone or "")


def true_of(report: Report, finding: Finding, chance: random.Random) -> list[str]:
    """Sentences of free patterns that are true of the finding."""
    long = finding.measurements[0].value
    same = alike(report, finding)
    one_place = len({f.location for f in same}) == 1
    texts = [
        f"There is a {noun(finding)} {place(finding.location)}.",
        f"A {noun(finding)} with a long axis of {long} mm is seen.",
        f"{noun(finding).capitalize()} was detected {place(finding.location)}; it measures {long / 10:.1f} cm.",
        f"Although nothing else was looked for, the picture shows {noun(finding)}.",
    ]
    if report.kind == "defect":
        texts += [
            f"The image shows a {SAY.term('extent', str(finding.extent))} {noun(finding)}, {place(finding.location)}.",
            f"A {finding.severity} {noun(finding)} was found.",
            f"In total {len(report.findings)} defects were reported, and the part should be rejected.",
        ]
        absent = [t for t in taxonomy.line(str(report.technique.product_line)).types if t not in types(report)]
        if absent:
            other = SAY.noun(chance.choice(absent))
            texts.append(f"No {other} was found, but a {noun(finding)} is visible {place(finding.location)}.")
            texts.append(f"The picture shows {noun(finding)} without any {other}.")
    else:
        side = report.fields["laterality"].value
        texts += [
            f"Possible {noun(finding)} on the {side}.",
            f"Axial CT with {noun(finding)}. A fracture cannot be excluded.",
        ]
    if one_place and all(f.word == finding.word for f in same):
        many = noun(finding, plural=len(same) > 1)
        texts.append(f"{count_word(len(same)).capitalize()} {many} {place(finding.location)}.")
    return texts


def untrue_of(report: Report, finding: Finding, chance: random.Random) -> list[tuple[str, str]]:
    """The same with one thing made wrong."""
    long = finding.measurements[0].value
    same = alike(report, finding)
    others = taxonomy.CT_TYPES if report.kind == "ct" else taxonomy.DEFECT_TYPES
    other = SAY.noun(chance.choice([t for t in others if t not in types(report)]))
    zones = {f.location for f in same}
    elsewhere = [z for z in ZONES[:9] if z not in zones]
    here = place(finding.location)
    texts = [
        ("type", f"There is a {other} {here}."),
        ("type", f"The picture shows {noun(finding)} and {other}."),
        ("type", f"No sign of anything but {other} {here}."),
        ("negation", f"There is no {noun(finding)} {here}."),
        ("negation", f"A {noun(finding)} was not observed."),
        ("negation", f"The image is free of {noun(finding, plural=True)}, as far as can be seen."),
        ("all is well", "No abnormality is seen."),
        ("all is well", "The picture is otherwise unremarkable."),
        ("all is well", "No defect of the assessed types was found."),
        ("number", f"A {noun(finding)} with a long axis of {long * chance.choice((0.7, 1.3)):.2f} mm is seen."),
        ("number", f"{noun(finding).capitalize()} {here}, {long * 20:.0f} mm² in area."),
    ]
    if elsewhere:
        texts.append(("place", f"There is a {noun(finding)} {place(chance.choice(elsewhere))}."))
    if finding.location and mirrored(finding.location) not in {*zones, finding.location}:
        texts.append(("place mirrored", f"A {noun(finding)} is seen {place(mirrored(finding.location))}."))
    count = chance.choice(
        [n for n in ("two", "three", "five") if n not in (count_word(len(same)), "five" * (len(same) == 5))]
    )
    at_place = sum(f.location == finding.location for f in same)
    if count_word(at_place) != count and not (count == "five" and len(same) > 3):
        texts.append(("count", f"{count.capitalize()} {noun(finding, plural=True)}, {here}."))
    if report.kind == "defect":
        size = [e for e in EXTENTS if all(e != f.extent for f in same)]
        severity = [s for s in ("critical", "major", "minor") if all(s != f.severity for f in same)]
        if size:
            texts.append(("size", f"The image shows a {SAY.term('extent', chance.choice(size))} {noun(finding)}."))
        if severity:
            texts.append(("severity", f"A {chance.choice(severity)} {noun(finding)} was found."))
        texts.append(("disposition", "The part should be accepted."))
    else:
        side = "left" if report.fields["laterality"].value == "right" else "right"
        texts.append(("side", f"Possible {noun(finding)} on the {side}."))
        texts.append(("side", f"{side.capitalize()}-sided {noun(finding)} is present."))
        texts.append(("technique", f"Coronal CT with {noun(finding)}."))
    return texts


def types(report: Report) -> set[str]:
    return {f.type for f in report.findings}


def mirrored(zone: str) -> str:
    return zone.replace("left", "#").replace("right", "left").replace("#", "right")


# Sentences of radiologists


def of_radiologists(path: Path) -> list[dict[str, object]]:
    """How well naming and denying are told apart."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    both = Counter[str]()
    print("label: positive reports, sensitivity, specificity; and specificity where the term is named (reports)")
    for label, pattern in LABELS.items():
        counts, named = Counter[tuple[bool, bool]](), Counter[tuple[bool, bool]]()
        for row in rows:
            mentions = [m for clause in clauses(row["report_text"], {label: pattern}) for m in clause.mentions]
            pair = (row[label] == "1", any(m.status == "asserted" for m in mentions))
            counts[pair] += 1
            if mentions:
                named[pair] += 1
        positive, negative = counts[True, True] + counts[True, False], counts[False, False] + counts[False, True]
        denials = named[False, False] + named[False, True]
        understood = named[False, False] / denials if denials else float("nan")
        print(
            f"  {label}: {positive}, {counts[True, True] / positive:.3f}, {counts[False, False] / negative:.3f}; "
            f"{understood:.3f} ({denials})"
        )
        both.update({"tp": counts[True, True], "p": positive, "tn": counts[False, False], "n": negative})
        both.update({"named p": named[True, True] + named[True, False], "named tp": named[True, True]})
        if denials >= OFTEN_DENIED:
            both.update({"denied": denials, "understood": named[False, False]})
    return [
        claim("radiologists' reports, 18 labels: sensitivity", both["tp"] / both["p"], 0.9),
        claim("radiologists' reports, 18 labels: specificity", both["tn"] / both["n"], 0.9),
        claim("... sensitivity where the term is named", both["named tp"] / both["named p"], 0.95),
        claim(
            "... specificity where the term is named, of terms often denied", both["understood"] / both["denied"], 0.9
        ),
    ]


# The bundled model's sentences


def of_the_writer(data: Path, count: int) -> list[dict[str, object]]:
    """How often the decoder's own impression contradicts the findings, and how often what is reported does."""
    from pipelines.evaluation.pictures import load  # all of ScanScribe
    from pipelines.manifest import read_data_sets
    from pipelines.reader import Reader
    from pipelines.study import Rejection

    reader = Reader.load()
    cases = [(name, case) for name, every in read_data_sets(data, lenient=True).items() for case in every]
    cases = [(name, case) for name, case in cases if case.split == "val"]
    random.Random(0).shuffle(cases)
    before, after, seen = Counter[str](), Counter[str](), Counter[str]()
    for name, case in cases[:count]:
        study, golden = load(case.image), load(case.template) if case.template else None
        if isinstance(study, Rejection) or isinstance(golden, Rejection):
            continue
        reading = reader.read(study, reference=golden)
        seen[name] += 1
        before[name] += bool(reading.refused)
        after[name] += bool(contradictions(reading.draft(), [reading.impression]))
    print("reports with a contradiction, before and after the check:")
    for name, n in seen.items():
        print(f"  {name}: {before[name]} and {after[name]} of {n}")
    n = seen.total()
    return [
        claim(f"reports whose impression by the decoder contradicts the findings ({n} pictures)", before.total() / n),
        claim("... after the check", after.total() / n, 0.0, most=True),
    ]


if __name__ == "__main__":
    main()
