"""Small decoders and the plain loop that the engine is compared with: no cache, no batch, one token after another."""

from __future__ import annotations

import numpy as np
import torch

from decoder import Decoder, DecoderConfig, ExpertsConfig, FullAttentionConfig, LatentAttentionConfig
from decoder.engine import Grammar, Request
from reports.grammar import TOKENS, compile_grammar

EXPERTS = ExpertsConfig(count=8, active=2, hidden=16, shared_hidden=16)
ATTENTIONS = {
    "full": FullAttentionConfig(heads=4, kv_heads=2, head_dim=16),
    "fused": FullAttentionConfig(heads=4, kv_heads=2, head_dim=32, qk_norm="head"),  # on a GPU, the layers too
    "latent": LatentAttentionConfig(heads=4, latent=24, rotary=8, plain=16, value=16, query_latent=12),
}


def make_decoder(attention: str, *, width: int = 64, length: int = 300, seed: int = 0) -> Decoder:
    """A decoder of the report's vocabulary with random weights."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocabulary=len(TOKENS), width=width, layers=2, length=length, attention=ATTENTIONS[attention], experts=EXPERTS
    )
    return Decoder(config).eval().requires_grad_(False)


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
