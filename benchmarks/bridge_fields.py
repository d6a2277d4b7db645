"""What the bridge is worth: {MLP, ALIGN} x {all visual tokens, N tokens}, and 2x2 unshuffle, before the same decoder.

    .venv/bin/python benchmarks/bridge_fields.py --data data/          # a GPU: about four minutes
    .venv/bin/python benchmarks/bridge_fields.py --quick               # two CPU cores: under a minute

Each arm is a bridge and the bundled model's decoder, trained from scratch on the visual tokens of the bundled glance,
which is frozen; nothing else is in the prompt, so that what the decoder writes it has read through the bridge. It
writes reports in the report grammar with the CT fields, or with the types of defect that are on the picture. Figures
are exact matches on the validation split; on noisy and on flat pictures, too. Intervals (95%) are by bootstrap over
groups, of the mean over seeds. Boards are left out: at the glance's size their defects are not to be seen. Speed is
tokens a second of bridge, prompt and decoding together, for reports of the same length.
Without --data the quick run reads synthetic tokens, which say nothing about pictures.
The last line of the output is one JSON object with each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge import Bridge, BridgeConfig
from decoder import Decoder, DecoderConfig
from decoder.engine import Engine, Grammar, Request
from encoders import GlanceNet
from pipelines.inputs import GLANCE, channels, pad, read_grey, resize
from pipelines.manifest import Case, read_manifest
from pipelines.model import FIELDS, ModelConfig, decode_tokens
from pipelines.store import find
from pipelines.training.augment import augmentation, draw
from pipelines.training.run import capture, cosine, load_recipe, parameter_groups
from pipelines.training.streams import load_stream
from pipelines.weights import load_weights
from reports.grammar import ID, PAD, TOKENS, Draft, compile_grammar, from_tokens, to_tokens
from reports.taxonomy import CT_FIELDS, DEFECT_TYPES

ARMS = {"mlp": "MLP, all tokens", "align-all": "ALIGN, all tokens", "mlp-queries": "MLP, N queries"}
ARMS |= {"align": "ALIGN, N queries (the bridge)", "unshuffle": "2x2 unshuffle + MLP"}
N = 16  # tokens of the arms that give fewer than there are: as many as unshuffle makes of 64
MARGIN = 3.0  # points that count as on a par, where the interval of the difference does not hold 0
FASTER = 1.5
# The fields of each data set that are not the same for all of its pictures.
ASKED = {
    "medpix-ct": ("region", "plane", "contrast"),
    "covid-ct": ("covid19",),
    "neu-det": ("type",),
    "magnetic-tile": ("type", "presence"),
}
NOISE, FLAT = 25.0, 0.35  # grey levels (standard deviation); share of the contrast that is left
LENGTH = 16  # tokens of the longest report
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int  # draws of every stream for the pool
    share: float  # of the pictures of each batch of the writer's recipe
    cases: int | None  # validation cases a data set; None is all
    steps: int
    batch: int
    seeds: int
    decoded: tuple[int, ...]  # reports at once, for the speed
    repeats: int


FULL = Sizes(250, 1.0, None, 1200, 256, 3, (1, 32, 256), 7)
QUICK = Sizes(4, 0.2, 12, 12, 8, 1, (1, 16), 5)


@dataclass(slots=True)
class Pool:
    """What is learned from."""

    visual: Tensor  # [n, N, C]
    tokens: Tensor  # [n, LENGTH]
    targets: Tensor  # [n, LENGTH], IGNORE where nothing is known


@dataclass(slots=True)
class Asked:
    """What is asked of a data set: visual tokens under each condition, and the right answers."""

    name: str
    visual: dict[str, Tensor]  # condition -> [n, N, C]
    truth: list[dict[str, str]]
    groups: list[str]


class Arm(nn.Module):
    """A bridge and a decoder."""

    def __init__(self, name: str, visual_width: int) -> None:
        super().__init__()
        decoder = DecoderConfig(vocabulary=len(TOKENS))
        self.bridge = Bridge(BridgeConfig(visual_width, decoder.width, decoder.vocabulary, name=name, queries=N))
        self.decoder = Decoder(decoder)

    def prompt(self, visual_BNC: Tensor) -> Tensor:
        return self.bridge(visual_BNC, self.decoder.embedding.weight)  # type: ignore[no-any-return]

    def loss(self, visual_BNC: Tensor, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        prompt = self.prompt(visual_BNC)
        words = self.decoder.embed(tokens_BT[:, :-1])
        logits = self.decoder(torch.cat((prompt.to(words.dtype), words), 1))[:, prompt.shape[1] :]
        return F.cross_entropy(logits.float().flatten(0, 1), targets_BT[:, 1:].flatten(), ignore_index=IGNORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of data-set folders, each with manifest.jsonl")
    parser.add_argument("--quick", action="store_true", help="one seed, few pictures, few steps: shows that it runs")
    asked = parser.parse_args()
    if asked.data is None and not asked.quick:
        parser.error("give --data, or --quick for synthetic tokens")
    sizes = QUICK if asked.quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    started = time.perf_counter()
    pool, sets = synthetic(device) if asked.data is None else look(asked.data, sizes, device)
    if asked.data is None:
        print("synthetic tokens: the fields below say nothing about pictures")
    print(f"{len(pool.tokens)} examples to learn from, {sum(len(s.truth) for s in sets)} pictures to be asked about")

    right: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in ARMS}
    arms: dict[str, Arm] = {}
    for name in ARMS:
        for seed in range(sizes.seeds):
            arms[name] = train(name, seed, pool, sizes, device)
            right[name].append(answers(arms[name], sets, device))
        print(f"{name}: trained {sizes.seeds} times, {time.perf_counter() - started:.0f} s", flush=True)

    claims = fields_table(right, sets)
    visual = pool.visual[: max(sizes.decoded)]
    for place in dict.fromkeys((device, torch.device("cpu"))):
        claims += speed_table({name: arm.to(place) for name, arm in arms.items()}, visual.to(place), sizes, place)
    claims.append(verdict(claims))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    machine = f"{platform.machine()}, {where}, torch {torch.__version__}"
    print(json.dumps({"benchmark": "bridge_fields", "machine": machine, "quick": asked.quick, "claims": claims}))


def look(data: Path, sizes: Sizes, device: torch.device) -> tuple[Pool, list[Asked]]:
    """Visual tokens of augmented training views, and of the validation pictures under each condition."""
    glance = bundled_glance().to(device)
    parts: list[Pool] = []
    sets = []
    chance = np.random.default_rng(0)
    for name, table in load_recipe("writer")["streams"].items():
        if name not in ASKED or not (data / name).is_dir():
            continue
        cases = read_manifest(data / name / "manifest.jsonl")
        learned = [case for case in cases if case.split == "train"]
        held = [case for case in cases if case.split == "val"]
        if sizes.cases:
            learned, held = (
                list(chance.permutation(np.array(some, object))[: sizes.cases]) for some in (learned, held)
            )
        stream = load_stream(name, learned).to(device)
        for _ in range(sizes.rounds):
            batch = draw(stream, max(1, round(table["batch"] * sizes.share)), table["side"], augmentation(table))
            visual = tokens_of(glance, F.interpolate(batch.x, size=(GLANCE, GLANCE), mode="area"))
            labels = [each.cpu() for each in (batch.labels, batch.valid, batch.fields)]
            drafts = [draft_of(stream.line, *row) for row in zip(*labels, strict=True)]
            parts.append(Pool(visual, *written(drafts, device)))
        sets.append(ask(name, held, glance, device))
    if not sets:
        raise SystemExit(f"none of {', '.join(ASKED)} is in {data}")
    return Pool(*(torch.cat([getattr(part, each) for part in parts]) for each in Pool.__slots__)), sets


def bundled_glance() -> GlanceNet:
    """The glance of the bundled model, frozen."""
    stored = find("default")
    glance = GlanceNet(ModelConfig.from_dict(stored.config).glance)
    weights = {k.removeprefix("glance."): v for k, v in load_weights(stored.weights).items() if k.startswith("glance.")}
    glance.load_state_dict(weights, strict=False)
    return glance.eval().requires_grad_(False).fuse()


@torch.no_grad()
def tokens_of(glance: GlanceNet, x_B3HW: Tensor) -> Tensor:
    with torch.autocast(x_B3HW.device.type, torch.bfloat16, enabled=x_B3HW.device.type == "cuda"):
        return glance(x_B3HW).visual_BNC.half()  # type: ignore[no-any-return]


def draft_of(line: str, labels_M: Tensor, valid_M: Tensor, fields_F: Tensor) -> tuple[Draft, set[str]]:
    """The report of a picture's fields, or of the types on it, and the fields that are not known."""
    if line != "ct":
        shown = sorted(set(labels_M[valid_M].tolist()))
        return Draft("defect", line, {}, (), impression([DEFECT_TYPES[label] for label in shown])), set()
    truth = dict(zip(FIELDS, fields_F.tolist(), strict=True))
    fields = {name: values[max(0, truth[name])] for name, values in CT_FIELDS.items()}
    return Draft("ct", None, fields), {name for name in CT_FIELDS if truth[name] < 0}


def impression(types: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    """Only which types there are is asked: count and zone are always the same."""
    return tuple(("several", name, "throughout") for name in types)


def written(drafts: list[tuple[Draft, set[str]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets."""
    tokens = torch.full((len(drafts), LENGTH), PAD)
    targets = torch.full((len(drafts), LENGTH), IGNORE)
    for row, (draft, unknown) in enumerate(drafts):
        words = to_tokens(draft)[:LENGTH]
        tokens[row, : len(words)] = torch.tensor([ID[word] for word in words])
        known = [i for i, word in enumerate(words) if word.partition(":")[0] not in unknown]
        targets[row, known] = tokens[row, known]
    return tokens.to(device), targets.to(device)


def ask(name: str, cases: list[Case], glance: GlanceNet, device: torch.device) -> Asked:
    """The validation pictures as they are, with noise, and flat."""
    greys = [resize(read_grey(case.image), GLANCE) for case in cases]
    chance = np.random.default_rng(0)

    def noisy(grey: np.ndarray) -> np.ndarray:
        return np.clip(grey + chance.normal(0, NOISE, grey.shape), 0, 255).astype(np.uint8)

    def flat(grey: np.ndarray) -> np.ndarray:
        return ((grey - grey.mean()) * FLAT + grey.mean()).astype(np.uint8)

    conditions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": lambda grey: grey,
        "noisy": noisy,
        "flat": flat,
    }
    visual = {}
    for condition, change in conditions.items():
        x = torch.from_numpy(np.stack([pad(channels(change(grey)), square=True)[0] for grey in greys]))
        visual[condition] = torch.cat([tokens_of(glance, part.to(device)) for part in x.split(64)])
    truth = []
    for case in cases:
        types = "+".join(sorted(case.finding_types or ())) or "none"
        known = case.fields if case.kind == "ct" else {"type": types, "presence": str(types != "none")}
        truth.append({field: known[field] for field in ASKED[name] if field in known})
    return Asked(name, visual, truth, [case.group for case in cases])


def synthetic(device: torch.device) -> tuple[Pool, list[Asked]]:
    """Each value of a field is a direction, put on one of 64 tokens."""
    width, asked = 512, ASKED["medpix-ct"]
    direction = {(field, value): torch.randn(width) for field in asked for value in CT_FIELDS[field]}

    def examples(n: int) -> tuple[Tensor, list[dict[str, str]]]:
        visual, truth = torch.randn(n, 64, width), []
        for row in range(n):
            chosen = {field: CT_FIELDS[field][int(torch.randint(len(CT_FIELDS[field]), ()))] for field in asked}
            for field, value in chosen.items():
                visual[row, int(torch.randint(64, ()))] += 3 * direction[field, value]
            truth.append(chosen)
        return visual, truth

    visual, truth = examples(256)
    rest = {name: values[0] for name, values in CT_FIELDS.items()}
    drafts = [(Draft("ct", None, rest | known), set(rest) - set(known)) for known in truth]
    seen, right = examples(64)
    conditions = {"clean": seen, "noisy": seen + torch.randn_like(seen), "flat": seen * FLAT}
    held = Asked("synthetic", {k: v.to(device) for k, v in conditions.items()}, right, [str(i) for i in range(64)])
    return Pool(visual.to(device), *written(drafts, device)), [held]


def train(name: str, seed: int, pool: Pool, sizes: Sizes, device: torch.device) -> Arm:
    """An arm, trained; on a GPU a step is one CUDA graph."""
    torch.manual_seed(seed)
    on_gpu = device.type == "cuda"
    arm = Arm(name, pool.visual.shape[2]).to(device).train()
    rate = torch.zeros((), device=device)
    groups = parameter_groups(arm, 0.05)
    optimiser = torch.optim.AdamW(
        groups, lr=rate if on_gpu else 0.0, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu
    )

    def step() -> Tensor:
        rows = torch.randint(len(pool.tokens), (sizes.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = arm.loss(pool.visual[rows].float(), pool.tokens[rows], pool.targets[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(arm.parameters(), 1.0, foreach=True)
        optimiser.step()
        arm.decoder.rebalance(0.001)
        return loss.detach()

    replay = capture(step) if on_gpu else None
    loss = torch.zeros(())
    for i in range(sizes.steps):
        now = 1e-3 * cosine(i, sizes.steps, sizes.steps // 10)
        if replay is not None:
            rate.fill_(now)
            replay[0].replay()
            loss = replay[1]
        else:
            for group in optimiser.param_groups:
                group["lr"] = now
            loss = step()
    if not bool(loss.isfinite()):
        raise SystemExit(f"{name}, seed {seed}: the loss is {float(loss)}")
    print(f"  {name}, seed {seed}: loss {float(loss):.4f} after {sizes.steps} steps", flush=True)
    return arm.eval().requires_grad_(False)


def write(engine: Engine, prompts_BPD: Tensor, forbidden: list[int]) -> list[list[int]]:
    """The token ids of a report for each prompt."""
    return [each.ids for each in engine.generate([Request((), prompt, forbidden=forbidden) for prompt in prompts_BPD])]


def answers(arm: Arm, sets: list[Asked], device: torch.device) -> dict[str, np.ndarray]:
    """`set/field/condition` -> whether each picture's field is right (NaN where it is not known)."""
    engine = Engine(arm.decoder, slots=256, grammar=Grammar.from_table(compile_grammar()))
    right = {}
    for each in sets:
        ct = each.name not in ("neu-det", "magnetic-tile")
        forbidden = [i for word, i in ID.items() if word.startswith(("evidence:", "kind:defect" if ct else "kind:ct"))]
        for condition, visual in each.visual.items():
            ids = write(engine, arm.prompt(visual.float()), forbidden)
            said = []
            for draft in (from_tokens(decode_tokens(row)) for row in ids):
                types = "+".join(sorted({name for _, name, _ in draft.impression})) or "none"
                said.append(draft.fields if ct else {"type": types, "presence": str(types != "none")})
            for field in dict.fromkeys(key for truth in each.truth for key in truth):
                right[f"{each.name}/{field}/{condition}"] = np.array(
                    [s[field] == t[field] if field in t else np.nan for s, t in zip(said, each.truth, strict=True)],
                    float,
                )
    return right


def fields_table(right: dict[str, list[dict[str, np.ndarray]]], sets: list[Asked]) -> list[dict[str, object]]:
    """Prints accuracies of each field and their means, with intervals; the claims about them."""
    chance = np.random.default_rng(0)
    draws = {}  # how often each picture is drawn, [resamples, pictures]; the first row is the sample itself
    for each in sets:
        _, member = np.unique(each.groups, return_inverse=True)
        count = chance.multinomial(member.max() + 1, np.full(member.max() + 1, 1 / (member.max() + 1)), 2000)
        draws[each.name] = np.concatenate((np.ones((1, len(member))), count[:, member]))

    def resampled(key: str, name: str) -> np.ndarray:
        """Percent right over seeds and pictures, in every resample."""
        hit = np.mean([seed[key] for seed in right[name]], 0)
        known = np.isfinite(hit)
        weights = draws[key.partition("/")[0]][:, known]
        return 100 * (weights @ hit[known]) / np.maximum(weights.sum(1), 1)

    fields = list(dict.fromkeys(key.rpartition("/")[0] for key in right["mlp"][0]))
    claims: list[dict[str, object]] = []
    for condition in ("clean", "noisy", "flat"):
        print(f"\n{condition} pictures: % right (mean over fields with its 95% interval, and over seeds from-to)")
        print(f"{'':30} {'mean':>20} {'seeds':>13}  " + "  ".join(fields))
        means = {}
        for name, title in ARMS.items():
            each = np.stack([resampled(f"{field}/{condition}", name) for field in fields])
            means[name] = each.mean(0)
            seeds = [
                100 * np.mean([np.nanmean(seed[f"{field}/{condition}"]) for field in fields]) for seed in right[name]
            ]
            cells = "  ".join(f"{value:{len(field)}.1f}" for field, value in zip(fields, each[:, 0], strict=True))
            low, high = np.percentile(means[name][1:], (2.5, 97.5))
            mean = f"{means[name][0]:6.1f} ({low:.1f} to {high:.1f})"
            print(f"{title:30} {mean:>20} {f'{min(seeds):.1f}-{max(seeds):.1f}':>13}  {cells}")
        for name in ARMS:
            if name != "mlp":
                difference = means[name] - means["mlp"]
                low, high = np.percentile(difference[1:], (2.5, 97.5))
                row = claim(f"{condition}: fields, {ARMS[name]} less MLP, all tokens", difference[0], "points", 5.0)
                claims.append(row | {"interval": [round(float(low), 2), round(float(high), 2)]})
    return claims


def speed_table(arms: dict[str, Arm], visual: Tensor, sizes: Sizes, device: torch.device) -> list[dict[str, object]]:
    """Prints tokens a second of bridge, prompt and decoding; arms take turns. The reports are as long for all arms."""
    grammar = Grammar.from_table(compile_grammar())
    claims = []
    side = round(visual.shape[1] ** 0.5)
    print(f"\n{device.type}: tokens a second of bridge, prompt and report; {side * side} visual tokens a picture")
    print(f"{'':30} {'tokens':>6} {'weights':>9} {'MFLOP':>7} " + "".join(f"{f'batch {n}':>26}" for n in sizes.decoded))
    speeds: dict[int, dict[str, list[float]]] = {}
    for batch in sizes.decoded:
        seen = visual[torch.arange(batch, device=device) % len(visual)].float()
        forbidden = [i for word, i in ID.items() if word.startswith(("evidence:", "count:", "kind:defect"))]
        engines = {name: Engine(arm.decoder, slots=batch, grammar=grammar) for name, arm in arms.items()}
        speeds[batch] = {name: [] for name in arms}
        for repeat in range(-2, sizes.repeats):
            for name, arm in arms.items():
                if device.type == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                with torch.inference_mode():
                    ids = write(engines[name], arm.prompt(seen), forbidden)
                if repeat >= 0:
                    speeds[batch][name].append(sum(map(len, ids)) / (time.perf_counter() - started))
    for name, arm in arms.items():
        config, decoder = arm.bridge.config, arm.decoder.config
        given = config.given(side, side)
        cost = (config.flops(side, side) + given * decoder.flops_per_token(given // 2)) / 1e6
        cells = ""
        for batch in sizes.decoded:
            values = speeds[batch][name]
            low, high = min(values), max(values)
            cells += f"{statistics.median(values):10,.0f} ({low:,.0f}-{high:,.0f})".rjust(26)
        print(f"{ARMS[name]:30} {given:6} {config.parameters:9,} {cost:7.1f} {cells}")
    for batch in sizes.decoded:
        ratios = [a / b for a, b in zip(speeds[batch]["align"], speeds[batch]["mlp"], strict=True)]
        row = claim(
            f"{device.type}, batch {batch}: speed of prompt and report, {ARMS['align']} / MLP, all tokens",
            statistics.median(ratios),
            "times",
            FASTER,
        )
        claims.append(row | {"spread": [round(min(ratios), 2), round(max(ratios), 2)]})
    return claims


def verdict(claims: list[dict[str, object]]) -> dict[str, object]:
    """Better by five points, or on a par (the interval holds 0, or the margin is kept) and 1.5 times as fast."""
    fields = next(each for each in claims if str(each["claim"]).startswith(f"clean: fields, {ARMS['align']}"))
    fastest = max(
        (each for each in claims if "speed" in str(each["claim"])), key=lambda each: float(str(each["value"]))
    )
    low, high = fields["interval"]  # type: ignore[misc]
    par = low <= 0 <= high or low > -MARGIN
    how = "better by 5 points" if fields["met"] else "on a par" if par else "worse"
    where = str(fastest["claim"]).partition(":")[0]
    which = f"{how} ({fields['value']} points, {low} to {high}), up to {fastest['value']} times as fast ({where})"
    print(f"\n{ARMS['align']} against concatenation: {which}")
    return {
        "claim": "the bridge at N tokens: 5 points better, or on a par with 1.5 times the speed",
        "value": which,
        "unit": "",
        "target": "either",
        "met": bool(fields["met"] or (par and fastest["met"])),
    }


def claim(what: str, value: float, unit: str, least: float) -> dict[str, object]:
    return {"claim": what, "value": round(float(value), 2), "unit": unit, "target": least, "met": bool(value >= least)}


if __name__ == "__main__":
    main()
