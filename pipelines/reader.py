"""Reads a study with the model: look once, inspect what needs it, gather the evidence, let the decoder write.

Every picture is first seen at glance size, which tells its kind and product line. Pictures of a line with small defects
are then inspected larger. Of a CT volume, slices spread over it are read through one or two display windows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decoder.engine import Completion, Engine, Grammar, Request
from encoders import Dense, Glance
from encoders.flips import look_from_all_sides
from encoders.select import Items, select_boxes, select_regions
from pipelines import tiles
from pipelines.domain import STRANGE, DomainModel, colourfulness, domain_features
from pipelines.inputs import (
    GLANCE,
    LONGEST_SIDE,
    LUNG,
    MIRRORED,
    PRESENCE,
    SHOWN,
    SOFT_TISSUE,
    WHOLE_SIDE,
    channels,
    grey8,
    pad,
    resize,
    stretch,
    window,
)
from pipelines.model import (
    BOX_TYPE_TOKENS,
    FIELDS,
    LINE_VALUES,
    MAP_TYPE_TOKENS,
    REGIONS,
    Evidence,
    ModelConfig,
    ScanScribeModel,
    decode_tokens,
    field_log_probabilities,
)
from pipelines.reading import OUT_OF_DOMAIN, FieldReading, FindingReading, ModelIdentity, NotFiniteError, Reading
from pipelines.store import Calibration, ModelError, find
from pipelines.study import ImageStudy
from pipelines.weights import load_into
from reports.grammar import (
    ID,
    POINTERS,
    DraftFinding,
    compile_grammar,
    extent_of,
    from_tokens,
    summarise,
    zone_of,
)
from reports.taxonomy import CT_FIELDS, CT_TYPES, DEFECT_TYPES, LINE_OF_TYPE, LINES, UNDETERMINED
from reports.texts import summary

SURE = 0.5  # confidence from which a finding is always reported
MAX_SLICES = 24  # of a volume, spread evenly
BATCH = 8  # views that go through the encoder together
SLOTS = 32  # reports that are decoded together
WINDOWS = {"soft tissue": SOFT_TISSUE, "lung": LUNG}


@dataclass(frozen=True, slots=True)
class View:
    """One picture as the network sees it: `[3, H, W]`, and how to get back to the picture's own pixels."""

    x_CHW: np.ndarray
    scale: float  # network pixels a picture pixel
    offset: tuple[int, int]  # x, y of the picture in the network's frame
    size: tuple[int, int]  # width, height of the picture

    def boxes(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Network pixels -> the picture's own pixels, clipped to it."""
        x, y = self.offset
        own = (boxes_N4 - np.array([x, y, x, y], np.float32)) / self.scale
        width, height = self.size
        return np.clip(own, 0, np.array([width, height, width, height], np.float32))


def view(grey_HW: np.ndarray, longest: int, reference_HW: np.ndarray | None = None, *, square: bool) -> View:
    """Scales a picture (and its golden sample with it) and frames it for the network."""
    small = resize(grey_HW, longest)
    golden = None if reference_HW is None else stretch(reference_HW, small.shape)
    framed, offset = pad(channels(small, golden), square=square)
    height, width = grey_HW.shape
    return View(framed, max(small.shape) / max(height, width), offset, (width, height))


@dataclass(frozen=True, slots=True)
class Candidate:
    """An evidence item in the picture's own pixels."""

    type: str
    bbox: tuple[float, float, float, float]
    score: float
    slice_index: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What looking gave."""

    line: str  # a product line, or "ct"
    confidence: float  # of the kind
    fields: Tensor  # [1, F] log-probabilities
    visual: Tensor  # [1, N, C]
    candidates: list[Candidate]  # by falling score
    size: tuple[int, int]  # width, height
    slices: tuple[int, ...] = (0,)
    windows: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    domain: float | None = None  # how likely it is of that line; None: the model does not know
    shows: str | None = None  # the surest type of defect that the picture as a whole shows, if any


class Reader:
    """A loaded model. `load` makes one; `read` turns a study into a reading. Not for use by several threads at once."""

    def __init__(
        self,
        model: ScanScribeModel,
        calibration: Calibration,
        info: ModelIdentity,
        device: torch.device,
        domain: DomainModel | None = None,
    ):
        self.model, self.calibration, self.info, self.device, self.domain = model, calibration, info, device, domain
        self._grammar = Grammar.from_table(compile_grammar())
        self._engine: Engine | None = None  # made when it is first needed

    @classmethod
    def load(cls, model: str | Path = "default", device: str = "auto") -> Reader:
        """Loads a model by name or folder. Raises `ModelError` with what would mend it."""
        stored = find(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            place = torch.device(device)
            if place.type == "cuda" and not torch.cuda.is_available():
                raise ModelError(f"device {device!r}: this machine has no usable GPU; use --device cpu")
        except RuntimeError:
            raise ModelError(f"there is no device {device!r}; use auto, cpu, cuda or cuda:N") from None
        stored.verify()
        network = ScanScribeModel(ModelConfig.from_dict(stored.config))
        try:
            load_into(network, stored.weights)
            domain = DomainModel.load(stored.domain).to(place) if stored.domain_sha256 else None
        except ValueError as error:
            raise ModelError(str(error)) from None
        network.eval().requires_grad_(False)
        network.glance.fuse()
        network.detector.fuse()
        network.to(place)
        network.to(memory_format=torch.channels_last)
        info = ModelIdentity(stored.name, stored.version, stored.weights_sha256, stored.config_sha256, str(place))
        return cls(network, stored.calibration, info, place, domain)

    def read(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Reading:
        """Reads one study. `kind` is "auto", "ct" or "defect"; `reference` a golden sample of the same view.

        Raises NotFiniteError.
        """
        started = time.perf_counter()
        seen = self.look(study, kind=kind, reference=reference)
        encoded = time.perf_counter()
        reading = self.write([seen])[0]
        if isinstance(reading, NotFiniteError):
            raise reading
        timing = {"encode": round(encoded - started, 4), "decode": round(time.perf_counter() - encoded, 4)}
        return replace(reading, timing_s=timing)

    def look(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Seen:
        """The part of `read` that glance and detector do."""
        if study.units == "HU" and kind != "defect":
            return self._look_at_volume(study)
        if study.units == "display" and tiles.is_large(study.pixels[0]):
            return self._look_at_tiles(study, kind, reference)
        return self._look_at_picture(study, kind, reference)

    @torch.inference_mode()
    def _glance(self, views: Sequence[View]) -> Glance:
        """What the pictures are; views of one size."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model.glance(self._batch(views))

    @torch.inference_mode()
    def _inspect(self, seen: View, line: str, whole: View | None = None, *, mirrored: bool) -> tuple[Items, str | None]:
        """The boxes of one view, and the type that the picture surely shows, of a line that is asked for it.

        `whole` is the view that tells which types there are, when it is another.
        """

        def dense(of: View) -> Dense:
            x = self._batch([of])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                return look_from_all_sides(self.model.detector, x) if mirrored else self.model.detector(x)

        found = dense(seen)
        if whole is not None:
            found = found._replace(presence_BT=dense(whole).presence_BT)
        present = {
            name: float(p)
            for name, p in zip(DEFECT_TYPES, found.presence_BT[0].float().sigmoid(), strict=True)
            if LINE_OF_TYPE[name] == line
        }
        surest = max(present, key=lambda name: present[name])
        return select_boxes(found, presence=PRESENCE[line]), surest if line in SHOWN and present[
            surest
        ] >= SURE else None

    def _batch(self, views: Sequence[View]) -> Tensor:
        x = torch.from_numpy(np.stack([v.x_CHW for v in views])).to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def _look_at_picture(self, study: ImageStudy, kind: str, reference: ImageStudy | None) -> Seen:
        middle = len(study.pixels) // 2  # of a volume that is to be read as a defect picture; a picture has one slice
        if study.units == "HU":
            grey = window(study.pixels[middle], *(study.window or SOFT_TISSUE))
        else:
            grey = grey8(study.pixels[middle])
        golden = grey8(reference.pixels[0]) if reference is not None and reference.units == "display" else None
        glance, shows = view(grey, GLANCE, golden, square=True), None
        output = self._glance([glance])
        fields = field_log_probabilities(output)
        line, confidence = self._line(fields, kind)
        if line == "ct":
            items = select_regions(output.maps_BTHW, glance.x_CHW.shape[1:])
            found = _candidates(items, 0, glance, CT_TYPES, middle)
        else:
            closer = view(grey, LONGEST_SIDE[line], golden, square=False)
            whole = view(grey, WHOLE_SIDE[line], golden, square=False) if line in WHOLE_SIDE else None
            items, shows = self._inspect(closer, line, whole, mirrored=line in MIRRORED)
            found = _candidates(items, 0, closer, DEFECT_TYPES, middle)
            found = [candidate for candidate in found if LINE_OF_TYPE[candidate.type] == line]
        domain = self._domain(domain_features(output.features), line, study.pixels[middle])
        return Seen(
            line, confidence, fields, output.visual_BNC, found, glance.size, (middle,), domain=domain, shows=shows
        )

    def _look_at_tiles(self, study: ImageStudy, kind: str, reference: ImageStudy | None) -> Seen:
        """A picture far larger than the network's view: an overview tells what it is, tiles show its defects."""
        pixels = study.pixels[0]
        height, width = pixels.shape[:2]
        golden = reference.pixels[0] if reference is not None and reference.units == "display" else None
        small = grey8(tiles.overview(pixels))
        small_golden = None if golden is None else grey8(tiles.overview(golden))
        glance = view(small, GLANCE, small_golden, square=True)
        output = self._glance([glance])
        fields = field_log_probabilities(output)
        line, confidence = self._line(fields, kind)
        if line == "ct":
            domain = self._domain(domain_features(output.features), line, tiles.overview(pixels))
            whole = replace(glance, scale=glance.scale * max(small.shape) / max(height, width), size=(width, height))
            found = _candidates(select_regions(output.maps_BTHW, glance.x_CHW.shape[1:]), 0, whole, CT_TYPES)
            flags: tuple[str, ...] = ("seen-reduced",)
            return Seen(line, confidence, fields, output.visual_BNC, found, (width, height), (0,), (), flags, domain)
        places = tiles.layout(height, width, LONGEST_SIDE[line])
        goldens = repeat(None) if golden is None else tiles.cut(golden, places, pixels.shape)
        items, features = [], []
        every = -(-len(places) // BATCH)
        for n, (place, grey, beside) in enumerate(zip(places, tiles.cut(pixels, places), goldens, strict=False)):
            if n % every == 0:  # the training pictures had the scale of tiles, not that of the overview
                features.append(domain_features(self._glance([view(grey, GLANCE, beside, square=True)]).features))
            closer = view(grey, LONGEST_SIDE[line], beside, square=False)
            for each in _candidates(self._inspect(closer, line, mirrored=False)[0], 0, closer, DEFECT_TYPES):
                if LINE_OF_TYPE[each.type] == line:
                    x, y = place[:2]
                    x0, y0, x1, y1 = each.bbox
                    items.append((replace(each, bbox=(x0 + x, y0 + y, x1 + x, y1 + y)), place))
        merged = tiles.merge(
            [each.bbox for each, _ in items],
            [each.type for each, _ in items],
            [each.score for each, _ in items],
            [place for _, place in items],
        )
        found = [replace(items[i][0], bbox=bbox) for i, bbox in merged]
        domain = self._domain(torch.cat(features), line, tiles.overview(pixels))
        flags = ("read-in-tiles", "seen-reduced") if places[0][2] > LONGEST_SIDE[line] else ("read-in-tiles",)
        return Seen(line, confidence, fields, output.visual_BNC, found, (width, height), (0,), (), flags, domain)

    def _look_at_volume(self, study: ImageStudy) -> Seen:
        count = len(study.pixels)
        chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_SLICES)).round().astype(int)).tolist()
        names = ["soft tissue"]
        fields, visual, found, features = self._look_through("soft tissue", study, chosen)
        mean = fields.mean(0, keepdim=True)
        if FIELDS["region"][int(self._part(mean, "region").argmax())] == "chest":
            names.append("lung")
            _, lung_visual, lung_found, _ = self._look_through("lung", study, chosen)
            visual, found = torch.cat((visual, lung_visual)), found + lung_found
        # One item for each type: where in the volume, and through which window, it shows best.
        best: dict[str, tuple[int, Candidate]] = {}
        for row, candidates in enumerate(found):
            for candidate in candidates:
                if candidate.type not in best or candidate.score > best[candidate.type][1].score:
                    best[candidate.type] = row, candidate
        ranked = sorted(best.values(), key=lambda pair: -pair[1].score)
        key_row = ranked[0][0]
        height, width = study.pixels.shape[1:3]
        items = [candidate for _, candidate in ranked]
        return Seen(
            "ct",
            1.0,
            mean,
            visual[key_row : key_row + 1],
            items,
            (width, height),
            tuple(chosen),
            tuple(names),
            domain=self._domain(features, "ct", study.pixels[chosen[0]]),
        )

    def _look_through(
        self, name: str, study: ImageStudy, chosen: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[list[Candidate]], Tensor]:
        """Field log-probabilities, visual tokens, candidates and domain features of each slice."""
        fields, visual, found, features = [], [], [], []
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            views = [view(window(study.pixels[s], *WINDOWS[name]), GLANCE, square=True) for s in part]
            output = self._glance(views)
            fields.append(field_log_probabilities(output))
            visual.append(output.visual_BNC)
            features.append(domain_features(output.features))
            items = select_regions(output.maps_BTHW, views[0].x_CHW.shape[1:])
            found += [_candidates(items, b, views[b], CT_TYPES, s) for b, s in enumerate(part)]
        return torch.cat(fields), torch.cat(visual), found, torch.cat(features)

    def _domain(self, features_BD: Tensor, line: str, pixels: np.ndarray) -> float | None:
        """How likely what was seen is of that line; `pixels` tell how colourful it is."""
        if self.domain is None or line not in self.domain.lines:
            return None
        return self.domain.score(features_BD, line, colour=colourfulness(pixels))

    def _part(self, fields_BF: Tensor, name: str) -> Tensor:
        """The log-probabilities of one field, `[values]`, of the first row."""
        start = 0
        for field, values in FIELDS.items():
            if field == name:
                return fields_BF[0, start : start + len(values)]
            start += len(values)
        raise KeyError(name)

    def _line(self, fields_BF: Tensor, kind: str) -> tuple[str, float]:
        """The likeliest product line or "ct", and how sure its kind is; `kind` overrides."""
        p = self._part(fields_BF, "line").exp().cpu()
        ct = float(p[LINE_VALUES.index("ct")])
        if kind == "ct" or (kind == "auto" and ct >= 0.5):
            return "ct", 1.0 if kind == "ct" else ct
        return LINES[int(p[: len(LINES)].argmax())], 1.0 if kind == "defect" else 1 - ct

    @torch.inference_mode()
    def write(self, seen: Sequence[Seen]) -> list[Reading | NotFiniteError]:
        """The decoder's part of `read`: what was seen becomes readings, all decoded together.

        Where the decoder's scores are not finite, that one becomes an error, and the others are as without it.
        """
        if not seen:
            return []
        evidence = [self._evidence(each) for each in seen]
        prompts_BPD = self.model.prompt(
            torch.cat([each.visual for each in seen]).float(),
            torch.cat([each.fields for each in seen]),
            Evidence(
                *(torch.cat(parts) for parts in zip(*((e.boxes, e.types, e.scores) for e in evidence), strict=True))
            ),
        )
        fields = [self._fields(each.fields) if each.line == "ct" else {} for each in seen]
        if self._engine is None:
            self._engine = Engine(
                self.model.decoder, slots=SLOTS, grammar=self._grammar, decide=point_or_pass, hints=1 + POINTERS
            )
        written = self._engine.generate(
            self._request(each, prompt_PD, read)
            for each, prompt_PD, read in zip(seen, prompts_BPD, fields, strict=True)
        )
        return [self._reading(*parts) for parts in zip(seen, fields, written, strict=True)]

    def _evidence(self, seen: Seen) -> Evidence:
        """What the decoder can point at, one row."""
        width, height = seen.size
        kept = seen.candidates[: REGIONS if seen.line == "ct" else POINTERS]
        tokens, names = (MAP_TYPE_TOKENS, CT_TYPES) if seen.line == "ct" else (BOX_TYPE_TOKENS, DEFECT_TYPES)
        evidence = Evidence(
            torch.tensor([[c.bbox for c in kept]], dtype=torch.float32).reshape(1, -1, 4)
            / torch.tensor([width, height, width, height]),
            tokens[torch.tensor([[names.index(c.type) for c in kept]], dtype=torch.long)],
            torch.tensor([[c.score for c in kept]], dtype=torch.float32),
        ).padded()
        return Evidence(*(t.to(self.device) for t in (evidence.boxes, evidence.types, evidence.scores)))

    def _request(self, seen: Seen, prompt_PD: Tensor, fields: dict[str, FieldReading]) -> Request:
        """What the decoder is left to decide: what to point at, and how to sum it up."""
        ct = seen.line == "ct"
        kept = seen.candidates[: REGIONS if ct else POINTERS]
        forbidden = [f"evidence:{i}" for i in range(len(kept), POINTERS)]
        forbidden += [f"evidence:{i}" for i, candidate in enumerate(kept) if candidate.score <= 0]
        forbidden.append("kind:defect" if ct else "kind:ct")
        forbidden += [f"line:{name}" for name in LINES if name != seen.line]
        # The field heads know the fields better than the decoder does: it is held to what they measured.
        for name, reading in fields.items():
            likeliest = max(reading.probabilities, key=lambda value: reading.probabilities[value])
            forbidden += [f"{name}:{value}" for value in CT_FIELDS[name] if value != likeliest]
        # What it points at is described as the evidence has it (measured: types rewritten by the decoder cost half a
        # point of mAP on boards).
        head = ["<bos>", "kind:ct", *(f"{name}:{values[0]}" for name, values in CT_FIELDS.items())]
        entry = self._grammar.walk(ID[word] for word in (head if ct else ["<bos>", "kind:defect", f"line:{seen.line}"]))
        pins = {}
        for i, candidate in enumerate(kept):
            zone, extent = self._place(seen, candidate)
            state = self._grammar.walk([ID[f"evidence:{i}"]], entry)
            for word in (f"type:{candidate.type}", *([] if ct else [f"extent:{extent}"]), f"zone:{zone}"):
                pins[state] = ID[word]
                state = self._grammar.walk([ID[word]], state)
        # It decides about doubtful items; what is more likely right than wrong is always pointed at.
        sure = [self._confidence(candidate.score, seen.line) >= SURE for candidate in kept]
        hints_H = torch.zeros(1 + POINTERS)
        hints_H[0] = self.calibration.point.get(seen.line, 0.5)
        hints_H[1 : 1 + len(sure)] = torch.tensor(sure)
        return Request((), prompt_PD, forbidden=[ID[word] for word in forbidden], pins=pins, hints_H=hints_H)

    def _place(self, seen: Seen, candidate: Candidate) -> tuple[str, str]:
        """Zone and extent of an item; CT items have no extent."""
        return zone_of(candidate.bbox, *seen.size), "" if seen.line == "ct" else extent_of(candidate.bbox, *seen.size)

    def _reading(self, seen: Seen, fields: dict[str, FieldReading], written: Completion) -> Reading | NotFiniteError:
        """What was written, with the evidence behind it."""
        if written.ended == "not-finite":
            return NotFiniteError("the decoder's scores were not finite")
        words = decode_tokens(written.ids)
        draft = from_tokens(words)
        pointed = {finding.pointer for finding in draft.findings}
        findings = []
        least = self.calibration.report.get(seen.line, 0.0)
        # What the picture as a whole shows is reported, even where no box of it is sure.
        shown = next((i for i, candidate in enumerate(seen.candidates) if candidate.type == seen.shows), None)
        for i, candidate in enumerate(seen.candidates):
            confidence = self._confidence(candidate.score, seen.line)
            zone, extent = self._place(seen, candidate)
            findings.append(
                FindingReading(
                    candidate.type,
                    candidate.bbox,
                    candidate.slice_index,
                    confidence,
                    # Sure items are reported also where there are more of them than the decoder has slots for.
                    i == shown or confidence >= SURE or (i in pointed and confidence >= least),
                    "weak" if seen.line == "ct" else "box",
                    zone,
                    extent,
                    candidate.score,
                )
            )
        findings.sort(key=lambda finding: -finding.confidence)
        reported = [DraftFinding(0, f.type, f.location, f.extent) for f in findings if f.reported]
        # The impression sums up what is reported; where the decoder's own contradicts its findings, that is noted.
        kind = "ct" if seen.line == "ct" else "defect"
        strange = seen.domain is not None and seen.domain < STRANGE
        return Reading(
            kind=kind,
            kind_confidence=seen.confidence,
            product_line=None if seen.line == "ct" else seen.line,
            fields=fields,
            findings=tuple(findings),
            impression=summary(kind, summarise(reported)),
            slices_read=seen.slices,
            windows=seen.windows,
            quality_flags=seen.flags + ((OUT_OF_DOMAIN,) if strange else ()),
            corrections=() if draft.impression == summarise(draft.findings) else ("impression",),
            tokens=tuple(words),
            domain=seen.domain,
        )

    def _confidence(self, score: float, line: str) -> float:
        a, b = self.calibration.evidence.get(line, (1.0, 0.0))
        clipped = min(max(score, 1e-6), 1 - 1e-6)
        return float(1 / (1 + np.exp(-(a * np.log(clipped / (1 - clipped)) + b))))

    def _fields(self, fields_BF: Tensor) -> dict[str, FieldReading]:
        """The fields with calibrated probabilities; one that cannot be told from the image is undetermined."""
        readings = {}
        for name, values in CT_FIELDS.items():
            log_p = self._part(fields_BF, name).cpu()
            p = (log_p / self.calibration.temperature.get(name, 1.0)).softmax(-1).tolist()
            best = max(range(len(values)), key=p.__getitem__)
            value = values[best] if p[best] >= self.calibration.answer.get(name, 0.0) else UNDETERMINED
            raw = dict(zip(values, log_p.exp().tolist(), strict=True))
            readings[name] = FieldReading(value, dict(zip(values, p, strict=True)), raw)
        return readings


def point_or_pass(log_p_BV: Tensor, hints_BH: Tensor) -> Tensor:
    """Points at the first evidence item that is sure, or likely enough given that the ones before it are passed over.

    Where the grammar lets the decoder point, its distribution over pointers and "no more" is read as one decision after
    another; elsewhere the likeliest token is taken. `hints` are what is likely enough, and for each item whether it is
    sure (1) or not (0).
    """
    first, stop = ID["evidence:0"], ID["<impression>"]
    pointers = log_p_BV[:, first : first + POINTERS].exp()
    later = pointers.flip(1).cumsum(1).flip(1) + log_p_BV[:, stop : stop + 1].exp()
    likely = (pointers / later.clamp(min=1e-9) >= hints_BH[:, :1]) | (hints_BH[:, 1:] > 0)
    likely = likely & log_p_BV[:, first : first + POINTERS].isfinite()
    chosen = torch.where(likely.any(1), first + likely.int().argmax(1), stop)
    return torch.where(log_p_BV[:, stop].isfinite(), chosen, log_p_BV.argmax(-1))


def _candidates(items: Items, row: int, seen: View, types: Sequence[str], slice_index: int = 0) -> list[Candidate]:
    """Row `row` of the items in the picture's own pixels, by falling score."""
    scores = items.scores[row].float().cpu().numpy()
    boxes = seen.boxes(items.boxes[row].float().cpu().numpy())
    names = items.types[row].cpu().numpy()
    return [
        Candidate(types[name], tuple(float(v) for v in box), float(score), slice_index)  # type: ignore[arg-type]
        for box, name, score in zip(boxes, names, scores, strict=True)
        if score > 0 and box[2] > box[0] and box[3] > box[1]
    ]
