"""Does the model know this kind of picture? An in-domain probability from what the glance computes anyway.

Of each product line (and CT), training pictures span a small part of the space of the glance's channel statistics.
Each line is described there by a Gaussian of low rank: its main axes with their variances, and one variance for all
that is left. The distance to it (Mahalanobis) says how strange a picture is; a logistic curve, placed on validation
pictures, turns the distance into a probability whose half is the line between known and strange.

Nothing of the outside is needed to fit it, so that the probability ranks pictures and is no bet on how often strange
ones come. Shapes: B views, N pictures, D statistics, K axes.
Sources: Mahalanobis distance of a network's features (Lee et al., arXiv 1807.03888), residuals of a principal subspace
(ViM, arXiv 2203.10807), Gaussians of low rank (Tipping and Bishop 1999), channel means and deviations as what tells a
texture (arXiv 1703.06868), colourfulness (Hasler and Suesstrunk 2003).
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders import GlanceNet
from pipelines.inputs import GLANCE, channels, pad, read_grey, resize, stretch
from pipelines.manifest import Case, read_manifest

STRANGE: Final = 0.5  # in-domain probability below which a picture is flagged
RANK: Final = 64  # axes of a line
LEVELS: Final = 2  # the finest levels of the glance; its last one tells known kinds apart and little else (measured)
FALSE_ALARMS: Final = 0.015  # share of validation pictures, varied ones among them, that may lie beyond the limit
USUAL: Final = 0.95  # probability of a line's median picture
PER_SET: Final = 700  # training pictures of one data set
FEW: Final = 100  # training pictures of an owner's line; fewer are seen in several variations
VIVID: Final = 33.0  # colourfulness from which people call a picture colourful; the training pictures are grey
BATCH: Final = 8


def domain_features(features: Sequence[Tensor]) -> Tensor:
    """The glance's feature maps, finest first, each `[B, C, H, W]` -> `[B, D]` float32.

    Means and standard deviations of the channels of the first `LEVELS` maps, as square roots: rectified activations
    have long tails, which a Gaussian has not.
    """
    statistics = []
    for level in features[:LEVELS]:
        values = level.float()
        statistics += [values.mean((2, 3)), values.std((2, 3))]
    return torch.cat(statistics, 1).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class LineDomain:
    """Where the pictures of one product line lie, in scaled statistics, and how far out they get."""

    centre: Tensor  # [D]
    axes: Tensor  # [K, D], of length 1
    variances: Tensor  # [K], falling
    rest: Tensor  # [], the mean variance along all other axes
    limit: Tensor  # [], log distance at which a picture is as likely in as out
    spread: Tensor  # [], of the logistic curve

    def distance(self, scaled_BD: Tensor) -> Tensor:
        """`[B]`: log of the mean squared deviation, in units of the line's own."""
        away = scaled_BD - self.centre
        along = away @ self.axes.T
        within = (along.square() / self.variances).sum(1)
        beyond = (away.square().sum(1) - along.square().sum(1)).clamp(min=0) / self.rest
        return ((within + beyond) / away.shape[1]).clamp(min=1e-9).log()


@dataclass(frozen=True, slots=True)
class DomainModel:
    """The lines that a model knows. `fit`, then `calibrate`; `score` says how likely views are of a line."""

    scale: Tensor  # [D] standard deviations over all lines
    lines: Mapping[str, LineDomain]

    @classmethod
    def fit(cls, features_ND: Tensor, lines: Sequence[str]) -> DomainModel:
        """Describes each line by its training pictures, a row of `domain_features` each.

        Raises ValueError for a line with fewer than eight. The axes of a line with few pictures are fewer.
        """
        model = cls(features_ND.std(0).clamp(min=1e-4), {})
        for line in sorted(set(lines)):
            model = model.learn(line, features_ND[[each == line for each in lines]])
        return model

    def learn(self, line: str, features_ND: Tensor) -> DomainModel:
        """The same with one more line, or a line anew, described by its training pictures. Raises ValueError for fewer
        than eight."""
        scaled = (features_ND / self.scale).double()
        if len(scaled) < 8:
            raise ValueError(f"{line}: {len(scaled)} pictures are too few to tell what is usual; give 8 or more")
        centre = scaled.mean(0)
        away = scaled - centre
        variances, axes = torch.linalg.eigh(away.T @ away / len(away))
        kept = min(RANK, len(scaled) // 4, scaled.shape[1] // 2)
        described = LineDomain(
            centre.float(),
            axes[:, -kept:].flip(1).T.contiguous().half().float(),  # as stored
            variances[-kept:].flip(0).float(),
            variances[:-kept].mean().clamp(min=1e-6).float(),
            torch.zeros(()),
            torch.ones(()),
        )
        return replace(self, lines={**self.lines, line: described})

    def only(self, line: str) -> DomainModel:
        """What it knows of one line. Raises KeyError."""
        return replace(self, lines={line: self.lines[line]})

    def joined(self, other: DomainModel) -> DomainModel:
        """With the lines of another one that has the same scale; those of the other stand."""
        return replace(self, lines={**self.lines, **other.lines})

    def calibrate(self, features_ND: Tensor, lines: Sequence[str]) -> DomainModel:
        """Places each line's limit on pictures that were not fitted; a line without any keeps what it has."""
        placed = dict(self.lines)
        for line in set(lines) & set(placed):
            far = placed[line].distance((features_ND / self.scale)[[each == line for each in lines]])
            limit, median = torch.quantile(far, 1 - FALSE_ALARMS), far.median()
            spread = (limit - median).clamp(min=1e-3) / math.log(USUAL / (1 - USUAL))
            placed[line] = replace(placed[line], limit=limit, spread=spread)
        return replace(self, lines=placed)

    def probabilities(self, features_BD: Tensor, line: str) -> Tensor:
        """`[B]`: how likely each view is a picture of `line`. Raises KeyError for a line that was not fitted."""
        known = self.lines[line]
        return ((known.limit - known.distance(features_BD.float() / self.scale)) / known.spread).sigmoid()

    def score(self, features_BD: Tensor, line: str, *, colour: float = 0.0) -> float:
        """How likely a study is of `line`, 0..1; below `STRANGE` it is to be flagged.

        A volume is as usual as its median slice: the ends of a scan show little. `colour` is its colourfulness.
        """
        return self.scores([features_BD], line, [colour])[0]

    def scores(self, features: Sequence[Tensor], line: str, colours: Sequence[float]) -> list[float]:
        """`score` of several studies at once."""
        parts = self.probabilities(torch.cat(list(features)), line).split([len(each) for each in features])
        vivid = [1 / (1 + math.exp((colour - VIVID) / 3)) for colour in colours]
        return [float(part.median()) * share for part, share in zip(parts, vivid, strict=True)]

    def to(self, device: torch.device | str) -> DomainModel:
        """The same on another device."""
        moved = {
            name: LineDomain(*(getattr(line, part).to(device) for part in LineDomain.__dataclass_fields__))
            for name, line in self.lines.items()
        }
        return DomainModel(self.scale.to(device), moved)

    def save(self, path: Path) -> None:
        """Writes safetensors: axes as float16, all else as float32; about 100 kB a line."""
        tensors = {"scale": self.scale}
        for name, line in self.lines.items():
            for part in LineDomain.__dataclass_fields__:
                value = getattr(line, part)
                tensors[f"{name}.{part}"] = (value.half() if part == "axes" else value).cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> DomainModel:
        """The inverse of `save`. Raises ValueError for a file that is none."""
        try:
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
            names = sorted({name.rpartition(".")[0] for name in tensors} - {""})
            parts = LineDomain.__dataclass_fields__
            lines = {name: LineDomain(*(tensors[f"{name}.{part}"] for part in parts)) for name in names}
            return cls(tensors["scale"], lines)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} does not describe a domain ({error}); install the model again") from None


def fit_domain(glance: GlanceNet, data: Path, *, progress: Callable[[str], None] = print) -> DomainModel:
    """Fits the `train` split of every data set below `data`, and places the limits on `val`.

    Each picture is seen as it is, in an ordinary variation, and beside its golden sample where it has one. About four
    minutes on two idle cores. Raises `ManifestError`, and ValueError where there is nothing to fit.
    """
    rng = np.random.default_rng(0)
    device = next(glance.parameters()).device
    rows: dict[str, list[Tensor]] = defaultdict(list)
    lines: dict[str, list[str]] = defaultdict(list)
    for manifest in sorted(data.glob("*/manifest.jsonl")):
        labelled = read_manifest(manifest)
        for split in ("train", "val"):
            cases = [case for case in labelled if case.split == split]
            if len(cases) > PER_SET:
                cases = [cases[i] for i in sorted(rng.choice(len(cases), PER_SET, replace=False))]
            progress(f"{manifest.parent.name}, {split}: {len(cases)} pictures")
            views: list[np.ndarray] = []
            for case in cases:
                seen = list(_views(case, rng))
                views += seen
                lines[split] += [case.product_line or "ct"] * len(seen)
                if len(views) >= BATCH:
                    rows[split].append(_look(glance, views, device))
                    views = []
            if views:
                rows[split].append(_look(glance, views, device))
    if not rows["train"]:
        raise ValueError(f"no */manifest.jsonl with a 'train' split below {data}")
    model = DomainModel.fit(torch.cat(rows["train"]), lines["train"])
    return model.calibrate(torch.cat(rows["val"]), lines["val"]) if rows["val"] else model


def learn_line(
    glance: GlanceNet, known: DomainModel | None, line: str, fitted: Sequence[Case], placed: Sequence[Case]
) -> DomainModel:
    """`known` with an owner's line, described by the pictures `fitted`, its limit placed on the pictures `placed`.

    Few pictures are seen in several variations each. Raises ValueError for fewer than eight views.
    """
    rng, device = np.random.default_rng(0), next(glance.parameters()).device

    def features(cases: Sequence[Case], rounds: int) -> Tensor:
        views = [view for _ in range(rounds) for case in cases for view in _views(case, rng)]
        return torch.cat([_look(glance, views[i : i + BATCH], device) for i in range(0, len(views), BATCH)])

    rounds = max(1, FEW // max(1, len(fitted)))
    seen = features(fitted, rounds)
    model = DomainModel.fit(seen, [line] * len(seen)) if known is None else known.to("cpu").learn(line, seen)
    there = features(placed, rounds)
    return model.calibrate(there, [line] * len(there))


@torch.inference_mode()
def _look(glance: GlanceNet, views: list[np.ndarray], device: torch.device) -> Tensor:
    x = torch.from_numpy(np.stack(views)).to(device).contiguous(memory_format=torch.channels_last)
    return domain_features(glance(x).features).cpu()


def _views(case: Case, rng: np.random.Generator) -> Iterator[np.ndarray]:
    grey = read_grey(case.image)
    yield _framed(grey)
    yield _framed(varied(grey, rng))
    if case.template is not None:
        yield _framed(grey, read_grey(case.template))


def _framed(grey_HW: np.ndarray, golden_HW: np.ndarray | None = None) -> np.ndarray:
    """As `pipelines.reader.view` frames a glance."""
    small = resize(grey_HW, GLANCE)
    return pad(channels(small, None if golden_HW is None else stretch(golden_HW, small.shape)), square=True)[0]


def _recompressed(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    with io.BytesIO() as buffer:
        Image.fromarray(grey).save(buffer, "JPEG", quality=int(rng.integers(40, 92)))
        return np.asarray(Image.open(buffer))


def _scaled(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return resize(grey, max(8, round(max(grey.shape) * 2 ** rng.uniform(-1, 1))))


def _toned(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    curved = (grey.astype(np.float32) / 255) ** (2 ** rng.uniform(-0.35, 0.35))
    levels = (curved - 0.5) * rng.uniform(0.8, 1.25) + 0.5 + rng.uniform(-0.1, 0.1)
    return np.clip(levels * 255 + 0.5, 0, 255).astype(np.uint8)


def _turned(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(grey)
    return np.asarray(picture.rotate(rng.uniform(-7, 7), Image.Resampling.BILINEAR, fillcolor=int(rng.choice(grey[0]))))


def _bordered(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, bottom, left, right = (int(side * rng.uniform(0, 0.08)) for side in (*grey.shape[:1] * 2, *grey.shape[1:] * 2))
    return np.pad(grey, ((top, bottom), (left, right)), constant_values=int(rng.choice([0, 128, 255])))


def _softened(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = rng.uniform(0.3, 1) * max(grey.shape) / GLANCE
    return np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(radius)))


def _cropped(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = grey.shape
    top, bottom, left, right = rng.uniform(0, 0.12, 4)
    return grey[int(top * height) : height - int(bottom * height), int(left * width) : width - int(right * width)]


def _mirrored(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(grey[:, ::-1])


def _noisy(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(grey + rng.normal(0, rng.uniform(1, 5), grey.shape), 0, 255).astype(np.uint8)


VARIATIONS: Final = (
    _recompressed,
    _scaled,
    _toned,
    _turned,
    _bordered,
    _softened,
    _cropped,
    _mirrored,
    _noisy,
)


def varied(grey_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One or two of the changes that pictures undergo on their way to a report, and that change nothing in them."""
    for i in rng.choice(len(VARIATIONS), rng.integers(1, 3), replace=False):
        grey_HW = VARIATIONS[i](grey_HW, rng)
    return grey_HW
