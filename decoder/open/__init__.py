"""Open language models from a local Hugging Face folder: DeepSeek-V2 and V3, Qwen3-MoE, OLMoE.

`docs/open-weights.md` says what is supported. Nothing is fetched and no code of a checkpoint is run.
"""

from decoder.open.configs import DeepseekConfig, OlmoeConfig, OpenConfig, Qwen3MoeConfig, read_config
from decoder.open.errors import CheckpointError, PromptError
from decoder.open.generation import Completion
from decoder.open.layers import Cache
from decoder.open.model import OpenDecoder
from decoder.open.tokenizer import Tokenizer

__all__ = [
    "Cache",
    "CheckpointError",
    "Completion",
    "DeepseekConfig",
    "OlmoeConfig",
    "OpenConfig",
    "OpenDecoder",
    "PromptError",
    "Qwen3MoeConfig",
    "Tokenizer",
    "read_config",
]
