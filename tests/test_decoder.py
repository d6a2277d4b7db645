"""The decoder and its experts: fast paths against plain arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import decoder.flops
from decoder import (
    AdaptiveAttentionConfig,
    AttentionConfig,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    FullAttentionConfig,
    LatentAttentionConfig,
    PromptError,
    adaptive,
)
from decoder.adaptive import AdaptiveAttention
from decoder.attention import Places
from decoder.layers import FEW, PIECE, READING, Linear, RMSNorm
from decoder.moe import MixtureOfExperts, Router
from reports.grammar import TOKENS

ATTENTIONS: dict[str, AttentionConfig] = {
    "full": FullAttentionConfig(heads=3, kv_heads=3, head_dim=16),
    "grouped": FullAttentionConfig(heads=4, kv_heads=2, head_dim=16, qk_norm="head"),
    "adaptive": AdaptiveAttentionConfig(heads=4, kv_heads=2, head_dim=16, window=8, stride=4),
    "latent": LatentAttentionConfig(heads=3, latent=24, rotary=8, plain=16, value=16),
}
SMALL = DecoderConfig(
    vocabulary=len(TOKENS),
    width=48,
    layers=2,
    length=300,
    attention=ATTENTIONS["full"],
    experts=ExpertsConfig(count=8, hidden=16, shared_hidden=24),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SMALL).eval().requires_grad_(False)


def test_experts_are_the_weighted_sum_of_the_chosen() -> None:
    torch.manual_seed(1)
    moe = MixtureOfExperts(32, ExpertsConfig(count=8, hidden=16, shared_hidden=24)).eval()
    moe.router.balance_E.normal_(std=0.2)  # or the test passes with the bias ignored
    assert moe.shared is not None
    x = torch.randn(13, 32)
    chosen, weights = moe.router(x)
    expected = []
    for t in range(len(x)):
        gate, up = moe.shared.w13(x[t]).chunk(2)
        total = moe.shared.w2(F.silu(gate) * up)
        for expert, weight in zip(chosen[t], weights[t], strict=True):
            gate, up = (moe.experts.w13_E2ID[expert] @ x[t]).chunk(2)
            total = total + weight * (moe.experts.w2_EDI[expert] @ (F.silu(gate) * up))
        expected.append(total)
    torch.testing.assert_close(moe(x[None])[0], torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_few_rows_on_a_cpu_give_what_many_give(threshold: float, threads: int) -> None:
    config = ExpertsConfig(count=8, active=3, hidden=24, shared_hidden=40, threshold=threshold)
    torch.manual_seed(0)
    layers = (MixtureOfExperts(32, config), RMSNorm(32, eps=1e-5), Linear(32, PIECE // 32 + 5))
    with torch.no_grad():
        layers[1].weight.uniform_(0.5, 2)
    x_BTD = torch.randn(1, FEW + 1, 32)
    reading = READING.set(True)
    torch.set_num_threads(threads)
    try:
        for layer in layers:
            with torch.inference_mode():
                whole, parts = layer(x_BTD), [layer(x_BTD[:, start:end]) for start, end in ((0, 1), (1, 6), (6, None))]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    finally:
        READING.reset(reading)
        torch.set_num_threads(1)


def test_cooperation_starts_as_none_and_then_lets_experts_see_each_other() -> None:
    torch.manual_seed(1)
    plain = MixtureOfExperts(32, ExpertsConfig(count=8, active=3, hidden=16, shared_hidden=24))
    together = MixtureOfExperts(32, ExpertsConfig(count=8, active=3, hidden=16, shared_hidden=24, cooperation=4))
    together.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 13, 32)
    torch.testing.assert_close(together(x), plain(x), atol=0, rtol=0)
    assert together.cooperation is not None
    together.cooperation.out.weight.data.normal_()
    results, weights = torch.randn(5, 3, 32), torch.ones(5, 3)
    before = together.cooperation(results, weights)
    changed = results.clone()
    changed[:, 2] += 1
    assert not torch.allclose(together.cooperation(changed, weights)[:, 0], before[:, 0])
    left_out = torch.tensor([[1.0, 1.0, 0.0]]).expand(5, -1)
    torch.testing.assert_close(
        together.cooperation(changed, left_out)[:, :2], together.cooperation(results, left_out)[:, :2]
    )


def test_experts_far_below_the_best_are_left_out_and_cost_no_load() -> None:
    torch.manual_seed(1)
    config = ExpertsConfig(count=8, active=4, hidden=16, shared_hidden=24, threshold=0.8)
    moe = MixtureOfExperts(32, config).train()
    moe.router.weight.data *= 4
    x = torch.randn(1, 40, 32, requires_grad=True)
    chosen, weights = moe.router(x[0])
    kept = chosen < 8
    assert 40 < int(kept.sum()) < 160
    assert int(moe.router.load_E.sum()) == int(kept.sum())
    scores = (x[0] @ moe.router.weight.T).sigmoid().topk(4).values
    assert torch.equal(kept, scores >= 0.8 * scores[:, :1])
    torch.testing.assert_close(weights.sum(1), torch.ones(40))
    assert moe.shared is not None
    expected = []
    for t in range(40):
        total = moe.shared(x[0, t])
        for expert, weight in zip(chosen[t, kept[t]], weights[t, kept[t]], strict=True):
            gate, up = (moe.experts.w13_E2ID[expert] @ x[0, t]).chunk(2)
            total = total + weight * (moe.experts.w2_EDI[expert] @ (F.silu(gate) * up))
        expected.append(total)
    out, plain = moe(x)[0], torch.stack(expected)
    torch.testing.assert_close(out, plain, atol=1e-4, rtol=1e-4)
    sides = [
        torch.autograd.grad(each.square().sum(), [x, *moe.parameters()], retain_graph=True) for each in (out, plain)
    ]
    for mine, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_processes_that_train_together_balance_by_the_sum_of_their_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: load.add_(torch.tensor([0.0, 0.0, 0.0, 40.0])))
    router = Router(16, ExpertsConfig(count=4))
    router.load_E.copy_(torch.tensor([10.0, 2.0, 2.0, 0.0]))
    router.rebalance(0.1)
    assert router.balance_E.argmin() == 3
    assert float(router.balance_E.sum()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [1, 37])
@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(count=16, active=2, hidden=64, shared_hidden=64),
        ExpertsConfig(count=16, active=3, hidden=64, shared_hidden=0, cooperation=16),
        None,
    ],
)
def test_flops_are_those_that_the_configuration_says(experts: ExpertsConfig | None, count: int) -> None:
    attention = FullAttentionConfig(heads=4, kv_heads=2, head_dim=32)
    config = DecoderConfig(vocabulary=64, width=128, layers=2, attention=attention, experts=experts, dense_hidden=256)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Decoder(config).eval()(torch.zeros(1, count, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(count * config.flops_per_token(count), rel=0.01)


def test_the_balance_chooses_but_does_not_weigh() -> None:
    router = Router(16, ExpertsConfig(count=8))
    x = torch.randn(50, 16)
    router.balance_E[3] = 100.0
    chosen, weights = router(x)
    assert (chosen == 3).any(1).all()
    unbiased = torch.sigmoid(x @ router.weight.T).gather(1, chosen)
    torch.testing.assert_close(weights, unbiased / unbiased.sum(1, keepdim=True))


def test_rebalancing_evens_the_load() -> None:
    torch.manual_seed(2)
    router = Router(16, ExpertsConfig(count=8)).train()
    x = torch.randn(400, 16) + 1.0

    def spread() -> float:
        router.load_E.zero_()
        router(x)
        return float(router.load_E.std() / router.load_E.mean())

    before = spread()
    for _ in range(300):
        router.load_E.zero_()
        router(x)
        router.rebalance(0.005)
    assert spread() < before / 2


def test_a_checkpointed_layer_counts_its_load_once() -> None:
    moe = MixtureOfExperts(16, ExpertsConfig(count=8, hidden=8, shared_hidden=8)).train()
    x = torch.randn(1, 50, 16, requires_grad=True)
    checkpoint(moe, x, use_reentrant=False).square().mean().backward()
    assert float(moe.router.load_E.sum()) == 100


def test_gates_and_positions_stay_in_single_precision() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SMALL)
    before = {name: tensor.clone() for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers())}
    decoder.to(torch.bfloat16)
    after = dict((*decoder.named_parameters(), *decoder.named_buffers()))
    kept = {name for name, tensor in after.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in before if ".router." in name or name.startswith("rotary.")}
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_active_share_is_between_a_tenth_and_a_fifth() -> None:
    experts = ExpertsConfig()
    assert 0.1 <= experts.active / experts.count <= 0.2


def test_a_configuration_survives_json() -> None:
    for attention in ATTENTIONS.values():
        config = replace(SMALL, attention=attention, dense_layers=(0,), dense_hidden=64)
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# The cache


def of_kind(name: str) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(SMALL, attention=ATTENTIONS[name])).eval().requires_grad_(False)
    for weight in (w for n, w in decoder.named_parameters() if "salience" in n):
        weight.normal_()  # it starts as zeros, and the test would pass without it
    return decoder


@pytest.mark.parametrize("name", ATTENTIONS)
def test_costs_are_those_of_the_tensors(name: str) -> None:
    decoder = of_kind(name)
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.parameters
    cache = decoder.new_cache(2, 63)
    assert sum(buffer.nbytes for buffer in cache.buffers) == 2 * decoder.config.cache_bytes(cache.places)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_in_whatever_parts_a_sequence_comes_its_hidden_states_are_the_same(name: str) -> None:
    decoder, x = of_kind(name), torch.randn(2, 40, 48)
    whole = decoder.hidden(x)
    for split in ((12, *[1] * 28), (1, 20, 1, 18), (40,)):
        cache = decoder.new_cache(2, 40)
        parts = [decoder.hidden(part, cache) for part in x.split(split, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        assert cache.used_B.tolist() == [40, 40]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_of_different_lengths_are_as_each_alone(name: str) -> None:
    decoder, x = of_kind(name), torch.randn(3, 40, 48)
    lengths, more = torch.tensor([7, 30, 19]), torch.tensor([4, 0, 1])
    cache = decoder.new_cache(3, 60)
    used = cache.used_B
    decoder.hidden(x[:, :30], cache, lengths)
    forced = decoder.hidden(x[:, 30:34], cache, more)
    step = decoder.hidden(x[:, 34:35], cache)
    assert used is cache.used_B
    assert used.tolist() == [12, 31, 21]
    for row in range(3):
        own = torch.cat((x[row, : lengths[row]], x[row, 30 : 30 + more[row]], x[row, 34:35]))[None]
        expected = decoder.hidden(own)[0]
        torch.testing.assert_close(step[row, 0], expected[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(forced[row, : more[row]], expected[lengths[row] : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_slot_goes_on_with_what_was_put_into_it_and_nothing_else(name: str) -> None:
    decoder, x = of_kind(name), torch.randn(3, 40, 48)
    cache, prompt, prefix = decoder.new_cache(3, 60), decoder.new_cache(2, 35), decoder.new_cache(1, 20)
    decoder.hidden(torch.full((3, 50, 48), float("nan")), cache)
    decoder.hidden(x[:2, :35], prompt)
    decoder.hidden(x[2:, :20], prefix)
    cache.put(torch.tensor([2, 0]), prompt)
    cache.put(torch.tensor([1]), prefix)
    assert cache.used_B.tolist() == [35, 20, 35]
    step = decoder.hidden(x[:, 39:], cache)
    for slot, (row, count) in enumerate(((1, 35), (2, 20), (0, 35))):
        expected = decoder.hidden(torch.cat((x[row, :count], x[slot, 39:]))[None])
        torch.testing.assert_close(step[slot, 0], expected[0, -1], atol=1e-4, rtol=1e-4)
    cache.put(torch.tensor([0, 1, 2]), prefix)
    shared = decoder.hidden(x[:, 20:25], cache)
    expected = decoder.hidden(torch.cat((x[2:, :20].expand(3, -1, -1), x[:, 20:25]), 1))[:, 20:]
    torch.testing.assert_close(shared, expected, atol=1e-4, rtol=1e-4)


@given(
    window=st.integers(1, 6),
    stride=st.sampled_from([1, 2, 3, 5]),
    splits=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    padded=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_adaptive_attention_gives_in_parts_what_it_gives_at_once(
    window: int, stride: int, splits: list[int], padded: list[int], grouped: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    attention = AdaptiveAttentionConfig(
        heads=4, kv_heads=2 if grouped else 4, head_dim=8, window=window * stride, stride=stride
    )
    config = DecoderConfig(
        vocabulary=8, width=16, layers=2, length=256, attention=attention, experts=None, dense_hidden=16
    )
    decoder = Decoder(config).requires_grad_(False)
    for layer in decoder.layers:
        layer.attention.salience_Jd.normal_(std=3.0)  # type: ignore[union-attr,operator]
    x, cache = torch.randn(2, sum(splits) + 1, 16), decoder.new_cache(2)
    parts: list[list[torch.Tensor]] = [[], []]
    kept: list[list[torch.Tensor]] = [[], []]
    for part in x.split([*splits, 1], 1):
        counts = [max(part.shape[1] - gone, 1) for gone in padded]
        out = decoder.hidden(part, cache, torch.tensor(counts))
        for row, count in enumerate(counts):
            parts[row].append(part[row, :count])
            kept[row].append(out[row, :count])
    for row in range(2):
        at_once = decoder.hidden(torch.cat(parts[row])[None])[0]
        torch.testing.assert_close(torch.cat(kept[row]), at_once, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("piece", [1024, 24])  # on a CPU a prompt goes through some windows at a time
def test_adaptive_attention_is_what_it_says(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one softmax over raw keys and one over blocks, position by position."""
    monkeypatch.setattr(adaptive, "PIECE", piece)
    torch.manual_seed(0)
    config = AdaptiveAttentionConfig(heads=2, kv_heads=2, head_dim=8, window=12, stride=4)
    decoder = Decoder(DecoderConfig(vocabulary=8, width=16, attention=config, experts=None, dense_hidden=16))
    attention = decoder.layers[0].attention.requires_grad_(False)
    assert isinstance(attention, AdaptiveAttention)
    attention.salience_Jd.normal_()
    x = torch.randn(1, 50, 16)
    positions = torch.arange(50)[None]
    at = Places(positions, positions[:, :1], None, *decoder.rotary(positions))
    q, k, v = (each[0].transpose(0, 1) for each in attention.project(x, at))
    expected = []
    for t in range(50):
        start = t // 12 * 12
        raw = slice(max(0, start - 12), t + 1)
        near = (q[:, t, None] @ k[:, raw].mT * 8**-0.5).softmax(-1) @ v[:, raw]
        weights = (k[:, :start] @ attention.salience_Jd[..., None]).unflatten(1, (-1, 4)).softmax(2)
        blocks = [(each[:, :start].unflatten(1, (-1, 4)) * weights).sum(2) for each in (k, v)]
        keys, values = (torch.cat((torch.zeros(2, 1, 8), each), 1) for each in blocks)
        far = (q[:, t, None] @ keys.mT * 8**-0.5).softmax(-1) @ values
        gate = attention.gate(x[0, t]).sigmoid()[:, None, None]
        expected.append(attention.out((gate * near + (1 - gate) * far).flatten()))
    with torch.no_grad():
        torch.testing.assert_close(attention(x, at, None)[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_prompts_in_pieces_store_what_they_store_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdaptiveAttentionConfig(heads=2, kv_heads=2, head_dim=8, window=12, stride=4)
    decoder = Decoder(
        DecoderConfig(vocabulary=8, width=16, length=200, attention=config, experts=None, dense_hidden=16)
    )
    x, step, counts = torch.randn(4, 90, 16), torch.randn(4, 1, 16), torch.tensor([90, 3, 47, 72])
    found = []
    for piece in (1024, 24):
        monkeypatch.setattr(adaptive, "PIECE", piece)
        cache = decoder.new_cache(4)
        prompt = decoder.hidden(x, cache, counts)
        found.append([prompt[torch.arange(4), counts - 1], *(decoder.hidden(step, cache) for _ in range(20))])
    torch.testing.assert_close(*found)


def test_the_kernels_of_adaptive_attention_give_what_pytorch_gives() -> None:
    """In Triton's interpreter, which a process has to be started with."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


KERNELS = """
import torch
from decoder import AdaptiveAttentionConfig, windows
from decoder.attention import Places
from decoder.rotary import Rope, Rotary

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = ((100, 4, 2, 32, 32, 8), (31, 2, 2, 16, 16, 4), (130, 2, 1, 16, 64, 16))
for count, heads, kv_heads, dim, window, stride in sizes:
    config = AdaptiveAttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=dim, window=window, stride=stride)
    assert config.fused
    attention = config.build(64, 1e-6).requires_grad_(False)
    attention.salience_Jd.normal_()
    x, q, kv = torch.randn(2, count, 64), torch.randn(2, count, heads, dim), torch.randn(2, count, kv_heads, 2 * dim)
    given = (x, q, *kv.chunk(2, -1), Places(torch.arange(count)[None], torch.arange(2)[:, None], None, None, None))
    one, other = (tuple(torch.full((2, *shape), 7.0) for shape in config.stored(count)) for _ in range(2))
    torch.testing.assert_close(attention._fused(*given, one), attention.mix(*given, other), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
places = ((4, 2, 32, 32, 8, (0, 31, 32, 64, 199)), (2, 2, 16, 16, 1, (16, 299)), (3, 1, 64, 64, 16, (15, 300)))
for windows.SPLITS in (1, 4):
    for heads, kv_heads, dim, window, stride, positions in places:
        config = AdaptiveAttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=dim, window=window, stride=stride)
        attention = config.build(64, 1e-6).requires_grad_(False)
        attention.salience_Jd.normal_()
        batch, positions = len(positions), torch.tensor(positions)[:, None]
        x, q, kv = (torch.randn(batch, 1, *each) for each in ((64,), (heads, dim), (kv_heads, 2 * dim)))
        masks = config.masks(positions, 304, x.dtype)
        given = (x, q, *kv.chunk(2, -1), Places(positions, torch.arange(batch)[:, None], None, None, None, masks))
        one = tuple(torch.randn(batch, *shape) for shape in config.stored(304))
        one[1][:, :, 0] = 0
        other = tuple(each.clone() for each in one)
        torch.testing.assert_close(attention._fused(*given, one), attention.mix(*given, other), atol=1e-5, rtol=1e-5)
        whole = (positions[:, 0] + 1) % stride == 0  # blocks that nobody sees yet may be pooled or not
        one[1][~whole] = other[1][~whole] = 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
for interleaved in (False, True):
    for rows in (1, 3):
        x, rope = torch.randn(3, 70, 10, 32)[:, :, 2:6], Rope(interleaved=interleaved)
        cos, sin = Rotary(rope, 32)(torch.arange(70)[None] + torch.arange(rows)[:, None])
        torch.testing.assert_close(windows.rotate(x, cos, sin, interleaved), rope.rotate(x, cos, sin))
"""


def test_windows_of_broken_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="not made of whole blocks"):
        AdaptiveAttentionConfig(window=100, stride=16)


def test_a_prompt_longer_than_the_decoder_is_refused(decoder: Decoder) -> None:
    with pytest.raises(PromptError, match="301 positions do not fit: there is room for 300"):
        decoder(torch.randn(1, 301, 48))
    cache, full = decoder.new_cache(2, 20), decoder.new_cache(1, 40)
    decoder(torch.randn(2, 18, 48), cache)
    with pytest.raises(PromptError, match="3 positions do not fit: there is room for 2"):
        decoder(torch.randn(2, 3, 48), cache)
    decoder(torch.randn(1, 30, 48), full)
    with pytest.raises(PromptError, match="30 positions do not fit: there is room for 20"):
        cache.put(torch.tensor([1]), full)


# Generation
