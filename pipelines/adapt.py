"""A model for an owner's product line from 50 to 500 labelled images.

The manifest is checked whole, a part of its groups is held out, an adapter to a base model is trained on the rest, and
what was held out calibrates confidences and the domain flag. What comes out is a model of its own in the store: a small
file of weights, and settings that name the base by its SHA-256. The base stays as it is.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from encoders.adapter import AdapterConfig, load_adapter
from pipelines import ingest
from pipelines.adapted import Adapted
from pipelines.build import HALF, LEAST, fit_evidence
from pipelines.domain import DomainModel, learn_line
from pipelines.evaluation.detection import match
from pipelines.evaluation.predictions import Prediction
from pipelines.evaluation.scoring import score
from pipelines.inputs import colourfulness, read_grey
from pipelines.look import Seen
from pipelines.manifest import Case, Fault, ManifestError, read_manifest, terms_of
from pipelines.model import ModelConfig, ScanScribeModel
from pipelines.own_line import OwnLine, inspection_size
from pipelines.reader import Reader
from pipelines.reading import NotFiniteError, Reading
from pipelines.store import (
    DOMAIN,
    SETTINGS,
    WEIGHTS,
    Base,
    Calibration,
    StoredModel,
    find,
    home,
    save_settings,
    stored_models,
)
from pipelines.study import ImageStudy
from pipelines.training.adapt import STREAM, fitted, train_adapter
from pipelines.training.run import Run, load_recipe
from pipelines.training.streams import load_stream
from pipelines.weights import load_into
from reports.files import atomic_write
from reports.taxonomy import PRODUCT_LINES, ProductLine

LEAST_IMAGES: Final = 50
LEAST_OF_TYPE: Final = 8  # images that show a type
LEAST_GROUPS: Final = 10  # of which some are held out
HELD_OUT: Final = 0.2  # share of the images that calibrates, by group
VERSION: Final = "1.0"
NAMES: Final = re.compile(r"\w[\w .,/()+-]{0,59}")  # of lines and types: words that a report can say
FIGURES: Final = ("map_50", "f1_reported", "image_type_accuracy", "presence_auroc", "ece_detections")

Listener = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


class AdaptError(ValueError):
    """Nothing can be adapted so; the message says what is missing or in the way."""

    code = "adapt"


@dataclass(frozen=True, slots=True)
class Examples:
    """The labelled images, divided."""

    line: OwnLine
    train: list[Case]
    held_out: list[Case]  # whole groups
    unlabelled: int  # images of the manifest without labels, which are left out


def adapt(
    data: Path,
    *,
    model: str | Path = "default",
    name: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Listener = lambda what, done, total: None,
) -> StoredModel:
    """Makes the adapted model `name` (by default called like the line) in the store, or in the folder `out`.

    `data` is a manifest, or its folder. `overrides` change the recipe `adapt`. Raises `ManifestError` with every fault
    of the manifest, `AdaptError` for too little data or a name that is taken, `ModelError`, ValueError for a wrong
    override or checkpoint, and `DivergedError`.
    """
    base = find(model)
    if base.base is not None:
        raise AdaptError(
            f"{base.name} is an adapted model itself: give the one that it adapts, --model {base.base.name}"
        )
    try:
        recipe = load_recipe("adapt", overrides)
    except ValueError as error:
        raise AdaptError(str(error)) from None
    manifest = data / "manifest.jsonl" if data.is_dir() else data
    line = own_terms(manifest, name)
    folder, name = _place(name or _slug(line.name), out)
    base.verify()
    examples = divide(manifest, line, recipe["seed"])
    reader = Reader.load(base.folder, device)
    if reader.device.type == "cuda" and not any(each.startswith("steps=") for each in overrides):
        recipe |= {"steps": recipe["gpu_steps"]}
    recipe = fitted(recipe, examples.line.longest, whole=bool(examples.line.weak))
    recipe |= {"data": hashlib.sha256(manifest.read_bytes()).hexdigest(), "base": base.weights_sha256}
    try:
        run = _Told(folder / "training", recipe, resume=resume, progress=progress)
    except ValueError as error:
        raise AdaptError(str(error)) from None

    network = ScanScribeModel(ModelConfig.from_dict(base.config))
    load_into(network, base.weights)
    detector = network.detectors[0].to(reader.device)
    stream = load_stream(STREAM, examples.train, longest=examples.line.longest, own_types=examples.line.types)
    state = train_adapter(run, stream, detector, examples.line.types, reader.device)
    state = {key: value.half().cpu().contiguous() for key, value in state.items()}

    config = AdapterConfig(len(examples.line.types), recipe["rank"])
    own = load_adapter(detector, config, {key: value.float() for key, value in state.items()})
    progress("Learning what its pictures look like", 0, 0)
    domain = learn_line(reader.model.glance, reader.domain, examples.line.name, examples.train, examples.held_out)
    calibration, figures = _calibrate(_with(reader, own, examples.line, domain), examples, progress)

    save_file(state, folder / WEIGHTS)
    domain.only(examples.line.name).save(folder / DOMAIN)
    adapted = _facts(examples, figures, run)
    atomic_write(folder / "MODEL_CARD.md", _card(name, base, examples, adapted))
    save_settings(
        folder,
        name=name,
        version=VERSION,
        config=asdict(config),
        calibration=calibration,
        base=Base(base.name, base.version, base.weights_sha256, str(base.folder.resolve())),
        own_line=examples.line,
        adapted=adapted,
    )
    run.checkpoint.unlink(missing_ok=True)  # what it was for is done
    return find(folder)


def own_terms(manifest: Path, name: str | None = None) -> ProductLine:
    """The product line and types that a manifest names: its `product`, or the model's `name` where it has none.

    Raises `ManifestError`.
    """
    products, types = terms_of(manifest)
    faults = [
        Fault(0, f"{what} {word!r} cannot be used in a report: give words of at most 60 letters, digits and spaces")
        for what, words in (("product", products), ("type", types))
        for word in words
        if not NAMES.fullmatch(word)
    ]
    if len(products) > 1:
        faults.append(Fault(0, f"names several products ({', '.join(products)}); give each line a manifest of its own"))
    if not products and not name:
        faults.append(Fault(0, "names no product; give each line a 'product', or the model a --name"))
    if not types:
        faults.append(Fault(0, 'labels no finding; give lines \'findings\' with types, such as [{"type": "dent"}]'))
    if faults:
        raise ManifestError(manifest, faults)
    product = products[0] if products else str(name)
    known = next((line for line in PRODUCT_LINES if product in (line.name, line.title)), None)
    return ProductLine(known.name if known else product, product, types)


def divide(manifest: Path, line: ProductLine, seed: int) -> Examples:
    """Reads the manifest and holds a part out: its split `val` where it has one, else groups by chance.

    Raises `ManifestError` with every fault, and `AdaptError` for too little data.
    """
    every = read_manifest(manifest, lines=(line,))
    cases = [case for case in every if case.finding_types is not None]
    shapes, colours = _look_at_files(manifest, cases)
    enough(cases, line.types)
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    held_out = [case for case in cases if case.split == "val"]
    if not held_out or len(held_out) == len(cases):
        held_out = hold_out(list(groups.values()), seed)
    held = {case.id for case in held_out}
    boxed = Counter(box.type for case in cases for box in case.boxes)
    boxless = Counter(
        name for case in cases for name in set(case.finding_types or ()) - {box.type for box in case.boxes}
    )
    weak = tuple(name for name in line.types if boxless[name] >= boxed[name])
    sides = [
        min(b.bbox[2] - b.bbox[0], b.bbox[3] - b.bbox[1]) / max(shapes[c.id])
        for c in cases
        for b in c.boxes
        if b.type not in weak
    ]
    longest = inspection_size([] if weak else sides, [max(shape) for shape in shapes.values()])
    own = OwnLine(line.name, line.types, weak, longest, colour=round(float(np.percentile(colours, 95)), 1))
    train = [case for case in cases if case.id not in held]
    return Examples(own, train, held_out, len(every) - len(cases))


def enough(cases: Sequence[Case], types: Sequence[str]) -> None:
    """Raises `AdaptError` that says what would be needed, all of it at once."""
    shown = Counter(name for case in cases for name in case.finding_types or ())
    groups = len({case.group for case in cases})
    needs = []
    if len(cases) < LEAST_IMAGES:
        needs.append(
            f"at least {LEAST_IMAGES} labelled images: there are {len(cases)}, {LEAST_IMAGES - len(cases)} more"
        )
    if groups < LEAST_GROUPS:
        needs.append(f"images of at least {LEAST_GROUPS} groups (parts, strips, lots): there are {groups}")
    needs += [
        f"at least {LEAST_OF_TYPE} images that show {name!r}, best with a box each: there are {shown[name]}, "
        f"{LEAST_OF_TYPE - shown[name]} more; or leave that type out"
        for name in types
        if shown[name] < LEAST_OF_TYPE
    ]
    if needs:
        raise AdaptError("\n  ".join(["too little data to adapt to; it would take", *needs]))


def hold_out(groups: Sequence[Sequence[Case]], seed: int) -> list[Case]:
    """Whole groups, by chance, until every type has its share held out and a fifth of the images is."""
    order = list(groups)
    random.Random(seed).shuffle(order)
    total = sum(map(len, order))
    shown = Counter(name for group in order for case in group for name in case.finding_types or ())
    wanted = {name: max(2, round(HELD_OUT * count)) for name, count in shown.items()}
    held: list[Case] = []
    for rare_first in (True, False):
        for group in list(order):
            types = {name for case in group for name in case.finding_types or ()}
            if rare_first and not any(wanted[name] > 0 for name in types):
                continue
            if len(held) >= HELD_OUT * total and not (rare_first and len(held) < 2 * HELD_OUT * total):
                break
            held += group
            order.remove(group)
            for case in group:
                for name in case.finding_types or ():
                    wanted[name] -= 1
    return held


class _Told(Run):
    """A run that tells a listener, and keeps its log, where training prints."""

    def __init__(self, out: Path, recipe: dict[str, Any], *, resume: bool, progress: Listener) -> None:
        super().__init__(out, recipe, resume=resume)
        self._progress = progress
        progress("Adapting", 0, recipe["steps"])

    def tell(self, record: dict[str, Any]) -> None:
        self._progress("Adapting", record["step"], self.recipe["steps"])


def _look_at_files(manifest: Path, cases: Sequence[Case]) -> tuple[dict[str, tuple[int, ...]], list[float]]:
    """Height and width of each picture, and how colourful it is. Raises `ManifestError` for those that do not open."""
    faults, shapes, colours = [], {}, []
    for case in cases:
        for path in filter(None, (case.image, case.template)):
            try:
                grey = read_grey(path)
            except (OSError, ValueError, Image.DecompressionBombError):
                faults.append(Fault(case.line, f"{path.name} cannot be read as a picture; give PNG, JPEG, TIFF or BMP"))
                continue
            if path == case.image:
                shapes[case.id] = grey.shape
                with Image.open(path) as image:
                    colour = image.mode not in ("1", "L", "LA") and not image.mode.startswith("I")
                    colours.append(colourfulness(np.asarray(image.convert("RGB"))) if colour else 0.0)
    if faults:
        raise ManifestError(manifest, faults)
    return shapes, colours


def _place(name: str, out: Path | None) -> tuple[Path, str]:
    """The folder of the new model and what it is called. Raises `AdaptError` for one that is taken."""
    folder = out or home() / "models" / name
    name = folder.resolve().name if out else name
    if not NAMES.fullmatch(name) or "/" in name:
        raise AdaptError(f"{name!r} is no name for a model; give --name letters, digits and hyphens")
    if (folder / SETTINGS).exists():
        raise AdaptError(f"{folder} holds a model already; give another --name or --out, or remove that folder")
    if out is None and name in {stored.folder.name for stored in stored_models()}:
        raise AdaptError(f"there is a model {name!r} already; give another --name")
    return folder, name


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-") or "adapted"


def _with(reader: Reader, detector: Any, line: OwnLine, domain: DomainModel) -> Reader:
    """The base's reader with the adapter, uncalibrated."""
    own = ProductLine(line.name, line.name, line.types)
    lines = (*(each for each in PRODUCT_LINES if each.name != line.name), own)
    return Reader(
        reader.model,
        Calibration(),
        reader.info,
        reader.device,
        domain,
        Adapted.ready(line, detector, reader.device),
        lines,
    )


def _calibrate(reader: Reader, examples: Examples, progress: Listener) -> tuple[Calibration, dict[str, Any]]:
    """Confidences and the report's threshold from what was held out, and figures on the same images."""
    name, cases, seen = examples.line.name, examples.held_out, []
    for done, case in enumerate(cases):
        progress("Calibrating on what was held out", done, len(cases))
        golden = None if case.template is None else _study(case.template)
        seen.append(reader.look(_study(case.image), kind="defect", reference=golden))
    hits, scores, labels = _hits(examples, _written(reader, seen))
    reader.calibration = Calibration(evidence={name: fit_evidence(hits, scores)})
    sure = np.array(reader.confidences(scores, name))
    least = max(LEAST, key=lambda t: 2 * np.sum(np.asarray(hits)[sure >= t]) / max(1, labels + np.sum(sure >= t)))
    reader.calibration = calibration = replace(reader.calibration, report={name: least})
    again = _written(reader, seen)
    answers = [Prediction.from_reading(case.id, reading) for case, reading in zip(cases, again, strict=True)]
    metrics = score(cases, answers)["metrics"]
    figures = {key: metrics[key] for key in FIGURES if key in metrics and metrics[key]["value"] is not None}
    strange = sum("out-of-domain" in reading.quality_flags for reading in again)
    elsewhere = sum(reading.product_line != name for reading in again)
    return calibration, {"metrics": figures, "flagged": strange, "taken_for_another_line": elsewhere}


def _written(reader: Reader, seen: Sequence[Seen]) -> list[Reading]:
    readings = reader.write(seen)
    for reading in readings:
        if isinstance(reading, NotFiniteError):
            raise reading
    return [reading for reading in readings if isinstance(reading, Reading)]


def _hits(examples: Examples, readings: Sequence[Reading]) -> tuple[list[bool], list[float], int]:
    """Of everything that was found whether it is right (boxes at IoU 0.5, types without boxes by the image), its score,
    and how many there are to find."""
    cases, weak = examples.held_out, examples.line.weak
    answers = [Prediction.from_reading(case.id, r).findings for case, r in zip(cases, readings, strict=True)]
    boxes = [[box for box in case.boxes if box.type not in weak] for case in cases]
    matches = match(boxes, [[f for f in found if f.type not in weak] for found in answers]).values()
    pairs = [pair for m in matches for pair in zip(m.hit[HALF].tolist(), m.raw.tolist(), strict=True)]
    for case, found in zip(cases, answers, strict=True):
        pairs += [(f.type in (case.finding_types or ()), float(f.raw_confidence or 0)) for f in found if f.type in weak]
    labels = sum(map(len, boxes)) + sum(name in weak for case in cases for name in case.finding_types or ())
    return [bool(hit) for hit, _ in pairs], [score for _, score in pairs], labels


def _study(path: Path) -> ImageStudy:
    """A picture as reports read it. Raises `AdaptError` where they refuse it."""
    study = ingest.load(ingest.plan([path]).units[0])
    if not isinstance(study, ImageStudy):
        raise AdaptError(f"{path.name} is refused by reports: {study.reason}; leave it out of the manifest")
    return study


def _facts(examples: Examples, figures: dict[str, Any], run: Run) -> dict[str, Any]:
    """What `model.json` keeps of how the model came to be."""
    held = examples.held_out
    return {
        "trained_on": {"images": len(examples.train), "groups": len({case.group for case in examples.train})},
        "held_out": {"images": len(held), "groups": len({case.group for case in held})},
        "unlabelled": examples.unlabelled,
        "images_of_type": {
            name: [sum(name in (case.finding_types or ()) for case in cases) for cases in (examples.train, held)]
            for name in examples.line.types
        },
        "recipe": {key: value for key, value in run.recipe.items() if key != "streams"},
        **figures,
        "note": how_sure(examples, figures),
    }


def how_sure(examples: Examples, figures: dict[str, Any]) -> str:
    """A sentence on how far the calibration can be trusted."""
    held = examples.held_out
    groups = len({case.group for case in held})
    # The rule of three: with nothing wrong in n, up to 3/n may be wrong.
    unseen = min(1.0, 3 / max(1, len(held)))
    words = (
        f"Confidences, the report's threshold and the domain flag rest on {len(held)} held-out images in {groups} "
        "groups, and the figures are of the same images, so that they lie somewhat high. Even a mistake that none of "
        f"them shows may occur in up to {math.ceil(100 * unseen)}% of pictures."
    )
    few = [name for name in examples.line.types if sum(name in (c.finding_types or ()) for c in held) < 5]
    return words + (f" Fewer than five of them show: {', '.join(few)}." if few else "")


def _card(name: str, base: StoredModel, examples: Examples, adapted: dict[str, Any]) -> str:
    """The model card: what it is, on what it was made, what was measured."""

    def cell(row: dict[str, Any]) -> str:
        text = f"{row['value']:.3f}"
        return f"{text} ({row['ci95'][0]:.3f} to {row['ci95'][1]:.3f})" if row["ci95"] else text

    from pipelines.evaluation.names import name_of

    line = examples.line
    types = "\n".join(f"| {each} | {a} | {b} |" for each, (a, b) in adapted["images_of_type"].items())
    rows = "\n".join(f"| {name_of(key)} | {cell(row)} |" for key, row in adapted["metrics"].items())
    weak = f" Without boxes, told from the whole picture: {', '.join(line.weak)}." if line.weak else ""
    return f"""# Model card: {name} {VERSION}

{base.name} {base.version} (weights `{base.weights_sha256[:12]}`) with an adapter to a product line: **{line.name}**.
**Every report is a draft for a qualified person.** The detector learned the line from its owner's images; the decoder
did not, so that reports on it are worded by the catalogue. All other lines are read as {base.name} reads them.

| type | images trained on | images held out |
|---|---|---|
{types}

Pictures are inspected at {line.longest} px{", in four mirror images" if line.mirrored else ""}.{weak}

| figure on the held-out images | value (95 % interval) |
|---|---|
{rows}

{adapted["note"]}
Held-out images flagged as unlike the line: {adapted["flagged"]}; taken for another line: \
{adapted["taken_for_another_line"]}, of {adapted["held_out"]["images"]}.
"""
