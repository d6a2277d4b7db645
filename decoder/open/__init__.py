"""Open language models from a local Hugging Face folder: DeepSeek-V2 and V3, Qwen3-MoE, OLMoE.

`docs/open-weights.md` says what is supported. Nothing is fetched and no code of a checkpoint is run.
"""

from decoder.engine import Completion
from decoder.errors import PromptError
from decoder.open.configs import OpenConfig, read_config
from decoder.open.errors import CheckpointError
from decoder.open.model import OpenDecoder
from decoder.open.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "Completion",
    "OpenConfig",
    "OpenDecoder",
    "PromptError",
    "Tokenizer",
    "read_config",
]
