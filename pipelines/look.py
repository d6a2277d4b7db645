"""The encoders' part of reading: what is to be seen of studies, many at a time, becomes evidence.

Every picture is first seen at glance size, which tells its kind and product line. Pictures of a line with small defects
are then inspected larger. Of a CT volume, slices spread over it are read through one or two display windows. Frames of
one size go through the network together, and what they gave comes back from the device once for all of them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from encoders import Dense, Glance
from encoders.flips import look_from_all_sides
from encoders.select import Items, select_regions
from pipelines import tiles
from pipelines.adapted import Adapted, evidence
from pipelines.domain import STRANGE, DomainModel, domain_features
from pipelines.evidence import items_of
from pipelines.inputs import (
    GLANCE,
    LONGEST_SIDE,
    MEAN,
    MIRRORED,
    SHOWN,
    STD,
    WHOLE_SIDE,
    colourfulness,
    grey8,
)
from pipelines.model import FIELDS, LINE_VALUES, ScanScribeModel, field_log_probabilities
from pipelines.sight import Frame, Sight, frame
from pipelines.study import ImageStudy
from reports.taxonomy import CT_TYPES, DEFECT_TYPES, LINE_OF_TYPE, LINES

BELOW: Final = 0.99  # of the leading type's best score: the most that another type's items have
SURE: Final = 0.5  # how likely a type must be on the picture to be shown without a sure box
# Pixels that go through a network together. On a CPU one frame of inspection at a time is quickest (measured).
TOGETHER: Final = {"cuda": 64 * GLANCE * GLANCE, "cpu": 8 * GLANCE * GLANCE}
TOGETHER_CLOSER: Final = {"cuda": 64 * GLANCE * GLANCE, "cpu": 1}
_T = TypeVar("_T")


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
    fields: Tensor  # [1, F] log-probabilities, on the CPU
    visual: Tensor  # [1, N, C]
    candidates: list[Candidate]  # by falling score
    size: tuple[int, int]  # width, height
    slices: tuple[int, ...] = (0,)
    windows: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    domain: float | None = None  # how likely it is of that line; None: the model does not know
    shows: str | None = None  # the surest type of defect that the picture as a whole shows, if any


@dataclass(frozen=True, slots=True)
class _Glanced:
    """What a glance at frames gave. Fields, regions and domain features are on the CPU."""

    fields_BF: Tensor
    visual_BNC: Tensor
    regions: Items
    features_BD: Tensor


class Looker:
    """Looks at studies with the glance and the detectors of a model, and that of an adapter where there is one.

    Not for use by several threads at once.
    """

    def __init__(
        self, model: ScanScribeModel, device: torch.device, domain: DomainModel | None, own: Adapted | None = None
    ) -> None:
        self._model, self._device, self._domain, self._own = model, device, domain, own
        # For each new number of frames a GPU's convolutions are planned anew: there, batches are powers of two.
        self._powers_of_two = device.type == "cuda"
        self._share = 1.0  # of what goes through together; halved when the memory does not suffice

    def halve(self) -> None:
        """Let less go through the network together from now on."""
        self._share /= 2

    @torch.inference_mode()
    def look(self, sights: Sequence[Sight]) -> list[Seen]:
        """What is seen of each study; equal to looking at each alone, within rounding."""
        seen: dict[int, Seen] = {}
        for i, each in enumerate(sights):
            if each.large:
                assert each.source is not None
                seen[i] = self._look_at_tiles(*each.source, each.kind)
        others = [i for i, each in enumerate(sights) if not each.large]
        glanced = self._glance_all([sights[i].glances for i in others])
        pictures = []
        for i, glance in zip(others, glanced, strict=True):
            if not sights[i].volume:
                pictures.append((i, glance))
        seen |= self._look_at_pictures({i: (sights[i], glance) for i, glance in pictures})
        volumes = {i: glance for i, glance in zip(others, glanced, strict=True) if sights[i].volume}
        chests = [i for i, glance in volumes.items() if self._is_chest(glance)]
        lungs = dict(zip(chests, self._glance_all([sights[i].lungs for i in chests]), strict=True))
        for i, glance in volumes.items():
            seen[i] = self._seen_volume(sights[i], glance, lungs.get(i))
        return [seen[i] for i in range(len(sights))]

    # The networks

    def _together(self, frames: Sequence[_T], pixels: int, most: dict[str, int]) -> Iterator[Sequence[_T]]:
        """Parts of frames of so many pixels each, that go through a network together."""
        count = max(1, int(most[self._device.type] * self._share) // pixels)
        if self._powers_of_two:
            count = 1 << count.bit_length() - 1
        return (frames[start : start + count] for start in range(0, len(frames), count))

    def _glance_all(self, groups: Sequence[Sequence[Frame]]) -> list[_Glanced]:
        """A glance at each group of frames; all glances are squares of one size."""
        frames = [each for group in groups for each in group]
        if not frames:
            return []
        parts: list[tuple[Tensor, ...]] = []
        for part in self._together(frames, GLANCE * GLANCE, TOGETHER):
            output = self._glance(part)
            items = select_regions(output.maps_BTHW, part[0].grey_HW.shape)
            fields, features = field_log_probabilities(output), domain_features(output.features)
            given = fields, output.visual_BNC, items.boxes, items.types, items.scores, features
            parts.append(tuple(each[: len(part)] for each in given))
        whole = [torch.cat(each) for each in zip(*parts, strict=True)]
        whole = [whole[0].cpu(), whole[1], *(each.cpu() for each in whole[2:])]
        ends = list(itertools.accumulate(map(len, groups)))
        found = []
        for end, group in zip(ends, groups, strict=True):
            fields, visual, boxes, types, scores, features = (each[end - len(group) : end] for each in whole)
            found.append(_Glanced(fields, visual, Items(boxes, types, scores), features))
        return found

    def _glance(self, frames: Sequence[Frame]) -> Glance:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._model.glance(self._input(frames))

    def _detect(self, frames: Sequence[Frame], *, mirrored: bool) -> Dense:
        x = self._input(frames)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            found = look_from_all_sides(self._model.detectors, x) if mirrored else self._model.detectors[0](x)
        types, distances, presence = (
            each[: len(frames)] for each in (found.types_BAT, found.distances_BA4R, found.presence_BT)
        )
        return found._replace(types_BAT=types, distances_BA4R=distances, presence_BT=presence)

    def _input(self, frames: Sequence[Frame]) -> Tensor:
        """`[B, 3, H, W]`: as `pipelines.inputs.channels` and `pad` make it, of bytes that were moved to the device.

        B is the number of frames, or the power of two above it: then the last frame is repeated.
        """
        if self._powers_of_two:
            frames = [*frames, *[frames[-1]] * ((1 << (len(frames) - 1).bit_length()) - len(frames))]
        grey = torch.from_numpy(np.stack([each.grey_HW for each in frames])).to(self._device)
        image = (grey.float() - MEAN) / STD
        if any(each.golden_HW is not None for each in frames):
            goldens = [each.grey_HW if each.golden_HW is None else each.golden_HW for each in frames]
            reference = (torch.from_numpy(np.stack(goldens)).to(self._device).float() - MEAN) / STD
        else:
            reference = image
        x_B3HW = torch.stack((image, reference, (image - reference).abs()), 1)
        height, width = frames[0].grey_HW.shape
        if any(each.place != (0, 0, width, height) for each in frames):
            place = torch.tensor([each.place for each in frames], device=self._device)
            ys, xs = (torch.arange(side, device=self._device) for side in (height, width))
            x, y, w, h = (part[:, None] for part in place.unbind(1))
            inside = ((ys >= y) & (ys < y + h))[:, :, None] & ((xs >= x) & (xs < x + w))[:, None]
            x_B3HW = x_B3HW * inside[:, None]
        return x_B3HW.contiguous(memory_format=torch.channels_last)

    # Pictures

    def _look_at_pictures(self, pictures: dict[int, tuple[Sight, _Glanced]]) -> dict[int, Seen]:
        lines = {i: self._line(glance, each.kind) for i, (each, glance) in pictures.items()}
        closer: dict[str, list[tuple[int, Frame, Frame | None]]] = defaultdict(list)
        for i, (each, _) in pictures.items():
            if (line := lines[i][0]) != "ct":
                whole = each.closer[WHOLE_SIDE[line]] if line in WHOLE_SIDE and not self._owns(line) else None
                closer[line].append((i, each.closer[self._longest(line)], whole))
        found: dict[int, tuple[list[Candidate], str | None]] = {}
        for line, asked in closer.items():
            frames = [(closest, whole) for _, closest, whole in asked]
            for (i, closest, _), (items, row, shows) in zip(asked, self._inspect(line, frames), strict=True):
                found[i] = _candidates(items, row, closest, self._types(line), pictures[i][0].slices[0]), shows
        known = self._known_all(
            [(glance.features_BD, lines[i][0], each.colour) for i, (each, glance) in pictures.items()]
        )
        seen = {}
        for (i, (each, glance)), domain in zip(pictures.items(), known, strict=True):
            (line, confidence), shows = lines[i], None
            if line == "ct":
                candidates = _candidates(glance.regions, 0, each.glances[0], CT_TYPES, each.slices[0])
            else:
                candidates, shows = found[i]
                candidates = _led(self._of_line(candidates, line), shows)
            seen[i] = Seen(
                line,
                confidence,
                glance.fields_BF,
                glance.visual_BNC,
                candidates,
                each.size,
                each.slices,
                domain=domain,
                shows=shows,
            )
        return seen

    def _inspect(
        self, line: str, frames: Sequence[tuple[Frame, Frame | None]], *, mirrored: bool | None = None
    ) -> list[tuple[Items, int, str | None]]:
        """Of each frame its boxes (items and which row of them), and the type that the picture surely shows, of a line
        that is asked for it. The second frame tells which types there are, where it is given.
        """
        if self._own is not None and self._owns(line):
            return self._inspect_own(self._own, [first for first, _ in frames], mirrored)
        mirrored = line in MIRRORED if mirrored is None else mirrored
        outcome: dict[int, tuple[Items, int, str | None]] = {}
        for shape, numbers in _by_shape(frames).items():
            for part in self._together(numbers, shape[0] * shape[1], TOGETHER_CLOSER):
                found = self._detect([frames[n][0] for n in part], mirrored=mirrored)
                wholes = [whole for n in part if (whole := frames[n][1]) is not None]
                if wholes:
                    found = found._replace(presence_BT=self._presence(wholes, mirrored))
                items = items_of(found, line)
                items = Items(items.boxes.cpu(), items.types.cpu(), items.scores.cpu())
                present_BT = found.presence_BT.float().sigmoid().cpu()
                for row, n in enumerate(part):
                    outcome[n] = items, row, _shown(line, present_BT[row])
        return [outcome[n] for n in range(len(frames))]

    def _inspect_own(
        self, own: Adapted, frames: Sequence[Frame], mirrored: bool | None
    ) -> list[tuple[Items, int, str | None]]:
        outcome: dict[int, tuple[Items, int, str | None]] = {}
        for shape, numbers in _by_shape([(each, None) for each in frames]).items():
            for part in self._together(numbers, shape[0] * shape[1], TOGETHER_CLOSER):
                x = self._input([frames[n] for n in part])
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                    items = evidence(own.detector, own.line, x, mirrored=mirrored)
                items = Items(items.boxes.cpu(), items.types.cpu(), items.scores.cpu())
                outcome |= {n: (items, row, None) for row, n in enumerate(part)}
        return [outcome[n] for n in range(len(frames))]

    def _presence(self, frames: Sequence[Frame], mirrored: bool) -> Tensor:
        """The logit of each type to be anywhere on a picture, `[B, T]`."""
        rows: dict[int, Tensor] = {}
        for shape, numbers in _by_shape([(each, None) for each in frames]).items():
            for part in self._together(numbers, shape[0] * shape[1], TOGETHER_CLOSER):
                rows |= zip(part, self._detect([frames[n] for n in part], mirrored=mirrored).presence_BT, strict=True)
        return torch.stack([rows[n] for n in range(len(frames))])

    # Volumes

    def _is_chest(self, glance: _Glanced) -> bool:
        mean = glance.fields_BF.mean(0, keepdim=True)
        return FIELDS["region"][int(part_of(mean, "region").argmax())] == "chest"

    def _seen_volume(self, sight: Sight, soft: _Glanced, lung: _Glanced | None) -> Seen:
        names, visual, found = ["soft tissue"], soft.visual_BNC, _regions(soft, sight.glances, sight.slices)
        if lung is not None:
            names.append("lung")
            visual = torch.cat((visual, lung.visual_BNC))
            found = found + _regions(lung, sight.lungs, sight.slices)
        # One item for each type: where in the volume, and through which window, it shows best.
        best: dict[str, tuple[int, Candidate]] = {}
        for row, candidates in enumerate(found):
            for candidate in candidates:
                if candidate.type not in best or candidate.score > best[candidate.type][1].score:
                    best[candidate.type] = row, candidate
        ranked = sorted(best.values(), key=lambda pair: -pair[1].score)
        key_row = ranked[0][0]
        return Seen(
            "ct",
            1.0,
            soft.fields_BF.mean(0, keepdim=True),
            visual[key_row : key_row + 1],
            [candidate for _, candidate in ranked],
            sight.size,
            sight.slices,
            tuple(names),
            domain=self._known(soft.features_BD, "ct", sight.colour),
        )

    # Pictures far larger than the network's view

    def _look_at_tiles(self, study: ImageStudy, reference: ImageStudy | None, kind: str) -> Seen:
        """An overview tells what a picture is, tiles show its defects."""
        pixels = study.pixels[0]
        height, width = pixels.shape[:2]
        golden = reference.pixels[0] if reference is not None and reference.units == "display" else None
        overview = tiles.overview(pixels)
        small = grey8(overview)
        small_golden = None if golden is None else grey8(tiles.overview(golden))
        first = frame(small, GLANCE, small_golden, square=True)
        [glance] = self._glance_all([[first]])
        line, confidence = self._line(glance, kind)
        size = (width, height)
        seen = Seen(line, confidence, glance.fields_BF, glance.visual_BNC, [], size)
        if line == "ct":
            whole = replace(first, scale=first.scale * max(small.shape) / max(height, width), size=size)
            found = _candidates(glance.regions, 0, whole, CT_TYPES)
            domain = self._known(glance.features_BD, line, colourfulness(overview))
            return replace(seen, candidates=found, flags=("seen-reduced",), domain=domain)
        longest = self._longest(line)
        places = tiles.layout(height, width, longest)
        goldens: Iterable[np.ndarray | None] = (
            itertools.repeat(None) if golden is None else tiles.cut(golden, places, pixels.shape)
        )
        items, features = [], []
        every = -(-len(places) // 8)
        for n, (place, grey, beside) in enumerate(zip(places, tiles.cut(pixels, places), goldens, strict=False)):
            if n % every == 0:  # the training pictures had the scale of tiles, not that of the overview
                features.append(self._glance_all([[frame(grey, GLANCE, beside, square=True)]])[0].features_BD)
            closer = frame(grey, longest, beside, square=False)
            [(boxes, row, _)] = self._inspect(line, [(closer, None)], mirrored=False)
            for each in self._of_line(_candidates(boxes, row, closer, self._types(line)), line):
                x, y = place[:2]
                x0, y0, x1, y1 = each.bbox
                items.append((replace(each, bbox=(x0 + x, y0 + y, x1 + x, y1 + y)), place))
        merged = tiles.merge(
            [each.bbox for each, _ in items],
            [each.type for each, _ in items],
            [each.score for each, _ in items],
            [place for _, place in items],
        )
        flags = ("read-in-tiles", "seen-reduced") if places[0][2] > longest else ("read-in-tiles",)
        domain = self._known(torch.cat(features), line, colourfulness(overview))
        return replace(
            seen, candidates=[replace(items[i][0], bbox=bbox) for i, bbox in merged], flags=flags, domain=domain
        )

    # What was seen

    def _known(self, features_BD: Tensor, line: str, colour: float) -> float | None:
        """How likely what was seen is of that line; `colour` tells how colourful it is."""
        return self._known_all([(features_BD, line, colour)])[0]

    def _known_all(self, seen: Sequence[tuple[Tensor, str, float]]) -> list[float | None]:
        """The same of several studies, those of a line together."""
        scores: dict[int, float] = {}
        for name in {line for _, line, _ in seen}:
            if self._domain is not None and name in self._domain.lines:
                numbers = [i for i, (_, line, _) in enumerate(seen) if line == name]
                usual = self._own.line.colour if self._own is not None and self._owns(name) else 0.0
                colours = [max(0.0, seen[i][2] - usual) for i in numbers]
                scores |= zip(numbers, self._domain.scores([seen[i][0] for i in numbers], name, colours), strict=True)
        return [scores.get(i) for i in range(len(seen))]

    def _owns(self, line: str) -> bool:
        """Whether a line is the one that an adapter brought."""
        return self._own is not None and line == self._own.line.name

    def _longest(self, line: str) -> int:
        """The longest side at which pictures of a line are inspected."""
        return self._own.line.longest if self._own is not None and self._owns(line) else LONGEST_SIDE[line]

    def _types(self, line: str) -> Sequence[str]:
        """The types that are told apart on pictures of a line."""
        return self._own.line.types if self._own is not None and self._owns(line) else DEFECT_TYPES

    def _of_line(self, candidates: list[Candidate], line: str) -> list[Candidate]:
        return [each for each in candidates if self._owns(line) or LINE_OF_TYPE[each.type] == line]

    def _line(self, glance: _Glanced, kind: str) -> tuple[str, float]:
        """The likeliest product line or "ct", and how sure its kind is; `kind` overrides.

        The glance has never seen an adapter's line: a picture is of it where the domain says so. One that could be of
        either is of the adapter's, as the model was made for that line.
        """
        p = part_of(glance.fields_BF, "line").exp()
        ct = float(p[LINE_VALUES.index("ct")])
        if self._own is not None and self._domain is not None and kind != "ct":
            name = self._own.line.name
            own = float(self._domain.probabilities(glance.features_BD, name).median())
            if own >= STRANGE or name == LINE_VALUES[int(p.argmax())]:
                return name, 1.0 if kind == "defect" else max(1 - ct, own)
        if kind == "ct" or (kind == "auto" and ct >= 0.5):
            return "ct", 1.0 if kind == "ct" else ct
        return LINES[int(p[: len(LINES)].argmax())], 1.0 if kind == "defect" else 1 - ct


def part_of(fields_BF: Tensor, name: str) -> Tensor:
    """The log-probabilities of one field, `[values]`, of the first row."""
    start = 0
    for field, values in FIELDS.items():
        if field == name:
            return fields_BF[0, start : start + len(values)]
        start += len(values)
    raise KeyError(name)


def _by_shape(frames: Sequence[tuple[Frame, Frame | None]]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of frames by their size."""
    numbers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for n, (each, _) in enumerate(frames):
        numbers[each.grey_HW.shape].append(n)
    return numbers


def _shown(line: str, present_T: Tensor) -> str | None:
    if line not in SHOWN:
        return None
    present = {name: float(p) for name, p in zip(DEFECT_TYPES, present_T, strict=True) if LINE_OF_TYPE[name] == line}
    surest = max(present, key=lambda name: present[name])
    return surest if present[surest] >= SURE else None


def _led(candidates: list[Candidate], shows: str | None) -> list[Candidate]:
    """With scores lowered, type by type, so that no item is surer than the surest one of the type that the picture as a
    whole shows: it tells types better than single boxes do.
    """
    best: dict[str, float] = {}
    for each in candidates:
        best[each.type] = max(each.score, best.get(each.type, 0.0))
    if shows is None or shows not in best:
        return candidates
    lower = {name: 1.0 if name == shows else min(1.0, BELOW * best[shows] / score) for name, score in best.items()}
    return sorted((replace(each, score=each.score * lower[each.type]) for each in candidates), key=lambda c: -c.score)


def _regions(glance: _Glanced, frames: Sequence[Frame], slices: Sequence[int]) -> list[list[Candidate]]:
    return [
        _candidates(glance.regions, row, each, CT_TYPES, s)
        for row, (each, s) in enumerate(zip(frames, slices, strict=True))
    ]


def _candidates(items: Items, row: int, seen: Frame, types: Sequence[str], slice_index: int = 0) -> list[Candidate]:
    """Row `row` of the items in the picture's own pixels, by falling score."""
    scores = items.scores[row].tolist()
    boxes = seen.boxes(items.boxes[row].float().numpy()).tolist()
    names = items.types[row].tolist()
    return [
        Candidate(types[name], tuple(box), score, slice_index)
        for box, name, score in zip(boxes, names, scores, strict=True)
        if score > 0 and box[2] > box[0] and box[3] > box[1]
    ]
