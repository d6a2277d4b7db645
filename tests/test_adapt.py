"""`scanscribe adapt` through its command: from few labelled pictures of an owner's line to reports with its types."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.adapt import adapt, hold_out
from pipelines.manifest import Case, read_manifest
from pipelines.own_line import inspection_size
from pipelines.reader import Reader
from pipelines.run import Job, execute
from pipelines.store import ModelError, find
from pipelines.training.adapt import fitted, train_adapter
from pipelines.training.run import Run, load_recipe
from pipelines.training.streams import load_stream
from reports.taxonomy import ProductLine
from scanscribe import cli
from tests.tiny_reader import TinyReader

QUICK = ("steps=2", "side=64", "streams.own.batch=2", "checkpoint_every=1")
LINE = ProductLine("casting", "casting", ("dent", "pore"))


def draw(folder: Path, images: int = 52) -> list[dict[str, object]]:
    """Dark castings: dents with a box, pores that only the image is labelled with, and good ones. Two of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(images):
        pixels = (80 + 20 * np.sin(np.arange(96) / 3) + rng.normal(0, 6, (96, 96))).clip(0, 255).astype(np.uint8)
        findings: list[dict[str, object]] = []
        if i % 3 == 0:
            x, y = rng.integers(5, 60, 2).tolist()
            pixels[y : y + 24, x : x + 24] = 250
            findings.append({"type": "dent", "bbox": [x, y, x + 24, y + 24]})
        elif i % 3 == 1:
            pixels[rng.integers(0, 96, 40), rng.integers(0, 96, 40)] = 0
            findings.append({"type": "pore"})
        Image.fromarray(pixels).save(folder / f"{i}.png")
        line = {"id": f"c{i}", "image": f"{i}.png", "group": f"part {i // 2}", "product": "casting"}
        lines.append(line | {"findings": findings})
    return lines


def write(folder: Path, lines: list[dict[str, object]]) -> Path:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("castings")
    return write(folder, draw(folder))


@pytest.fixture(scope="module")
def model(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapted model after two steps: it has learned nothing, but all of it is there."""
    folder = tmp_path_factory.mktemp("models") / "castings"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.domain.FEW", 1)  # each picture in one variation only
        adapt(manifest, out=folder, device="cpu", overrides=QUICK)
    return folder


@pytest.fixture
def scanscribe(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with an empty model store of its own."""
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scanscribe", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return run


def certain(model: Path, folder: Path) -> Path:
    """A copy that is sure of all that it sees."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "model.json").read_text())
    settings["calibration"] |= {"evidence": {"casting": [1.0, 12.0]}}
    (folder / "model.json").write_text(json.dumps(settings))
    return folder


def test_the_model_is_small_names_its_base_and_leaves_it_as_it_is(model: Path, scanscribe) -> None:
    base, stored = find("default"), find(model)
    base.verify()
    assert hashlib.sha256(base.weights.read_bytes()).hexdigest() == base.weights_sha256
    assert stored.base is not None
    assert stored.base.weights_sha256 == base.weights_sha256
    assert stored.weights.stat().st_size < base.weights.stat().st_size / 5
    assert not (model / "training" / "checkpoint.pt").exists()
    assert stored.adapted["trained_on"]["images"] + stored.adapted["held_out"]["images"] == 52
    assert "held-out images" in stored.adapted["note"]
    assert "casting" in (model / "MODEL_CARD.md").read_text()
    code, out, _ = scanscribe("models", "verify", model, "--json")
    assert code == 0
    assert json.loads(out)["adapts"]["name"] == "default"


def test_reports_name_the_owners_line_and_types(model: Path, manifest: Path, tmp_path: Path) -> None:
    sure = certain(model, tmp_path / "sure")
    rules = tmp_path / "rules.yaml"
    text = (Path("reports") / "default_rules.yaml").read_text()
    rules.write_text(text.replace("types: [open, short]", "types: [pore]").replace("scanscribe-default", "house"))
    job = Job((manifest.parent / "0.png",), tmp_path / "out", ("json", "md", "html"), str(sure), "cpu", rules=rules)
    summary = execute(job)
    assert not summary.rejected
    folder = tmp_path / "out" / summary.reported[0].id
    report = json.loads((folder / "report.json").read_text())
    assert report["technique"]["product_line"] == "casting"
    assert {"dent", "pore"} <= {finding["type"] for finding in report["findings"]}
    weak = {finding["type"]: finding["evidence"][0]["localisation"] for finding in report["findings"]}
    assert weak["pore"] == "weak"
    assert weak["dent"] == "box"
    assert "“pore”" in report["impression"]
    assert "adapted-line" in report["quality_flags"]
    assert "house" in report["disposition_rule"]
    not_assessed = {item["values"].get("line") for item in report["not_assessed"]}
    assert {"steel", "tile", "board"} <= not_assessed
    assert "casting" not in not_assessed
    assert "“dent”" in (folder / "report.md").read_text()


def test_other_lines_are_read_as_the_base_reads_them(model: Path, tmp_path: Path) -> None:
    sample = Path("examples") / "steel" / "scratches.png"
    by_base, by_adapted = (
        execute(Job((sample,), tmp_path / name, ("json",), str(which), "cpu"))
        for name, which in (("a", "default"), ("b", model))
    )
    one, other = (json.loads((s.out / s.reported[0].id / "report.json").read_text()) for s in (by_base, by_adapted))
    assert one["findings"] == other["findings"]
    assert one["technique"] == other["technique"]
    assert "casting" in {item["values"].get("line") for item in other["not_assessed"]}


def test_evaluation_scores_the_owners_types(model: Path, manifest: Path, tmp_path: Path, scanscribe) -> None:
    some = read_manifest(manifest, lines=(LINE,))[:3]
    lines = [json.loads(line) for line in manifest.read_text().splitlines()[: len(some)]]
    lines = [line | {"image": str(case.image)} for line, case in zip(lines, some, strict=True)]
    few = write(tmp_path, lines)
    code, out, _ = scanscribe("evaluate", "--data", few, "--model", model, "--out", tmp_path / "f.json", "--json")
    assert code == 0
    figures = json.loads(out)
    assert figures["metrics"]["product_line_accuracy"]["n"] == 3
    assert figures["per_type"]["dent"]["boxes"] == 1


def test_a_damaged_adapter_or_a_missing_base_is_told(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = bytearray((damaged / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="SHA-256"):
        Reader.load(damaged, "cpu")
    orphan = tmp_path / "orphan"
    shutil.copytree(model, orphan)
    settings = json.loads((orphan / "model.json").read_text())
    settings["base"] |= {"weights_sha256": "0" * 64}
    (orphan / "model.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"adapts default .* not installed"):
        find(orphan).verify()


def test_too_little_data_says_all_that_would_be_needed(manifest: Path, tmp_path: Path, scanscribe) -> None:
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [line | {"image": str(manifest.parent / line["image"])} for line in lines[:20]]
    lines[2]["findings"] = [{"type": "dint", "bbox": [1, 1, 9, 9]}]
    code, _, err = scanscribe("adapt", "--data", write(tmp_path, lines))
    assert code == 2
    assert "at least 50 labelled images: there are 20, 30 more" in err
    assert "at least 8 images that show 'dent'" in err
    assert "'dint', best with a box each: there are 1, 7 more; or leave that type out" in err
    assert not (tmp_path / "home").exists()


def spoil(lines: list[dict[str, object]], scratch: str) -> list[tuple[int, str]]:
    """Puts five faults into lines that name good images; the numbers of the lines, and words of what is wrong there."""
    lines[5] |= {"image": "gone.png"}
    lines[6] |= {"findings": [{"type": scratch, "bbox": [0, 0, 500, 20]}]}
    lines[7] |= {"id": "c0"}
    lines[8] |= {"split": "val"}  # line 10 is of the same part
    lines[11] |= {"findings": "none"}
    return [
        (6, "image 'gone.png' is not a file"),
        (7, "must be [x0, y0, x1, y1] within 96 x 96 px"),
        (8, "id is already used on line 1"),
        (10, "group 'part 4' is in split 'train' here, in 'val' on line 9"),
        (12, "'findings' must be a list"),
    ]


def told(err: str, number: int, words: str) -> bool:
    return any(f"line {number}: " in line and words in line for line in err.splitlines())


def test_adapt_names_every_fault_of_a_manifest_with_its_line(tmp_path: Path, scanscribe) -> None:
    lines = [line | {"split": "train"} for line in draw(tmp_path)]
    faults = spoil(lines, "dent")
    code, _, err = scanscribe("adapt", "--data", write(tmp_path, lines))
    assert code == 2
    assert [number for number, words in faults if not told(err, number, words)] == []
    assert not (tmp_path / "home").exists()


def test_train_and_evaluate_name_every_fault_of_all_manifests(
    tmp_path: Path, scanscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training stops before it begins; an evaluation goes on with the lines that are good."""
    data, run = tmp_path / "data", tmp_path / "run"
    lines = [line | {"split": "train", "product": "steel", "findings": []} for line in draw(data / "set", 14)]
    faults = spoil(lines, "scratches")
    lines[12] |= {"findings": [{"type": "dint", "bbox": [1, 1, 9, 9]}]}
    faults.append((13, "finding 1 has the unknown type 'dint'"))
    write(data / "set", lines)
    (data / "other").mkdir()
    write(data / "other", [{"id": "a", "image": "none.png", "split": "train"}])
    code, _, err = scanscribe("train", "--recipe", "detector", "--data", data, "--out", run, "--device", "cpu")
    assert code == 2
    assert [number for number, words in faults if not told(err, number, words)] == []
    assert "other, line 1: image 'none.png' is not a file" in err
    assert not (run / "log.jsonl").exists()

    monkeypatch.setattr("pipelines.reader.Reader.load", lambda model, device: TinyReader())
    lines[7] |= {"id": "c7"}  # which case an answer is for must be known
    code, _, err = scanscribe("evaluate", "--data", write(data / "set", lines), "--out", tmp_path / "figures.json")
    assert code == 1  # of the file that is not there
    assert [number for number, words in faults if number != 8 and not told(err, number, words)] == []


def test_pictures_that_do_not_open_are_faults_too(tmp_path: Path, scanscribe) -> None:
    lines = draw(tmp_path)
    (tmp_path / "7.png").write_bytes(b"no picture")
    code, _, err = scanscribe("adapt", "--data", write(tmp_path, lines))
    assert code == 2
    assert "line 8: 7.png cannot be read as a picture" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "step=3"], "has no 'step'"),
        (["--name", "default"], "there is a model 'default' already"),
        (["--model", "none"], "there is no model 'none'"),
    ],
)
def test_wrong_usage_is_told_before_anything_trains(manifest: Path, scanscribe, arguments, words: str) -> None:
    code, _, err = scanscribe("adapt", "--data", manifest, *arguments)
    assert code == 2
    assert words in err


def test_a_run_that_diverges_stops_and_goes_on_from_its_last_checkpoint(
    manifest: Path, tmp_path: Path, scanscribe
) -> None:
    """With a learning rate out of all reason; `--resume` with a sane one ends what was begun."""
    out = tmp_path / "castings"
    arguments = ["adapt", "--data", manifest, "--out", out, "--device", "cpu"]
    quick = [part for each in QUICK[1:] for part in ("--set", each)]
    code, _, err = scanscribe(
        *arguments, *quick, "--set", "steps=60", "--set", "warmup=1", "--set", "learning_rate=1e30"
    )
    assert code == 2
    assert "last good checkpoint: " in err
    assert "--resume" in err
    assert not (out / "model.json").exists()


def test_the_same_seed_gives_the_same_adapter(manifest: Path, tmp_path: Path) -> None:
    from pipelines.model import ModelConfig, ScanScribeModel
    from pipelines.weights import load_into

    base = find("default")
    network = ScanScribeModel(ModelConfig.from_dict(base.config))
    load_into(network, base.weights)
    before = {name: value.clone() for name, value in network.detectors[0].state_dict().items()}
    cases = read_manifest(manifest, lines=(LINE,))[:8]
    stream = load_stream("own", cases, longest=96, own_types=LINE.types)
    states = []
    for n, seed in enumerate((1, 1, 2)):
        recipe = fitted(load_recipe("adapt", [*QUICK, f"seed={seed}"]), 96, whole=True)
        run = Run(tmp_path / str(n), recipe, resume=False)
        states.append(
            train_adapter(run, stream, network.detectors[0], LINE.types, network.detectors[0].presence.weight.device)
        )
    assert all(bool((states[0][name] == states[1][name]).all()) for name in states[0])
    assert any(bool((states[0][name] != states[2][name]).any()) for name in states[0])
    assert all(bool((value == before[name]).all()) for name, value in network.detectors[0].state_dict().items())


def test_whole_groups_are_held_out_and_every_type_with_them() -> None:
    def case(i: int) -> Case:
        types = (("dent",), ("pore",), (), ("rare",) if i % 20 == 3 else ())[i % 4]
        return Case(f"c{i}", Path(), None, f"g{i // 2}", "defect", "casting", types, (), {}, None)

    cases = [case(i) for i in range(100)]
    groups = [cases[i : i + 2] for i in range(0, 100, 2)]
    held = hold_out(groups, seed=0)
    assert {c.group for c in held}.isdisjoint({c.group for c in cases if c not in held})
    assert 20 <= len(held) <= 40
    assert {t for c in held for t in c.finding_types or ()} == {"dent", "pore", "rare"}


def test_a_line_is_inspected_at_the_size_that_its_defects_need() -> None:
    assert inspection_size([0.2] * 8, [200] * 50) == 256
    assert inspection_size([0.032] * 8, [354] * 50) == 320
    assert inspection_size([0.01] * 8, [2000] * 50) == 640
    assert inspection_size([0.01] * 8, [300] * 50) == 256
    assert inspection_size([0.02] * 8, [600] * 50) == 320
    assert inspection_size([], [2000]) == 256
