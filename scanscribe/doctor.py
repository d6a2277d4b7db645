"""What is installed, what would fail, and how to mend it. Looks only: writes nothing, calls nobody."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

State = Literal["ok", "warn", "fail"]

GIB = 1 << 30
# torch's minor version -> torchvision's. timm imports torchvision, whose operators are built for one torch only.
TORCHVISION_OF_TORCH = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}
CODECS = {
    "pyjpegls": ("jpeg_ls", "JPEG-LS"),
    "python-gdcm": ("gdcm", "JPEG Lossless"),
}
SETUP = "run `make setup`"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Check]:
    """All checks, in the order in which a person would mend them. Never raises: a check that breaks has failed."""
    checks: list[Check] = []
    for look in (_python, _torch, _device, _codecs, _flows, _models, _disk):
        try:
            checks.extend(look())
        except Exception as error:  # a broken installation breaks in any way it likes
            checks.append(Check(look.__name__.strip("_"), "fail", str(error) or type(error).__name__, SETUP))
    return checks


def _python() -> Iterator[Check]:
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "fail", sys.version.split()[0], "" if good else "use Python 3.11 or newer")


def _torch() -> Iterator[Check]:
    torch, vision = _installed("torch"), _installed("torchvision")
    if torch is None:
        yield Check("torch", "fail", "not installed", SETUP)
        return
    minor = ".".join(torch.split(".")[:2])
    wanted = TORCHVISION_OF_TORCH.get(minor)
    if vision is None:
        yield Check("torch", "warn", f"{torch} without torchvision: training with timm will fail", SETUP)
    elif wanted is None:
        yield Check("torch", "warn", f"{torch} is not among the tested versions", f"{SETUP} for the tested pair")
    elif not vision.startswith(f"{wanted}."):
        yield Check("torch", "fail", f"{torch} does not match torchvision {vision}", f"install torchvision {wanted}")
    else:
        importlib.import_module("torch")
        yield Check("torch", "ok", f"{torch} with torchvision {vision}")


def _device() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        yield Check("device", "ok", f"{name}, {memory / GIB:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        yield Check("device", "ok", f"no CUDA device: the CPU does the work, {os.cpu_count()} cores")


def _codecs() -> Iterator[Check]:
    for package, (module, what) in CODECS.items():
        try:
            importlib.import_module(module)
            yield Check(f"codec {what}", "ok", f"{package} {_installed(package)}")
        except ImportError:
            yield Check(f"codec {what}", "warn", f"{package} is missing: such DICOM files are refused", SETUP)


def _flows() -> Iterator[Check]:
    prefect, fastapi = _installed("prefect"), _installed("fastapi")
    if prefect is None or fastapi is None:
        yield Check("flows", "warn", "prefect is not installed: `scanscribe batch` cannot run", SETUP)
    elif not (0, 139) <= _numbers(fastapi)[:2] < (0, 151):
        yield Check(
            "flows", "fail", f"prefect {prefect} breaks with fastapi {fastapi}", "install fastapi>=0.139,<0.151"
        )
    else:
        yield Check("flows", "ok", f"prefect {prefect}, fastapi {fastapi}")


def _models() -> Iterator[Check]:
    from pipelines.store import ModelError, find, stored_models

    find("default")
    damaged: list[ModelError] = []
    for model in stored_models(damaged.append):
        try:
            model.verify()
            size = model.weights.stat().st_size / (1 << 20)
            yield Check(f"model {model.name}", "ok", f"version {model.version}, {size:.1f} MiB, weights are whole")
        except ModelError as error:
            yield Check(f"model {model.name}", "fail", str(error), "install the model again")
    for fault in damaged:
        yield Check("model", "fail", str(fault), "or remove its folder")


def _disk() -> Iterator[Check]:
    from flows.machine.space import free_bytes
    from pipelines.store import home

    places = {"this folder": Path.cwd(), "the state folder": _existing(home())}
    for what, folder in places.items():
        free = free_bytes(folder)
        if not os.access(folder, os.W_OK):
            remedy = "set SCANSCRIBE_HOME" if what == "the state folder" else "name another folder with --out"
            yield Check("disk", "warn", f"{what} cannot be written", remedy)
        elif free < GIB:
            yield Check("disk", "warn", f"{free / GIB:.1f} GiB free in {what}", "free some space: reports need room")
        else:
            yield Check("disk", "ok", f"{free / GIB:.0f} GiB free in {what}")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
