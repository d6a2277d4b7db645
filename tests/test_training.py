"""Training through its command: from a folder of manifests to weights, resumable, faults named before it starts."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from encoders import Detector, DetectorConfig
from pipelines.build import Labelled, f1, join_weights, right_types
from pipelines.manifest import Case, read_manifest
from pipelines.model import ModelConfig, ScanScribeModel
from pipelines.reading import FindingReading, Reading
from pipelines.study import ImageStudy
from pipelines.training import run as training_run
from pipelines.training.__main__ import cli
from pipelines.training.augment import LATERALITY, LEFT_RIGHT, Augmentation, augmentation, draw
from pipelines.training.losses import ciou, evidence_loss, presence_loss
from pipelines.training.pretrain import code_losses, draw_pairs
from pipelines.training.shrink import shrink
from pipelines.training.streams import held_out_groups, load_streams
from pipelines.weights import load_config, load_held_out, load_into, load_weights, packed, save_weights

COMMON = """
seed = 1
steps = 4
side = 64
learning_rate = 1e-3
weight_decay = 0.05
warmup = 1
clip = 10.0
ema = 0.9
late_share = 0.5
checkpoint_every = 2
"""
DETECTOR = (
    'kind = "detector"'
    + COMMON
    + """
loss = { boxes = 1.0, presence = 1.0 }
held_out = 0.0
[streams.strip]
batch = 4
mosaic = 0.5
late = { whole = true }
"""
)
GLANCE = (
    'kind = "glance"'
    + COMMON
    + """
loss = { fields = 0.5, types = 5.0 }
held_out = 0.0
backbone = "resnet18d"
last_stage = 64
pretrained = false
[streams.strip]
batch = 2
[streams.body]
batch = 2
symmetry = "mirror"
whole = true
rotate = 10.0
erase = 0.5
"""
)
PRETRAIN = (
    'kind = "pretrain"'
    + COMMON
    + """
loss = { invariance = 25.0, variance = 25.0, covariance = 1.0 }
views = { share = [0.35, 1.0], aspect = 0.2, rotate = 15.0, contrast = 0.2, noise = 0.05, erase = 0.3 }
code = 32
last_stage = 64
[streams.body]
batch = 8
"""
)
WRITER = """
kind = "writer"
seed = 1
pool_rounds = 1
measured = 8
steps = 3
batch = 4
learning_rate = 1e-3
weight_decay = 0.05
warmup = 1
clip = 1.0
ema = 0.9
balance = 0.001
score_noise = 0.5
blind = 0.5
checked_every = 3
checkpoint_every = 3
bridge = "align"
[streams.strip]
batch = 3
side = 256
whole = true
[streams.body]
batch = 2
side = 256
whole = true
symmetry = "mirror"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small data sets: strips with one bright scratch each, and round bodies with labels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("strip", "body"):
        (folder / name / "images").mkdir(parents=True)
        lines = []
        for i in range(6):
            pixels = rng.integers(60, 90, (100, 120), dtype=np.uint8)
            line: dict[str, object] = {
                "id": f"{name}{i}",
                "image": f"images/{i}.png",
                "group": f"g{i}",
                "split": "train" if i else "val",
            }
            if name == "strip":
                x, y = 10 + 12 * i, 20 + 5 * i
                pixels[y : y + 8, x : x + 30] = 230
                line |= {"product": "hot-rolled steel strip"}
                line |= {"findings": [{"type": "scratches", "bbox": [x, y, x + 30, y + 8]}]}
            else:
                line |= {"region": "chest", "plane": "axial", "laterality": ["left", "right"][i % 2]}
                line |= {"findings": ["nodule"] if i % 2 else []}
            Image.fromarray(pixels).save(folder / name / "images" / f"{i}.png")
            lines.append(json.dumps(line))
        (folder / name / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def without(data: Path, out: Path, is_left_out: Callable[[dict[str, str]], bool]) -> Path:
    """A copy of data sets without some lines of their manifests."""
    shutil.copytree(data, out)
    for manifest in out.glob("*/manifest.jsonl"):
        lines = [line for line in manifest.read_text().splitlines() if not is_left_out(json.loads(line))]
        manifest.write_text("\n".join(lines))
    return out


def test_from_manifests_to_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(data), "--device", "cpu"]
    for name, text, losses in (("glance", GLANCE, ("fields", "types")), ("detector", DETECTOR, ("boxes", "presence"))):
        out = tmp_path / name
        assert cli(["--recipe", recipe(tmp_path, text), "--out", str(out), *arguments]) == 0
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == 4 and all(np.isfinite(log[-1][loss]) for loss in losses)
        assert json.loads((out / "recipe.json").read_text())["streams"]["strip"]["batch"] in (2, 4)

    written = tmp_path / "writer"
    glance, detector = (str(tmp_path / name / f"{name}.safetensors") for name in ("glance", "detector"))
    trained = ["--glance", glance, "--detector", detector, detector]
    writer = ["--recipe", recipe(tmp_path, WRITER), "--out", str(written), *arguments]
    assert cli([*writer, *trained]) == 2  # both know all pictures
    assert "--set held_out=0.1" in capsys.readouterr().err
    stand_ins = []
    for name, text in (("glance", GLANCE), ("detector", DETECTOR)):
        out = tmp_path / f"{name}-stand-in"
        command = ["--recipe", recipe(tmp_path, text), "--set", "held_out=0.4", "--out", str(out), *arguments]
        assert cli(command) == 0
        stand_ins += [f"--stand-in-{name}", str(out / f"{name}.safetensors")]
    writer[1] = recipe(tmp_path, WRITER)
    assert cli([*writer, *trained, *stand_ins]) == 0
    weights = load_weights(written / "writer.safetensors")
    assert "decoder.embedding.weight" in weights
    # The validation split has no part in it.
    bare = without(data, tmp_path / "bare", lambda line: line["split"] == "val")
    writer[3:6:2] = str(tmp_path / "again"), str(bare)
    assert cli([*writer, *trained, *stand_ins]) == 0
    again = load_weights(tmp_path / "again" / "writer.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    # Together they are a model with two detectors.
    join_weights(Path(glance), [Path(detector)] * 2, written / "writer.safetensors", tmp_path / "model")
    whole = ScanScribeModel(ModelConfig.from_dict(load_config(written / "writer.safetensors")))
    load_into(whole, tmp_path / "model" / "weights.safetensors")
    alone = Detector(whole.config.detector)
    load_into(alone, Path(detector))
    for each in whole.detectors:
        assert all(
            torch.equal(a, b) for a, b in zip(each.state_dict().values(), alone.state_dict().values(), strict=True)
        )


def test_groups_that_are_held_out_are_whole_and_unknown_to_the_network(data: Path, tmp_path: Path) -> None:
    cases = [
        replace(case, group=f"g{i // 3}") for i, case in enumerate(read_manifest(data / "strip/manifest.jsonl") * 5)
    ]
    held = held_out_groups(cases, 0.25)
    assert held == held_out_groups(cases[::-1], 0.25)
    assert 0 < sum(case.group in held for case in cases) <= 0.25 * len(cases)
    assert len(held_out_groups(cases, 0.05)) == 1 and not held_out_groups(cases, 0.0)
    assert not held_out_groups([replace(case, group="one") for case in cases], 0.5)

    train = read_manifest(data / "strip/manifest.jsonl", split="train")
    held = held_out_groups(train, 0.4)
    parts = [load_streams(data, "train", held_out=0.4, inverted=inverted) for inverted in (False, True)]
    assert [len(streams[-1]) for streams in parts] == [3, 2] and parts[0][-1].name == "strip"
    assert parts[1][-1].boxes[:, 0, 0].tolist() == pytest.approx(
        [case.boxes[0].bbox[0] * 256 / 120 for case in train if case.group in held]
    )
    rest = without(data, tmp_path / "rest", lambda line: line["group"] in held)
    weights = []
    for number, (folder, share) in enumerate(((data, 0.4), (rest, 0.0))):
        out = tmp_path / str(number)
        command = ["--recipe", recipe(tmp_path, DETECTOR), "--data", str(folder), "--out", str(out), "--device", "cpu"]
        assert cli([*command, "--set", f"held_out={share}"]) == 0
        assert load_held_out(out / "detector.safetensors") == share
        weights.append(load_weights(out / "detector.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_report_is_judged_by_its_boxes_and_by_the_type_of_the_picture(data: Path) -> None:
    cases = read_manifest(data / "strip/manifest.jsonl")
    grey = np.zeros((1, 100, 120), np.uint8)
    labelled = [Labelled(case, ImageStudy(case.id, case.id, "display", grey, ()), None) for case in cases]

    def answer(case: Case, *types: str) -> Reading:
        box = case.boxes[0].bbox
        found = [FindingReading(t, box, 0, 0.9 - 0.1 * n, True, "box") for n, t in enumerate(types)]
        return Reading("defect", 1.0, "steel", {}, tuple(found), "")

    assert right_types(labelled, [answer(case, "scratches", "patches") for case in cases]) == 1
    assert right_types(labelled, [answer(case, "patches", "scratches") for case in cases]) == 0
    some = [answer(case, "scratches") if n < 3 else answer(case) for n, case in enumerate(cases)]
    assert (right_types(labelled, some), f1(labelled, some)) == (0.5, pytest.approx(2 * 3 / 9))
    several = [replace(case, finding_types=("patches", "scratches")) for case in cases]  # no type of their own
    assert right_types([replace(each, case=case) for each, case in zip(labelled, several, strict=True)], some) == 0


def test_a_backbone_learns_without_labels_and_the_glance_starts_from_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data), "--device", "cpu", "--recipe"]
    first = [*command, recipe(tmp_path, PRETRAIN), "--out", str(tmp_path / "first")]
    assert cli(first) == 0
    log = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and all(np.isfinite(log[-1][loss]) for loss in ("invariance", "variance", "covariance"))
    weights = tmp_path / "first" / "pretrain.safetensors"
    glance = [*command, recipe(tmp_path, GLANCE), "--set", "learning_rate=1e-9", "--out"]
    assert cli([*glance, str(tmp_path / "glance"), "--backbone", str(weights)]) == 0
    learned = load_weights(weights)["layer4.1.conv2.weight"]
    started = load_weights(tmp_path / "glance" / "glance.safetensors")["backbone.layer4.1.conv2.weight"]
    assert torch.allclose(started, learned, atol=float(learned.abs().max()) / 100)
    # A backbone of another width, and a recipe that has no use for one.
    assert cli([*glance, str(tmp_path / "wide"), "--set", "last_stage=128", "--backbone", str(weights)]) == 2
    assert "layer4.0.conv1.weight" in capsys.readouterr().err
    detector = [*command, recipe(tmp_path, DETECTOR), "--out", str(tmp_path / "detector")]
    assert cli([*detector, "--backbone", str(weights)]) == 2
    assert "the recipe glance starts from" in capsys.readouterr().err


def test_codes_are_to_agree_spread_and_say_nothing_twice() -> None:
    torch.manual_seed(0)
    good = torch.randn(4096, 8)
    losses = code_losses(torch.cat((good, good)))
    assert losses["invariance"] == 0 and losses["variance"] < 0.02 and losses["covariance"] < 0.02
    assert code_losses(torch.ones(64, 8))["variance"] > 0.9  # all pictures alike
    assert code_losses(torch.cat((good, good.roll(1, 0))))["invariance"] > 1
    twice = good[:, :4].repeat(1, 2)
    assert code_losses(torch.cat((twice, twice)))["covariance"] > 1.5


def test_both_views_of_a_picture_show_it_alike(data: Path) -> None:
    torch.manual_seed(0)
    (stream,) = (s for s in load_streams(data, "train") if s.name == "strip")
    stream.pictures[:], stream.pictures[..., : stream.pictures.shape[-1] // 2] = 40, 220  # bright on its left
    views = {"share": [0.7, 1.0], "aspect": 0.2, "rotate": 15.0, "contrast": 0.1, "noise": 0.05, "erase": 0.0}
    x = draw_pairs([(stream, 32)], 64, views)[:, 0]
    bright_left = (x[..., :32].mean((1, 2)) > x[..., 32:].mean((1, 2))).view(2, 32)
    assert bright_left.any() and not bright_left.all()  # mirrored or not
    assert torch.equal(bright_left[0], bright_left[1])  # but both views alike
    assert (x[:32] - x[32:]).abs().mean() > 0.05  # and yet not the same


def test_a_run_ends_within_its_time_at_a_low_learning_rate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # each look at the clock is a second later
    monkeypatch.setattr(training_run.time, "perf_counter", lambda: float(next(ticks)))
    command = ["--recipe", recipe(tmp_path, DETECTOR), "--out", str(tmp_path / "run"), "--data", str(data)]
    command += ["--device", "cpu", "--set", "steps=100000", "--minutes"]
    assert cli([*command, "0.01"]) == 2
    assert "before the first step" in capsys.readouterr().err
    assert cli([*command, "0.2"]) == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 4 < last["step"] < 20 and last["rate"] < 0.1 * 1e-3
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == last["step"]
    assert cli([*command, "0.2", "--resume"]) == 0  # its time is over
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]) == last


def test_more_than_half_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="at most half"):
        augmentation({"batch": 4, "mixup": 0.6})


def test_mixed_pictures_have_the_boxes_of_both(data: Path) -> None:
    torch.manual_seed(0)
    (stream,) = (s for s in load_streams(data, "train") if s.name == "strip")
    how = Augmentation(whole=True, aspect=0.0, zoom=(0.5, 0.5), contrast=0.0, noise=0.0, symmetry="mirror", mixup=0.5)
    batch = draw(stream, 8, 128, how)
    assert batch.valid.sum(1).tolist() == [2] * 4 + [1] * 4
    for x, boxes, valid in zip(batch.x[:, 0], batch.boxes, batch.valid, strict=True):
        for x0, y0, x1, y1 in boxes[valid].round().int().tolist():
            # A scratch is bright where it is whole, and still brighter than what lies around it where it is blended.
            assert x[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].median() > x.median() + 0.3


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--recipe", recipe(tmp_path, DETECTOR), "--out", str(tmp_path / "run"), "--data", str(data)]
    save = training_run.Run.save

    def interrupted(self: training_run.Run, step: int, parts: dict) -> None:
        save(self, step, parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run.Run, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli([*command, "--device", "cpu"])
    monkeypatch.undo()
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    assert cli([*command, "--device", "cpu"]) == 2  # not without --resume: that would start over
    assert cli([*command, "--device", "cpu", "--resume"]) == 0
    done = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert done["step"] == 4
    # The weights went on from the checkpoint's: they have moved, but less than two fresh networks differ.
    key = "layer4.1.conv2.weight"
    moved = (done["network"][f"backbone.{key}"] - kept["network"][f"backbone.{key}"]).norm()
    assert 0 < moved < 0.2 * kept["network"][f"backbone.{key}"].norm()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [4]


def test_a_checkpoint_of_another_recipe_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--recipe", recipe(tmp_path, DETECTOR), "--out", str(tmp_path / "run"), "--data", str(data)]
    assert cli([*command, "--device", "cpu", "--set", "steps=2"]) == 0
    assert cli([*command, "--device", "cpu", "--set", "steps=3", "--resume"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_a_run_that_diverges_stops_and_says_where_it_was_good(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--recipe", recipe(tmp_path, DETECTOR), "--out", str(tmp_path / "run"), "--data", str(data)]
    assert cli([*command, "--device", "cpu", "--set", "learning_rate=1e30", "--set", "clip=1e30"]) == 2
    message = capsys.readouterr().err
    assert "last good checkpoint: none was written" in message and "learning_rate" in message
    assert not (tmp_path / "run" / "checkpoint.pt").exists()  # weights that are no numbers are never kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "there are: adapt, detector, glance, pretrain, writer"),
        (["--recipe", "detector", "--set", "stepz=3"], "has no 'stepz'"),
        (["--recipe", "writer"], "give --glance"),
        (
            ["--recipe", "writer", "--glance", "nothing.safetensors", "--detector", "nothing.safetensors"],
            "not a readable safetensors file",
        ),
        (["--recipe", "detector"], "data sets that are not there: deep-pcb"),
        (["--recipe", "pretrain"], "data sets that are not there: covid-ct"),
    ],
)
def test_wrong_usage_is_told_before_anything_trains(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli([*arguments, "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_faults_of_a_manifest_are_named_with_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.jsonl").write_text('{"id": "a", "image": "gone.png", "split": "train"}\n')
    command = ["--recipe", recipe(tmp_path, DETECTOR), "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert cli([*command, "--device", "cpu"]) == 2
    assert "line 1" in capsys.readouterr().err


def test_boxes_stay_on_their_scratch_through_augmentation(data: Path) -> None:
    torch.manual_seed(0)
    stream = next(s for s in load_streams(data, "train") if s.name == "strip")
    how = Augmentation(zoom=(0.7, 1.3), mosaic=0.5, contrast=0.0, noise=0.0)
    batch = draw(stream, 16, 256, how)
    assert batch.valid.any(1).float().mean() > 0.5
    for picture, boxes, valid in zip(batch.x, batch.boxes, batch.valid, strict=True):
        for x0, y0, x1, y1 in boxes[valid].round().int().tolist():
            if min(x1 - x0, y1 - y0) >= 4:
                assert picture[0, y0:y1, x0:x1].mean() > 1.0  # 230 is 1.6; the strip around it about -0.8


def test_mirrored_bodies_swap_left_and_right(data: Path) -> None:
    torch.manual_seed(0)
    stream = next(s for s in load_streams(data, "train") if s.name == "body")
    position, (right, left) = LATERALITY, LEFT_RIGHT
    for picture, label in zip(stream.pictures, stream.fields[:, position].tolist(), strict=True):
        # Radiological convention: the body's right is on the picture's left. The labelled side is dark.
        half = picture[:, :, :128] if label == right else picture[:, :, 128:]
        half.zero_()
    batch = draw(stream, 64, 256, Augmentation(symmetry="mirror", whole=True, contrast=0, noise=0, zoom=(1, 1)))
    left_is_dark = batch.x[:, 0, 128, 60:120].mean(1) < batch.x[:, 0, 128, 136:196].mean(1)
    assert left_is_dark.any() and not left_is_dark.all()
    assert batch.fields[:, position].tolist() == torch.where(left_is_dark, right, left).tolist()


def test_ciou_of_equal_boxes_is_one() -> None:
    box = torch.tensor([[3.0, 4, 20, 40]])
    torch.testing.assert_close(ciou(box, box), torch.ones(1))
    assert ciou(box, box + 100) < 0


def test_the_evidence_loss_prefers_the_truth() -> None:
    from encoders import Dense

    points = torch.tensor([[4.0 + 8 * x, 4.0 + 8 * y] for y in range(8) for x in range(8)])
    strides = torch.full((64,), 8.0)
    truth, labels, valid = torch.tensor([[[16.0, 16, 48, 48]]]), torch.tensor([[1]]), torch.tensor([[True]])

    def loss(box: tuple[float, ...], label: int) -> float:
        types = torch.full((1, 64, 3), -6.0)
        sides = torch.stack((points - torch.tensor(box[:2]), torch.tensor(box[2:]) - points), 1).flatten(1) / 8
        inside = (sides > 0).all(1)
        types[0, inside, label] = 4.0
        distances = -(sides.clamp(0, 15)[None, ..., None] - torch.arange(16)).abs() * 10
        dense = Dense(types, distances, points, strides, torch.zeros(1, 3))
        return float(evidence_loss(dense, labels, truth, valid))

    right = loss((16, 16, 48, 48), 1)
    assert right < loss((16, 16, 48, 48), 0) and right < loss((24, 24, 60, 60), 1)


def test_the_presence_loss_prefers_the_types_that_are_there() -> None:
    labels, valid = torch.tensor([[1, 1, 2]]), torch.tensor([[True, True, False]])

    def loss(*logits: float) -> float:
        return float(presence_loss(torch.tensor([logits]), labels, valid))

    assert loss(-4, 4, -4) < loss(-4, 4, 4) < loss(4, -4, 4)


def test_boxes_shrink_with_their_picture_whatever_the_golden_samples_size(tmp_path: Path) -> None:
    large = tmp_path / "large" / "board"
    (large / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((900, 1280), np.uint8)).save(large / "images" / "a.png")
    Image.fromarray(np.zeros((450, 640), np.uint8)).save(large / "images" / "golden.png")
    line = {"id": "a", "image": "images/a.png", "template": "images/golden.png", "split": "train"}
    line |= {"findings": [{"type": "open", "bbox": [100, 200, 140, 260]}]}
    (large / "manifest.jsonl").write_text(json.dumps(line))
    shrink(tmp_path / "large", tmp_path / "small", quality=90)
    case = read_manifest(tmp_path / "small" / "board" / "manifest.jsonl")[0]
    assert case.boxes[0].type == "open" and case.boxes[0].bbox == (50, 100, 70, 130)
    stream = load_streams(tmp_path / "large", "train")[0]
    assert stream.boxes[0, 0].tolist() == [50, 100, 70, 130] and stream.sizes[0].tolist() == [640, 450]


def test_weights_come_back_within_half_a_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"big": torch.randn(64, 80), "small": torch.randn(7), "count": torch.tensor(3)}
    save_weights(tmp_path / "w.safetensors", state, {"width": 3})
    assert load_config(tmp_path / "w.safetensors") == {"width": 3}
    loaded = load_weights(tmp_path / "w.safetensors")
    assert set(loaded) == {"big", "small"}
    step = state["big"].abs().amax(1, keepdim=True) / 127
    assert ((loaded["big"] - state["big"]).abs() <= step / 2 + 1e-6).all()
    torch.testing.assert_close(loaded["small"], state["small"], atol=2e-3, rtol=1e-3)


def test_large_tensors_get_six_bits_until_the_file_is_small_enough(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"kernel": torch.randn(128, 128, 3, 3), "matrix": torch.randn(64, 512), "early": torch.randn(64, 64)}
    state |= {"odd": torch.randn(4096, 51), "small": torch.randn(7), "extreme": torch.full((256, 512), 2.0)}
    state |= {"glance.matrix": torch.randn(200, 200)}
    state["extreme"][:, ::2] = -2.0
    save_weights(tmp_path / "8.safetensors", state, {})
    stored = load_file(tmp_path / "8.safetensors")
    size = sum(value.nbytes for value in stored.values())
    assert packed(stored, size).keys() == stored.keys()
    save_file(packed(stored, size - 70_000), tmp_path / "6.safetensors")
    eight, six = (load_weights(tmp_path / f"{bits}.safetensors") for bits in (8, 6))
    assert set(six) == set(state)
    assert (tmp_path / "6.safetensors").stat().st_size < (tmp_path / "8.safetensors").stat().st_size - 69_000
    for name in ("kernel", "matrix"):
        assert 0 < (six[name] - state[name]).norm() < 0.035 * state[name].norm()
        assert (six[name] - state[name]).abs().max() < 1.5  # the largest of a row may be cut off, nothing is swapped
    torch.testing.assert_close(six["extreme"], state["extreme"])
    assert all(torch.equal(six[name], eight[name]) for name in ("early", "odd", "small", "glance.matrix"))  # no need
    with pytest.raises(ValueError, match="even with six bits"):
        packed(stored, size / 2)


def test_what_a_network_uses_in_several_places_is_stored_once(tmp_path: Path) -> None:
    detector, other = Detector(DetectorConfig(types=3)), Detector(DetectorConfig(types=3))
    save_weights(tmp_path / "w.safetensors", detector.state_dict(), {})
    stored = load_weights(tmp_path / "w.safetensors")
    kernels = [name for name in stored if name.startswith("boxes.type_branch") and name.endswith("conv.weight")]
    assert kernels == [f"boxes.type_branch.0.{i}.conv.weight" for i in (0, 1)]
    load_into(other, tmp_path / "w.safetensors")
    for i in range(3):
        torch.testing.assert_close(other.state_dict()[f"boxes.type_branch.{i}.1.conv.weight"], stored[kernels[1]])
    save_file({name: value for name, value in stored.items() if name != kernels[0]}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="is missing"):
        load_into(other, tmp_path / "v.safetensors")


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    for state, message in (
        ({"weight": torch.zeros(2, 3)}, "'bias' is missing"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"shape \(2, 4\), expected \(2, 3\)"),
        ({**network.state_dict(), "more": torch.zeros(1)}, "'more' is unknown"),
    ):
        save_weights(tmp_path / "w.safetensors", state, {})
        with pytest.raises(ValueError, match=message):
            load_into(network, tmp_path / "w.safetensors")


def test_a_recipe_with_wrong_keys_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"]
    for text, message in (
        (DETECTOR.replace("clip = 10.0", ""), "lacks clip"),
        (DETECTOR.replace("mosaic = 0.5", "mosiac = 0.5"), "does not know: mosiac"),
        ("kind = [", "is not a recipe"),
    ):
        assert cli(["--recipe", recipe(tmp_path, text), *command]) == 2
        assert message in capsys.readouterr().err
