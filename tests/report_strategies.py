"""Generated reports, and pictures that fit them, for the tests of the renderers."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from hypothesis import strategies as st

from reports.grammar import ZONES
from reports.images import Picture, ReportImages
from reports.schema import (
    Code,
    ContextNote,
    Evidence,
    FieldValue,
    Finding,
    Measurement,
    ModelInfo,
    NotAssessed,
    Report,
    Segment,
    Source,
    SourceInput,
    Technique,
)
from reports.taxonomy import CT_TYPES, DEFECT_TYPES

AWKWARD = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "</title></style><script>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egpj.exe",
    "検査 結果 画像",
    "فحص.png",
    "a & b &amp; c",
    "quotes \" ' ` and | pipes\\ \n# no heading\r\n- no item",
    "bell \x07, null \x00, escape \x1b[31m, delete \x7f, isolate \u2067 and mark \ufeff",
    '#import "x": *; #sys.inputs $x^2$ @here _a_ *b* #panic()',
    "=HYPERLINK(0)",
    "long" * 400,
    "検査" * 300,
)
WIDTH, HEIGHT = 60, 40

texts = st.one_of(st.sampled_from(AWKWARD), st.text(st.characters(codec="utf-8"), max_size=30))
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
ids = st.text("0123456789abcdef", min_size=16, max_size=16)
unit = st.floats(0, 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
coordinates = st.floats(-5, WIDTH + 5)
inputs = st.builds(SourceInput, name=texts, sha256=hashes, media_type=texts, page=st.none() | st.integers(0, 9))
fields = st.builds(FieldValue, value=texts, confidence=unit, probabilities=st.dictionaries(texts, unit, max_size=3))
points = st.tuples(finite, finite, finite)
evidence = st.builds(
    Evidence,
    input_index=st.just(0),
    slice_index=st.integers(0, 2),
    bbox=st.tuples(coordinates, coordinates, coordinates, coordinates),
    bbox_mm=st.none() | st.tuples(points, points),
    localisation=st.sampled_from(["box", "weak"]),
)
measurements = st.builds(
    Measurement, name=texts, value=finite, unit=st.sampled_from(["mm", "%", "{pixel}", "[hnsf'U]"]), method=texts
)
codes = st.builds(Code, value=texts, scheme=st.sampled_from(["SCT", "RADLEX"]), meaning=texts)
not_assessed = st.builds(NotAssessed, what=texts, reason=texts)
notes = st.builds(
    ContextNote,
    text=texts,
    kind=st.sampled_from(["request", "prior-report", "inspection-sheet", "text"]),
    name=texts,
    sha256=hashes,
    page=st.none() | st.integers(0, 9),
)
findings = st.builds(
    Finding,
    id=st.integers(1, 99).map("F{}".format),
    type=st.sampled_from(CT_TYPES + DEFECT_TYPES) | texts,
    description=texts,
    location=st.none() | st.sampled_from(ZONES) | texts,
    extent=st.sampled_from([None, "small", "medium", "large"]),
    code=st.none() | codes,
    laterality=st.none() | texts,
    evidence=st.lists(evidence, max_size=2).map(tuple),
    measurements=st.lists(measurements, max_size=3).map(tuple),
    severity=st.sampled_from([None, "critical", "major", "minor"]),
    confidence=unit,
)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """Any report that the schema allows, within reason of size."""
    return draw(
        st.builds(
            Report,
            id=ids,
            kind=st.sampled_from(["ct", "defect"]),
            created=st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC)),
            language=st.sampled_from(["en", "zh-CN"]),
            version=st.integers(1, 9),
            title=texts,
            source=st.builds(
                Source,
                inputs=st.lists(inputs, min_size=1, max_size=10).map(tuple),
                reference=st.none() | inputs,
                name=texts,
                accession=st.none() | texts,
                lot=texts,
                serial=st.none() | texts,
            ),
            context=st.lists(notes, max_size=2).map(tuple),
            technique=st.builds(
                Technique,
                region=st.none() | fields,
                contrast=st.none() | fields,
                slice_count=st.sampled_from([None, 1, 3]),
                kernel=st.none() | texts,
                image_size_px=st.just((WIDTH, HEIGHT)),
                read_from=st.just({}),
            ),
            fields=st.dictionaries(texts, fields, max_size=2),
            findings=st.lists(findings, max_size=3, unique_by=lambda f: f.id).map(tuple),
            measurements=st.lists(measurements, max_size=2).map(tuple),
            impression=texts,
            disposition=st.sampled_from([None, "accept", "rework", "reject", "hold"]),
            disposition_rule=st.none() | texts,
            not_assessed=st.lists(not_assessed, max_size=2).map(tuple),
            segments=st.lists(st.builds(Segment, id=ids, title=texts, method=texts), max_size=1).map(tuple),
            quality_flags=st.lists(texts, max_size=2).map(tuple),
            supersedes=st.none() | ids,
            model=st.builds(
                ModelInfo, name=texts, version=texts, weights_sha256=hashes, config_sha256=hashes, device=texts
            ),
            timing_s=st.dictionaries(texts, st.floats(0, 1e6), max_size=2),
        )
    )


def plain_report(**changes: object) -> Report:
    """The least report that the schema allows, changed as asked."""
    least = {
        "id": "0" * 16,
        "kind": "defect",
        "created": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "title": "A picture",
        "source": Source(inputs=(SourceInput(name="a.png", sha256="a" * 64, media_type="image/png"),)),
        "technique": Technique(image_size_px=(WIDTH, HEIGHT)),
        "impression": "No defect of the assessed types was found.",
        "model": ModelInfo(name="m", version="1", weights_sha256="b" * 64, config_sha256="c" * 64, device="cpu"),
    }
    return Report.model_validate(least | changes)


def images_for(report: Report) -> ReportImages:
    """A picture for the first two slices only, so that some evidence has none."""
    grey = np.arange(WIDTH * HEIGHT, dtype=np.uint32).reshape(HEIGHT, WIDTH).astype(np.uint8)
    colour = np.stack([grey, grey.T.reshape(HEIGHT, WIDTH), 255 - grey], axis=-1)
    return ReportImages({0: Picture(grey, "shown plainly"), 1: Picture(colour, pixel_aspect=2.5)}, Picture(grey))
