"""The mixture-of-experts language decoder and its generation engine."""

from decoder.engine import Generated, generate
from decoder.model import Decoder, DecoderConfig, KeyValueCache

__all__ = ["Decoder", "DecoderConfig", "Generated", "KeyValueCache", "generate"]
