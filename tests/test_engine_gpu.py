"""The engine on a GPU: CUDA graphs and kernels of its own give the tokens that the plain loop gives there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from decoder import Decoder
from decoder.engine import Engine, Request
from reports.grammar import ID, POINTERS, TOKENS, from_tokens
from tests.engine_cases import ATTENTIONS, check_choices, make_decoder, make_requests, plain_loop, report_grammar

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


def test_steps_of_adaptive_attention_by_kernels_are_the_same_in_a_graph() -> None:
    config = make_decoder("adaptive").config
    attention = replace(config.attention, window=16)
    torch.manual_seed(0)
    decoder = Decoder(replace(config, attention=attention)).eval().requires_grad_(False).cuda().bfloat16()
    requests = make_requests(25, most=60)
    done = [[each.ids for each in Engine(decoder, slots=5, graphs=on).generate(requests)] for on in (True, False)]
    assert done[0] == done[1]
    alone = [plain_loop(decoder, each)[0] for each in requests]
    assert sum(ids[0] == first for ids, first in zip(done[0], alone, strict=True)) > 22  # rounding decides a few


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
    check_choices(vocabulary, dtype, torch.device("cuda"))
