"""The whole network: glance, detectors, bridge, and the decoder that reads both the picture and its evidence.

The decoder's prompt is, in this order: the bridge's queries (the picture), one token of all field logits, and one token
for each evidence slot. What it writes is in the language of `reports.grammar`.
Shapes: B pictures, N visual tokens, C visual width, F field logits in all, K evidence slots, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bridge import Bridge, BridgeConfig, EvidenceTokens
from decoder import Decoder, DecoderConfig
from encoders import Detector, DetectorConfig, Glance, GlanceConfig, GlanceNet
from reports.grammar import ID, POINTERS, TOKENS
from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES, LINES

LINE_VALUES = (*LINES, "ct")
# What the glance's field heads tell. The last one only helps training: its data set has no patient ids.
FIELDS: dict[str, tuple[str, ...]] = {
    "line": LINE_VALUES,
    **CT_FIELDS,
    "lung_nodule": ("none", "benign", "malignant"),
}
BOX_TYPE_TOKENS = torch.tensor([ID[f"type:{name}"] for name in DEFECT_TYPES])
MAP_TYPE_TOKENS = torch.tensor([ID[f"type:{name}"] for name in CT_TYPES])
REGIONS = 8  # class map items that the decoder reads of a CT image; boxes fill all slots
POINTER_TOKENS = torch.tensor([ID[f"evidence:{i}"] for i in range(POINTERS)])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Every size of the network."""

    glance: GlanceConfig
    detector: DetectorConfig
    bridge: BridgeConfig
    decoder: DecoderConfig
    detectors: int = 1  # whose evidence is averaged

    @classmethod
    def default(
        cls, *, backbone: str = "resnet18d", last_stage: int = 512, visual_width: int = 512, bridge: str = "align"
    ) -> ModelConfig:
        """The bundled model's sizes, for the taxonomy's terms."""
        decoder = DecoderConfig(vocabulary=len(TOKENS))
        return cls(
            GlanceConfig(
                map_types=len(CT_TYPES),
                fields={name: len(values) for name, values in FIELDS.items()},
                backbone=backbone,
                last_stage=last_stage,
            ),
            DetectorConfig(types=len(DEFECT_TYPES)),
            BridgeConfig(visual_width, decoder.width, decoder.vocabulary, name=bridge),
            decoder,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        return cls(
            GlanceConfig(**values["glance"]),
            DetectorConfig(**values["detector"] | {"widths": tuple(values["detector"]["widths"])}),
            BridgeConfig(**values["bridge"]),
            DecoderConfig.from_dict(values["decoder"]),
            values.get("detectors", 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the decoder can point at. Boxes are shares of the picture's sides; a score of 0 is an empty slot."""

    boxes: Tensor  # [B, K, 4]
    types: Tensor  # [B, K] long: token ids of `type:...`
    scores: Tensor  # [B, K]

    def padded(self) -> Evidence:
        """Cut or filled up to `POINTERS` slots."""
        boxes, types, scores = self.boxes[:, :POINTERS], self.types[:, :POINTERS], self.scores[:, :POINTERS]
        missing = POINTERS - scores.shape[1]
        return Evidence(
            nn.functional.pad(boxes, (0, 0, 0, missing)),
            nn.functional.pad(types, (0, missing)),
            nn.functional.pad(scores, (0, missing)),
        )


class ScanScribeModel(nn.Module):
    """Glance, detectors, bridge and decoder. The first two run on their own; `prompt` joins what they gave.

    Lines that are seen without mirror images are seen by the first detector alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.glance = GlanceNet(config.glance)
        detectors = nn.ModuleList(Detector(config.detector) for _ in range(config.detectors))
        self.detectors: Sequence[Detector] = detectors  # type: ignore[assignment]  # torch knows modules alone
        self.bridge = Bridge(config.bridge)
        self.decoder = Decoder(config.decoder)
        self.evidence = EvidenceTokens(config.decoder.width, sum(config.glance.fields.values()))

    def prompt(self, visual_BNC: Tensor, fields_BF: Tensor, evidence: Evidence) -> Tensor:
        """`[B, queries + 1 + K, D]`: what the decoder reads. `fields_BF` as `field_log_probabilities` gives them."""
        table = self.decoder.embedding.weight
        picture = self.bridge(visual_BNC, table)
        types, pointers = table[evidence.types], table[POINTER_TOKENS.to(table.device)]
        found = self.evidence(fields_BF, evidence.boxes, evidence.scores, types, pointers)
        return torch.cat((picture, found.to(picture.dtype)), 1)


def field_log_probabilities(output: Glance) -> Tensor:
    """All field logits, normalised field by field: `[B, F]`."""
    return torch.cat([logits.float().log_softmax(-1) for logits in output.fields.values()], 1)


def decode_tokens(ids: Sequence[int]) -> list[str]:
    """Token ids as text."""
    return [TOKENS[i] for i in ids]
