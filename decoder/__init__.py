"""The mixture-of-experts language decoder and its generation engine."""

from decoder.engine import generate
from decoder.model import Decoder, DecoderConfig, KeyValueCache

__all__ = ["Decoder", "DecoderConfig", "KeyValueCache", "generate"]
