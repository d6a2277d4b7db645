"""The report's language: every path of the automaton is a draft, and every draft a path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.grammar import (
    COUNTS,
    EXTENTS,
    ID,
    POINTERS,
    TOKENS,
    ZONES,
    Draft,
    DraftFinding,
    compile_grammar,
    extent_of,
    from_tokens,
    summarise,
    to_tokens,
    zone_of,
)
from reports.taxonomy import CT_FIELDS, CT_TYPES, PRODUCT_LINES


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    pointers = sorted(draw(st.sets(st.integers(0, POINTERS - 1), max_size=8)))
    if draw(st.booleans()):
        product = draw(st.sampled_from(PRODUCT_LINES))
        findings = tuple(
            DraftFinding(
                p,
                draw(st.sampled_from(product.types)),
                draw(st.sampled_from(ZONES)),
                draw(st.sampled_from(EXTENTS)),
            )
            for p in pointers
        )
        return Draft("defect", product.name, {}, findings, summarise(findings))
    findings = tuple(DraftFinding(p, draw(st.sampled_from(CT_TYPES)), draw(st.sampled_from(ZONES))) for p in pointers)
    fields = {name: draw(st.sampled_from(values)) for name, values in CT_FIELDS.items()}
    return Draft("ct", None, fields, findings, summarise(findings))


@given(drafts())
def test_a_draft_comes_back_from_its_tokens(draft: Draft) -> None:
    assert from_tokens(to_tokens(draft)) == draft


@given(st.randoms(use_true_random=False))
def test_every_path_of_the_automaton_parses_and_ends(random) -> None:  # type: ignore[no-untyped-def]
    table, state, tokens = compile_grammar(), 0, []
    while not tokens or tokens[-1] != "<end>":
        token = random.choice(np.flatnonzero(table[state] >= 0).tolist())
        tokens.append(TOKENS[token])
        state = int(table[state, token])
        assert len(tokens) < 250
    assert to_tokens(from_tokens(tokens)) == tokens


def test_every_state_leads_to_the_end() -> None:
    table = compile_grammar()
    done = {int(table[s, ID["<end>"]]) for s in range(len(table)) if table[s, ID["<end>"]] >= 0}
    assert len(done) == 1
    reaching = set(done)
    for _ in range(len(table)):
        reaching |= {s for s in range(len(table)) if reaching & set(table[s][table[s] >= 0].tolist())}
    assert reaching == set(range(len(table)))


@pytest.mark.parametrize(
    "tokens",
    [
        ["<bos>", "kind:defect", "line:steel", "<impression>", "<clear>"],
        ["<bos>", "kind:defect", "line:steel", "evidence:3", "type:open"],
        [
            "<bos>",
            "kind:defect",
            "line:steel",
            "evidence:3",
            "type:crazing",
            "extent:small",
            "zone:centre",
            "evidence:3",
        ],
        ["<bos>", "kind:ct", "plane:axial"],
        ["word"],
        [],
    ],
)
def test_what_leaves_the_language_is_refused(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match=r"not allowed|does not end"):
        from_tokens(tokens)


def test_zones_and_extents() -> None:
    assert zone_of((0, 0, 10, 10), 90, 90) == "upper left"
    assert zone_of((40, 40, 50, 50), 90, 90) == "centre"
    assert zone_of((80, 80, 90, 90), 90, 90) == "lower right"
    assert zone_of((0, 0, 90, 88), 90, 90) == "throughout"
    assert [extent_of((0, 0, s, s), 100, 100) for s in (5, 10, 31, 32)] == ["small", "medium", "medium", "large"]


def test_the_impression_counts_by_type() -> None:
    findings = [
        DraftFinding(i, "scratches", zone, "small") for i, zone in enumerate(["centre", "centre", "upper left"])
    ]
    findings.append(DraftFinding(5, "inclusion", "centre", "small"))
    assert summarise(findings) == (("one", "inclusion", "centre"), ("three", "scratches", "several places"))
    assert COUNTS[-1] in summarise([DraftFinding(i, "open", "centre", "small") for i in range(9)])[0]
