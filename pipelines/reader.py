"""Reads studies with the model: what the encoders see (`pipelines.look`) is evidence that the decoder writes about."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decoder.engine import Completion, Engine, Grammar, Request
from pipelines.adapted import Adapted
from pipelines.domain import STRANGE, DomainModel
from pipelines.look import SURE, Candidate, Looker, Seen, part_of
from pipelines.model import (
    BOX_TYPE_TOKENS,
    MAP_TYPE_TOKENS,
    REGIONS,
    Evidence,
    ModelConfig,
    ScanScribeModel,
    decode_tokens,
)
from pipelines.reading import (
    ADAPTED_LINE,
    OUT_OF_DOMAIN,
    DeviceLostError,
    FieldReading,
    FindingReading,
    ModelIdentity,
    NotFiniteError,
    Reading,
)
from pipelines.sight import Sight, sight
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
from reports.language import contradictions
from reports.taxonomy import (
    CT_FIELDS,
    CT_TYPES,
    DEFECT_TYPES,
    LINES,
    PRODUCT_LINES,
    UNDETERMINED,
    WORDS_OF_TYPE,
    ProductLine,
)
from reports.texts import nothing_found, statements, summary

TOKENS = 10_240  # of reports that are decoded together, prompts included: 32 of the bundled model's


class Reader:
    """A loaded model. `load` makes one; `read` turns a study into a reading. Not for use by several threads at once."""

    def __init__(
        self,
        model: ScanScribeModel,
        calibration: Calibration,
        info: ModelIdentity,
        device: torch.device,
        domain: DomainModel | None = None,
        own: Adapted | None = None,
        lines: tuple[ProductLine, ...] = PRODUCT_LINES,
    ):
        self.model, self.calibration, self.info, self.device, self.domain = model, calibration, info, device, domain
        self.own, self.lines = own, lines
        self._looker = Looker(model, device, domain, own)
        self._grammar = Grammar.from_table(compile_grammar()[:, : model.config.decoder.vocabulary])
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
        base = stored.find_base() if stored.base else stored
        network, own = ScanScribeModel(ModelConfig.from_dict(base.config)), None
        try:
            load_into(network, base.weights)
            domain = DomainModel.load(base.domain) if base.domain_sha256 else None
            if stored.own_line is not None:
                own = Adapted.load(stored, network.detectors[0], place)
                known = DomainModel.load(stored.domain)
                domain = known if domain is None else domain.joined(known)
        except ValueError as error:
            raise ModelError(str(error)) from None
        network.eval().requires_grad_(False)
        network.glance.fuse()
        for detector in network.detectors:
            detector.fuse()
        network.to(place)
        network.to(memory_format=torch.channels_last)
        info = ModelIdentity(stored.name, stored.version, stored.weights_sha256, stored.config_sha256, str(place))
        calibration = base.calibration if own is None else base.calibration.joined(stored.calibration)
        return cls(network, calibration, info, place, domain, own, stored.lines)

    def read(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Reading:
        """Reads one study. `kind` is "auto", "ct" or "defect"; `reference` a golden sample of the same view.

        Raises NotFiniteError.
        """
        [reading] = self.read_many([sight(study, kind=kind, reference=reference)])
        if isinstance(reading, Exception):
            raise reading
        return reading

    def read_many(self, sights: Sequence[Sight]) -> list[Reading | Exception]:
        """Reads studies together, from what `pipelines.sight.sight` made of them; equal to reading each alone, within
        rounding. What fails is that study's error; when the memory does not suffice, fewer go together from then on.

        Raises DeviceLostError.
        """
        if not sights:
            return []
        try:
            return self._read_together(sights)
        except Exception as error:
            failure = error
        traceback.clear_frames(failure.__traceback__)  # they hold what has filled the memory
        if isinstance(failure, torch.OutOfMemoryError):
            self._looker.halve()
            torch.cuda.empty_cache()
        elif isinstance(failure, torch.AcceleratorError):
            raise DeviceLostError(str(failure).partition("\n")[0])
        if len(sights) == 1:
            return [failure]
        half = len(sights) // 2
        return [*self.read_many(sights[:half]), *self.read_many(sights[half:])]

    def _read_together(self, sights: Sequence[Sight]) -> list[Reading | Exception]:
        started = time.perf_counter()
        seen = self.look_many(sights)
        encoded = time.perf_counter()
        readings = self.write(seen)
        spent = {"encode": encoded - started, "decode": time.perf_counter() - encoded}
        timing = {name: round(seconds / len(sights), 4) for name, seconds in spent.items()}
        return [each if isinstance(each, Exception) else replace(each, timing_s=timing) for each in readings]

    def look(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Seen:
        """The part of `read` that glance and detector do."""
        return self.look_many([sight(study, kind=kind, reference=reference)])[0]

    def look_many(self, sights: Sequence[Sight]) -> list[Seen]:
        """What glance and detector see of studies; equal to looking at each alone, within rounding."""
        with self._on_device():
            return self._looker.look(sights)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton starts its kernels on the GPU that is current in a thread, wherever their tensors are."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.inference_mode()
    def write(self, seen: Sequence[Seen]) -> list[Reading | NotFiniteError]:
        """The decoder's part of `read`: what was seen becomes readings, all decoded together.

        Where the decoder's scores are not finite, that one becomes an error, and the others are as without it. Of an
        adapter's line the decoder has no words.
        """
        own = [self.own is not None and each.line == self.own.line.name for each in seen]
        with self._on_device():
            decoded = iter(self._decode([each for each, of_own in zip(seen, own, strict=True) if not of_own]))
        return [
            self._without_decoder(each) if of_own else next(decoded) for each, of_own in zip(seen, own, strict=True)
        ]

    def _decode(self, seen: Sequence[Seen]) -> list[Reading | NotFiniteError]:
        if not seen:
            return []
        evidence = [self._evidence(each) for each in seen]
        parts = zip(*((e.boxes, e.types, e.scores) for e in evidence), strict=True)
        prompts_BPD = self.model.prompt(
            torch.cat([each.visual for each in seen]).float(),
            torch.cat([each.fields for each in seen]).to(self.device),
            Evidence(*(torch.cat(part).to(self.device) for part in parts)),
        )
        fields = [self._fields(each.fields) if each.line == "ct" else {} for each in seen]
        if self._engine is None:
            slots = max(1, TOKENS // self.model.config.decoder.length)
            self._engine = Engine(
                self.model.decoder, slots=slots, grammar=self._grammar, decide=point_or_pass, hints=POINTERS
            )
        written = self._engine.generate(
            self._request(each, prompt_PD, read)
            for each, prompt_PD, read in zip(seen, prompts_BPD, fields, strict=True)
        )
        return [self._reading(*parts) for parts in zip(seen, fields, written, strict=True)]

    def _evidence(self, seen: Seen) -> Evidence:
        """What the decoder can point at, one row; on the CPU."""
        width, height = seen.size
        kept = seen.candidates[: REGIONS if seen.line == "ct" else POINTERS]
        tokens, names = (MAP_TYPE_TOKENS, CT_TYPES) if seen.line == "ct" else (BOX_TYPE_TOKENS, DEFECT_TYPES)
        return Evidence(
            torch.tensor([[c.bbox for c in kept]], dtype=torch.float32).reshape(1, -1, 4)
            / torch.tensor([width, height, width, height]),
            tokens[torch.tensor([[names.index(c.type) for c in kept]], dtype=torch.long)],
            torch.tensor([[c.score for c in kept]], dtype=torch.float32),
        ).padded()

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
        # point of mAP on boards); where there are several words for that, it chooses one.
        head = ["<bos>", "kind:ct", *(f"{name}:{values[0]}" for name, values in CT_FIELDS.items())]
        entry = self._grammar.walk(ID[word] for word in (head if ct else ["<bos>", "kind:defect", f"line:{seen.line}"]))
        pins = {}
        for i, candidate in enumerate(kept):
            zone, extent = self._place(seen, candidate)
            state = self._grammar.walk([ID[f"evidence:{i}"]], entry)
            for word in (f"type:{candidate.type}", *([] if ct else [f"extent:{extent}"]), f"zone:{zone}"):
                if word != f"type:{candidate.type}" or not self._words(candidate.type):
                    pins[state] = ID[word]
                state = self._grammar.walk([ID[word]], state)
        # Decoder and evidence decide together, with the weights that were best on validation data.
        asked = what_is_asked(self.confidences([c.score for c in kept], seen.line), *self._asked(seen.line))
        hints_H = torch.ones(POINTERS)
        hints_H[: len(kept)] = torch.tensor(
            [likely if self._assesses(seen.line, c.type) else 1.0 for c, likely in zip(kept, asked, strict=True)]
        )
        return Request((), prompt_PD, forbidden=[ID[word] for word in forbidden], pins=pins, hints_H=hints_H)

    def _words(self, finding_type: str) -> list[str]:
        """Words for a finding of the type, beside its noun, that the decoder knows."""
        known = self.model.config.decoder.vocabulary
        return [word for word in WORDS_OF_TYPE.get(finding_type, ()) if ID[f"word:{word}"] < known]

    def _asked(self, line: str) -> tuple[float, float]:
        """What the decoder's word counts, and what it and the evidence must reach together."""
        return self.calibration.point.get(line, 0.5), self.calibration.report.get(line, 0.5)

    def _assesses(self, line: str, finding_type: str) -> bool:
        """Whether findings of the type are reported at all."""
        return finding_type in self.calibration.assessed.get(line, (finding_type,))

    def _place(self, seen: Seen, candidate: Candidate) -> tuple[str, str]:
        """Zone and extent of an item; CT items have no extent."""
        return zone_of(candidate.bbox, *seen.size), "" if seen.line == "ct" else extent_of(candidate.bbox, *seen.size)

    def _reading(self, seen: Seen, fields: dict[str, FieldReading], written: Completion) -> Reading | NotFiniteError:
        """What was written, with the evidence behind it."""
        if written.ended == "not-finite":
            return NotFiniteError("the decoder's scores were not finite")
        words = decode_tokens(written.ids)
        draft = from_tokens(words)
        pointed = {finding.pointer: finding for finding in draft.findings}
        findings = []
        slots, least = REGIONS if seen.line == "ct" else POINTERS, self._asked(seen.line)[1]
        # What the picture as a whole shows is reported, even where no box of it is sure.
        shown = next((i for i, candidate in enumerate(seen.candidates) if candidate.type == seen.shows), None)
        sure = self.confidences([candidate.score for candidate in seen.candidates], seen.line)
        for i, (candidate, confidence) in enumerate(zip(seen.candidates, sure, strict=True)):
            zone, extent = self._place(seen, candidate)
            named = pointed.get(i)
            findings.append(
                FindingReading(
                    candidate.type,
                    candidate.bbox,
                    candidate.slice_index,
                    confidence,
                    # Of more items than the decoder has slots for, the evidence alone decides.
                    i == shown
                    or named is not None
                    or (i >= slots and confidence >= least and self._assesses(seen.line, candidate.type)),
                    "weak" if seen.line == "ct" else "box",
                    zone,
                    extent,
                    candidate.score,
                    # A word that belongs to another type would say what was not found.
                    named.word if named is not None and named.type == candidate.type else "",
                )
            )
        findings.sort(key=lambda finding: -finding.confidence)
        kind = "ct" if seen.line == "ct" else "defect"
        strange = seen.domain is not None and seen.domain < STRANGE
        reading = Reading(
            kind=kind,
            kind_confidence=seen.confidence,
            product_line=None if seen.line == "ct" else seen.line,
            fields=fields,
            findings=tuple(findings),
            impression="",
            slices_read=seen.slices,
            windows=seen.windows,
            quality_flags=seen.flags + ((OUT_OF_DOMAIN,) if strange else ()),
            corrections=() if draft.impression == summarise(draft.findings) else ("impression",),
            unsure=tuple(name for name in CT_TYPES if not self._assesses("ct", name)) if kind == "ct" else (),
            tokens=tuple(words),
            domain=seen.domain,
            lines=self.lines,
        )
        # The decoder's sentences stand where they agree with what is reported, and what they leave out is added: both
        # is what the findings themselves sum up to.
        told = reading.draft()
        own = statements(kind, draft.impression, told.findings) or [nothing_found(kind, reading.product_line)]
        refused = dict.fromkeys(each.sentence for each in contradictions(told, own))
        return replace(reading, impression=summary(kind, told.findings), refused=tuple(refused))

    def _without_decoder(self, seen: Seen) -> Reading:
        """What is sure enough is reported, in the catalogue's words."""
        assert self.own is not None
        least = self.calibration.report.get(seen.line, SURE)
        findings = []
        sure = self.confidences([candidate.score for candidate in seen.candidates], seen.line)
        for candidate, confidence in zip(seen.candidates, sure, strict=True):
            findings.append(
                FindingReading(
                    candidate.type,
                    candidate.bbox,
                    candidate.slice_index,
                    confidence,
                    confidence >= least,
                    "weak" if candidate.type in self.own.line.weak else "box",
                    *self._place(seen, candidate),
                    candidate.score,
                )
            )
        reported = [DraftFinding(0, f.type, f.location, f.extent) for f in findings if f.reported]
        strange = seen.domain is not None and seen.domain < STRANGE
        return Reading(
            kind="defect",
            kind_confidence=seen.confidence,
            product_line=seen.line,
            fields={},
            findings=tuple(findings),
            impression=summary("defect", reported),
            slices_read=seen.slices,
            quality_flags=(*seen.flags, ADAPTED_LINE, *((OUT_OF_DOMAIN,) if strange else ())),
            domain=seen.domain,
            lines=self.lines,
        )

    def confidences(self, scores: Sequence[float], line: str) -> list[float]:
        """The calibrated probabilities that items of those scores are right."""
        a, b = self.calibration.evidence.get(line, (1.0, 0.0))
        return (1 / (1 + np.exp(-(a * _logit(scores) + b)))).tolist()

    def _fields(self, fields_BF: Tensor) -> dict[str, FieldReading]:
        """The fields with calibrated probabilities; one that cannot be told from the image is undetermined."""
        readings = {}
        for name, values in CT_FIELDS.items():
            log_p = part_of(fields_BF, name).cpu()
            p = (log_p / self.calibration.temperature.get(name, 1.0)).softmax(-1).tolist()
            best = max(range(len(values)), key=p.__getitem__)
            value = values[best] if p[best] >= self.calibration.answer.get(name, 0.0) else UNDETERMINED
            raw = dict(zip(values, log_p.exp().tolist(), strict=True))
            readings[name] = FieldReading(value, dict(zip(values, p, strict=True)), raw)
        return readings


def what_is_asked(confidences: Sequence[float], weight: float, least: float) -> list[float]:
    """How likely the decoder must hold items of those confidences to be right for the report to point at them.

    An item is reported where the weighted mean of both logits, the decoder's with `weight`, reaches that of `least`.
    """
    if weight == 0:
        return [0.0 if confidence >= least else 1.0 for confidence in confidences]
    rest = (_logit(least) - (1 - weight) * _logit(confidences)) / weight
    return (1 / (1 + np.exp(-np.clip(rest, -50, 50)))).tolist()


def _logit(p: float | Sequence[float]) -> np.ndarray:
    clipped = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def point_or_pass(log_p_BV: Tensor, hints_BH: Tensor) -> Tensor:
    """Points at the first evidence item that is likely enough given that the ones before it are passed over.

    Where the grammar lets the decoder point, its distribution over pointers and "no more" is read as one decision after
    another; elsewhere the likeliest token is taken. `hints` are what is likely enough, item by item; 1 is never.
    """
    first, stop = ID["evidence:0"], ID["<impression>"]
    pointers = log_p_BV[:, first : first + POINTERS].exp()
    later = pointers.flip(1).cumsum(1).flip(1) + log_p_BV[:, stop : stop + 1].exp()
    likely = (pointers / later.clamp(min=1e-9) >= hints_BH) & (hints_BH < 1)
    likely = likely & log_p_BV[:, first : first + POINTERS].isfinite()
    chosen = torch.where(likely.any(1), first + likely.int().argmax(1), stop)
    return torch.where(log_p_BV[:, stop].isfinite(), chosen, log_p_BV.argmax(-1))
