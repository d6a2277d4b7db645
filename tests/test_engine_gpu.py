"""The engine on a GPU: CUDA graphs and kernels of its own give the tokens that the plain loop gives there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.engine import Engine, Request
from decoder.engine import rows as reference
from decoder.engine.rows import DeviceGrammar, Rows, pack
from reports.grammar import ID, POINTERS, TOKENS, from_tokens
from tests.engine_cases import ATTENTIONS, make_decoder, make_requests, plain_loop, report_grammar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
GRAMMAR = report_grammar()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_requests_through_few_slots_are_as_each_alone(attention: str, graphs: bool) -> None:
    decoder = make_decoder(attention).cuda()
    requests = make_requests(25, most=40)
    done = Engine(decoder, slots=5, graphs=graphs).generate(requests)
    assert [each.ids for each in done] == [plain_loop(decoder, each) for each in requests]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_report_is_what_the_plain_loop_writes(attention: str) -> None:
    decoder = make_decoder(attention).cuda()
    requests = [
        replace(each, forbidden=[ID[f"evidence:{i}"] for i in range(n, POINTERS)], max_new_tokens=7 + 9 * n)
        for n, each in enumerate(make_requests(12))
    ]
    engine = Engine(decoder, slots=4, grammar=GRAMMAR)
    for _ in range(2):  # captured, then replayed
        for request, done in zip(requests, engine.generate(requests), strict=True):
            assert done.ids == plain_loop(decoder, request, GRAMMAR)
            from_tokens([TOKENS[i] for i in done.ids])


def test_graphs_of_all_sizes_share_one_pool() -> None:
    decoder = make_decoder("fused", length=2000).cuda()
    engine = Engine(decoder, slots=8)
    requests = [Request([5] * n, max_new_tokens=40 * (9 - k)) for k, n in enumerate((3, 200, 600, 30, 9, 9, 9, 9))]
    engine.generate(requests)
    graphs = [graph for graph in engine._runner._graphs.values() if graph is not None]
    assert len(graphs) >= 3
    assert len({graph.pool() for graph in graphs}) == 1


def test_sampling_draws_what_it_draws_on_a_cpu() -> None:
    decoder = make_decoder("fused")
    requests = [replace(each, temperature=0.8, seed=n) for n, each in enumerate(make_requests(9))]
    expected = [each.ids for each in Engine(decoder, slots=3).generate(requests)]
    assert [each.ids for each in Engine(decoder.cuda(), slots=4).generate(requests)] == expected


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_request_that_is_not_finite_ends_and_leaves_no_trace(attention: str) -> None:
    decoder = make_decoder(attention).cuda()
    poison = torch.zeros(6, 64)
    poison[2, 3] = float("nan")
    requests = make_requests(9, seed=2)
    done = Engine(decoder, slots=3).generate([*requests[:2], Request([5], poison, max_new_tokens=9), *requests[2:]])
    assert (done[2].ids, done[2].ended) == ([], "not-finite")
    assert [each.ids for each in done if each is not done[2]] == [plain_loop(decoder, each) for each in requests]


def test_a_request_can_be_cancelled_while_it_runs() -> None:
    decoder = make_decoder("fused").cuda()
    engine = Engine(decoder, slots=2)
    long, other = (engine.submit(Request([n, 2], max_new_tokens=100)) for n in (1, 3))
    for _ in range(9):
        engine.step()
    engine.cancel(long)
    late = engine.submit(Request([4, 4, 4], max_new_tokens=20))
    while not engine.idle:
        engine.step()
    assert (long.ended, 0 < len(long.ids) < 12) == ("cancelled", True)
    assert [each.ids for each in (other, late)] == [plain_loop(decoder, each.request) for each in (other, late)]


def test_decide_is_a_part_of_the_graph() -> None:
    decoder = make_decoder("full").cuda()

    def least(log_p_BV: Tensor, hints_BH: Tensor) -> Tensor:
        return torch.where(hints_BH[:, 0] > 0, log_p_BV.argmin(-1), log_p_BV.argmax(-1))

    engine = Engine(decoder, slots=2, decide=least, hints=1)
    request = Request([5, 6], max_new_tokens=12)
    greedy, odd = engine.generate([replace(request, hints_H=torch.tensor([hint])) for hint in (0.0, 1.0)])
    assert greedy.ids == plain_loop(decoder, request) != odd.ids


@pytest.mark.parametrize("vocabulary", [len(TOKENS), 5000, 128000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_choose_what_plain_torch_chooses(vocabulary: int, dtype: torch.dtype) -> None:
    from decoder.engine import kernels

    for seed, width in ((0, 1), (1, 4)):
        chance = np.random.default_rng(seed)
        grammar = GRAMMAR if vocabulary == len(TOKENS) and width > 1 else None
        states, width = (len(GRAMMAR.next_SC), width) if grammar else (0, 1)  # only a grammar adds tokens to a choice
        rows = Rows.zeros(33, vocabulary, width, states, 0, torch.device("cuda"))
        rows.left_B.copy_(torch.from_numpy(chance.integers(6, 40, 33)))
        rows.left_B[3] = 0
        rows.temperature_B.copy_(torch.from_numpy(chance.random(33) * (chance.random(33) < 0.5)))
        rows.seed_B.copy_(torch.from_numpy(chance.integers(-(2**31), 2**31, 33)))
        if grammar:
            rules = grammar.rules_of([ID["kind:ct"]])
            rows.only_BS.copy_(torch.from_numpy(rules.only_S))
            rows.ways_BS.copy_(torch.from_numpy(rules.ways_S))
            reachable = np.flatnonzero((rules.ways_S > 0) & (rules.ways_S < 6))
            rows.state_B.copy_(torch.from_numpy(chance.choice(reachable, 33)))
        else:
            forbidden_BV = chance.random((33, vocabulary)) < 0.3
            words = rows.forbidden_BX.shape[1]
            rows.forbidden_BX.copy_(torch.from_numpy(np.stack([pack(each, words) for each in forbidden_BV])))
        logits_BV = (torch.randn(33, vocabulary, device="cuda") * 3).to(dtype)
        logits_BV[7, 5], logits_BV[8, vocabulary - 1] = float("nan"), float("inf")
        used_B = torch.from_numpy(chance.integers(1, 99, 33)).cuda()
        device = DeviceGrammar.of(grammar, used_B.device) if grammar else None
        mine, its = (rows.take(torch.arange(33, device="cuda")) for _ in range(2))
        used_mine, used_its = used_B.clone(), used_B.clone()
        kernels.advance(mine, used_mine, logits_BV, device)
        reference.advance(its, used_its, logits_BV, device)
        active = rows.left_B > 0
        # Noise is rounded in other places: a draw may fall to another token now and then, a greedy choice may not.
        same = (mine.record_BR == its.record_BR).all(1)[active]
        assert bool(same[rows.temperature_B[active] == 0].all())
        assert float(same.float().mean()) > 0.9
        agree = active.clone()
        agree[active] = same
        for name in ("tokens_BW", "count_B", "left_B", "state_B"):
            assert torch.equal(getattr(mine, name)[agree], getattr(its, name)[agree]), name
        assert torch.equal(used_mine[agree], used_its[agree])
