"""The engine on a CPU: whatever shares a batch with whatever, each request gets what the plain loop gives it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoder import Decoder, PromptError
from decoder.engine import Completion, Engine, Grammar, Request, lean, pages, rows
from decoder.engine.grammar import Rules
from decoder.engine.requests import Plan
from decoder.engine.runner import RUN
from decoder.engine.scheduler import Entry, Scheduler
from decoder.engine.ways import TRIES, Ways
from decoder.layers import READING
from reports.grammar import ID, POINTERS, TOKENS, from_tokens
from tests.engine_cases import ATTENTIONS, make_decoder, make_requests, plain_loop, report_grammar

GRAMMAR = report_grammar()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder("full")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_requests_through_few_slots_are_as_each_alone(attention: str) -> None:
    decoder = make_decoder(attention)
    requests = make_requests(11)
    done = Engine(decoder, slots=3).generate(requests)
    assert [each.ids for each in done] == [plain_loop(decoder, each) for each in requests]
    assert {each.ended for each in done} == {"length"}


def test_a_slot_is_refilled_as_soon_as_it_is_free(decoder: Decoder) -> None:
    requests = [Request([5, 6], max_new_tokens=n) for n in (30, 2, 2, 2, 2, 2)]
    engine = Engine(decoder, slots=2)
    completions = [engine.submit(each) for each in requests]
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
        if steps == 12:
            assert all(each.ended for each in completions[1:])  # they went through one slot while the long one ran
    assert steps <= 30


def test_an_end_token_ends_a_completion(decoder: Decoder) -> None:
    request = Request([7, 8, 9], max_new_tokens=20)
    written = plain_loop(decoder, request)
    end = written[5]
    done = Engine(decoder, slots=2).generate([replace(request, eos=(end,)), request])
    assert (done[0].ids, done[0].ended) == (written[: written.index(end) + 1], "eos")
    assert (done[1].ids, done[1].ended) == (written, "length")


def test_tokens_are_told_as_they_come(decoder: Decoder) -> None:
    told: list[int] = []
    requests = [*make_requests(4), Request([3, 4], max_new_tokens=9, on_token=told.append)]
    engine = Engine(decoder, slots=2)
    streamed: dict[Completion, list[int]] = {}
    for completion, token in engine.stream(requests):
        streamed.setdefault(completion, []).append(token)
        assert completion.ids[-1:] == [token] or token in completion.ids
    assert [each.ids for each in streamed] and all(each.ids == tokens for each, tokens in streamed.items())
    assert {each.request: each.ids for each in streamed}[requests[-1]] == told == plain_loop(decoder, requests[-1])


def test_a_request_can_be_cancelled_while_it_runs_and_while_it_waits(decoder: Decoder) -> None:
    requests = make_requests(5, most=30, seed=3)
    long = Request([1, 2], max_new_tokens=200)
    engine = Engine(decoder, slots=2)
    running, *others, waiting = [engine.submit(each) for each in (long, *requests, long)]
    for _ in range(4):
        engine.step()
    before = len(running.ids)
    engine.cancel(running)
    engine.cancel(waiting)
    while not engine.idle:
        engine.step()
    assert (running.ended, waiting.ended, waiting.ids) == ("cancelled", "cancelled", [])
    assert len(running.ids) == before
    assert [each.ids for each in others] == [plain_loop(decoder, each) for each in requests]


def test_what_a_listener_raises_comes_out_and_the_engine_goes_on(decoder: Decoder) -> None:
    engine = Engine(decoder, slots=2)

    def fail(token: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.generate([*make_requests(3), Request([1], max_new_tokens=50, on_token=fail)])
    assert engine.idle
    requests = make_requests(3, seed=5)
    assert [each.ids for each in engine.generate(requests)] == [plain_loop(decoder, each) for each in requests]


def test_sampling_follows_its_seed_whatever_else_is_in_the_batch(decoder: Decoder) -> None:
    drawn = Request([9, 8, 7], max_new_tokens=20, temperature=1.0, seed=11)
    alone = Engine(decoder, slots=1).generate([drawn])[0].ids
    among = Engine(decoder, slots=4).generate([*make_requests(6), drawn, *make_requests(6, seed=1)])[6].ids
    assert alone == among != plain_loop(decoder, drawn)
    shorter = Engine(decoder, slots=2).generate([replace(drawn, max_new_tokens=8), replace(drawn, seed=12)])
    assert shorter[0].ids == alone[:8] != shorter[1].ids[:8]


def test_sampling_follows_the_distribution(decoder: Decoder) -> None:
    ids = [4, 5, 6]
    p_V = (decoder(torch.tensor([ids]))[0, -1] / 0.5).softmax(-1)
    requests = [Request(ids, max_new_tokens=1, temperature=0.5, seed=seed) for seed in range(2000)]
    drawn = [each.ids[0] for each in Engine(decoder, slots=500).generate(requests)]
    seen_V = torch.bincount(torch.tensor(drawn), minlength=len(TOKENS)) / len(drawn)
    assert float((seen_V - p_V).abs().sum()) < 0.25
    assert float((seen_V - p_V).abs().max()) < 0.04


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_request_that_is_not_finite_ends_and_leaves_no_trace(attention: str) -> None:
    decoder = make_decoder(attention)
    poison = torch.zeros(6, 64)
    poison[2, 3] = float("nan")
    requests = make_requests(7, seed=2)
    for prompt in (Request([5], poison, max_new_tokens=5), Request((), poison, max_new_tokens=5)):
        done = Engine(decoder, slots=2).generate([*requests[:2], prompt, *requests[2:]])
        assert (done[2].ids, done[2].ended) == ([], "not-finite")
        assert [each.ids for each in done if each is not done[2]] == [plain_loop(decoder, each) for each in requests]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_embeddings_and_what_is_shared_are_read_as_their_tokens_would_be(attention: str) -> None:
    decoder = make_decoder(attention)
    beginning, requests = [3, 1, 4, 1, 5, 9, 2, 6], make_requests(6, seed=4)
    expected = [plain_loop(decoder, replace(each, ids=[*beginning, *each.ids])) for each in requests]
    embedded = decoder.embed(torch.tensor(beginning))
    engine = Engine(decoder, slots=3)
    shared, half = engine.share(beginning), engine.share(beginning[:3], embeddings_PD=None)
    ways = [
        [replace(each, embeddings_PD=embedded) for each in requests],
        [replace(each, shared=shared) for each in requests],
        [replace(each, shared=half, embeddings_PD=embedded[3:]) for each in requests],
    ]
    for way in ways:
        assert [each.ids for each in engine.generate(way)] == expected


def test_prompts_that_cannot_run_are_refused_before_any_runs(decoder: Decoder) -> None:
    told: list[int] = []
    engine = Engine(decoder, slots=2, length=64, grammar=GRAMMAR)

    def refusal(bad: Request) -> PromptError:
        with pytest.raises(PromptError) as caught:
            engine.generate([Request([5, 6], max_new_tokens=9, on_token=told.append), bad])
        assert not told and engine.idle
        return caught.value

    assert refusal(Request([5] * 65)).code == "prompt-too-long"
    assert "prompt 1 has 60 positions, and 9 more" in str(refusal(Request([5] * 60, max_new_tokens=9)))
    assert refusal(Request()).code == "prompt-empty"
    assert refusal(Request([len(TOKENS)])).code == refusal(Request([-1])).code == "token-out-of-vocabulary"
    assert refusal(Request((), torch.zeros(3, 5))).code == "embeddings-shape"
    assert refusal(Request([5], max_new_tokens=3)).code == "prompt-too-long"
    assert refusal(Request([5], forbidden=[ID["<end>"]])).code == "nothing-to-write"
    with pytest.raises(ValueError, match="pinned to state 0"):
        engine.generate([Request([5], pins={0: ID["<end>"]})])
    with pytest.raises(PromptError, match="there is room for 64"):
        engine.share([5] * 65)


# Grammar


@pytest.mark.parametrize("wide", [1, 1 << 13], ids=["listed", "masked"])  # tokens that may come
def test_what_is_written_is_what_the_plain_loop_writes_and_parses(
    decoder: Decoder, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "WIDE", wide)
    for seed in range(3):
        requests = [
            replace(each, forbidden=[ID[f"evidence:{i}"] for i in range(n, POINTERS)], max_new_tokens=7 + 9 * n)
            for n, each in enumerate(make_requests(6, seed=seed))
        ]
        for request, done in zip(requests, Engine(decoder, slots=3, grammar=GRAMMAR).generate(requests), strict=True):
            assert done.ids == plain_loop(decoder, request, GRAMMAR)
            assert done.ended == "eos" and len(done.ids) <= (request.max_new_tokens or 0)
            from_tokens([TOKENS[i] for i in done.ids])


def test_forced_tokens_take_no_decision(decoder: Decoder) -> None:
    forbidden = [ID["kind:ct"], *(ID[f"line:{name}"] for name in ("steel", "tile"))]
    pins = {}
    for i in range(POINTERS):
        words = ["<bos>", "kind:defect", "line:board", f"evidence:{i}"]
        for word in ("type:open", "extent:small", "zone:centre"):
            pins[GRAMMAR.walk(ID[each] for each in words)] = ID[word]
            words.append(word)
    requests = [replace(each, forbidden=forbidden, pins=pins, max_new_tokens=150) for each in make_requests(8)]
    for request, done in zip(requests, Engine(decoder, slots=3, grammar=GRAMMAR).generate(requests), strict=True):
        assert done.ids == plain_loop(decoder, request, GRAMMAR)
        draft = from_tokens([TOKENS[i] for i in done.ids])
        assert {(each.type, each.extent, each.zone) for each in draft.findings} <= {("open", "small", "centre")}
        assert done.decisions == choices(done.ids, GRAMMAR.rules_of(forbidden, pins)) <= 0.6 * len(done.ids)


def choices(ids: list[int], rules: Rules) -> int:
    """Forwards that the tokens take: what the grammar forces needs none of its own, up to RUN tokens together."""
    states = [0, *(GRAMMAR.walk(ids[:i]) for i in range(1, len(ids)))]
    forced = [rules.only_S[state] >= 0 for state in states]
    at = forced.index(False)
    count = 0
    while at < len(ids):
        count += 1
        run = 1
        while run < RUN and at + run < len(ids) and forced[at + run]:
            run += 1
        at += run
    return count


def test_a_grammar_without_choice_needs_no_decoder(decoder: Decoder) -> None:
    pointers = [ID[f"evidence:{i}"] for i in range(POINTERS)]
    nothing = Request(
        [5],
        forbidden=[ID["kind:ct"], ID["line:tile"], ID["line:board"], *pointers]
        + [ID[each] for each in TOKENS if each.startswith("count:")],
    )
    done = Engine(decoder, slots=1, grammar=GRAMMAR).generate([nothing])[0]
    assert [TOKENS[i] for i in done.ids] == ["<bos>", "kind:defect", "line:steel", "<impression>", "<clear>", "<end>"]
    assert (done.decisions, done.ended) == (0, "eos")


SMALLEST = 9  # tokens of the vocabulary that random automata have


@pytest.fixture(scope="module")
def small() -> Decoder:
    return make_decoder("full", width=32, length=40, vocabulary=SMALLEST)


@st.composite
def automata(draw: st.DrawFn) -> np.ndarray:
    """Tables `[S, V]` of any kind: dead ends, loops without a way out, states that nothing leads to."""
    states = draw(st.integers(1, 7))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    table_SV = chance.integers(0, states, (states, SMALLEST))
    table_SV[chance.random(table_SV.shape) < draw(st.sampled_from((0.2, 0.6, 0.9)))] = -1
    table_SV[-1] = -1  # an end
    return table_SV.astype(np.int32)


@given(automata(), st.sets(st.integers(0, SMALLEST - 1), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_pins_leave_what_a_table_without_the_other_tokens_leaves(
    table_SV: np.ndarray, forbidden: set[int], data: st.DataObject
) -> None:
    allowed = [{int(token) for token in np.flatnonzero(row >= 0)} - forbidden for row in table_SV]
    states = data.draw(st.sets(st.sampled_from([state for state, row in enumerate(allowed) if row] or [-1])))
    pins = {state: data.draw(st.sampled_from(sorted(allowed[state]))) for state in states - {-1}}
    narrowed_SV = table_SV.copy()
    for state, token in pins.items():
        narrowed_SV[state] = -1
        narrowed_SV[state, token] = table_SV[state, token]
    if shortest(narrowed_SV, forbidden) is None:
        with pytest.raises(PromptError):
            Grammar.from_table(table_SV).rules_of(forbidden, pins)
        return
    found, expected = Grammar.from_table(table_SV).rules_of(forbidden, pins), Grammar.from_table(narrowed_SV)
    assert np.array_equal(found.ways_S, expected.rules_of(forbidden).ways_S)
    assert np.array_equal(found.only_S, expected.rules_of(forbidden).only_S)


@given(automata(), st.sets(st.integers(0, SMALLEST - 1), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_automaton_it_accepts_what_is_written_within_the_budget(
    small: Decoder, table_SV: np.ndarray, forbidden: set[int], data: st.DataObject
) -> None:
    grammar = Grammar.from_table(table_SV)
    nearest = shortest(table_SV, forbidden)
    engine = Engine(small, slots=2, grammar=grammar)
    if nearest is None:
        with pytest.raises(PromptError) as caught:
            engine.generate([Request([1], forbidden=forbidden, max_new_tokens=20)])
        assert caught.value.code == "nothing-to-write"
        return
    if nearest > 1:
        with pytest.raises(PromptError, match=f"what the grammar asks for takes {nearest}"):
            engine.generate([Request([1], forbidden=forbidden, max_new_tokens=nearest - 1)])
    budgets = data.draw(st.lists(st.integers(max(1, nearest), nearest + 12), min_size=3, max_size=3))
    requests = [
        Request([n, 2], forbidden=forbidden, max_new_tokens=budget, temperature=n, seed=n)
        for n, budget in enumerate(budgets)
    ]
    for request, done in zip(requests, engine.generate(requests), strict=True):
        assert grammar.accepts(done.ids) and done.ended == "eos"
        assert len(done.ids) <= (request.max_new_tokens or 0)
        assert not forbidden & set(done.ids)
        if not request.temperature and nearest:
            assert done.ids == plain_loop(small, request, grammar)


def shortest(table_SV: np.ndarray, forbidden: set[int]) -> int | None:
    """Tokens on the shortest way from state 0 to an end, None where there is no way."""
    seen, front, steps = {0}, {0}, 0
    while front:
        if any((table_SV[state] < 0).all() for state in front):
            return steps
        tokens = [token for token in range(table_SV.shape[1]) if token not in forbidden]
        front = {int(table_SV[state, token]) for state in front for token in tokens} - {-1} - seen
        seen |= front
        steps += 1
    return None


# Steps


@pytest.mark.parametrize("lengths", [[9], [9, 9, 9], [30, 1, 17, 9]])
@pytest.mark.parametrize("attention", ["full", "fused"])
@torch.inference_mode()
def test_a_step_in_few_operators_gives_what_the_layers_give(attention: str, lengths: list[int]) -> None:
    decoder = make_decoder(attention)
    assert lean.fits(decoder)
    mine, its = (decoder.new_cache(len(lengths), 40) for _ in range(2))
    x_BTD = torch.randn(len(lengths), 30, 64)
    for cache in (mine, its):
        decoder.hidden(x_BTD, cache, torch.tensor(lengths))
    for step in range(4):
        token = READING.set(step > 1)  # weights read in either way
        out_BTD = lean.Lean(decoder).hidden(x_BTD[:, step : step + 1], mine)
        READING.reset(token)
        torch.testing.assert_close(out_BTD, decoder.hidden(x_BTD[:, step : step + 1], its), atol=1e-5, rtol=1e-5)
    assert torch.equal(mine.used_B, its.used_B)
    for ours, theirs in zip(mine.buffers, its.buffers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    full = decoder.new_cache(1, 4)
    decoder.hidden(x_BTD[:1, :4], full)
    with pytest.raises(PromptError, match="there is room for 0"):
        lean.Lean(decoder).hidden(x_BTD[:1, :1], full)


# Kernels


def test_the_kernels_of_a_step_give_what_the_layers_give() -> None:
    """In Triton's interpreter, which a process has to be started with."""
    pytest.importorskip("triton", reason="Triton comes with torch on Linux")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


KERNELS = f"""
import torch
from tests.engine_cases import check_choices, check_fused

torch.set_num_threads(1)
check_fused(3, 4)  # sorted by expert,
check_fused(3, 2, positions=16)  # ... few rows, and those of the cache in parts,
check_fused(2, 1, positions=16, joined=1)  # ... which are joined by themselves
for vocabulary in ({len(TOKENS)}, 2100):
    check_choices(vocabulary, torch.float32, torch.device("cpu"))
"""


def test_decide_takes_the_place_of_the_likeliest(decoder: Decoder) -> None:
    def nth(log_p_BV: Tensor, hints_BH: Tensor) -> Tensor:
        return log_p_BV.argsort(-1, descending=True).gather(1, hints_BH.long())[:, 0]

    engine = Engine(decoder, slots=2, decide=nth, hints=1)
    requests = [Request([5, 6], max_new_tokens=1, hints_H=torch.tensor([float(n)])) for n in range(5)]
    best = decoder(torch.tensor([[5, 6]]))[0, -1].argsort(descending=True)[:5].tolist()
    assert [each.ids for each in engine.generate(requests)] == [[token] for token in best]
    with pytest.raises(ValueError, match="told 1 numbers"):
        engine.generate([Request([5])])


# Ways of a step on the CPU


def test_a_cpu_compiles_nothing(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="for a GPU"):
        Engine(decoder, compile=True)


def test_weights_move_into_huge_pages_and_stay_what_they_are() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(1500, 1000))
    module.append(module[1])
    weights, before = list(module.parameters()), [each.detach().clone() for each in module.parameters()]
    with torch.inference_mode():
        moved = pages.settle(module)
    if not moved:
        pytest.skip("the system leaves huge pages to nobody")
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    assert module[2].weight is module[1].weight
    assert not pages.settle(module)  # a second engine moves nothing
    module[1](torch.zeros(1, 1500)).sum().backward()  # and they can still be trained
    advised = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            here = start <= weights[2].data_ptr() < end
        elif line.startswith("VmFlags:") and here:
            advised = "hg" in line.split()
    assert advised


def test_the_fastest_way_is_taken_and_what_was_set_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("decoder.engine.ways.time", SimpleNamespace(perf_counter=lambda: now[0]))
    before = torch.get_num_threads()
    options = ((1, False), (1, True), (2, False), (2, True))
    ways = Ways(options)
    seen = []
    for _ in range(len(options) * TRIES + 4):
        with ways.of(1):
            seen.append((torch.get_num_threads(), READING.get()))
            now[0] += dict(zip(options, (0.03, 0.02, 0.04, 0.01), strict=True))[seen[-1]]
        assert torch.get_num_threads() == before and not READING.get()
    assert seen[: len(options) * TRIES] == [*options] * TRIES
    assert seen[len(options) * TRIES :] == [options[3]] * 4


# Slots


def test_slots_are_given_lowest_first_and_those_that_are_left_move_together() -> None:
    def entry() -> Entry:
        request = Request([1])
        return Entry(Completion(request), Plan(request, None, [], 0, 9))

    scheduler = Scheduler(8)
    entries = [entry() for _ in range(9)]
    for each in entries:
        scheduler.add(each)
    assert [each.slot for each in scheduler.admit()] == list(range(8))
    scheduler.release(entries[2])
    assert [each.slot for each in scheduler.admit()] == [2]
    for each in (entries[8], *entries[3:7]):
        scheduler.release(each)
    assert scheduler.reach == 8 and scheduler.moves() == [(7, 2)]
    assert scheduler.reach == 3 and scheduler.moves() == []
    assert entries[7].slot == 2 and set(scheduler.running) == {0, 1, 2}
