"""The mixture-of-experts language decoder and its generation engine."""

from decoder.adaptive import AdaptiveAttentionConfig
from decoder.attention import AttentionConfig, FullAttentionConfig
from decoder.cache import Cache
from decoder.config import DecoderConfig
from decoder.errors import PromptError
from decoder.latent import LatentAttentionConfig
from decoder.model import Decoder
from decoder.moe import ExpertsConfig

__all__ = [
    "AdaptiveAttentionConfig",
    "AttentionConfig",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "ExpertsConfig",
    "FullAttentionConfig",
    "LatentAttentionConfig",
    "PromptError",
]
