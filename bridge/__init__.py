"""Visual tokens into the decoder's vocabulary space."""

from bridge.align import AlignBridge, BridgeConfig, MlpBridge, build_bridge
from bridge.evidence import EvidenceTokens

__all__ = ["AlignBridge", "BridgeConfig", "EvidenceTokens", "MlpBridge", "build_bridge"]
