"""Trains bridge and decoder: to read what glance and detector found, point at what is real, and word the report.

Both networks are frozen, so that their outputs are computed once for a pool of augmented views; the pool fits the GPU.
Shapes: B pictures, K evidence slots, M labelled boxes, L positions of a target, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Detector, GlanceNet
from encoders.select import Items, box_iou, select_boxes, select_regions
from pipelines.inputs import GLANCE, PRESENCE
from pipelines.model import (
    BOX_TYPE_TOKENS,
    FIELDS,
    MAP_TYPE_TOKENS,
    REGIONS,
    Evidence,
    ModelConfig,
    ScanScribeModel,
    field_log_probabilities,
)
from pipelines.training.augment import Batch, augmentation, draw
from pipelines.training.run import Ema, Run, cosine, parameter_groups
from pipelines.training.streams import Stream, load_streams
from reports.grammar import ID, PAD, POINTERS, Draft, DraftFinding, extent_of, summarise, to_tokens, zone_of
from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES

LENGTH = 192  # tokens of the longest target
IGNORE = -100


@dataclass(slots=True)
class Pool:
    """Examples: what the decoder reads, and what it should write."""

    visual: Tensor  # [n, N, C] float16
    fields: Tensor  # [n, F]
    boxes: Tensor  # [n, K, 4]
    types: Tensor  # [n, K]
    scores: Tensor  # [n, K]
    tokens: Tensor  # [n, LENGTH] long, padded
    targets: Tensor  # [n, LENGTH] long, IGNORE where nothing is known

    def rows(self, index: Tensor) -> Pool:
        return Pool(*(getattr(self, name)[index] for name in self.__slots__))


def match(items: Items, batch: Batch, overlap: float = 0.5) -> np.ndarray:
    """Which labelled box each item answers for, `[B, K]`, -1 for none: by falling score, each box once."""
    iou_BKM = (box_iou(items.boxes, batch.boxes) * batch.valid[:, None]).cpu().numpy()
    present = (items.scores > 0).cpu().numpy()
    matched = np.full(present.shape, -1, np.int64)
    for b in range(len(matched)):
        taken: set[int] = set()
        for k in np.flatnonzero(present[b]):
            for m in np.argsort(-iou_BKM[b, k]):
                if iou_BKM[b, k, m] < overlap:
                    break
                if m not in taken:
                    matched[b, k] = m
                    taken.add(m)
                    break
    return matched


def defect_drafts(line: str, items: Items, batch: Batch, side: int) -> list[Draft]:
    """The right report for each picture: every item that answers for a labelled box, with the box's type."""
    matched, labels = match(items, batch), batch.labels.cpu().numpy()
    boxes = items.boxes.cpu().numpy()
    drafts = []
    for b, row in enumerate(matched):
        findings = tuple(
            DraftFinding(
                int(k),
                DEFECT_TYPES[labels[b, row[k]]],
                zone_of(boxes[b, k], side, side),
                extent_of(boxes[b, k], side, side),
            )
            for k in np.flatnonzero(row >= 0)
        )
        drafts.append(Draft("defect", line, {}, findings, summarise(findings)))
    return drafts


def ct_drafts(items: Items, batch: Batch, side: int) -> list[Draft]:
    """Fields as labelled (the first value where unknown), and the labelled types among the items."""
    truth, types = batch.fields.cpu().numpy(), batch.types.cpu().numpy()
    boxes, shown = items.boxes.cpu().numpy(), items.types.cpu().numpy()
    names = list(FIELDS)
    drafts = []
    for b in range(len(truth)):
        fields = {name: values[max(0, truth[b, names.index(name)])] for name, values in CT_FIELDS.items()}
        findings = tuple(
            DraftFinding(k, CT_TYPES[t], zone_of(boxes[b, k], side, side))
            for k, t in enumerate(shown[b])
            if types[b, t] > 0
        )
        drafts.append(Draft("ct", None, fields, findings, summarise(findings)))
    return drafts


@torch.no_grad()
def examples(glancing: GlanceNet, detector: Detector, stream: Stream, batch: Batch, *, findings: bool) -> Pool:
    """What both networks make of a batch, and the right report. `findings=False`: only the fields are taught."""
    x, side = batch.x, batch.x.shape[-1]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        small = x if side == GLANCE else F.interpolate(x, size=(GLANCE, GLANCE), mode="area")
        glance = glancing(small)
        if stream.line == "ct":
            items = select_regions(glance.maps_BTHW, (side, side), keep=REGIONS)
            type_tokens = MAP_TYPE_TOKENS
        else:
            items = select_boxes(detector(x), presence=PRESENCE[stream.line], keep=POINTERS)
            type_tokens = BOX_TYPE_TOKENS
    drafts = ct_drafts(items, batch, side) if stream.line == "ct" else defect_drafts(stream.line, items, batch, side)
    evidence = Evidence(items.boxes / side, type_tokens.to(x.device)[items.types], items.scores).padded()

    tokens = torch.full((len(x), LENGTH), PAD)
    targets = torch.full((len(x), LENGTH), IGNORE)
    known = (batch.fields >= 0).cpu().numpy()
    names = list(FIELDS)
    for b, draft in enumerate(drafts):
        ids = torch.tensor([ID[token] for token in to_tokens(draft)][:LENGTH])
        tokens[b, : len(ids)] = targets[b, : len(ids)] = ids
        if draft.kind == "ct":
            for i, name in enumerate(CT_FIELDS):
                if not known[b, names.index(name)]:
                    targets[b, 2 + i] = IGNORE
            if not findings:
                targets[b, 2 + len(CT_FIELDS) :] = IGNORE
    device = x.device
    return Pool(
        glance.visual_BNC.half(),
        field_log_probabilities(glance),
        evidence.boxes.float(),
        evidence.types,
        evidence.scores.float(),
        tokens.to(device),
        targets.to(device),
    )


def build_pool(glance: GlanceNet, detector: Detector, streams: list[Stream], recipe: dict[str, Any], run: Run) -> Pool:
    """Draws every stream `pool_rounds` times."""
    known = {stream.name: stream for stream in streams}
    parts: list[Pool] = []
    for i in range(recipe["pool_rounds"]):
        for name, table in recipe["streams"].items():
            batch = draw(known[name], table["batch"], table["side"], augmentation(table))
            parts.append(examples(glance, detector, known[name], batch, findings=table.get("findings", True)))
        if (i + 1) % 50 == 0:
            run.log(pool=sum(len(part.tokens) for part in parts))
    return Pool(*(torch.cat([getattr(part, name) for part in parts]) for name in Pool.__slots__))


def writer_loss(model: ScanScribeModel, rows: Pool, score_noise: float) -> Tensor:
    """Mean cross-entropy over the known target tokens."""
    logit = torch.logit(rows.scores.clamp(1e-4, 1 - 1e-4))
    noisy = (logit + torch.randn_like(logit) * score_noise).sigmoid() * (rows.scores > 0)
    prompt = model.prompt(rows.visual.float(), rows.fields, Evidence(rows.boxes, rows.types, noisy))
    words = model.decoder.embed(rows.tokens[:, :-1])
    logits = model.decoder(torch.cat((prompt.to(words.dtype), words), 1))[:, prompt.shape[1] :]
    return F.cross_entropy(logits.float().transpose(1, 2), rows.targets[:, 1:], ignore_index=IGNORE)


def train_writer(run: Run, data: Path, glance: GlanceNet, detector: Detector, device: torch.device) -> ScanScribeModel:
    """Runs the recipe and returns the whole model with averaged weights. Raises as `train_glance` does."""
    recipe = run.recipe
    torch.manual_seed(recipe["seed"])
    for network in (glance, detector):
        network.to(device).eval().requires_grad_(False)
    wanted = set(recipe["streams"])
    streams = [s.to(device) for s in load_streams(data, "train") if s.name in wanted]
    if missing := wanted - {s.name for s in streams}:
        raise ValueError(f"the recipe names data sets that are not there: {', '.join(sorted(missing))}")
    pool = build_pool(glance, detector, streams, recipe, run)
    sizes = glance.config
    config = ModelConfig.default(
        backbone=sizes.backbone, last_stage=sizes.last_stage, visual_width=glance.width, bridge=recipe["bridge"]
    )
    model = ScanScribeModel(config)
    model.glance, model.detector = glance, detector
    model.to(device).train()
    for network in (glance, detector):
        network.eval()
    average = Ema(model, recipe["ema"])
    groups = parameter_groups(model, recipe["weight_decay"])
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    parts = {"model": model, "average": average.model, "optimiser": optimiser}
    number = run.resume(parts, device)
    done = run.start(number)
    while done < 1:
        for group in optimiser.param_groups:
            group["lr"] = recipe["learning_rate"] * cosine(
                round(done * recipe["steps"]), recipe["steps"], recipe["warmup"]
            )
        rows = pool.rows(torch.randint(len(pool.tokens), (recipe["batch"],), device=device))
        longest = int((rows.tokens != PAD).sum(1).max())
        rows.tokens, rows.targets = rows.tokens[:, :longest], rows.targets[:, :longest]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = writer_loss(model, rows, recipe["score_noise"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimiser.step()
        model.decoder.rebalance(recipe["balance"])
        average.update()
        number += 1
        done = run.share(number)
        if number % 100 == 0 or done >= 1:
            run.log(step=number, loss=run.check(loss.detach(), number), rate=optimiser.param_groups[0]["lr"])
        if number % recipe["checkpoint_every"] == 0 or done >= 1:
            run.save(number, parts)
    return average.model
