"""What the decoding benchmarks share: a model for both sides, the peers in transformers, and timing.

A side is timed with one new token and with many; the difference is what decoding takes, and prefill is left out.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder import Decoder
from decoder.engine import Engine, Request

# Qwen3-MoE in shape, one expert of eight active: about 30M parameters, 8M of them active, and about 400M, 100M active.
MODELS: dict[str, dict[str, Any]] = {
    "30M": {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 128, "intermediate_size": 512},
    "400M": {"vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 256, "intermediate_size": 1024},
    # For runs that only try the script
    "tiny": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "intermediate_size": 128},
}
MOST_COMPARED = 48  # sequences whose tokens are compared
TRIES = 3  # of a measurement that something else on the machine made useless
MARGIN = 1e-3  # scores closer than this are a draw: the order of a sum decides
EXPERTS_PINNED = "grouped_mm_always"  # transformers changes "grouped_mm" to another function for decoding


def make_model(name: str, folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, Decoder]:
    """transformers' model with random weights, and ours with the same ones, which transformers saves in the folder."""
    import transformers

    from decoder.open import OpenDecoder

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = transformers.Qwen3MoeConfig(
        **MODELS[name],
        max_position_embeddings=4096,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        initializer_range=0.06,  # wider than in training, so that one token's score stands out
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    theirs.save_pretrained(folder)
    ours = OpenDecoder.from_pretrained(folder, dtype=dtype, device=device)
    return theirs.to(device).requires_grad_(False), ours


@dataclass(slots=True)
class Side:
    """One way to decode: `run(prompts [B, T], new)` gives the new tokens `[B, new]`."""

    name: str
    run: Callable[[Tensor, int], Tensor]
    failed: str = ""
    rate: float | None = None  # tokens a second of the last run, of a side that tells itself
    engine: Engine | None = None  # ours


def engine_side(name: str, decoder: Decoder, prompts_BT: Tensor, new: int, **options: Any) -> Side:
    """Ours."""
    engine = Engine(decoder, slots=len(prompts_BT), length=prompts_BT.shape[1] + new, **options)

    def run(prompts_BT: Tensor, new: int) -> Tensor:
        done = engine.generate([Request(ids, max_new_tokens=new) for ids in prompts_BT.tolist()])
        return torch.tensor([each.ids for each in done])

    return Side(name, run, engine=engine)


def generate_side(
    name: str, model: Any, *, experts: str | None = None, static: int | None = None, **options: Any
) -> Side:
    """`generate` of transformers; `experts` is how experts are computed, None as it comes.

    `static`: with one static cache of so many positions for all calls, for which transformers compiles steps.
    """
    from transformers import StaticCache

    if static is not None:
        argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        options[argument] = cache = StaticCache(config=model.config, max_cache_len=static)

    def run(prompts_BT: Tensor, new: int) -> Tensor:
        ids_BT = prompts_BT.to(model.device)
        with implementation(model, experts), torch.inference_mode():
            if static is not None and cache.layers[0].is_initialized:
                cache.reset()
            written = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                **options,
            )
        return written[:, ids_BT.shape[1] :].cpu()

    return Side(name, run)


def batching_side(name: str, model: Any, *, experts: str | None = None) -> Side:
    """Continuous batching of transformers, with a manager that stays. It has a thread that starts with each call."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it lists all requests; we tell below
    attention = model.config._attn_implementation  # which the manager changes, once, when it is made
    paged = attention
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(prompts_BT: Tensor, new: int) -> Tensor:
        nonlocal paged
        model.set_attn_implementation(paged)
        try:
            # Its thread goes on with tensors that are made here: they must not be of inference mode.
            with implementation(model, experts), torch.no_grad():
                done = model.generate_batch(
                    prompts_BT.tolist(),
                    generation_config=settings,
                    continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.3),
                    max_new_tokens=new,
                    record_timestamps=True,
                    persistent_manager=True,
                ).values()
        finally:
            paged = model.config._attn_implementation
            model.set_attn_implementation(attention)
        for each in done:
            if each.error or len(each.generated_tokens) != new:
                raise RuntimeError(each.error or f"a request has {len(each.generated_tokens)} tokens, not {new}")
        came = torch.tensor([each.timestamps for each in done], dtype=torch.float64)
        running = came[:, 0].max()
        side.rate = float((came > running).sum() / (came.max() - running)) if new > 1 else None
        return torch.tensor([each.generated_tokens for each in done])

    side = Side(name, run)
    return side


@contextmanager
def implementation(model: Any, experts: str | None) -> Iterator[None]:
    """The model with another way to compute its experts."""
    if experts is None:
        yield
        return
    if experts == EXPERTS_PINNED:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_PINNED, ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    before = model.config._experts_implementation
    model.set_experts_implementation(experts)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@dataclass(frozen=True, slots=True)
class Timing:
    """Tokens a second of decoding, whatever came before it left out: median, least, most."""

    rate: float
    least: float
    most: float
    first: float  # seconds to the first token


def measure(sides: Sequence[Side], prompts_BT: Tensor, new: int, repeats: int) -> dict[str, Timing]:
    """Times all sides in turns; one that fails is left out and says why."""
    rates: dict[str, list[tuple[float, float]]] = {}
    for side in sides:  # warm-up, which also compiles and captures
        started = time.perf_counter()
        try:
            for count in (new, 1, new, 1) if side.engine else (new, 1):
                timed(side, prompts_BT, count)
        except Exception as error:
            side.failed = f"{type(error).__name__}: {error}"
            print(f"  {side.name}: failed: {side.failed[:300]}", flush=True)
            continue
        rates[side.name] = []
        print(f"  {side.name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
    for _ in range(repeats):
        for side in sides:
            if not side.failed:
                rates[side.name].append(rate_of(side, prompts_BT, new))
    return {
        name: Timing(
            statistics.median(rate for rate, _ in pairs),
            min(rate for rate, _ in pairs),
            max(rate for rate, _ in pairs),
            statistics.median(first for _, first in pairs),
        )
        for name, pairs in rates.items()
    }


def rate_of(side: Side, prompts_BT: Tensor, new: int) -> tuple[float, float]:
    """Tokens a second behind the first one, and seconds to that."""
    for _ in range(TRIES):
        short = timed(side, prompts_BT, 1)
        long = timed(side, prompts_BT, new)
        if side.rate is not None:
            return side.rate, short
        if long > short:
            return len(prompts_BT) * (new - 1) / (long - short), short
    raise RuntimeError(f"{side.name}: one token takes as long as {new}; is the machine busy with something else?")


def timed(side: Side, prompts_BT: Tensor, new: int) -> float:
    """Seconds of one call."""
    synchronise()
    started = time.perf_counter()
    written = side.run(prompts_BT, new)
    synchronise()
    seconds = time.perf_counter() - started
    if written.shape != (len(prompts_BT), new):
        raise RuntimeError(f"gave {list(written.shape)} tokens, not {[len(prompts_BT), new]}")
    return seconds


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of our greedy tokens, at each of their places: shares, and distances between scores."""

    as_theirs: float  # what transformers writes there, too
    as_exact: float  # what fp32 writes there
    theirs_as_exact: float  # of what transformers writes there, what fp32 does
    behind: float  # by how much fp32 likes its own token better, on average
    theirs_behind: float
    draws: float  # share of ours that fp32 likes as much as its own, or less by MARGIN at most


@torch.inference_mode()
def agreement(theirs: Any, exact: Any, prompts_BT: Tensor, written_BN: Tensor) -> Agreement:
    """What transformers, and transformers in fp32 (`exact`), would have written in our places.

    They are given our tokens, so that one draw does not make all that follow count as different.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    new = written_BN.shape[1]
    for all_BT in torch.cat((prompts_BT, written_BN), 1)[:MOST_COMPARED].split(16):
        all_BT = all_BT.to(theirs.device)
        its_BN = theirs(all_BT[:, :-1], logits_to_keep=new).logits.argmax(-1)
        exact_BNV = exact(all_BT[:, :-1], logits_to_keep=new).logits.float()
        best_BN, ours_BN = exact_BNV.amax(-1), all_BT[:, -new:]
        behind, its_behind = (best_BN - exact_BNV.gather(2, ids[..., None])[..., 0] for ids in (ours_BN, its_BN))
        seen.append(((ours_BN == its_BN).float(), behind, its_behind))
    same, behind, its_behind = (torch.cat(each) for each in zip(*seen, strict=True))
    return Agreement(
        *(float(each.float().mean()) for each in (same, behind == 0, its_behind == 0, behind, its_behind)),
        draws=float((behind <= MARGIN).float().mean()),
    )


def exact_model(model: Any) -> Any:
    """transformers' model with the same weights in fp32."""
    exact = copy.deepcopy(model).float()
    exact.set_experts_implementation("eager")
    return exact


def claim(what: str, value: float, unit: str, target: float, *, least: bool = True) -> dict[str, object]:
    """One line of the summary; `least`: the target is a lower bound."""
    met = value >= target if least else value <= target
    return {"claim": what, "value": float(f"{value:.3g}"), "unit": unit, "target": target, "met": met}


def machine() -> str:
    """What it runs on."""
    import transformers

    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{where}, {versions}, Python {platform.python_version()}"
