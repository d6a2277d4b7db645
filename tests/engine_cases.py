"""Small decoders, what kernels are compared with, and the plain loop: no cache, no batch, one token after another."""

from __future__ import annotations

import numpy as np
import torch

from decoder import (
    AdaptiveAttentionConfig,
    AttentionConfig,
    Decoder,
    DecoderConfig,
    ExpertsConfig,
    FullAttentionConfig,
    LatentAttentionConfig,
)
from decoder.engine import Grammar, Request
from decoder.engine import rows as reference
from decoder.engine.rows import DeviceGrammar, Rows, pack
from reports.grammar import ID, TOKENS, compile_grammar

EXPERTS = ExpertsConfig(count=8, active=2, hidden=16, shared_hidden=16)
ATTENTIONS: dict[str, AttentionConfig] = {
    "full": FullAttentionConfig(heads=4, kv_heads=2, head_dim=16),
    "fused": FullAttentionConfig(heads=4, kv_heads=2, head_dim=32, qk_norm="head"),  # on a GPU, the layers too
    "latent": LatentAttentionConfig(heads=4, latent=24, rotary=8, plain=16, value=16, query_latent=12),
    "adaptive": AdaptiveAttentionConfig(heads=4, kv_heads=2, head_dim=16, window=8, stride=4),
}


def make_decoder(
    attention: str, *, width: int = 64, length: int = 300, seed: int = 0, vocabulary: int = len(TOKENS)
) -> Decoder:
    """A decoder with random weights, of the report's vocabulary unless said otherwise."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocabulary=vocabulary, width=width, layers=2, length=length, attention=ATTENTIONS[attention], experts=EXPERTS
    )
    decoder = Decoder(config).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)  # all are 1 at first, and a gain that is forgotten would not show
    return decoder


def report_grammar() -> Grammar:
    return Grammar.from_table(compile_grammar())


def make_requests(count: int, *, most: int = 24, seed: int = 0, **options: object) -> list[Request]:
    """Requests of different lengths."""
    chance = np.random.default_rng(seed)
    return [
        Request(
            chance.integers(0, len(TOKENS), chance.integers(1, 40)).tolist(),
            max_new_tokens=int(chance.integers(1, most)),
            **options,  # type: ignore[arg-type]
        )
        for _ in range(count)
    ]


@torch.inference_mode()
def plain_loop(decoder: Decoder, request: Request, grammar: Grammar | None = None) -> list[int]:
    """Greedy tokens."""
    written: list[int] = []
    assert request.max_new_tokens is not None
    device = decoder.embedding.weight.device
    rules = grammar.rules_of(request.forbidden, request.pins) if grammar else None
    state = 0
    while len(written) < request.max_new_tokens:
        x_BTD = decoder.embed(torch.tensor([[*request.ids, *written]], device=device).long())
        if request.embeddings_PD is not None:
            x_BTD = torch.cat((request.embeddings_PD[None].to(x_BTD), x_BTD), 1)
        logits_V = decoder(x_BTD)[0, -1].float().cpu().numpy()
        if grammar and rules:
            target_V = grammar.next_SC[state, grammar.class_V]
            left = request.max_new_tokens - len(written)
            allowed_V = (target_V >= 0) & (rules.ways_S[np.maximum(target_V, 0)] < left)
            allowed_V[list(request.forbidden)] = False
            if state in request.pins:
                allowed_V &= np.arange(len(allowed_V)) == request.pins[state]
            logits_V = np.where(allowed_V, logits_V, -np.inf)
        elif request.forbidden:
            logits_V[list(request.forbidden)] = -np.inf
        written.append(int(logits_V.argmax()))
        if written[-1] in request.eos:
            break
        if grammar:
            state = grammar.walk(written[-1:], state)
            if (grammar.next_SC[state] < 0).all():
                break
    return written


def check_choices(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Whether the kernels choose tokens as plain torch does."""
    from decoder.engine import kernels  # Triton

    report = report_grammar()
    for seed, width in ((0, 1), (1, 4)):
        chance = np.random.default_rng(seed)
        grammar = report if vocabulary == len(TOKENS) and width > 1 else None
        states, width = (len(report.next_SC), width) if grammar else (0, 1)  # only a grammar adds tokens to a choice
        rows = Rows.zeros(33, vocabulary, width, states, 0, device)
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
        logits_BV = (torch.randn(33, vocabulary, device=device) * 3).to(dtype)
        logits_BV[7, 5], logits_BV[8, vocabulary - 1] = float("nan"), float("inf")
        used_B = torch.from_numpy(chance.integers(1, 99, 33)).to(device)
        tables = DeviceGrammar.of(grammar, device) if grammar else None
        mine, its = (rows.take(torch.arange(33, device=device)) for _ in range(2))
        used_mine, used_its = used_B.clone(), used_B.clone()
        kernels.advance(mine, used_mine, logits_BV, tables)
        reference.advance(its, used_its, logits_BV, tables)
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


@torch.inference_mode()
def check_fused(slots: int, count: int, *, positions: int = 64, joined: int = 4) -> None:
    """Whether the kernels of a step give what the layers give, on the CPU in Triton's interpreter.

    Rows of the cache are looked at in as many parts as there are `positions` in it, so far as there are few rows.
    """
    from decoder.engine import fused  # Triton

    fused.POSITIONS, fused.JOINED, fused.OUTPUTS = positions, joined, 16  # fewer programs, as they run by turns
    decoder = make_decoder("fused", length=80)
    assert fused.fits(decoder)
    torch.manual_seed(slots)
    prompts_BTD, x_BTD = torch.randn(slots, 30, 64), torch.randn(slots, count, 64)
    lengths_B = torch.randint(1, 31, (slots,))
    counts_B = None if count == 1 else torch.randint(1, count + 1, (slots,))
    mine, its = (decoder.new_cache(slots, 70) for _ in range(2))
    for cache in (mine, its):
        decoder.hidden(prompts_BTD, cache, lengths_B)
    counted = torch.arange(count) < (1 if counts_B is None else counts_B[:, None])
    for _ in range(2):  # the second step reads what the first one stored
        one, other = fused.Fused(decoder).hidden(x_BTD, mine, counts_B), decoder.hidden(x_BTD, its, counts_B)
        torch.testing.assert_close(
            one[counted.expand(slots, -1)], other[counted.expand(slots, -1)], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(mine.used_B, its.used_B)
