"""Large pictures: tiles cover them, findings of tiles become findings of the picture, reports keep what is needed."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_reader import TinyReader

from pipelines import tiles
from pipelines.ingest import load, plan
from pipelines.inputs import grey8
from pipelines.reader import Reader
from pipelines.run import Job, execute
from pipelines.study import ImageStudy
from reports.bundle import load_bundle
from reports.images import Picture, encode_picture
from reports.measurements import covered_share

EXAMPLES = Path(__file__).parents[1] / "examples"


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from([256, 320, 640]))
@settings(max_examples=100, deadline=None)
def test_tiles_cover_the_picture_with_overlap(height: int, width: int, view: int) -> None:
    places = tiles.layout(height, width, view)
    assert len(places) <= tiles.MAX_TILES
    for axis, length in ((0, width), (1, height)):
        spans = sorted({(place[axis], place[axis + 2]) for place in places})
        assert spans[0][0] == 0 and spans[-1][1] == length
        for (start, end), (following, _) in itertools.pairwise(spans):
            assert end - following >= math.floor(tiles.OVERLAP * (end - start)) - 2


@pytest.mark.parametrize("shape", [(700, 500), (700, 500, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_overview_is_the_mean_of_what_it_covers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    if len(shape) == 3 and dtype == np.uint16:
        pytest.skip("colour pictures have 8 bit")
    monkeypatch.setattr(tiles, "OVERVIEW_SIDE", 70)
    pixels = np.random.RandomState(0).randint(0, np.iinfo(dtype).max, shape).astype(dtype)
    small = tiles.overview(pixels)
    assert small.shape == (70, 50, *shape[2:]) and small.dtype == np.uint8
    as_shown = pixels if dtype == np.uint8 else grey8(pixels, tiles.grey_span(pixels))
    means = as_shown.reshape(70, 10, 50, 10, -1).mean((1, 3)).reshape(small.shape)
    assert np.abs(small - means).max() <= 1


def test_a_finding_seen_from_two_tiles_is_one_and_whole() -> None:
    left, right = (0, 0, 100, 100), (80, 0, 180, 100)
    boxes = [(85.0, 10.0, 100.0, 30.0), (85.0, 10.0, 110.0, 30.0), (20.0, 60.0, 40.0, 80.0)]
    merged = tiles.merge(boxes, ["crack"] * 3, [0.95, 0.9, 0.5], [left, right, left])
    assert merged == [(1, boxes[1]), (2, boxes[2])]  # the first ends where its tile ends


def test_pieces_of_a_long_finding_are_joined() -> None:
    places = [(0, 0, 100, 100), (80, 0, 180, 100), (160, 0, 260, 100)]
    boxes = [(30.0, 40.0, 100.0, 50.0), (80.0, 41.0, 180.0, 51.0), (160.0, 40.0, 200.0, 50.0)]
    assert tiles.merge(boxes, ["scratches"] * 3, [0.7, 0.9, 0.8], places) == [(1, (30.0, 40.0, 200.0, 51.0))]


def test_findings_of_other_types_stay_apart() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    assert len(tiles.merge([box, box], ["crack", "fray"], [0.9, 0.8], [(0, 0, 100, 100)] * 2)) == 2


corners = st.integers(0, 50)


@given(st.lists(st.tuples(corners, corners, st.integers(1, 50), st.integers(1, 50)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_covered_share_counts_pixels_once(places: list[tuple[int, int, int, int]]) -> None:
    width, height = 60, 40
    boxes = [(x, y, x + wide, y + high) for x, y, wide, high in places]
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        covered[min(y0, height - 1) : y1, min(x0, width - 1) : x1] = True
    assert covered_share(boxes, width, height).value == pytest.approx(100 * covered.mean())


@pytest.fixture(scope="module")
def model() -> Reader:
    return Reader.load(device="cpu")


def study_of(path: Path) -> ImageStudy:
    study = load(plan([path]).units[0])
    assert isinstance(study, ImageStudy)
    return study


def test_defects_of_a_large_board_are_found_where_they_are(
    tmp_path: Path, model: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, golden = (Image.open(EXAMPLES / name / "board.png").convert("L") for name in ("board", "golden"))
    side = board.width
    large, large_golden = Image.new("L", (2 * side, side)), Image.new("L", (2 * side, side))
    for number in range(2):
        large.paste((golden, board)[number], (number * side, 0))
        large_golden.paste(golden, (number * side, 0))
    large.save(tmp_path / "large.png")
    large_golden.save(tmp_path / "golden.png")
    one, sample = study_of(EXAMPLES / "board" / "board.png"), study_of(EXAMPLES / "golden")
    alone = model.read(one, kind="defect", reference=sample)
    monkeypatch.setattr(tiles, "LARGE_SIDE", side)
    reading = model.read(study_of(tmp_path / "large.png"), kind="defect", reference=study_of(tmp_path / "golden.png"))
    assert reading.product_line == "board"
    assert reading.quality_flags == ("read-in-tiles",)
    expected = [(f.type, f.bbox[0] + side, f.bbox[1]) for f in alone.findings if f.reported]
    found = [(f.type, *f.bbox[:2]) for f in reading.findings if f.reported]
    for name, x, y in expected:
        assert any(name == other and abs(x - left) < 8 and abs(y - top) < 8 for other, left, top in found)
    assert expected and len(found) <= len(expected) + 1  # the board beside it has no defect


def test_the_report_of_a_large_picture_keeps_an_overview_and_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "LARGE_SIDE", 1000)
    monkeypatch.setattr(tiles, "OVERVIEW_SIDE", 256)
    TinyReader().install(monkeypatch)
    pixels = np.random.RandomState(1).randint(0, 200, (1200, 900), np.uint8)
    pixels[1000, 700] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    [entry] = execute(Job((tmp_path / "a.png",), tmp_path / "out")).reported
    assert entry.errors == {}
    bundle = load_bundle(tmp_path / "out" / entry.id)
    overview, detail = bundle.images.slices[0], bundle.images.details["F1"]
    assert max(overview.pixels.shape) <= 256
    assert (overview.width, overview.height) == (900, 1200)
    x0, y0, x1, y1 = map(int, detail.shows)
    np.testing.assert_array_equal(detail.pixels, pixels[y0:y1, x0:x1])
    assert x0 <= 700 < x1 and y0 <= 1000 < y1
    page = (tmp_path / "out" / entry.formats["html"]).read_text()
    assert 'viewBox="0 0 900 1200"' in page
    assert f'viewBox="0 0 {x1 - x0} {y1 - y0}"' in page


@given(st.floats(-50, 950), st.floats(-50, 1250), st.floats(0, 300), st.floats(0, 300))
@settings(max_examples=100, deadline=None)
def test_parts_of_an_overview_are_cut_in_the_images_pixels(x: float, y: float, wide: float, high: float) -> None:
    overview = Picture(np.zeros((120, 90), np.uint8), part=(0, 0, 900, 1200))
    encoded = encode_picture(overview, longest_side=400, box=(x, y, x + wide, y + high))
    x0, y0, x1, y1 = encoded.box
    assert 0 <= x0 < x1 <= 900 and 0 <= y0 < y1 <= 1200
