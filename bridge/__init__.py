"""Visual tokens into the decoder's vocabulary space."""

from bridge.bridge import BRIDGES, Bridge, BridgeConfig, Design
from bridge.evidence import EvidenceTokens

__all__ = ["BRIDGES", "Bridge", "BridgeConfig", "Design", "EvidenceTokens"]
