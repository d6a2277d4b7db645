"""Trains bridge and decoder: to read what glance and detector found, point at what is real, and word the report.

Both networks are frozen, so that what they see in a pool of augmented pictures is computed once, in the way the reader
does it (`pipelines.evidence`). What the detector says of pictures that it was trained on is far too good, though. So a
part of the training groups is kept out of the pool, and stand-ins, networks of the same recipes that were trained
without those groups, look at them. At each step the pool's scores are moved so that hits and false alarms are as sure
and as frequent as there (`Realism`), and the right report is made anew for what that leaves. The weights kept are those
that point best there. The `val` split is not looked at.
Shapes: B pictures, K evidence slots, M labelled boxes, L positions of a target, R rows of an impression, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import Dense, Detector, GlanceNet
from encoders.flips import look_from_all_sides
from encoders.select import box_iou, select_regions
from pipelines.evidence import items_of
from pipelines.inputs import GLANCE, MIRRORED, WHOLE_SIDE
from pipelines.model import (
    BOX_TYPE_TOKENS,
    FIELDS,
    LINE_VALUES,
    MAP_TYPE_TOKENS,
    POINTER_TOKENS,
    REGIONS,
    Evidence,
    ModelConfig,
    ScanScribeModel,
    field_log_probabilities,
)
from pipelines.training.augment import Batch, augmentation, draw
from pipelines.training.run import Ema, Run, cosine, parameter_groups
from pipelines.training.streams import Stream, load_streams
from pipelines.training.wording import WORDS
from reports.grammar import BOS, COUNTS, END, EXTENTS, ID, PAD, POINTERS, SCATTERED, ZONES
from reports.taxonomy import CT_FIELDS

LENGTH = 192  # tokens of the longest target
IGNORE = -100
OVERLAP = 0.5  # IoU from which an item answers for a labelled box
CT = LINE_VALUES.index("ct")
STILL = {
    "zoom": [1.0, 1.0],
    "aspect": 0.0,
    "rotate": 0.0,
    "contrast": 0.0,
    "noise": 0.0,
    "erase": 0.0,
    "keep_reference": 1.0,
}
POOL_SHARE = 0.45  # of the time of a run that is limited, at most, for the pool
HELD_OUT_DRAWS = 4  # of each held-out picture, mirrored and shifted by chance

_TYPE_TOKENS = torch.cat((BOX_TYPE_TOKENS, MAP_TYPE_TOKENS))  # in the order of an impression
_ZONE_TOKENS = torch.tensor([ID[f"zone:{name}"] for name in ZONES])
_EXTENT_TOKENS = torch.tensor([ID[f"extent:{name}"] for name in EXTENTS])
_COUNT_TOKENS = torch.tensor([ID[f"count:{name}"] for name in COUNTS])
_WORD_TOKENS = torch.tensor([PAD, *(ID[f"word:{name}"] for name in WORDS[1:])])
_LINE_TOKENS = torch.tensor([ID[f"line:{name}"] if name != "ct" else PAD for name in LINE_VALUES])
_FIELD_TOKENS = [torch.tensor([ID[f"{name}:{value}"] for value in values]) for name, values in CT_FIELDS.items()]
_FIELD_COLUMNS = [list(FIELDS).index(name) for name in CT_FIELDS]


@dataclass(frozen=True, slots=True)
class Eyes:
    """What looks at pictures: a glance, and detectors whose evidence is averaged."""

    glance: GlanceNet
    detectors: Sequence[Detector]


@dataclass(slots=True)
class Looks:
    """What both networks made of pictures, and what is known about these."""

    visual: Tensor  # [n, N, C] float16
    logits: Tensor  # [n, F] log-probabilities of the fields
    line: Tensor  # [n] long, place in LINE_VALUES
    boxes: Tensor  # [n, K, 4] shares of the picture's sides, by falling score
    types: Tensor  # [n, K] long, token ids
    scores: Tensor  # [n, K]
    words: Tensor  # [n, K] long, token id of the caption's word for the item's type; PAD: its own noun
    true_boxes: Tensor  # [n, M, 4]
    true_types: Tensor  # [n, M] long, token ids; PAD where there is no label
    fields: Tensor  # [n, len(FIELDS)] long, -1 where unknown
    findings: Tensor  # [n] bool: whether findings are taught

    def rows(self, index: Tensor) -> Looks:
        return Looks(*(getattr(self, name)[index] for name in self.__slots__))

    def __len__(self) -> int:
        return len(self.line)


def joined(parts: Sequence[Looks]) -> Looks:
    return Looks(*(torch.cat([getattr(part, name) for part in parts]) for name in Looks.__slots__))


@torch.no_grad()
def look(eyes: Eyes, stream: Stream, batch: Batch, *, findings: bool, tokens: GlanceNet | None = None) -> Looks:
    """What both networks make of a batch. `findings=False`: only the fields are known.

    `tokens` is the glance whose visual tokens are given, by default that of `eyes`.
    """
    x, side, device = batch.x, batch.x.shape[-1], batch.x.device
    small = x if side == GLANCE else F.interpolate(x, size=(GLANCE, GLANCE), mode="area")
    valid, true_types = batch.valid, BOX_TYPE_TOKENS.to(device)[batch.labels]
    true_boxes = batch.boxes / side

    def dense(pictures: Tensor) -> Dense:
        if stream.line in MIRRORED:
            return look_from_all_sides(eyes.detectors, pictures)
        return eyes.detectors[0](pictures)

    whole = None
    if stream.line in WHOLE_SIDE:
        size = (WHOLE_SIDE[stream.line],) * 2
        whole = small if size == small.shape[-2:] else F.interpolate(x, size=size, mode="area")
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        glance = eyes.glance(small)
        visual_BNC = (glance if tokens is None or tokens is eyes.glance else tokens(small)).visual_BNC
        found = None if stream.line == "ct" else dense(x)
        if found is not None and whole is not None:
            found = found._replace(presence_BT=dense(whole).presence_BT)
    # Not under autocast, as in the reader: boxes are pixels, of which bfloat16 would lose some.
    if found is None:
        items, type_tokens = select_regions(glance.maps_BTHW, (side, side), keep=REGIONS), MAP_TYPE_TOKENS.to(device)
    else:
        items, type_tokens = items_of(found, stream.line), BOX_TYPE_TOKENS.to(device)
    words = torch.full_like(items.types, PAD)
    if stream.line == "ct":
        # A class map stands for the whole picture: it is right where the picture has the type.
        valid, true_types = batch.types > 0, type_tokens.expand(len(x), -1)
        true_boxes = x.new_tensor([0.0, 0, 1, 1]).expand(*true_types.shape, 4)
        words = _WORD_TOKENS.to(device)[batch.words.gather(1, items.types)]
    evidence = Evidence(
        (items.boxes.float() / side).clamp(0, 1), type_tokens[items.types], items.scores.float()
    ).padded()
    missing = max(0, POINTERS - words.shape[1])
    return Looks(
        visual_BNC.half(),
        field_log_probabilities(glance),
        torch.full((len(x),), LINE_VALUES.index(stream.line), device=device),
        evidence.boxes,
        evidence.types,
        evidence.scores,
        F.pad(words[:, :POINTERS], (0, missing), value=PAD),
        _filled(true_boxes, 0.0),
        _filled(torch.where(valid, true_types, PAD), PAD),
        batch.fields,
        torch.full((len(x),), findings, device=device),
    )


def _filled(x_BM: Tensor, value: float) -> Tensor:
    """Labels of boards and of CT types side by side: as many columns for all."""
    missing = max(MAX_LABELS - x_BM.shape[1], 0)
    return F.pad(x_BM, (0, 0) * (x_BM.ndim - 2) + (0, missing), value=value)[:, :MAX_LABELS]


MAX_LABELS = 40


def hits(looks: Looks) -> Tensor:
    """Which items answer for a labelled box of their type, `[B, K]`: by falling score, each box once."""
    iou_BKM = box_iou(looks.boxes, looks.true_boxes)
    # A class map has the whole picture as its box: what it names is right wherever it looks.
    iou_BKM = torch.where((looks.line == CT)[:, None, None], 1.0, iou_BKM)
    iou_BKM = iou_BKM * (looks.types[:, :, None] == looks.true_types[:, None])
    iou_BKM = iou_BKM * (looks.scores > 0)[:, :, None]
    free_BM = torch.ones_like(looks.true_types, dtype=torch.bool)
    hit = []
    for k in range(iou_BKM.shape[1]):
        best_B, at_B = (iou_BKM[:, k] * free_BM).max(1)
        found_B = best_B >= OVERLAP
        free_BM = free_BM & ~(F.one_hot(at_B, free_BM.shape[1]).bool() & found_B[:, None])
        hit.append(found_B)
    return torch.stack(hit, 1)


class Realism:
    """Moves scores of the pool to where those of held-out pictures are, hits and false alarms apart, line by line.

    A false alarm keeps its rank among those of the pool, and gets the score that as many false alarms a picture exceed
    on held-out pictures; a hit likewise, counted by labelled box. What has no counterpart there is dropped: a detector
    that finds every labelled box of its training pictures misses some of the others.
    """

    def __init__(self, pool: Looks, held_out: Looks) -> None:
        self.curves: dict[tuple[int, bool], tuple[Tensor, Tensor, float]] = {}
        right = hits(pool), hits(held_out)
        for line in held_out.line.unique().tolist():
            for hit in (True, False):
                logits, counts = [], []
                for looks, hit_BK in zip((pool, held_out), right, strict=True):
                    of_line = (looks.line == line) & looks.findings
                    chosen = (hit_BK == hit) & (looks.scores > 0) & of_line[:, None]
                    logits.append(torch.logit(looks.scores[chosen].clamp(1e-6, 1 - 1e-6)).sort().values)
                    labels = (looks.true_types[of_line] != PAD).sum() if hit else of_line.sum()
                    counts.append(max(1, int(labels)))
                self.curves[line, hit] = logits[0], logits[1], counts[1] / counts[0]

    def __call__(self, looks: Looks, noise: float) -> Looks:
        """The looks with such scores, by falling score again. `noise`: spread added to logits."""
        hit_BK, logit_BK = hits(looks), torch.logit(looks.scores.clamp(1e-6, 1 - 1e-6))
        moved_BK = logit_BK.clone()
        gone_BK = looks.scores <= 0
        for (line, hit), (own, theirs, ratio) in self.curves.items():
            of_class = (hit_BK == hit) & (looks.line == line)[:, None]
            above_BK = (len(own) - torch.searchsorted(own, logit_BK)) * ratio  # as many are surer on held-out pictures
            if not len(theirs):
                gone_BK = gone_BK | of_class
                continue
            place = (len(theirs) - 1 - above_BK.long()).clamp(min=0, max=len(theirs) - 1)
            moved_BK = torch.where(of_class, theirs[place], moved_BK)
            gone_BK = gone_BK | (of_class & (above_BK >= len(theirs)))
        scores = (moved_BK + torch.randn_like(moved_BK) * noise).sigmoid().masked_fill(gone_BK, 0.0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        boxes = looks.boxes.gather(1, order[..., None].expand(-1, -1, 4))
        types, words = looks.types.gather(1, order), looks.words.gather(1, order)
        return replace(looks, boxes=boxes, types=types, words=words, scores=scores)


def reports_of(looks: Looks) -> tuple[Tensor, Tensor]:
    """The right report for each picture, as tokens and as targets `[B, LENGTH]`: every item that answers for a label.

    The same as `reports.grammar.to_tokens` gives, for a whole batch on the device. Targets are IGNORE where nothing is
    known.
    """
    device, n = looks.scores.device, len(looks)
    hit_BK = hits(looks)
    ct_B = looks.line == CT
    zone_BK, extent_BK = _zones(looks.boxes), _extents(looks.boxes)

    tokens = torch.full((n, LENGTH + 1), PAD, device=device)  # the last column takes what is not there
    known = torch.ones_like(tokens, dtype=torch.bool)
    kind = torch.where(ct_B, ID["kind:ct"], ID["kind:defect"])
    tokens[:, 0], tokens[:, 1] = BOS, kind
    tokens[:, 2] = _LINE_TOKENS.to(device)[looks.line]
    for i, (column, values) in enumerate(zip(_FIELD_COLUMNS, _FIELD_TOKENS, strict=True)):
        value = looks.fields[:, column]
        tokens[:, 2 + i] = torch.where(ct_B, values.to(device)[value.clamp(min=0)], tokens[:, 2 + i])
        known[:, 2 + i] = ~ct_B | (value >= 0)

    # Findings: pointer, type or word, extent (defects), zone.
    start_B = torch.where(ct_B, 2 + len(CT_FIELDS), 3)
    size_B = torch.where(ct_B, 3, 4)
    place_BK = start_B[:, None] + (hit_BK.cumsum(1) - 1) * size_B[:, None]
    named_BK = torch.where(looks.words == PAD, looks.types, looks.words)
    parts: list[tuple[Tensor, int | Tensor, Tensor]] = [
        (POINTER_TOKENS.to(device).expand(n, -1), 0, hit_BK),
        (named_BK, 1, hit_BK),
        (_EXTENT_TOKENS.to(device)[extent_BK], 2, hit_BK & ~ct_B[:, None]),
        (_ZONE_TOKENS.to(device)[zone_BK], (size_B - 1)[:, None], hit_BK),
    ]
    for values_BK, shift, chosen_BK in parts:
        at = torch.where(chosen_BK, place_BK + shift, LENGTH).clamp(max=LENGTH)
        tokens.scatter_(1, at, values_BK)
    end_B = start_B + hit_BK.sum(1) * size_B
    rows = torch.arange(n, device=device)
    tokens[rows, end_B.clamp(max=LENGTH)] = ID["<impression>"]

    # Impression: for each type that was found how many, and where if all are in one zone.
    of_type_BKR = hit_BK[:, :, None] & (looks.types[:, :, None] == _TYPE_TOKENS.to(device))
    count_BR = of_type_BKR.sum(1)
    first_BR = torch.where(of_type_BKR, zone_BK[:, :, None], len(ZONES)).amin(1)
    last_BR = torch.where(of_type_BKR, zone_BK[:, :, None], -1).amax(1)
    named_BR = count_BR > 0
    place_BR = end_B[:, None] + 1 + (named_BR.cumsum(1) - 1) * 3
    zone_BR = torch.where(
        first_BR == last_BR, _ZONE_TOKENS.to(device)[first_BR.clamp(max=len(ZONES) - 1)], ID[f"zone:{SCATTERED}"]
    )
    counted = _COUNT_TOKENS.to(device)[(count_BR - 1).clamp(0, len(COUNTS) - 1)]
    for shift, values_BR in enumerate((counted, _TYPE_TOKENS.to(device).expand(n, -1), zone_BR)):
        at = torch.where(named_BR, place_BR + shift, LENGTH).clamp(max=LENGTH)
        tokens.scatter_(1, at, values_BR)
    rows_B = named_BR.sum(1)
    clear_B = torch.where(rows_B == 0, end_B + 1, LENGTH).clamp(max=LENGTH)
    tokens[rows, clear_B] = ID["<clear>"]
    last_B = end_B + 1 + rows_B * 3 + (rows_B == 0)
    tokens[rows, last_B.clamp(max=LENGTH)] = END

    position = torch.arange(LENGTH, device=device)
    tokens = tokens[:, :LENGTH].masked_fill(position > last_B[:, None], PAD)
    known = known[:, :LENGTH] & (position <= last_B[:, None])
    known = known & (looks.findings[:, None] | (position < start_B[:, None]))
    return tokens, tokens.masked_fill(~known, IGNORE)


def _zones(boxes_BK4: Tensor) -> Tensor:
    """As `reports.grammar.zone_of`, as places in ZONES."""
    size = boxes_BK4[..., 2:] - boxes_BK4[..., :2]
    cell = ((boxes_BK4[..., 2:] + boxes_BK4[..., :2]) * 1.5).long().clamp(0, 2)
    return torch.where((size > 0.7).all(-1), len(ZONES) - 1, 3 * cell[..., 1] + cell[..., 0])


def _extents(boxes_BK4: Tensor) -> Tensor:
    """As `reports.grammar.extent_of`, as places in EXTENTS."""
    share = (boxes_BK4[..., 2] - boxes_BK4[..., 0]) * (boxes_BK4[..., 3] - boxes_BK4[..., 1])
    return (share >= 0.01).long() + (share >= 0.1).long()


def look_at(eyes: Eyes, streams: list[Stream], recipe: dict[str, Any], run: Run) -> Looks:
    """Draws every stream `pool_rounds` times, or less often where the run is limited in time."""
    known = {stream.name: stream for stream in streams}
    parts: list[Looks] = []
    rounds = recipe["pool_rounds"]
    for i in range(rounds):
        for name, table in recipe["streams"].items():
            batch = draw(known[name], table["batch"], table["side"], augmentation(table))
            parts.append(look(eyes, known[name], batch, findings=table.get("findings", True)))
        late = run.seconds > POOL_SHARE * run.limit_s
        if (i + 1) % 50 == 0 or i + 1 == rounds or late:
            run.log(pool=sum(map(len, parts)))
        if late:
            break
    return joined(parts)


def look_at_held_out(stand_ins: Eyes, streams: list[Stream], recipe: dict[str, Any], tokens: GlanceNet) -> Looks:
    """Every held-out picture as it is, but for shifts and mirror images, as stand-ins see it.

    `tokens` is the glance that the writer reads: another network's visual tokens would mean nothing to it.
    """
    parts = []
    for stream in streams:
        table = recipe["streams"][stream.name]
        how = augmentation(table | STILL)
        for _ in range(HELD_OUT_DRAWS):
            for start in range(0, len(stream), table["batch"]):
                rows = torch.arange(start, min(start + table["batch"], len(stream)), device=stream.pictures.device)
                batch = draw(stream.rows(rows), len(rows), table["side"], how)
                parts.append(look(stand_ins, stream, batch, findings=table.get("findings", True), tokens=tokens))
    return joined(parts)


def token_losses(model: ScanScribeModel, looks: Looks, *, blind: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token `[B, L]`, and the targets. `blind`: share of examples without the picture."""
    tokens, targets = reports_of(looks)
    longest = int((tokens != PAD).sum(1).max())
    tokens, targets = tokens[:, :longest], targets[:, 1:longest]
    seeing = torch.rand(len(tokens), 1, 1, device=tokens.device) >= blind
    prompt = model.prompt(looks.visual.float() * seeing, looks.logits, Evidence(looks.boxes, looks.types, looks.scores))
    words = model.decoder.embed(tokens[:, :-1])
    logits = model.decoder(torch.cat((prompt.to(words.dtype), words), 1))[:, prompt.shape[1] :]
    return F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"), targets


@torch.no_grad()
def held_out_losses(model: ScanScribeModel, looks: Looks, batch: int) -> tuple[float, float]:
    """Mean loss a decision of pointing or not, and a word, on held-out looks."""
    decisions = torch.tensor([*POINTER_TOKENS.tolist(), ID["<impression>"]], device=looks.line.device)
    spoken = _WORD_TOKENS[1:].to(looks.line.device)
    sums = looks.scores.new_zeros(4)
    for index in torch.arange(len(looks), device=looks.line.device).split(batch):
        with torch.autocast(index.device.type, torch.bfloat16, enabled=index.device.type == "cuda"):
            losses, targets = token_losses(model, looks.rows(index))
        pointing, wording = torch.isin(targets, decisions), torch.isin(targets, spoken)
        sums += torch.stack((losses[pointing].sum(), pointing.sum(), losses[wording].sum(), wording.sum()))
    pointed, points, worded, words = sums.tolist()
    return pointed / max(1, points), worded / max(1, words)


def train_writer(
    run: Run, data: Path, eyes: Eyes, stand_ins: Eyes, held_out: float, device: torch.device
) -> ScanScribeModel:
    """Runs the recipe and returns the whole model with averaged weights.

    `eyes` become part of the model; `stand_ins` have not seen the share `held_out` of the training groups, and may be
    the same. Raises as `train_glance` does.
    """
    recipe = run.recipe
    torch.manual_seed(recipe["seed"])
    for network in (eyes.glance, *eyes.detectors, stand_ins.glance, *stand_ins.detectors):
        network.to(device).eval().requires_grad_(False)
    wanted = set(recipe["streams"])
    known, unknown = (
        [s.to(device) for s in load_streams(data, "train", held_out=held_out, inverted=inverted) if s.name in wanted]
        for inverted in (False, True)
    )
    for streams, what in ((known, "training images"), (unknown, "groups to hold out")):
        if missing := wanted - {s.name for s in streams}:
            raise ValueError(f"the recipe names data sets that have no {what}: {', '.join(sorted(missing))}")
    unseen = look_at_held_out(stand_ins, unknown, recipe, eyes.glance)
    pool = look_at(eyes, known, recipe, run)
    realism = Realism(pool.rows(torch.randperm(len(pool), device=device)[: recipe["measured"]]), unseen)
    glance, detectors = eyes.glance, nn.ModuleList(eyes.detectors)
    config = ModelConfig.default(backbone=glance.config.backbone, visual_width=glance.width, bridge=recipe["bridge"])
    config = replace(config, glance=glance.config, detector=eyes.detectors[0].config, detectors=len(detectors))
    model = ScanScribeModel(config)
    model.glance, model.detectors = glance, detectors  # type: ignore[assignment]
    model.to(device).train()
    for network in (glance, *detectors):
        network.eval()
    average = Ema(model, recipe["ema"])
    best, least = copy.deepcopy(average.model), float("inf")
    groups = parameter_groups(model, recipe["weight_decay"])
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    parts = {"model": model, "average": average.model, "best": best, "optimiser": optimiser}
    number = run.resume(parts, device)
    done = run.start(number)
    if number:
        least = held_out_losses(best, unseen, recipe["batch"])[0]
    while done < 1:
        for group in optimiser.param_groups:
            group["lr"] = recipe["learning_rate"] * cosine(
                round(done * recipe["steps"]), recipe["steps"], recipe["warmup"]
            )
        rows = realism(pool.rows(torch.randint(len(pool), (recipe["batch"],), device=device)), recipe["score_noise"])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, targets = token_losses(model, rows, blind=recipe["blind"])
        loss = losses.sum() / (targets != IGNORE).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimiser.step()
        model.decoder.rebalance(recipe["balance"])
        average.update()
        number += 1
        done = run.share(number)
        if number % recipe["checked_every"] == 0 or done >= 1:
            pointing, wording = held_out_losses(average.model, unseen, recipe["batch"])
            if pointing < least:
                least = pointing
                best.load_state_dict(average.model.state_dict())
            there = {"pointing": pointing, "wording": wording, "least": least}
            run.log(step=number, loss=run.check(loss.detach(), number), rate=optimiser.param_groups[0]["lr"], **there)
        if number % recipe["checkpoint_every"] == 0 or done >= 1:
            run.save(number, parts)
    return best
