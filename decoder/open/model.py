"""The decoder with open weights, for every family in `decoder.open.configs`."""

from __future__ import annotations

from pathlib import Path

import torch

from decoder.model import Decoder
from decoder.open.checkpoint import load_state
from decoder.open.configs import OpenConfig, read_config


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
