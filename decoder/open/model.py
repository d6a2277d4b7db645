"""The decoder with open weights, for every family in `decoder.open.configs`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from decoder.model import Decoder
from decoder.open.checkpoint import load_state
from decoder.open.configs import OpenConfig, read_config
from decoder.open.generation import Completion, generate


class OpenDecoder(Decoder):
    """A mixture-of-experts language model with the weights of a Hugging Face folder."""

    config: OpenConfig

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
        """Goes on from each prompt, a list of token ids; see `decoder.open.generation.generate`."""
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
