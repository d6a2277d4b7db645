"""The committed samples are what their script draws, and ingest reads from them what `expected.json` says.

Benchmarks, which no test runs whole, find what they import.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.ingest import load, plan
from pipelines.study import ImageStudy, Rejection

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAMPLES: list[dict[str, Any]] = json.loads((EXAMPLES / "expected.json").read_text())["samples"]
PICTURES = [s for s in SAMPLES if s.get("kind") == "defect"]
REFUSED = [s for s in SAMPLES if "rejected" in s]
PHANTOM = next(s for s in SAMPLES if s.get("path") == "ct/phantom-series")


def study(path: Path) -> ImageStudy:
    units = plan([path]).units
    assert len(units) == 1
    loaded = load(units[0])
    assert isinstance(loaded, ImageStudy)
    return loaded


@pytest.fixture(scope="module")
def phantom() -> ImageStudy:
    return study(EXAMPLES / PHANTOM["path"])


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    runpy.run_path(str(EXAMPLES / "make_samples.py"))["main"](folder)
    return folder


def test_script_draws_the_committed_samples(redrawn: Path) -> None:
    assert json.loads((redrawn / "expected.json").read_text())["samples"] == SAMPLES
    files = {p.relative_to(redrawn) for kind in ("png", "dcm", "jpg") for p in redrawn.rglob(f"*.{kind}")}
    assert files == {p.relative_to(EXAMPLES) for kind in ("png", "dcm", "jpg") for p in EXAMPLES.rglob(f"*.{kind}")}
    for unit in plan([redrawn]).units:
        drawn = load(unit)
        place = unit.files[0].path.relative_to(redrawn)
        committed = next(u for u in plan([EXAMPLES]).units if u.files[0].path.relative_to(EXAMPLES) == place)
        kept = load(committed)
        if isinstance(drawn, Rejection):
            assert isinstance(kept, Rejection)
            assert drawn.code == kept.code
            continue
        assert isinstance(kept, ImageStudy)
        assert drawn.geometry == kept.geometry
        # The last bit of exp and cos differs between machines, so a rounded value may differ by one.
        difference = np.abs(drawn.pixels.astype(int) - kept.pixels)
        assert difference.max() <= 1 or (difference > 0).mean() < 1e-4


@pytest.mark.parametrize("sample", PICTURES, ids=lambda s: s["path"])
def test_picture_has_its_size_and_its_defects_inside(sample: dict[str, Any]) -> None:
    picture = study(EXAMPLES / sample["path"])
    assert picture.units == "display"
    assert picture.pixels.shape == (1, sample["height"], sample["width"])
    assert sample["findings"]
    for finding in sample["findings"]:
        x0, y0, x1, y1 = finding["bbox"]
        assert 0 <= x0 < x1 <= sample["width"]
        assert 0 <= y0 < y1 <= sample["height"]


def test_board_differs_from_its_golden_sample_where_the_defects_are() -> None:
    sample = next(s for s in PICTURES if "reference" in s)
    board, golden = study(EXAMPLES / sample["path"]).pixels[0], study(EXAMPLES / sample["reference"]).pixels[0]
    changed = board != golden
    for finding in sample["findings"]:
        x0, y0, x1, y1 = finding["bbox"]
        assert changed[y0:y1, x0:x1].sum() > 20
        changed[y0:y1, x0:x1] = False
    assert changed.mean() < 0.01  # only the roughness of etched edges


@pytest.mark.parametrize("sample", REFUSED, ids=lambda s: s["path"])
def test_broken_sample_is_refused_with_its_code(sample: dict[str, Any]) -> None:
    planned = plan([EXAMPLES / sample["path"]])
    outcomes = [*planned.rejections, *map(load, planned.units)]
    assert [r.code for r in outcomes if isinstance(r, Rejection)] == [sample["rejected"]]
    assert all(isinstance(r, Rejection) and r.reason and r.remedy for r in outcomes)


def test_phantom_geometry(phantom: ImageStudy) -> None:
    assert phantom.units == "HU"
    assert phantom.pixels.dtype == np.int16
    assert list(phantom.pixels.shape) == PHANTOM["shape"]
    assert phantom.geometry.spacing_mm == tuple(PHANTOM["spacing_mm"])
    assert phantom.geometry.slice_spacing_mm == pytest.approx(PHANTOM["slice_spacing_mm"])
    assert phantom.window == tuple(PHANTOM["window"])
    assert phantom.body_part == PHANTOM["body_part"]
    assert phantom.quality_flags == ()


def test_phantom_slices_are_in_position_order_whatever_their_names(phantom: ImageStudy) -> None:
    assert phantom.geometry.positions_mm is not None
    x, y, z = PHANTOM["first_position_mm"]
    step = PHANTOM["slice_spacing_mm"]
    assert phantom.geometry.positions_mm == tuple((x, y, z + step * k) for k in range(len(phantom.pixels)))
    names = [source.path for source in phantom.sources]
    assert names != sorted(names)


@pytest.mark.parametrize("fact", PHANTOM["hu"], ids=lambda f: f["tissue"])
def test_phantom_hounsfield_units(phantom: ImageStudy, fact: dict[str, Any]) -> None:
    s, r, c = voxel(fact["at_mm"])
    assert phantom.pixels[s, r - 2 : r + 3, c - 2 : c + 3].mean() == pytest.approx(fact["mean"], abs=8)


def test_phantom_nodule_is_where_it_was_put(phantom: ImageStudy) -> None:
    finding = PHANTOM["findings"][0]
    s, r, c = voxel(finding["centre_mm"])
    around = phantom.pixels[s - 2 : s + 3, r - 8 : r + 9, c - 8 : c + 9]
    dense = np.argwhere(around > -400)
    centre = voxel_to_mm(dense.mean(axis=0) + np.array([s - 2, r - 8, c - 8]))
    assert centre == pytest.approx(finding["centre_mm"], abs=1.5)
    sx, sy = PHANTOM["spacing_mm"]
    volume = len(dense) * sx * sy * PHANTOM["slice_spacing_mm"]
    assert 2 * (volume * 3 / (4 * np.pi)) ** (1 / 3) == pytest.approx(finding["diameter_mm"], abs=1.5)


def test_file_that_pydicom_installs() -> None:
    path = runpy.run_path(str(EXAMPLES / "paths.py"))["paths"]()[-1]
    expected = next(s for s in SAMPLES if s.get("installed") == path.name)
    slice_ = study(path)
    assert list(slice_.pixels.shape) == expected["shape"]
    assert slice_.geometry.spacing_mm == tuple(expected["spacing_mm"])
    assert [slice_.pixels.min(), slice_.pixels.max()] == expected["hu_range"]


def test_listed_paths_exist() -> None:
    paths = runpy.run_path(str(EXAMPLES / "paths.py"))["paths"]()
    assert len(paths) == len(SAMPLES)
    assert all(path.exists() for path in paths)


def voxel(at_mm: list[float]) -> tuple[int, int, int]:
    x0, y0, z0 = PHANTOM["first_position_mm"]
    rows, columns = PHANTOM["spacing_mm"]
    x, y, z = at_mm
    return round((z - z0) / PHANTOM["slice_spacing_mm"]), round((y - y0) / rows), round((x - x0) / columns)


def voxel_to_mm(index: np.ndarray) -> tuple[float, float, float]:
    x0, y0, z0 = PHANTOM["first_position_mm"]
    rows, columns = PHANTOM["spacing_mm"]
    return x0 + index[2] * columns, y0 + index[1] * rows, z0 + index[0] * PHANTOM["slice_spacing_mm"]


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_project_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and (ROOT / node.module.partition(".")[0]).is_dir():
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                if error.name != "transformers":  # what benchmarks compare with is not always installed
                    raise
                continue
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
