"""The decoder, its experts and its engine: fast paths against plain arithmetic, and output that follows the grammar."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from decoder import Decoder, DecoderConfig, KeyValueCache, generate
from decoder.moe import MixtureOfExperts
from reports.grammar import END, ID, POINTERS, TOKENS, compile_grammar, from_tokens

SMALL = DecoderConfig(vocabulary=len(TOKENS), width=48, layers=2, heads=3, experts=8, expert_hidden=16, length=300)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SMALL).eval().requires_grad_(False)


def test_experts_are_the_weighted_sum_of_the_chosen() -> None:
    torch.manual_seed(1)
    moe = MixtureOfExperts(32, experts=8, active=2, hidden=16, shared_hidden=24).eval()
    moe.balance_E.normal_(std=0.2)  # or the test passes with the bias ignored
    x = torch.randn(13, 32)
    chosen, weights = moe.route(x)
    expected = []
    for t in range(len(x)):
        gate, up = moe.shared13(x[t]).chunk(2)
        total = moe.shared2(F.silu(gate) * up)
        for expert, weight in zip(chosen[t], weights[t], strict=True):
            gate, up = (moe.w13_E2ID[expert] @ x[t]).chunk(2)
            total = total + weight * (moe.w2_EDI[expert] @ (F.silu(gate) * up))
        expected.append(total)
    torch.testing.assert_close(moe(x), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_balance_chooses_but_does_not_weigh() -> None:
    moe = MixtureOfExperts(16, experts=8, active=2, hidden=8, shared_hidden=8)
    x = torch.randn(50, 16)
    moe.balance_E[3] = 100.0
    chosen, weights = moe.route(x)
    assert (chosen == 3).any(1).all()
    unbiased = torch.sigmoid(x @ moe.gate.weight.T).gather(1, chosen)
    torch.testing.assert_close(weights, unbiased / unbiased.sum(1, keepdim=True))


def test_rebalancing_evens_the_load() -> None:
    torch.manual_seed(2)
    moe = MixtureOfExperts(16, experts=8, active=2, hidden=8, shared_hidden=8).train()
    x = torch.randn(400, 16) + 1.0

    def spread() -> float:
        moe.load_E.zero_()
        moe(x)
        return float(moe.load_E.std() / moe.load_E.mean())

    before = spread()
    for _ in range(300):
        moe.load_E.zero_()
        moe(x)
        moe.rebalance(0.005)
    assert spread() < before / 2


def test_active_share_is_between_a_tenth_and_a_fifth() -> None:
    config = DecoderConfig(vocabulary=10)
    assert 0.1 <= config.active / config.experts <= 0.2


def test_parameter_count_is_what_the_configuration_says(decoder: Decoder) -> None:
    assert sum(p.numel() for p in decoder.parameters()) == SMALL.parameters


def test_decoding_with_the_cache_is_decoding_at_once(decoder: Decoder) -> None:
    x = torch.randn(2, 20, 48)
    cache = KeyValueCache(SMALL, 2, x.device, x.dtype)
    steps = [decoder(x[:, :12], cache), *(decoder(x[:, t : t + 1], cache) for t in range(12, 20))]
    torch.testing.assert_close(torch.cat(steps, 1), decoder(x), atol=1e-4, rtol=1e-4)


def test_a_prompt_longer_than_the_decoder_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        decoder(torch.randn(1, 301, 48))


def test_whatever_the_weights_the_output_parses(decoder: Decoder) -> None:
    grammar = torch.from_numpy(compile_grammar())
    for seed in range(4):
        torch.manual_seed(seed)
        for written in generate(decoder, torch.randn(3, 20, 48) * 3, grammar, end=END):
            from_tokens([TOKENS[i] for i in written])


def test_a_sequence_does_not_depend_on_its_batch(decoder: Decoder) -> None:
    grammar = torch.from_numpy(compile_grammar())
    prompts = torch.randn(4, 20, 48)
    together = generate(decoder, prompts, grammar, end=END)
    alone = [generate(decoder, prompts[b : b + 1], grammar, end=END)[0] for b in range(4)]
    assert together == alone


def test_forbidden_tokens_are_never_written(decoder: Decoder) -> None:
    grammar = torch.from_numpy(compile_grammar())
    forbidden = torch.zeros(2, len(TOKENS), dtype=torch.bool)
    forbidden[:, ID["kind:ct"]] = True
    forbidden[:, [ID[f"evidence:{i}"] for i in range(2, POINTERS)]] = True
    for written in generate(decoder, torch.randn(2, 20, 48), grammar, end=END, forbidden_BV=forbidden):
        draft = from_tokens([TOKENS[i] for i in written])
        assert draft.kind == "defect"
        assert all(finding.pointer < 2 for finding in draft.findings)


def test_nothing_left_to_write_is_an_error(decoder: Decoder) -> None:
    forbidden = torch.ones(1, len(TOKENS), dtype=torch.bool)
    with pytest.raises(ValueError, match="nothing to write"):
        generate(decoder, torch.randn(1, 4, 48), torch.from_numpy(compile_grammar()), end=END, forbidden_BV=forbidden)
