"""The open decoder: token ids or embeddings to logits, for every family in `decoder.open.configs`.

Shapes: B batch, T new positions, S positions in the cache, P positions of a prefix, D width, V vocabulary, r half the
rotary width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.open.checkpoint import load_state
from decoder.open.configs import OpenConfig, read_config
from decoder.open.errors import PromptError
from decoder.open.generation import Completion, generate
from decoder.open.layers import Cache, Layer


class OpenDecoder(nn.Module):
    """A mixture-of-experts language model with the weights of a Hugging Face folder."""

    inv_freq: Tensor

    def __init__(self, config: OpenConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", config.rope.inverse_frequencies(), persistent=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
    ) -> OpenDecoder:
        """Loads `config.json` and the safetensors of a folder; gates stay in fp32.

        Raises CheckpointError, before any weight is read, where names, shapes or options are not what is expected.
        """
        folder = Path(folder)
        config = read_config(folder)
        with torch.device("meta"):
            decoder = cls(config)
        state = load_state(decoder, folder, dtype, torch.device(device))
        decoder.load_state_dict(state, assign=True)
        return decoder.requires_grad_(False).eval().to(device)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for so many sequences of up to `length` positions."""
        weight = self.embed_tokens.weight
        return Cache(self.config, batch, length, weight.device, weight.dtype)

    def hidden(self, x_BTD: Tensor, cache: Cache | None = None) -> Tensor:
        """Embeddings to the last hidden states, both `[B, T, D]`; with a cache positions go on behind those in use.

        Raises PromptError where the positions do not fit the context or the cache.
        """
        count = x_BTD.shape[1]
        context = self.config.max_position_embeddings
        room = context if cache is None else min(cache.length, context) - cache.filled
        if count > room:
            raise PromptError("prompt-too-long", f"{count} positions do not fit: there is room for {room}")
        mask_BTS = None
        if cache is None:
            positions_BT = torch.arange(count, device=x_BTD.device)[None]
        else:
            fresh, positions_BT = cache.filled == 0, cache.open(count)
            if not fresh:
                mask_BTS = torch.arange(cache.filled, device=x_BTD.device) <= positions_BT[..., None]
        angle_BT1r = (positions_BT[..., None] * self.inv_freq)[:, :, None]
        cos, sin = (each * self.config.rope.amplitude for each in (angle_BT1r.cos(), angle_BT1r.sin()))
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, mask_BTS, cache)
        return self.norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores of the next token from hidden states, `[..., V]`."""
        return F.linear(x_BTD, self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight)

    def forward(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids `[B, T]` to logits `[B, T, V]`; see `hidden`."""
        return self.logits(self.hidden(self.embed_tokens(ids_BT), cache))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        eos: Collection[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        prefix_BPD: Tensor | None = None,
    ) -> list[Completion]:
        """Goes on from each prompt; see `decoder.open.generation.generate`."""
        return generate(
            self,
            prompts,
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            eos=eos,
            on_token=on_token,
            prefix_BPD=prefix_BPD,
        )
