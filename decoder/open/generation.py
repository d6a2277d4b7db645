"""Generation with a cache: prompts of any lengths in one batch, greedy or sampled, tokens told as they come.

Shapes: B batch, P positions of a prefix, T prompt positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from decoder.errors import PromptError

if TYPE_CHECKING:
    from decoder.open.model import OpenDecoder


@dataclass(slots=True)
class Completion:
    """What was written after a prompt, and why it ended: `not-finite` means that its logits had NaN or infinity."""

    ids: list[int] = field(default_factory=list)  # without the prompt, with the token that ended it
    ended: Literal["eos", "length", "not-finite"] = "length"


@torch.inference_mode()
def generate(
    decoder: OpenDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    eos: Collection[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prefix_BPD: Tensor | None = None,
) -> list[Completion]:
    """Writes up to `max_new_tokens` after each prompt.

    `temperature` 0 is greedy; above it tokens are drawn, alike for one `seed`, the same prompts and the same machine.
    `eos` ends a completion: None means the model's own tokens, () none. `on_token(prompt, id)` hears of each token.
    `prefix_BPD` goes ahead of the prompts: embeddings, such as what a bridge reads from a picture.
    Raises PromptError before anything is computed. A prompt whose logits are not finite ends; the others go on.
    """
    ahead = 0 if prefix_BPD is None else prefix_BPD.shape[1]
    check(decoder, prompts, ahead + max_new_tokens)
    if prefix_BPD is not None and len(prefix_BPD) != len(prompts):
        raise ValueError(f"prefix_BPD is for {len(prefix_BPD)} prompts; there are {len(prompts)}")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("max_new_tokens must be 1 or above, temperature 0 or above")
    done = [Completion() for _ in prompts]
    if not prompts:
        return done
    ends = set(decoder.config.end_tokens if eos is None else eos)
    device = decoder.embedding.weight.device
    chance = torch.Generator(device)
    chance.manual_seed(chance.seed() if seed is None else seed)

    # Shorter prompts are filled up behind their end, where no position of theirs looks.
    # With their own last token: attention multiplies masked values by 0, which a token that gives NaN would survive.
    lengths = [len(prompt) for prompt in prompts]
    longest, lengths_B = max(lengths), torch.tensor(lengths, device=device) + ahead
    ids_BT = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts])
    x_BTD = decoder.embed(ids_BT.to(device))
    if prefix_BPD is not None:
        x_BTD = torch.cat((prefix_BPD.to(x_BTD), x_BTD), 1)
    cache = decoder.new_cache(len(prompts), ahead + longest + max_new_tokens - 1)
    x_BTD = decoder.hidden(x_BTD, cache, lengths_B)
    x_BD = x_BTD[torch.arange(len(prompts), device=device), lengths_B - 1]

    running = set(range(len(prompts)))
    for left in reversed(range(max_new_tokens)):
        logits_BV = decoder.logits(x_BD).float()
        token_B = choose(logits_BV, temperature, chance)
        tokens, finite = torch.stack((token_B, logits_BV.isfinite().all(-1).long())).tolist()
        for row in sorted(running):
            if not finite[row]:
                done[row].ended = "not-finite"
                running.remove(row)
                continue
            done[row].ids.append(tokens[row])
            if tokens[row] in ends:
                done[row].ended = "eos"
                running.remove(row)
            if on_token is not None:
                on_token(row, tokens[row])
        if not running or not left:
            break
        x_BD = decoder.hidden(decoder.embed(token_B[:, None]), cache)[:, 0]
    return done


def check(decoder: OpenDecoder, prompts: Sequence[Sequence[int]], beside: int) -> None:
    """Raises PromptError unless every prompt fits the vocabulary and, with so many positions beside it, the context."""
    context, vocabulary = decoder.config.length, decoder.config.vocabulary
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise PromptError("prompt-empty", f"prompt {number} has no token")
        if len(prompt) + beside > context:
            raise PromptError(
                "prompt-too-long",
                f"prompt {number} has {len(prompt)} tokens, and {beside} positions more are for the prefix and what is "
                f"written; the context has {context}: shorten the prompt or ask for fewer new tokens",
            )
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise PromptError("token-out-of-vocabulary", f"prompt {number} has token {token} of {vocabulary}")


def choose(logits_BV: Tensor, temperature: float, chance: torch.Generator) -> Tensor:
    """The likeliest token, or one drawn: the first of exponential clocks that run as fast as tokens are likely."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    clock_BV = torch.empty_like(logits_BV).exponential_(generator=chance)
    return ((logits_BV / temperature).softmax(-1) / clock_BV).argmax(-1)
