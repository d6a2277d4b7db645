"""What the writer is taught: right reports, and scores as sure as on pictures that the detector never saw."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipelines.model import FIELDS, LINE_VALUES
from pipelines.training.wording import word_of
from pipelines.training.writer import CT, Looks, Realism, hits, reports_of
from reports.grammar import ID, PAD, POINTERS, TOKENS, extent_of, from_tokens, summarise, to_tokens, zone_of
from reports.mentions import STEMS
from reports.taxonomy import CT_TYPES, PRODUCT_LINES, TYPE_OF_WORD, WORDS_OF_TYPE

LABELS = 40


def some_looks(count: int, seed: int) -> Looks:
    """Items on labelled boxes, of their types or not; of CT the types that a picture may show."""
    torch.manual_seed(seed)
    line = torch.randint(0, len(LINE_VALUES), (count,))
    names = {product.name: product.types for product in PRODUCT_LINES} | {"ct": CT_TYPES}
    corner = torch.rand(count, LABELS, 2) * 0.8
    labelled = torch.cat((corner, (corner + torch.rand(count, LABELS, 2) * 0.5 + 0.02).clamp(max=1)), -1)
    true_types = torch.full((count, LABELS), PAD)
    boxes, types = torch.zeros(count, POINTERS, 4), torch.zeros(count, POINTERS, dtype=torch.long)
    words = torch.full((count, POINTERS), PAD)
    scores = torch.rand(count, POINTERS).sort(1, descending=True).values
    for i, number in enumerate(line.tolist()):
        own = torch.tensor([ID[f"type:{name}"] for name in names[LINE_VALUES[number]]])
        picked = torch.randint(0, LABELS, (POINTERS,))
        boxes[i] = labelled[i, picked]
        if number == CT:
            types[i, :8], scores[i, 8:] = own[torch.randperm(len(own))[:8]], 0
            true_types[i, : len(own)] = torch.where(torch.rand(len(own)) < 0.5, own, PAD)
            for k in range(8):
                known = WORDS_OF_TYPE.get(TOKENS[types[i, k]].removeprefix("type:"))
                words[i, k] = ID[f"word:{known[0]}"] if known else PAD
        else:
            true_types[i] = own[torch.randint(0, len(own), (LABELS,))]
            types[i], scores[i, 20:] = true_types[i, picked], 0
    fields = torch.stack([torch.randint(0, len(values), (count,)) for values in FIELDS.values()], 1)
    return Looks(
        torch.zeros(count, 4, 8),
        torch.zeros(count, sum(map(len, FIELDS.values()))),
        *(line, boxes, types, scores, words, labelled, true_types, fields),
        torch.ones(count, dtype=torch.bool),
    )


def test_targets_are_the_reports_that_the_grammar_writes() -> None:
    looks = some_looks(40, 0)
    tokens, targets = reports_of(looks)
    assert torch.equal(tokens[tokens != PAD], targets[tokens != PAD]) and (targets >= 0).sum() == (tokens != PAD).sum()
    for row, found, boxes, types in zip(tokens, hits(looks), looks.boxes, looks.types, strict=True):
        written = [TOKENS[i] for i in row if i != PAD]
        draft = from_tokens(written)
        assert to_tokens(draft) == written and draft.impression == summarise(draft.findings)
        assert [finding.pointer for finding in draft.findings] == found.nonzero()[:, 0].tolist()
        for finding in draft.findings:
            box = boxes[finding.pointer].tolist()
            assert f"type:{finding.type}" == TOKENS[types[finding.pointer]]
            assert finding.zone == zone_of(box, 1, 1)
            assert finding.extent == ("" if draft.kind == "ct" else extent_of(box, 1, 1))
            assert finding.word == (WORDS_OF_TYPE.get(finding.type, ("",))[0] if draft.kind == "ct" else "")


def test_scores_become_as_sure_as_on_pictures_that_were_held_out() -> None:
    pool, held_out = some_looks(300, 1), some_looks(200, 2)
    doubtful = replace(held_out, scores=held_out.scores * 0.6)  # order and hits stay, all are less sure
    moved = Realism(pool, doubtful)(pool, noise=0.0)
    assert (moved.scores[:, :-1] >= moved.scores[:, 1:]).all()
    for number in range(len(LINE_VALUES)):
        before, after, aim = (
            each.scores[(each.line == number)[:, None] & (each.scores > 0) & hits(each)].mean()
            for each in (pool, moved, doubtful)
        )
        assert abs(after - aim) < 0.1 * aim < abs(before - aim)


def test_a_captions_word_is_learned_only_where_it_is_the_only_one_of_its_type() -> None:
    assert set(STEMS) == set(TYPE_OF_WORD)
    assert word_of("mass-or-lesion", "Large masses in the liver.") == "mass"
    assert word_of("mass-or-lesion", "A mass beside a second lesion.") == ""
    assert word_of("effusion", "Small effusion.") == ""
