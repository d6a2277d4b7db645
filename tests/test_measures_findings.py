"""What is measured inside evidence boxes: outlines where there is a distinct one, else the box, and distances."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pipelines.measures import measure_defect, measure_lesion
from pipelines.study import Geometry, ImageStudy, SourceFile
from reports.measurements import Box
from reports.schema import Measurement
from tests.phantoms import AXIAL, ct


def photo(pixels: np.ndarray, mm: float | None = None) -> ImageStudy:
    geometry = Geometry(spacing_mm=(mm, mm) if mm else None)
    return ImageStudy(
        "1" * 64, "a.png", "display", pixels[np.newaxis], (SourceFile("a.png", "2" * 64, "image/png"),), geometry
    )


def surface(seed: int = 0, size: tuple[int, int] = (300, 400)) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(128, 6, size), 0, 255).astype(np.uint8)


def bar(image: np.ndarray, angle: float, length: float, width: float, grey: int) -> tuple[np.ndarray, Box]:
    """A bar at an angle (degrees) in the middle of the image, and its upright box."""
    height, wide = image.shape
    turn = np.deg2rad(angle)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    middle = np.array([wide / 2, height / 2])
    corners = [
        middle + a * along * length / 2 + b * across * width / 2 for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))
    ]
    drawn = Image.new("1", (4 * wide, 4 * height))
    ImageDraw.Draw(drawn).polygon([(4 * float(x), 4 * float(y)) for x, y in corners], fill=1)
    mask = np.asarray(drawn).reshape(height, 4, wide, 4).mean(axis=(1, 3)) > 0.5
    ys, xs = np.nonzero(mask)
    out = image.copy()
    out[mask] = grey
    return out, (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))


def named(found: tuple[Measurement, ...]) -> dict[tuple[str, str], float]:
    assert len({(m.name, m.unit) for m in found}) == len(found)
    return {(m.name, m.unit): m.value for m in found}


PX = "{pixel}"


@pytest.mark.parametrize("angle", [0, 17, 45, 80])
@pytest.mark.parametrize("grey", [60, 190])
def test_a_bar_is_as_long_and_wide_as_it_is_at_any_angle(angle: float, grey: int) -> None:
    image, box = bar(surface(), angle, 120, 20, grey)
    found = measure_defect(photo(image), box, [], weak=False)
    values = named(found)
    assert values["length", PX] == pytest.approx(120, abs=3)
    assert values["width", PX] == pytest.approx(20, abs=3)
    assert values["area", PX] == pytest.approx(2400, rel=0.05)
    assert all("outline" in m.method for m in found if m.name in ("length", "width", "area"))


def test_a_ring_counts_with_what_it_encloses_and_a_bay_stays_outside() -> None:
    image, box = bar(surface(), 0, 120, 60, 40)
    image[130:170, 160:240] = 128  # 80 x 40 in its middle
    values = named(measure_defect(photo(image), box, [], weak=False))
    assert values["area", PX] == pytest.approx(120 * 60, rel=0.05)
    image[130:170, 240:270] = 128  # the hole opens to one side
    values = named(measure_defect(photo(image), box, [], weak=False))
    assert values["area", PX] == pytest.approx(120 * 60 - 100 * 40, rel=0.1)


def test_a_scale_gives_millimetres_beside_pixels() -> None:
    image, box = bar(surface(), 30, 120, 20, 40)
    values = named(measure_defect(photo(image, mm=0.05), box, [(0, 0, 10, 10)], weak=False))
    for name in ("length", "width", "distance to the nearest edge", "distance to the nearest finding"):
        assert values[name, "mm"] == pytest.approx(values[name, PX] * 0.05)
    assert values["area", "mm2"] == pytest.approx(values["area", PX] * 0.05**2)


def test_without_contrast_the_box_is_measured_and_the_method_says_so() -> None:
    found = measure_defect(photo(surface()), (100, 100, 160, 130), [], weak=False)
    values = named(found)
    assert (values["length", PX], values["width", PX], values["area", PX]) == (60, 30, 1800)
    assert {m.method for m in found if m.name == "length"} == {"long side of the evidence box"}


def test_a_rough_surface_needs_more_contrast() -> None:
    rough = np.clip(np.random.default_rng(0).normal(128, 14, (300, 400)), 0, 255).astype(np.uint8)
    for grey, outlined in ((95, False), (30, True)):
        image, box = bar(rough, 0, 120, 20, grey)
        found = measure_defect(photo(image), box, [], weak=False)
        assert ["outline" in m.method for m in found if m.name == "length"] == [outlined]


def test_a_pattern_that_goes_on_around_the_box_has_no_outline() -> None:
    stripes = np.tile(np.repeat([60, 200], 10), (300, 20)).astype(np.uint8)
    found = named(measure_defect(photo(stripes), (100, 100, 160, 130), [], weak=False))
    assert found["area", PX] == 1800


def test_a_mark_of_where_the_model_looked_is_never_outlined() -> None:
    image, box = bar(surface(), 0, 120, 20, 40)
    found = measure_defect(photo(image), box, [], weak=True)
    assert all("no outline" in m.method for m in found if m.name in ("length", "width", "area"))


def test_a_golden_sample_shows_what_differs() -> None:
    golden = np.tile(np.repeat([40, 210], 12), (240, 15)).astype(np.uint8)
    board = golden.copy()
    board[100:110, 125:131] = 255 - board[100:110, 125:131]  # a notch in a trace
    alone = measure_defect(photo(board), (120, 96, 136, 114), [], weak=False)
    against = measure_defect(photo(board), (123, 98, 133, 112), [], weak=False, reference=photo(golden))
    assert named(alone)["area", PX] == 16 * 18
    assert named(against)["area", PX] == 60
    assert (named(against)["length", PX], named(against)["width", PX]) == pytest.approx((10, 6))


@pytest.mark.parametrize("kind", ["rgb", "16 bit"])
def test_colour_and_deep_grey_have_outlines_too(kind: str) -> None:
    image, box = bar(surface(), 20, 120, 20, 30)
    pixels = np.stack([image] * 3, axis=-1) if kind == "rgb" else image.astype(np.uint16) * 40
    assert named(measure_defect(photo(pixels), box, [], weak=False))["length", PX] == pytest.approx(120, abs=3)


def test_distances_are_those_between_boxes() -> None:
    found = named(
        measure_defect(photo(surface()), (20, 50, 40, 60), [(70, 100, 90, 120), (43, 64, 50, 70)], weak=False)
    )
    assert found["distance to the nearest edge", PX] == 20
    assert found["distance to the nearest finding", PX] == 5
    touching = named(measure_defect(photo(surface()), (0, 0, 40, 60), [(30, 30, 90, 120)], weak=False))
    assert touching["distance to the nearest edge", PX] == touching["distance to the nearest finding", PX] == 0


def test_a_huge_box_takes_no_longer() -> None:
    image = np.random.default_rng(0).integers(100, 140, (6000, 6000), dtype=np.uint8)
    image[1500:4500, 2000:4000] = 20
    study = photo(image)
    measure_defect(study, (0, 0, 9, 9), [], weak=False)  # imports
    started = time.process_time()
    found = named(measure_defect(study, (1500, 1000, 4500, 5000), [], weak=False))
    assert time.process_time() - started < 0.5  # 10 ms on an idle core
    assert found["area", PX] == pytest.approx(3000 * 2000, rel=0.02)


def nodule(mm: tuple[float, float], long: float, short: float, hu: int = 50) -> ImageStudy:
    """An elliptic nodule in lung, its long axis at 30 degrees, in mm."""
    height, width = round(120 / mm[0]), round(120 / mm[1])
    y, x = np.mgrid[:height, :width]
    dy, dx = (y - height / 2 + 0.5) * mm[0], (x - width / 2 + 0.5) * mm[1]
    turn = np.deg2rad(30)
    a, b = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    noise = np.random.default_rng(1).normal(0, 15, y.shape)
    pixels = np.where((2 * a / long) ** 2 + (2 * b / short) ** 2 <= 1, hu, -850) + noise
    return ct(pixels[np.newaxis].astype(np.int16), Geometry(mm, AXIAL, ((0, 0, 0),)))


@pytest.mark.parametrize("mm", [(0.5, 0.5), (1.0, 0.5)])
def test_a_nodule_has_its_axes_in_millimetres(mm: tuple[float, float]) -> None:
    box = (60 / mm[1] - 16 / mm[1], 60 / mm[0] - 12 / mm[0], 60 / mm[1] + 16 / mm[1], 60 / mm[0] + 12 / mm[0])
    values = named(measure_lesion(nodule(mm, 30, 18), box, 0, weak=False))
    assert values["long axis", "mm"] == pytest.approx(30, abs=1.6)
    assert values["short axis", "mm"] == pytest.approx(18, abs=1.6)


def test_a_faint_lesion_is_measured_by_its_box() -> None:
    study = nodule((0.5, 0.5), 30, 18, hu=-840)
    found = measure_lesion(study, (90, 96, 150, 144), 0, weak=False)
    assert named(found)["long axis", "mm"] == 30
    assert "side of the evidence box" in found[0].method


def test_the_size_of_a_region_of_attention_does_not_pass_for_that_of_a_lesion() -> None:
    found = named(measure_lesion(nodule((0.5, 0.5), 30, 18), (90, 96, 150, 144), 0, weak=True))
    assert found["long axis of the marked region", "mm"] == 30
    assert ("long axis", "mm") not in found


def test_without_a_scale_a_lesion_has_hounsfield_units_only() -> None:
    study = replace(nodule((0.5, 0.5), 30, 18), geometry=Geometry())
    assert {m.unit for m in measure_lesion(study, (90, 96, 150, 144), 0, weak=False)} == {"[hnsf'U]"}


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["uint8", "uint16", "rgb", "float"]))
@settings(max_examples=80, deadline=None)
def test_whatever_the_box_sizes_are_finite_and_none_is_negative(
    data: st.DataObject, height: int, width: int, kind: str
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    pixels = rng.integers(0, 255, (height, width, 3) if kind == "rgb" else (height, width)).astype(np.uint8)
    x0, y0 = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    box = (x0, y0, data.draw(st.floats(x0 + 0.01, width)), data.draw(st.floats(y0 + 0.01, height)))
    if kind == "float":
        values = pixels.astype(np.float32)
        values[rng.random(values.shape) < 0.3] = np.nan
        found = measure_lesion(ct(values[np.newaxis], Geometry((0.5, 0.7), AXIAL, ((0, 0, 0),))), box, 0, weak=False)
    else:
        pixels = pixels.astype(np.uint16) if kind == "uint16" else pixels
        found = measure_defect(photo(pixels, mm=0.1), box, [(0, 0, 1, 1)], weak=False)
    assert all(np.isfinite(m.value) for m in found)
    assert all(m.value >= 0 for m in found if m.unit != "[hnsf'U]")


@given(st.floats(0.01, 3))
@settings(max_examples=10, deadline=None)
def test_sizes_follow_the_scale(mm: float) -> None:
    image, box = bar(surface(), 30, 100, 16, 40)
    one, other = (named(measure_defect(photo(image, each), box, [], weak=False)) for each in (mm, 2 * mm))
    for (name, unit), value in one.items():
        power = {"mm": 2, "mm2": 4}.get(unit, 1)
        assert other[name, unit] == pytest.approx(power * value)
