"""Pixels to visual tokens, dense evidence and field logits."""

from encoders.evidence import EncoderConfig, EncoderOutput, EvidenceEncoder

__all__ = ["EncoderConfig", "EncoderOutput", "EvidenceEncoder"]
