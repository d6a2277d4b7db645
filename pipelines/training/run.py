"""What every recipe shares: the run's folder, its log, the schedule, the averaged weights and checkpoints."""

from __future__ import annotations

import copy
import json
import math
import os
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

RECIPES = Path(__file__).parent / "recipes"


class DivergedError(RuntimeError):
    """The loss or the weights became NaN or infinite; the message names the last good checkpoint."""

    code = "diverged"


def load_recipe(name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The recipe called `name` (or the TOML file at that path), with `key=value` overrides; `table.key` is in a table.

    Raises ValueError that names what there is.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}; there are: {', '.join(sorted(p.stem for p in RECIPES.glob('*.toml')))}")
    try:
        recipe = tomllib.loads(path.read_text())
        pattern = tomllib.loads((RECIPES / f"{recipe['kind']}.toml").read_text())
    except (tomllib.TOMLDecodeError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a recipe ({error}); start from a copy of one in {RECIPES}") from None
    if faults := set(recipe) ^ set(pattern):
        word = "lacks" if faults - set(recipe) else "has an unknown"
        raise ValueError(f"{path} {word} {', '.join(sorted(faults))}; its keys must be those of {recipe['kind']}.toml")
    for override in overrides:
        path_to, _, value = override.partition("=")
        *outer, key = path_to.split(".")
        table: Any = recipe
        for part in outer:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict) or key not in table:
            raise ValueError(f"recipe {name!r} has no {path_to!r}; it has: {', '.join(recipe)}")
        try:
            table[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            raise ValueError(f"{override!r}: {value!r} is no value as TOML has them, such as 2000 or 1e-3") from None
    return recipe


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 1%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and single vectors do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class Ema(Generic[Model]):
    """An exponential moving average of a model's weights and buffers, kept on the device."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self.mine = [a for a, _ in pairs if a.is_floating_point()]
        self.theirs = [b for a, b in pairs if a.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.mine, self.theirs, 1 - self.decay)


def capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`step` as a CUDA graph, and the tensor that each replay fills with its result.

    The warm-up really runs the step: set the learning rate to 0 before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


class Run:
    """A run's folder: `recipe.json`, `log.jsonl` and `checkpoint.pt`."""

    def __init__(self, out: Path, recipe: dict[str, Any], *, resume: bool, minutes: float = math.inf) -> None:
        """`minutes` bounds the time of the run, that before a checkpoint included.

        Raises ValueError when the folder holds a checkpoint that is not to be, or cannot be, gone on from.
        """
        self.out, self.recipe, self.limit_s = out, recipe, 60 * minutes
        self.started = time.perf_counter()
        if self.checkpoint.exists():
            if not resume:
                raise ValueError(f"{self.checkpoint} is there: add --resume to go on from it, or give another --out")
            # A run that diverged goes on with a lower learning rate; everything else must be as it was.
            kept = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)["recipe"]
            if kept | {"learning_rate": 0} != recipe | {"learning_rate": 0}:
                raise ValueError(f"{self.checkpoint} was written by another recipe; give another --out or remove it")
        else:
            (out / "log.jsonl").unlink(missing_ok=True)  # of a run that left nothing to go on from
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, that before a checkpoint included."""
        return time.perf_counter() - self.started

    def share(self, step: int) -> float:
        """How much of the run is done, 0 to 1: of its steps, or of its time where that is further.

        The schedule follows it, so that a run that is cut short by its time limit still ends with a low learning rate.
        """
        return min(1.0, max(step / self.recipe["steps"], self.seconds / self.limit_s))

    def start(self, step: int) -> float:
        """`share`, before the loop. Raises ValueError where the time is over before the first step."""
        if step == 0 and self.share(0) >= 1:
            raise ValueError(f"{self.seconds:.0f} s went before the first step; give more --minutes")
        return self.share(step)

    def log(self, **values: float | int | str) -> None:
        """Appends a line to the log and prints it."""
        record = {"seconds": round(self.seconds, 1), **values}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.tell(record)

    def tell(self, record: dict[str, Any]) -> None:
        """What a person sees of a line of the log."""
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)

    def save(self, step: int, parts: dict[str, Any]) -> None:
        """Writes the checkpoint whole or not at all. Raises `DivergedError` for weights that are not finite."""
        for part in parts.values():
            if isinstance(part, nn.Module) and not all(bool(p.isfinite().all()) for p in part.parameters()):
                raise self._diverged(f"weights are not finite at step {step}")
        temporary = self.checkpoint.with_suffix(".tmp")
        state = {"step": step, "seconds": self.seconds, "recipe": self.recipe}
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, temporary)
        os.replace(temporary, self.checkpoint)

    def resume(self, parts: dict[str, Any], device: torch.device) -> int:
        """Loads the checkpoint into `parts` and returns the step to go on from; 0 when there is none."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.started -= state["seconds"]
        return int(state["step"])

    def check(self, loss: Tensor, step: int) -> float:
        """The loss as a number; raises `DivergedError` when it is not one."""
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at step {step}")
        return value

    def _diverged(self, what: str) -> DivergedError:
        kept = self.checkpoint if self.checkpoint.exists() else "none was written"
        return DivergedError(f"{what}; last good checkpoint: {kept}. Lower learning_rate and go on with --resume.")
