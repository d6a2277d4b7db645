"""Weights from safetensors: names, shapes and types of all files are checked from their headers before data is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decoder.open.configs import DeepseekConfig
from decoder.open.errors import CheckpointError
from decoder.open.layers import Experts, Router
from decoder.open.settings import Settings

if TYPE_CHECKING:
    from decoder.open.model import OpenDecoder

INDEX: Final = "model.safetensors.index.json"
TYPES: Final = ("F64", "F32", "F16", "BF16")
SHOWN: Final = 5  # names of a kind in a message


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint goes: a parameter, or a part of one that holds all experts."""

    parameter: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]


def places(model: OpenDecoder) -> dict[str, Place]:
    """The tensors that a checkpoint of the model must have, by name."""
    found = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            if isinstance(module, Experts):
                for projection, place in _parts(name, own, parameter):
                    expert = place.part[0]
                    found[f"model.{path}.{expert}.{projection}.weight"] = place
            else:
                prefix = "" if path == "lm_head" else "model."
                found[prefix + name] = Place(name, (), tuple(parameter.shape))
    return found


def _parts(name: str, own: str, parameter: Tensor) -> Iterator[tuple[str, Place]]:
    experts, rows, columns = parameter.shape
    for expert in range(experts):
        if own == "w2_EDI":
            yield "down_proj", Place(name, (expert,), (rows, columns))
        else:
            half = rows // 2
            yield "gate_proj", Place(name, (expert, slice(0, half)), (half, columns))
            yield "up_proj", Place(name, (expert, slice(half, rows)), (half, columns))


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or all."""
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError("missing-file", folder, f"has neither {INDEX} nor any *.safetensors file")
        return files
    named = Settings.read(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError("damaged-file", index, '"weight_map" must name a file for each tensor')
    files = []
    for name in sorted(set(named.values())):
        if Path(name).name != name:
            raise CheckpointError("damaged-file", index, f"{name!r} is not a file's name in the same folder")
        files.append(folder / name)
        if not files[-1].is_file():
            held = [tensor for tensor, file in named.items() if file == name]
            raise CheckpointError(
                "missing-file", index, f"{name} is not there; expected it to hold {_listed(held)}", tuple(held)
            )
    return files


def load_state(model: OpenDecoder, folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The state of a model that was made on the meta device, with gates in fp32 and all else in `dtype`.

    Raises CheckpointError; nothing is read before all tensors are known to be there in the right shape.
    """
    expected = places(model)
    where = check(model, expected, folder, shards(folder))
    gates = {path for path, module in model.named_modules() if isinstance(module, Router)}
    state = {}
    for name, parameter in model.named_parameters():
        kept = torch.float32 if name.rpartition(".")[0] in gates else dtype
        state[name] = torch.empty(parameter.shape, dtype=kept, device=device)
    for file in sorted(set(where.values())):
        try:
            with safe_open(file, "pt") as opened:
                for name in (name for name, its in where.items() if its == file):
                    place = expected[name]
                    state[place.parameter][place.part].copy_(opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError("damaged-file", file, f"cannot be read: {error}") from error
    return state


def check(model: OpenDecoder, expected: dict[str, Place], folder: Path, files: list[Path]) -> dict[str, Path]:
    """The file of each expected tensor; raises CheckpointError for all that differs at once."""
    where: dict[str, Path] = {}
    extra, wrong = [], []
    names: list[str] = []
    for file in files:
        for name, shape, kind in _header(file):
            place = expected.get(name)
            if place is None:
                if not _is_spare(model, name):
                    extra.append(f"{name} in {file.name}")
                    names.append(name)
                continue
            if name in where:
                wrong.append(f"{name} is in {where[name].name} and in {file.name}: expected once")
                names.append(name)
            elif shape != place.shape:
                wrong.append(f"{name} in {file.name} has the shape {list(shape)}: expected {list(place.shape)}")
                names.append(name)
            elif kind not in TYPES:
                wrong.append(f"{name} in {file.name} is of type {kind}: expected one of {', '.join(TYPES)}")
                names.append(name)
            where[name] = file
    missing = [name for name in expected if name not in where]
    problems = [
        *([f"{len(missing)} missing: {_listed(missing)}"] if missing else []),
        *([f"{len(extra)} not expected: {_listed(extra)}"] if extra else []),
        *([f"{len(wrong)} wrong: {_listed(wrong)}"] if wrong else []),
    ]
    if problems:
        file = files[0] if len(files) == 1 else folder
        raise CheckpointError(
            "tensor-mismatch",
            file,
            f"its tensors are not those that config.json asks for; {'; '.join(problems)}",
            tuple(missing + names),
        )
    return where


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor in a file."""
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_slice(name)
                yield name, tuple(tensor.get_shape()), tensor.get_dtype()
    except (SafetensorError, OSError) as error:
        raise CheckpointError("damaged-file", file, f"is no whole safetensors file: {error}") from error


def _is_spare(model: OpenDecoder, name: str) -> bool:
    """Tensors that do not take part: a copy of tied embeddings, and DeepSeek-V3's layers that draft further tokens."""
    config = model.config
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    if not isinstance(config, DeepseekConfig):
        return False
    drafts = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in drafts)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
