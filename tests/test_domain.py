"""What the model does not know: fitted on known kinds of pictures, asked about others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoders import GlanceConfig, GlanceNet
from pipelines.domain import STRANGE, VARIATIONS, DomainModel, domain_features, fit_domain, varied
from pipelines.inputs import channels, colourfulness, pad, resize
from pipelines.manifest import ManifestError


def rolled(rng: np.random.Generator) -> np.ndarray:
    """A surface with rolling marks."""
    marks = np.repeat(rng.normal(128, 20, (1, 96)), 128, 0)
    return np.clip(marks + rng.normal(0, 6, marks.shape), 0, 255).astype(np.uint8)


def board(rng: np.random.Generator) -> np.ndarray:
    """Black and white tracks."""
    grid = np.kron(rng.random((8, 8)) < 0.5, np.ones((16, 16)))
    return (grid * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def glance() -> GlanceNet:
    torch.manual_seed(0)
    net = GlanceNet(GlanceConfig(map_types=3, fields={"line": 4}))
    return net.eval().requires_grad_(False)


def look(glance: GlanceNet, greys: list[np.ndarray]) -> torch.Tensor:
    views = [pad(channels(resize(grey, 256)), square=True)[0] for grey in greys]
    return domain_features(glance(torch.from_numpy(np.stack(views))).features)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two product lines, 24 pictures to fit and 8 to calibrate each; boards have a golden sample."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, product, draw in (("strip", "steel", rolled), ("pcb", "board", board)):
        (folder / name).mkdir()
        lines = []
        for i in range(32):
            case = {"id": str(i), "image": f"{i}.png", "split": "val" if i % 4 == 3 else "train", "product": product}
            case |= {"group": str(i), "findings": []}
            picture = draw(rng)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
            if product == "board":
                case["template"] = f"{i}-golden.png"
                Image.fromarray(picture).save(folder / name / f"{i}-golden.png")
            lines.append(json.dumps(case))
        (folder / name / "manifest.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def fitted(glance: GlanceNet, data: Path) -> DomainModel:
    return fit_domain(glance, data, progress=lambda line: None)


def test_known_kinds_are_known_and_others_are_strange(glance: GlanceNet, fitted: DomainModel) -> None:
    rng = np.random.default_rng(1)
    known = {"steel": [rolled(rng) for _ in range(12)], "board": [board(rng) for _ in range(12)]}
    for line, pictures in known.items():
        assert (fitted.probabilities(look(glance, pictures), line) >= STRANGE).float().mean() >= 0.8
    noise = rng.integers(0, 256, (128, 128)).astype(np.uint8)
    blank = np.full((128, 128), 90, np.uint8)
    slope = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    for line in known:
        assert (fitted.probabilities(look(glance, [noise, blank, slope]), line) < STRANGE).all()


def test_one_line_is_strange_to_the_other(glance: GlanceNet, fitted: DomainModel) -> None:
    rng = np.random.default_rng(2)
    assert fitted.score(look(glance, [board(rng)]), "steel") < STRANGE
    assert fitted.score(look(glance, [rolled(rng)]), "board") < STRANGE


def test_a_volume_is_as_usual_as_its_median_slice(glance: GlanceNet, fitted: DomainModel) -> None:
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (128, 96)).astype(np.uint8)
    slices = look(glance, [rolled(rng), rolled(rng), rolled(rng), noise, noise])
    one_by_one = sorted(fitted.score(each[None], "steel") for each in slices)
    assert fitted.score(slices, "steel") == pytest.approx(one_by_one[2], abs=1e-5)


def test_what_leaves_the_axes_of_a_line_is_strange() -> None:
    torch.manual_seed(0)
    usual = torch.randn(400, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(400, 32)
    known = DomainModel.fit(usual[:200], ["steel"] * 200).calibrate(usual[200:], ["steel"] * 200)
    line = known.lines["steel"]
    away = torch.randn(32)
    away -= away @ line.axes.T @ line.axes
    beside = (line.centre + 6 * away / away.norm()) * known.scale
    assert known.score(torch.zeros(1, 32), "steel") > 0.9
    assert known.score(beside[None], "steel") < 0.2


def test_colour_is_strange_but_a_tint_is_not(glance: GlanceNet, fitted: DomainModel) -> None:
    rng = np.random.default_rng(4)
    grey = rolled(rng)
    seen = look(glance, [grey])
    tinted = np.stack((grey, grey * 0.95, grey * 0.85), -1).astype(np.uint8)
    flowers = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert colourfulness(grey) == 0
    assert fitted.score(seen, "steel", colour=colourfulness(tinted)) > 0.9 * fitted.score(seen, "steel")
    assert fitted.score(seen, "steel", colour=colourfulness(flowers)) < 0.01


def test_saving_keeps_the_answers(glance: GlanceNet, fitted: DomainModel, tmp_path: Path) -> None:
    fitted.save(tmp_path / "domain.safetensors")
    again = DomainModel.load(tmp_path / "domain.safetensors")
    rng = np.random.default_rng(5)
    seen = look(glance, [rolled(rng), board(rng)])
    for line in ("steel", "board"):
        torch.testing.assert_close(again.probabilities(seen, line), fitted.probabilities(seen, line))
    assert (tmp_path / "domain.safetensors").stat().st_size < 130_000 * len(fitted.lines)


def test_a_file_that_is_no_domain_is_named(tmp_path: Path) -> None:
    path = tmp_path / "domain.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"domain\.safetensors .* install the model again"):
        DomainModel.load(path)


def test_too_few_pictures_are_told(tmp_path: Path, glance: GlanceNet) -> None:
    with pytest.raises(ValueError, match="steel: 5 pictures are too few"):
        DomainModel.fit(torch.rand(5, 16), ["steel"] * 5)
    with pytest.raises(ValueError, match=r"no \*/manifest\.jsonl"):
        fit_domain(glance, tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.jsonl").write_text('{"id": "a"}')
    with pytest.raises(ManifestError):
        fit_domain(glance, tmp_path, progress=lambda line: None)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_variations_leave_pictures_pictures(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width)).astype(np.uint8)
    for change in (*VARIATIONS, varied):
        changed = change(picture, rng)
        assert changed.dtype == np.uint8
        assert changed.ndim == 2
        assert min(changed.shape) >= 1
