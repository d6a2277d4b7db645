"""Manifests: the JSON-lines files that name the images of a data set, their split and their labels.

Training and evaluation read their data through `read_manifest`, which either returns every case or names every
fault with its line. Only the standard library and Pillow's header reading are used, so that it runs on a bare machine.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from reports.taxonomy import CT_FIELDS, CT_TYPES, LINES, PRODUCT_LINES, ProductLine

Box = tuple[float, float, float, float]

_FILE_KEYS: Final = ("image", "template")
_READ_KEYS: Final = {"id", "split", "group", "product", "findings", *_FILE_KEYS, *CT_FIELDS}
_QUOTED: Final = 100  # faults listed in an exception's text; `ManifestError.faults` has them all
# Lines of which a published split divides what belongs together (DeepPCB's boards): there, that is only warned of.
_DIVIDED: Final = frozenset({"board"})


@dataclass(frozen=True, slots=True)
class BoxLabel:
    """One labelled finding with its place."""

    type: str  # a type of `reports.taxonomy`, or of an owner's line
    bbox: Box  # x0, y0, x1, y1 in the image's pixels; x1, y1 exclusive


@dataclass(frozen=True, slots=True)
class Case:
    """One line of a manifest. What a line does not say is absent here, never guessed."""

    id: str
    image: Path
    split: str | None
    group: str  # images that belong together (one patient, one part); the id where the line names no group
    kind: Literal["ct", "defect"] | None  # None: the line has no label that tells
    product_line: str | None  # "steel", "tile", "board", or an owner's own
    finding_types: tuple[str, ...] | None  # distinct, sorted; () is labelled as free of findings, None is not labelled
    boxes: tuple[BoxLabel, ...]  # of the findings that have one
    fields: dict[str, str]  # the known ones of `reports.taxonomy.CT_FIELDS`
    template: Path | None  # golden sample: the same view with no defect
    extra: dict[str, Any] = field(default_factory=dict)  # all other keys of the line, as they are
    line: int = 0  # of the manifest, from 1


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a manifest. `line` counts from 1; 0 is the file as a whole."""

    line: int
    message: str
    data_set: str = ""  # the manifest's folder, where several are read together

    def __str__(self) -> str:
        place = [self.data_set] * bool(self.data_set) + [f"line {self.line}"] * bool(self.line)
        return f"{', '.join(place)}: {self.message}" if place else self.message


class ManifestError(ValueError):
    """A manifest that cannot be used; `faults` has all that is wrong with it."""

    code = "manifest-fault"

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(str(path), faults))


class ManifestWarning(UserWarning):
    """A manifest that can be used, but whose figures need care."""


def _listed(what: str, faults: Sequence[Fault]) -> str:
    """A line for each fault, up to a cap; one fault stands behind `what`."""
    if len(faults) == 1:
        return f"{what}: {faults[0]}"
    more = [f"and {len(faults) - _QUOTED:,} more"] * (len(faults) > _QUOTED)
    return "\n  ".join([f"{what}: {len(faults):,} faults", *map(str, faults[:_QUOTED]), *more])


def read_manifest(
    path: Path, *, split: str | None = None, lenient: bool = False, lines: Sequence[ProductLine] = PRODUCT_LINES
) -> list[Case]:
    """All cases of the manifest at `path` (of one `split` if given), in the order of its lines.

    `lines` are the product lines and types that a label may name; those of an owner may have types without boxes.

    Paths in a line are relative to the manifest's folder. Boxes may leave the image by up to 1 px (rounding in the
    tool that drew them) and are clipped to it. The size comes from the image's header where Pillow knows the format,
    else from the line's `width` and `height`; without either a box is only checked to be one.

    Raises `ManifestError` with every fault of the file, also of lines outside `split`. `lenient`, for scoring, only
    warns (`ManifestWarning`) of labels that cannot be used, which are left out, of files that are not there, and of
    groups in several splits: one faulty line does not cost the answers for all others. A group of boards in several
    splits is only warned of in any case, since the published split of DeepPCB divides them.
    """
    cases: list[Case] = []
    faults: list[Fault] = []
    unusable: list[Fault] = []  # labels and files of lines that are cases all the same
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        case, problems = _read_line(line, path.parent, lines)
        if case is not None:
            if (seen := line_of_id.setdefault(case.id, number)) != number:
                faults.append(Fault(number, f"id is already used on line {seen}; ids must be unique"))
            cases.append(replace(case, line=number))
        (faults if case is None else unusable).extend(Fault(number, problem) for problem in problems)

    divided = _divided_groups(cases)
    tolerated = [fault for case, fault in divided if lenient or case.product_line in _DIVIDED]
    if not lenient:
        unusable += [fault for case, fault in divided if case.product_line not in _DIVIDED]
        faults = sorted([*faults, *unusable], key=lambda fault: fault.line)
    elif unusable:
        warnings.warn(_listed(f"{path}: left out or missing", unusable), ManifestWarning, stacklevel=2)
    if not faults and not cases:
        faults.append(Fault(0, "has no lines; give at least one case"))
    splits = sorted({case.split for case in cases if case.split is not None})
    if not faults and split is not None and split not in splits:
        faults.append(Fault(0, f"has no case in split {split!r}; its splits are: {', '.join(splits) or 'none'}"))
    if faults:
        raise ManifestError(path, faults)
    if tolerated:
        care = f"{path}: groups in several splits, so that figures on such a split flatter the model"
        warnings.warn(_listed(care, tolerated), ManifestWarning, stacklevel=2)
    return [case for case in cases if split is None or case.split == split]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise ManifestError(path, [Fault(0, f"{reason}; give a file of JSON lines")]) from None


def terms_of(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The products and the finding types that a manifest names, each sorted: an owner's own words.

    Lines that cannot be read are left to `read_manifest`. Raises `ManifestError` for a file that cannot be.
    """
    products: set[str] = set()
    types: set[str] = set()
    for line in _text_of(path).split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        findings = record.get("findings")
        named = [f.get("type") if isinstance(f, dict) else f for f in findings] if isinstance(findings, list) else []
        products |= {value for value in [record.get("product")] if isinstance(value, str) and value}
        types |= {name for name in named if isinstance(name, str) and name}
    return tuple(sorted(products)), tuple(sorted(types))


def read_data_sets(
    folder: Path, *, lenient: bool = False, lines: Sequence[ProductLine] = PRODUCT_LINES
) -> dict[str, list[Case]]:
    """The cases of every `*/manifest.jsonl` below `folder`, by the name of its folder.

    Raises `ManifestError` with the faults of all manifests together, or when there is no manifest.
    """
    sets: dict[str, list[Case]] = {}
    faults: list[Fault] = []
    manifests = sorted(folder.glob("*/manifest.jsonl"))
    for manifest in manifests:
        name = manifest.parent.name
        try:
            sets[name] = read_manifest(manifest, lenient=lenient, lines=lines)
        except ManifestError as error:
            faults += [Fault(fault.line, fault.message, name) for fault in error.faults]
    if not manifests:
        faults.append(Fault(0, "has no data sets; give a folder of folders with a manifest.jsonl each"))
    if faults:
        raise ManifestError(folder, faults)
    return sets


def groups_in_several_splits(cases: Iterable[Case]) -> int:
    """How many groups have cases in more than one split."""
    splits_of: dict[str, set[str | None]] = {}
    for case in cases:
        splits_of.setdefault(case.group, set()).add(case.split)
    return sum(len(splits) > 1 for splits in splits_of.values())


def _divided_groups(cases: Sequence[Case]) -> list[tuple[Case, Fault]]:
    """For each further split that a group is in, its first case there, and the fault."""
    seen: dict[str, dict[str | None, int]] = {}
    divided = []
    for case in cases:
        line_of_split = seen.setdefault(case.group, {})
        if case.split not in line_of_split:
            line_of_split[case.split] = case.line
            first, first_line = next(iter(line_of_split.items()))
            if first != case.split:
                message = f"group {case.group!r} is in split {case.split!r} here, in {first!r} on line {first_line}"
                divided.append((case, Fault(case.line, f"{message}; images that belong together must share a split")))
    return divided


def _read_line(line: str, folder: Path, known: Sequence[ProductLine]) -> tuple[Case | None, list[str]]:
    """The case of one line (None when it has no usable id) and what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, [f"is not JSON ({getattr(error, 'msg', 'nested too deeply')})"]
    if not isinstance(record, dict):
        return None, ["is not a JSON object"]

    problems: list[str] = []
    texts = {key: _text(record, key, problems) for key in ("id", "split", "group", "product", *_FILE_KEYS)}
    for key in ("id", "image"):
        if record.get(key) is None:
            problems.append(f"has no {key!r}")
    files = {key: _file(folder, key, texts[key], problems) for key in _FILE_KEYS}
    fields = _fields(record, problems)
    size = _image_size(files["image"], record) if record.get("findings") else None
    types, boxes = _findings(record.get("findings"), size, known, problems)

    # An owner may call a defect as the taxonomy calls a finding of CT.
    of_ct = {t for t in types or () if t in CT_TYPES and (fields or not any(t in each.types for each in known))}
    defects = [name for name in types or () if name not in of_ct]
    lines = {each.name for each in known if set(defects) <= set(each.types)} if defects else set()
    if defects and not lines:
        lines = {next(each.name for each in known if name in each.types) for name in defects}
    if product := texts["product"]:
        named = {each.name for each in known if product in (each.name, each.title)}
        if not named:
            problems.append(f"product {product!r} is unknown; known are: {', '.join(_products(known))}")
        lines = named if named <= lines or not lines else named | lines
    elif len(lines) > 1 and all(set(defects) <= set(each.types) for each in known if each.name in lines):
        lines = {max(lines, key=lambda name: [each.name for each in known].index(name))}  # an owner's line comes last
    is_ct = bool(fields or of_ct)
    if len(lines) + is_ct > 1:
        problems.append(f"labels of different kinds in one case: {', '.join(sorted(lines) + ['ct'] * is_ct)}")

    if not texts["id"]:
        return None, problems
    case = Case(
        id=texts["id"],
        image=files["image"] or folder,
        split=texts["split"],
        group=texts["group"] or texts["id"],
        kind="ct" if is_ct else "defect" if lines else None,
        product_line=min(lines, default=None),
        finding_types=types,
        boxes=boxes,
        fields=fields,
        template=files["template"],
        extra={key: value for key, value in record.items() if key not in _READ_KEYS},
    )
    return case, problems


def _products(known: Sequence[ProductLine]) -> list[str]:
    return [*(each.title for each in known), *(each.name for each in known if each.name != each.title)]


def _text(record: Mapping[str, Any], key: str, problems: list[str]) -> str | None:
    value = record.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    problems.append(f"{key!r} must be text that is not empty")
    return None


def _file(folder: Path, key: str, name: str | None, problems: list[str]) -> Path | None:
    if name is None:
        return None
    try:
        found = (folder / name).is_file()
    except OSError:  # such as a name longer than the file system takes
        found = False
    if not found:
        problems.append(f"{key} {name!r} is not a file; paths are relative to the manifest's folder")
    return folder / name


def _fields(record: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, allowed in CT_FIELDS.items():
        value = record.get(key)
        if value is None or value == "unknown":
            continue
        word = str(value).lower() if isinstance(value, bool) else value
        if word in allowed:
            fields[key] = word
        else:
            problems.append(f"{key} {value!r} is unknown; known are: {', '.join(allowed)}, unknown")
    return fields


def _findings(
    findings: object, size: tuple[int, int] | None, known: Sequence[ProductLine], problems: list[str]
) -> tuple[tuple[str, ...] | None, tuple[BoxLabel, ...]]:
    """Distinct types and boxes of a line's `findings`: CT types as words, or `{"type", "bbox"}` for any type."""
    if findings is None:
        return None, ()
    if not isinstance(findings, list):
        problems.append("'findings' must be a list, or null where the image is not labelled")
        return None, ()
    types: set[str] = set()
    boxes: list[BoxLabel] = []
    for position, finding in enumerate(findings, start=1):
        name = finding.get("type") if isinstance(finding, dict) else finding
        of_lines = [each.name for each in known if name in each.types]
        if not isinstance(name, str) or not (of_lines or name in CT_TYPES):
            problems.append(
                f"finding {position} has the unknown type {name!r}; types are listed in reports/taxonomy.py"
            )
            continue
        types.add(name)
        given = finding.get("bbox") if isinstance(finding, dict) else None
        if given is None:
            if of_lines and set(of_lines) <= set(LINES):
                problems.append(f"finding {position} ({name}) has no bbox; defects need one")
        elif (box := _box(given, size)) is None:
            within = f" within {size[0]} x {size[1]} px" if size else ""
            problems.append(f"finding {position} ({name}) has bbox {given!r}; it must be [x0, y0, x1, y1]{within}")
        else:
            boxes.append(BoxLabel(name, box))
    return tuple(sorted(types)), tuple(boxes)


def _box(given: object, size: tuple[int, int] | None) -> Box | None:
    """The box, clipped to the image; None when it is no box or leaves the image by more than 1 px."""
    if not isinstance(given, list) or len(given) != 4:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) < 1e9 for v in given):
        return None
    x0, y0, x1, y1 = map(float, given)
    if size is not None:
        width, height = size
        if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
            return None
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _image_size(image: Path | None, record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height from the header alone; None when neither the file nor the line tells."""
    if image is not None:
        try:
            with Image.open(image) as header:
                return header.size
        except (OSError, ValueError, Image.DecompressionBombError):
            pass  # not Pillow's to read (DICOM), or broken: whoever loads the image says so
    width, height = record.get("width"), record.get("height")
    if isinstance(width, int) and isinstance(height, int):
        return width, height
    return None
