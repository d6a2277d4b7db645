"""What the benchmarks of the decoder's layers share: timing by turns, CUDA graphs, and how a figure is told."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


@torch.inference_mode()
def race(arms: Sequence[Call], repeats: int, device: torch.device) -> list[tuple[float, float]]:
    """Median milliseconds of each and the distance between its quartiles, run by turns after two that do not count."""
    times: list[list[float]] = [[] for _ in arms]
    inner = 10 if device.type == "cuda" else 1
    for turn in range(repeats + 2):
        for arm, taken in zip(arms, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(inner):
                arm()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                taken.append((time.perf_counter() - started) * 1000 / inner)
    quartiles = [statistics.quantiles(taken, n=4) for taken in times]
    return [(statistics.median(taken), q[2] - q[0]) for taken, q in zip(times, quartiles, strict=True)]


def captured(call: Call) -> Call:
    """The call as a CUDA graph; it fails where the call waits for the device.

    A graph knows addresses only, and the next capture hands unused memory back to the driver: so the call, which holds
    the weights and inputs that the graph reads, is kept as long as the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()

    def replay(_kept: Call = call) -> None:
        graph.replay()

    return replay


def claim(
    what: str, value: float, target: float | None = None, *, unit: str = "ratio", most: bool = False
) -> dict[str, object]:
    """A figure beside its target: at least that, or at most (`most`); None is none."""
    met = None if target is None else value <= target if most else value >= target
    return {"claim": what, "value": float(f"{value:.4g}"), "unit": unit, "target": target, "met": met}


def machine(devices: Sequence[str]) -> str:
    """What the figures were measured on."""
    named = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    return f"{named}, {torch.cuda.get_device_name()}" if "cuda" in devices else named
