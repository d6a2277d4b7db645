"""Generation under a grammar, with a key/value cache.

The grammar is a table: `[S, V]`, the state after a token, -1 where the token is not allowed there. It lives on the
decoder's device; whatever is decided, the output follows it.
Shapes: B batch, P prompt positions, D width, S states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from decoder.model import Decoder

# (log-probabilities over what is allowed [B, V], -inf elsewhere) -> chosen token [B]
Decide = Callable[[Tensor], Tensor]


def greedy(log_p_BV: Tensor) -> Tensor:
    """The likeliest token."""
    return log_p_BV.argmax(-1)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt_BPD: Tensor,
    grammar_SV: Tensor,
    *,
    end: int,
    forbidden_BV: Tensor | None = None,
    decide: Decide = greedy,
) -> list[list[int]]:
    """Writes one token sequence for each prompt, from the grammar's state 0 to the token `end`.

    `forbidden_BV` (bool) rules tokens out for one prompt alone. Raises ValueError when prompt and output do not fit the
    decoder's length (PromptError), or when nothing is allowed.
    """
    batch, device = len(prompt_BPD), prompt_BPD.device
    cache = decoder.new_cache(batch)
    logits_BV = decoder(prompt_BPD, cache)[:, -1]
    state_B = torch.zeros(batch, dtype=torch.long, device=device)
    alive_B = torch.ones(batch, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    while bool(alive_B.any()):
        allowed_BV = grammar_SV[state_B] >= 0
        if forbidden_BV is not None:
            allowed_BV = allowed_BV & ~forbidden_BV
        log_p_BV = logits_BV.float().masked_fill(~allowed_BV, float("-inf")).log_softmax(-1)
        token_B = torch.where(alive_B, decide(log_p_BV), end)
        if not bool(allowed_BV.gather(1, token_B[:, None])[:, 0][alive_B].all()):
            raise ValueError("the grammar and the forbidden tokens leave nothing to write")
        tokens.append(token_B)
        state_B = torch.where(alive_B & (token_B != end), grammar_SV[state_B, token_B].long(), state_B)
        alive_B = alive_B & (token_B != end)
        if bool(alive_B.any()):
            logits_BV = decoder(token_B[:, None], cache)[:, -1]
    written_TB = torch.stack(tokens)
    lengths = (written_TB == end).int().argmax(0) + 1
    return [written_TB[:n, b].tolist() for b, n in enumerate(lengths.tolist())]
