"""Weights from safetensors: names, shapes and types of all files are checked from their headers before data is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decoder.attention import FullAttentionConfig
from decoder.latent import LatentAttentionConfig
from decoder.moe import Router
from decoder.open.configs import OpenConfig
from decoder.open.errors import CheckpointError
from decoder.open.settings import Settings

if TYPE_CHECKING:
    from decoder.open.model import OpenDecoder

INDEX: Final = "model.safetensors.index.json"
TYPES: Final = ("F64", "F32", "F16", "BF16")
SHOWN: Final = 5  # names of a kind in a message


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint goes: one of the model's, or a part of one that is fused of several."""

    tensor: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]


def places(model: OpenDecoder) -> dict[str, Place]:
    """The tensors that a checkpoint of the model must have, by name."""
    config = model.config
    found = {}
    for name, tensor in model.state_dict().items():
        for theirs, part in _parts(name, tensor, config):
            shape = tensor[part].shape if part else tensor.shape
            found[theirs] = Place(name, part, tuple(shape))
    return found


# Names within a layer; what is not here is fused of several of theirs, or is called alike.
NAMES: Final = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q": "self_attn.q_proj",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "feed_forward.router": "mlp.gate",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.shared.w2": "mlp.shared_experts.down_proj",
}


def _parts(name: str, tensor: Tensor, config: OpenConfig) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """Names of the tensors that make up one of the model's, and the part of it that each is."""
    if not name.startswith("layers."):
        outer = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
        yield outer.get(name, f"model.{name}"), ()
        return
    _, layer, inner = name.split(".", 2)
    module, _, own = inner.rpartition(".")
    prefix, latent = f"model.layers.{layer}.", isinstance(config.attention, LatentAttentionConfig)
    if own == "balance_E":
        yield f"{prefix}mlp.gate.e_score_correction_bias", ()
    elif module == "attention.q_norm":
        yield f"{prefix}self_attn.{'q_a_layernorm' if latent else 'q_norm'}.{own}", ()
    elif module == "attention.qkv":
        assert isinstance(config.attention, FullAttentionConfig)
        yield from _rows(f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"), config.attention.split, own)
    elif module in ("feed_forward.w13", "feed_forward.shared.w13"):
        outer_module = "mlp." if module == "feed_forward.w13" else "mlp.shared_experts."
        yield from _rows(prefix + outer_module, ("gate_proj", "up_proj"), (len(tensor) // 2,) * 2, own)
    elif module == "feed_forward.experts":
        for expert in range(len(tensor)):
            theirs = f"{prefix}mlp.experts.{expert}."
            if own == "w2_EDI":
                yield f"{theirs}down_proj.weight", (expert,)
            else:
                for part, rows in _rows(theirs, ("gate_proj", "up_proj"), (tensor.shape[1] // 2,) * 2, "weight"):
                    yield part, (expert, *rows)
    else:
        yield f"{prefix}{NAMES[module]}.{own}", ()


def _rows(
    prefix: str, names: tuple[str, ...], counts: tuple[int, ...], own: str
) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Tensors of which one is stacked row by row."""
    start = 0
    for name, count in zip(names, counts, strict=True):
        yield f"{prefix}{name}.{own}", (slice(start, start + count),)
        start += count


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
    for name, tensor in model.state_dict().items():
        kept = torch.float32 if name.rpartition(".")[0] in gates else dtype
        state[name] = torch.empty(tensor.shape, dtype=kept, device=device)
    for file in sorted(set(where.values())):
        try:
            with safe_open(file, "pt") as opened:
                for name in (name for name, its in where.items() if its == file):
                    place = expected[name]
                    state[place.tensor][place.part].copy_(opened.get_tensor(name))
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
        return config.tied
    drafts = range(config.layers, config.layers + config.draft_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in drafts)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
