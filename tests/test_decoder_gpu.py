"""The decoder on a GPU: steps as CUDA graphs, and kernels that a CPU does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import decoder.moe
from benchmarks.racing import captured
from decoder import (
    AdaptiveAttentionConfig,
    AttentionConfig,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    FullAttentionConfig,
    LatentAttentionConfig,
)
from decoder.attention import Places

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ATTENTIONS: dict[str, AttentionConfig] = {
    "full": FullAttentionConfig(heads=4, kv_heads=4, head_dim=32),
    "grouped": FullAttentionConfig(heads=4, kv_heads=2, head_dim=32, qk_norm="head"),
    "adaptive": AdaptiveAttentionConfig(heads=4, kv_heads=2, head_dim=32, window=32, stride=8),
    "latent": LatentAttentionConfig(heads=4, latent=64, rotary=16, plain=32, value=32),
}
PLAIN = ExpertsConfig(count=16, active=4, hidden=64, shared_hidden=64)
EXPERTS = {"plain": PLAIN, "varying": replace(PLAIN, threshold=0.9), "cooperating": replace(PLAIN, cooperation=8)}


def build(attention: AttentionConfig, experts: ExpertsConfig) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary=64, width=128, layers=2, length=300, attention=attention, experts=experts)
    made = Decoder(config).cuda().eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if "salience" in name or "cooperation" in name:
            weight.normal_(std=0.3)
    return made


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("name", ATTENTIONS)
@torch.inference_mode()
def test_a_step_as_a_cuda_graph_gives_what_the_whole_prompt_gives(name: str, kind: str) -> None:
    made, x = build(ATTENTIONS[name], EXPERTS[kind]), torch.randn(3, 120, 128, device="cuda")
    cache = made.new_cache(3, 200)
    lengths = torch.tensor([70, 41, 100], device="cuda")
    made.hidden(x[:, :100], cache, lengths)
    kept = [(tensor, tensor.clone()) for tensor in (cache.used_B, *cache.buffers)]
    given = x[:, 100:101].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made.hidden(given, cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = made.hidden(given, cache)
    torch.cuda.synchronize()
    for tensor, before in kept:
        tensor.copy_(before)
    for t in range(100, 120):
        given.copy_(x[:, t : t + 1])
        graph.replay()
        for row, length in enumerate(lengths.tolist()):
            whole = made.hidden(torch.cat((x[row, :length], x[row, 100 : t + 1]))[None])[0, -1]
            torch.testing.assert_close(out[row, 0], whole, atol=2e-3, rtol=2e-3)
    assert cache.used_B.tolist() == [length + 20 for length in lengths.tolist()]


@pytest.mark.parametrize("count", [31, 64, 250])
@torch.inference_mode()
def test_a_prompt_by_kernels_gives_what_pytorch_gives(count: int) -> None:
    made = build(ATTENTIONS["adaptive"], PLAIN).bfloat16()
    attention, positions = made.layers[0].attention, torch.arange(count, device="cuda")[None]
    at = Places(positions, torch.arange(3, device="cuda")[:, None], None, *made.rotary(positions))
    x = torch.randn(3, count, 128, device="cuda", dtype=torch.bfloat16)
    outs, kept = [], []
    for dtype in (torch.bfloat16, torch.float32):
        kept.append([torch.zeros(3, *shape, device="cuda", dtype=dtype) for shape in attention.config.stored(count)])
        outs.append(attention.to(dtype)(x.to(dtype), at, tuple(kept[-1])).float())
    torch.testing.assert_close(*outs, atol=3e-2, rtol=3e-2)
    for mine, exact in zip(*kept, strict=True):
        torch.testing.assert_close(mine.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("rows", [3, 150])  # in parts, and each by one program
@torch.inference_mode()
def test_a_step_by_kernels_gives_what_pytorch_gives(rows: int) -> None:
    made, config = build(ATTENTIONS["adaptive"], PLAIN), ATTENTIONS["adaptive"]
    attention = made.layers[0].attention
    positions = torch.randint(0, 4000, (rows, 1), device="cuda")
    positions[:3, 0] = torch.tensor([0, 31, 3999])
    x, rows_B1 = torch.randn(rows, 1, 128, device="cuda").bfloat16(), torch.arange(rows, device="cuda")[:, None]
    kept = [torch.randn(rows, *shape, device="cuda").bfloat16() for shape in config.stored(4000)]
    kept[1][:, :, 0] = 0  # the null key
    outs, stores = [], []
    for dtype in (torch.bfloat16, torch.float32):
        masks = config.masks(positions, 4000, dtype)
        assert (masks == []) == (dtype == torch.bfloat16)
        at = Places(positions, rows_B1, None, *made.rotary(positions), masks)
        stores.append(tuple(each.to(dtype) for each in kept))
        outs.append(attention.to(dtype)(x.to(dtype), at, stores[-1]).float())
    torch.testing.assert_close(*outs, atol=3e-2, rtol=3e-2)
    for mine, exact in zip(*stores, strict=True):
        torch.testing.assert_close(mine.float(), exact, atol=3e-2, rtol=3e-2)


def test_a_captured_call_keeps_what_it_reads() -> None:
    calls = []
    for value in (1.0, 2.0, 3.0):  # each capture hands unused memory back to the driver
        weight, out = torch.full((1 << 24,), value, device="cuda"), torch.empty(1 << 24, device="cuda")
        result = torch.empty((), device="cuda")
        calls.append((captured(lambda w=weight, o=out, r=result: r.copy_(o.copy_(w).mean())), result, value))
        del weight, out
    for call, result, value in calls:
        call()
        assert float(result) == value


@pytest.mark.parametrize("kind", EXPERTS)
@torch.inference_mode()
def test_gathered_experts_give_what_sorted_ones_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(ATTENTIONS["full"], EXPERTS[kind]).bfloat16().layers[0].feed_forward
    x = torch.randn(1, 16, 128, device="cuda", dtype=torch.bfloat16)
    gathered = layer(x)
    monkeypatch.setattr(decoder.moe, "GATHERED", 0)
    torch.testing.assert_close(gathered, layer(x), atol=3e-2, rtol=3e-2)
