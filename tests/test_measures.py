"""Measurements of CT studies without a model: on phantoms of known size, on real series, and where there is nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines import ingest
from pipelines.measures import StudyMeasures, measure_study, region_fits
from pipelines.study import Geometry, ImageStudy
from reports.texts import words
from tests.phantoms import AXIAL, BODY_MM, LEFT_MM, RIGHT_MM, chest, ct, ellipsoid_ml


def values(measures: StudyMeasures) -> dict[str, float]:
    return {m.name: m.value for m in measures.measurements}


def why(measures: StudyMeasures) -> dict[str, object]:
    return {item.code: item.values.get("why") for item in measures.not_assessed}


def mirrored(study: ImageStudy, axis: int) -> ImageStudy:
    """The same body stored the other way round along rows (1) or columns (2)."""
    geometry = study.geometry
    assert geometry.orientation and geometry.positions_mm and geometry.spacing_mm
    column, row = np.array(geometry.orientation[3:]), np.array(geometry.orientation[:3])
    direction = (column, row)[axis - 1]
    shift = direction * geometry.spacing_mm[axis - 1] * (study.pixels.shape[axis] - 1)
    turned = [column, row]
    turned[axis - 1] = -direction
    orientation = tuple(float(v) for v in (*turned[1], *turned[0]))
    positions = tuple(tuple(float(v) for v in np.add(p, shift)) for p in geometry.positions_mm)
    pixels = np.flip(study.pixels, axis)
    # Slices are stored by rising position along the normal, which turned over.
    return replace(
        study, pixels=pixels[::-1], geometry=replace(geometry, orientation=orientation, positions_mm=positions[::-1])
    )


# Lungs


@pytest.mark.parametrize("spacing", [(6.0, 2.5, 2.5), (10.0, 1.0, 1.0), (1.5, 1.6, 1.6), (4.0, 0.9, 0.9)])
def test_lungs_of_a_phantom_have_their_volume_to_within_two_per_cent(spacing: tuple[float, float, float]) -> None:
    found = values(measure_study(chest(spacing)))
    assert found["left lung volume"] == pytest.approx(ellipsoid_ml(LEFT_MM), rel=0.02)
    assert found["right lung volume"] == pytest.approx(ellipsoid_ml(RIGHT_MM), rel=0.02)
    assert found["lung volume"] == pytest.approx(found["left lung volume"] + found["right lung volume"])
    assert found["mean lung density"] == pytest.approx(-845, abs=5)


def test_masks_are_the_lungs_without_trachea_and_with_their_vessels() -> None:
    study = chest()
    measures = measure_study(study)
    assert [s.id for s in measures.segments] == list(measures.masks) == ["body", "bone", "lung-left", "lung-right"]
    assert all(mask.shape == study.pixels.shape and mask.dtype == bool for mask in measures.masks.values())
    left, right = measures.masks["lung-left"], measures.masks["lung-right"]
    assert not (left & right).any()
    assert left[:, :, 80:].sum() == left.sum()  # columns run to the patient's left
    assert not (left | right)[-10:, 77:79, 79:81].any()  # the trachea
    assert not (left | right)[24, 77:79, [83, 84, 85]].any()  # a main bronchus
    assert not (left | right)[26, 77:79, [77, 78, 81, 82]].any()  # both of them
    assert (left & (study.pixels == 40)).any()  # a vessel
    assert not (measures.masks["body"] & (study.pixels == -50)).any()  # the table
    assert (measures.masks["bone"] == (study.pixels == 400)).mean() > 0.999


def test_a_trachea_that_opens_into_one_lung_only_is_still_no_lung() -> None:
    study = chest()
    pixels = study.pixels.copy()
    branch = pixels[:, 74:81, 70:76]
    branch[branch == -1000] = 50  # the right main bronchus is closed
    left = measure_study(replace(study, pixels=pixels)).masks["lung-left"]
    assert not left[-15:, 75:80, 77:83].any()
    assert left.sum() * 6 * 2.5**2 / 1000 == pytest.approx(ellipsoid_ml(LEFT_MM), rel=0.006)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_side_is_the_patients_however_the_slices_are_stored(axis: int) -> None:
    study = chest()
    plain, turned = measure_study(study), measure_study(mirrored(study, axis))
    assert values(turned) == pytest.approx(values(plain), rel=1e-6)
    for name, mask in plain.masks.items():
        np.testing.assert_array_equal(np.flip(turned.masks[name], (0, axis)), mask)


def test_mirroring_the_pixels_alone_swaps_left_and_right() -> None:
    study = chest()
    swapped = values(measure_study(replace(study, pixels=study.pixels[:, :, ::-1])))
    plain = values(measure_study(study))
    assert swapped["left lung volume"] == pytest.approx(plain["right lung volume"])
    assert swapped["right lung volume"] == pytest.approx(plain["left lung volume"])


def test_a_coronal_stack_has_the_same_lungs_as_the_axial_one() -> None:
    axial = chest((2.5, 2.5, 2.5))
    assert axial.geometry.positions_mm
    size = len(axial.pixels), axial.pixels.shape[1]
    # Rows run to the left, columns to the feet: the normal points to the back, as the axial rows do.
    geometry = Geometry(
        (2.5, 2.5), (1, 0, 0, 0, 0, -1), tuple((0.0, 2.5 * n, 0.0) for n in range(size[1])), slice_spacing_mm=2.5
    )
    coronal = ct(np.ascontiguousarray(axial.pixels[::-1].transpose(1, 0, 2)), geometry)
    expected, found = values(measure_study(axial)), values(measure_study(coronal))
    assert found == pytest.approx(expected, rel=0.01, abs=0.5)


def test_lungs_that_touch_are_divided() -> None:
    study = chest((4.0, 2.0, 2.0))
    pixels = study.pixels.copy()
    rows, columns = pixels.shape[1] // 2, pixels.shape[2] // 2
    pixels[30:42, rows - 12 : rows - 2, columns - 20 : columns + 20] = -850  # a junction in front of the heart
    found = values(measure_study(replace(study, pixels=pixels)))
    assert found["left lung volume"] == pytest.approx(ellipsoid_ml(LEFT_MM), rel=0.03)
    assert found["right lung volume"] == pytest.approx(ellipsoid_ml(RIGHT_MM), rel=0.03)


def test_emphysema_and_dense_lung_are_counted() -> None:
    study = chest()
    lungs = measure_study(study).masks["lung-left"]
    pixels = study.pixels.copy()
    slices = np.arange(len(pixels))[:, np.newaxis, np.newaxis]
    pixels[lungs & (slices % 4 == 0)] = -960
    pixels[lungs & (slices % 4 == 1)] = -450
    pixels[lungs & (slices % 4 == 2)] = -940
    measures = measure_study(replace(study, pixels=pixels))
    both = sum(measures.masks[name].sum() for name in ("lung-left", "lung-right"))
    exact = {
        "LAA-950": (pixels < -950),
        "high-attenuation area": (pixels >= -600) & (pixels <= -250),
    }
    for name, which in exact.items():
        inside = (measures.masks["lung-left"] | measures.masks["lung-right"]) & which
        assert values(measures)[name] == pytest.approx(100 * inside.sum() / both)
        assert values(measures)[name] > 8


def test_a_scan_that_ends_inside_the_lungs_says_so() -> None:
    measures = measure_study(chest(bottom_mm=-20))
    assert "lungs-incomplete" in measures.quality_flags
    (volume,) = (m for m in measures.measurements if m.name == "left lung volume")
    assert volume.value < 0.8 * ellipsoid_ml(LEFT_MM)
    assert "scanned part" in volume.method
    assert "lungs-incomplete" not in measure_study(chest()).quality_flags


def test_a_single_slice_gives_areas() -> None:
    measures = measure_study(chest(bottom_mm=-43, top_mm=-37))
    (left,) = (m for m in measures.measurements if m.name == "left lung area")
    assert left.unit == "cm2"
    assert left.value == pytest.approx(np.pi * LEFT_MM[0] * LEFT_MM[1] * (1 - (40 / LEFT_MM[2]) ** 2) / 100, rel=0.02)
    assert not any("volume" in m.name for m in measures.measurements)


def test_noise_makes_laa_untrustworthy() -> None:
    quiet, noisy = measure_study(chest(noise=15)), measure_study(chest(noise=60))
    assert values(quiet)["image noise"] == pytest.approx(15, rel=0.1)
    assert values(noisy)["image noise"] == pytest.approx(60, rel=0.1)
    assert ("densitometry-noisy" in quiet.quality_flags, "densitometry-noisy" in noisy.quality_flags) == (False, True)


# What is not stated


def test_lungs_that_the_field_of_view_cuts_are_not_measured() -> None:
    measures = measure_study(chest(field_mm=240))
    assert why(measures)["lungs"] == "lungs-beyond-field"
    assert "body-truncated" in measures.quality_flags
    assert not {"lung volume", "effective diameter"} & values(measures).keys()


@pytest.mark.parametrize(
    ("half_axes", "reason"), [((20.0, 25.0, 30.0), "lungs-of-odd-size"), ((45.0, 60.0, 80.0), None)]
)
def test_lungs_of_impossible_size_are_not_measured(half_axes: tuple[float, float, float], reason: str | None) -> None:
    study = chest()
    z, y, x = np.ogrid[: len(study.pixels), :160, :160]
    pixels = np.where(study.pixels == -50, -1000, study.pixels)
    pixels[(pixels < -500) & (((x - 79.5) * 2.5 / BODY_MM[0]) ** 2 + ((y - 79.5) * 2.5 / BODY_MM[1]) ** 2 < 1)] = 50
    for centre in (-75, 75):
        parts = ((x - 79.5) * 2.5 - centre, (y - 79.5) * 2.5, (z - 23) * 6.0)
        pixels[sum((part / half) ** 2 for part, half in zip(parts, half_axes, strict=True)) < 1] = -850
    measures = measure_study(replace(study, pixels=pixels.astype(np.int16)))
    assert why(measures).get("lungs") == reason
    assert ("lung volume" in values(measures)) == (reason is None)


def test_bowel_gas_is_no_lung() -> None:
    study = chest()
    gas = np.where(study.pixels == -850, -1000, study.pixels).astype(np.int16)
    assert why(measure_study(replace(study, pixels=gas)))["lungs"] == "no-lungs"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spacing_mm": None}, "no-pixel-size"),
        ({"slice_spacing_mm": None}, "uneven-slices"),
        ({"orientation": None}, "unknown-orientation"),
        ({"orientation": (0.7, 0.7, 0.14, -0.5, 0.36, 0.79)}, "unknown-orientation"),
    ],
)
def test_without_full_geometry_nothing_of_the_body_is_measured(change: dict[str, object], reason: str) -> None:
    study = chest()
    measures = measure_study(replace(study, geometry=replace(study.geometry, **change)))
    assert why(measures) == {"body-and-lungs": reason}
    assert not measures.measurements
    assert not measures.masks


def test_a_sagittal_picture_is_no_section_of_the_body() -> None:
    geometry = Geometry((1.0, 1.0), (0, 1, 0, 0, 0, -1), ((0, 0, 0),))
    assert why(measure_study(ct(np.zeros((1, 64, 64), np.int16), geometry))) == {"body-and-lungs": "not-axial"}


def test_pictures_without_hounsfield_units_are_left_alone() -> None:
    study = replace(chest(), units="display")
    assert measure_study(study) == StudyMeasures()


def test_every_reason_has_its_words_in_every_language() -> None:
    import pipelines.measures.lungs as lungs
    import pipelines.measures.study as studies

    source = Path(lungs.__file__).read_text() + Path(studies.__file__).read_text()
    used = {
        part.split('"')[1]
        for mark in ("NoLungsError(", "_nothing(")
        for part in source.split(mark)[1:]
        if part[0] == '"'
    }
    assert len(used) > 8
    for language in ("en", "zh-CN"):
        assert all(words(language).term("why", code) != code for code in used)


def test_every_measurement_has_its_words_in_chinese() -> None:
    say = words("zh-CN")
    flat = chest(bottom_mm=-43, top_mm=-37)
    for study in (chest(noise=20), chest(bottom_mm=-20), flat):
        measures = measure_study(study)
        for m in measures.measurements:
            assert say.term("measurement", m.name) != m.name or m.name == "LAA-950"
            assert say.term("method", m.method) != m.method
        for segment in measures.segments:
            assert say.term("segment", segment.title) != segment.title
            assert say.term("method", segment.method) != segment.method


# The body


def test_the_effective_diameter_is_that_of_the_circle_of_the_same_area() -> None:
    found = values(measure_study(chest()))
    assert found["effective diameter"] == pytest.approx(2 * np.sqrt(BODY_MM[0] * BODY_MM[1]), rel=0.005)


def test_a_water_cylinder_is_its_own_equivalent() -> None:
    y, x = np.ogrid[:200, :200]
    water = np.where(np.hypot(x - 99.5, y - 99.5) * 2 < 150, 0, -1000).astype(np.int16)
    geometry = Geometry((2.0, 2.0), AXIAL, ((0, 0, 0),))
    for hu in (0, 500):
        found = values(measure_study(ct(np.where(water == 0, hu, water)[np.newaxis], geometry)))
        assert found["effective diameter"] == pytest.approx(300, rel=0.005)
        assert found["water-equivalent diameter"] == pytest.approx(300 * np.sqrt(1 + hu / 1000), rel=0.01)


def test_a_skull_is_a_head_and_a_chest_is_a_chest() -> None:
    y, x = np.ogrid[:160, :160]
    radius = np.hypot((x - 79.5) / 0.85, y - 79.5) * 1.5
    head = np.select([radius < 84, radius < 92, radius < 98], [35, 900, 10], -1000).astype(np.int16)
    skull = ct(np.repeat(head[np.newaxis], 5, axis=0), replace(chest().geometry, spacing_mm=(1.5, 1.5)))
    assert measure_study(skull).region == "head"
    assert measure_study(chest()).region == "chest"
    plain = ct(np.full((4, 90, 90), 40, np.int16), skull.geometry)
    assert measure_study(plain).region is None  # it fills the field of view


def test_regions_that_can_be_meant_agree() -> None:
    assert region_fits("abdomen", "pelvis-and-urinary")
    assert region_fits("chest", "musculoskeletal")
    assert region_fits("extremity", "undetermined")
    assert not region_fits("head", "abdomen")


@pytest.mark.parametrize(("thickness", "flags"), [(6.0, ()), (1.0, ("slice-gap",)), (8.0, ("slice-overlap",))])
def test_slice_thickness_is_held_against_the_distance(thickness: float, flags: tuple[str, ...]) -> None:
    study = chest()
    geometry = replace(study.geometry, slice_thickness_mm=thickness)
    assert measure_study(replace(study, geometry=geometry)).quality_flags == flags


# Any input


@given(scale=st.floats(0.75, 1.3))
@settings(max_examples=5, deadline=None)
def test_lengths_areas_and_volumes_follow_the_scale(scale: float) -> None:
    plain, scaled = measure_study(chest((8.0, 4.0, 4.0))), measure_study(chest((8.0, 4.0, 4.0), scale=scale))
    powers = {"mm": 1, "cm2": 2, "mL": 3}
    for before, after in zip(plain.measurements, scaled.measurements, strict=True):
        assert (before.name, before.unit) == (after.name, after.unit)
        if before.unit in powers:
            assert after.value == pytest.approx(before.value * scale ** powers[before.unit], rel=0.03)


@given(
    pixels=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(16, 40), st.integers(16, 40)),
        elements=st.sampled_from([np.nan, np.inf, -np.inf, -2000.0, -1024.0, -850.0, 0.0, 40.0, 1000.0, 30000.0]),
    ),
    spacing=st.floats(0.1, 12),
    between=st.none() | st.floats(0.2, 20),
    thickness=st.none() | st.floats(0.2, 20),
    orientation=st.sampled_from(
        [AXIAL, (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, -1, 0), (1, 0, 0, 0, 0.95, 0.3), None]
    ),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_volume_what_is_stated_is_finite(
    pixels: np.ndarray, spacing: float, between: float | None, thickness: float | None, orientation: tuple | None
) -> None:
    positions = tuple((0.0, 0.0, float(n)) for n in range(len(pixels)))
    measures = measure_study(ct(pixels, Geometry((spacing, spacing), orientation, positions, between, thickness)))
    units = {"mm", "mL", "cm2", "%", "[hnsf'U]"}
    assert all(np.isfinite(m.value) and m.unit in units and m.method for m in measures.measurements)
    assert all(0 <= m.value <= 100 for m in measures.measurements if m.unit == "%")


def test_padding_and_holes_in_the_data_do_not_move_the_lungs() -> None:
    study = chest()
    pixels = study.pixels.astype(np.float32)
    pixels[:, :20] = -2000
    pixels[:, :, :14] = np.nan  # up to the skin
    expected, found = values(measure_study(study)), values(measure_study(replace(study, pixels=pixels)))
    assert found == pytest.approx(expected, rel=1e-3)


# Real series


def test_two_kernels_of_one_chest_have_the_same_lungs(shared_data: Path) -> None:
    """One breath-hold, reconstructed twice: volumes may differ by what the kernels do to the pleura, and no more."""
    folder = shared_data / "dicom" / "lung-pet-ct-dx"
    found = []
    for name in ("2.000000-5mm-40805", "3.000000-5mm-41315"):
        (unit,) = ingest.plan([folder / name]).units
        study = ingest.load(unit)
        assert isinstance(study, ImageStudy)
        started = time.process_time()
        measures = measure_study(study)
        assert time.process_time() - started < 5  # 0.8 s on two idle cores
        assert measures.region == "chest"
        assert not why(measures)
        found.append(values(measures))
    for name in ("left lung volume", "right lung volume"):
        assert found[0][name] == pytest.approx(found[1][name], rel=0.02)
    assert found[0]["image noise"] > 4 * found[1]["image noise"]  # the first is sharp


def test_an_abdomen_has_no_lungs_to_measure(shared_data: Path) -> None:
    (unit,) = ingest.plan([shared_data / "dicom" / "abdomen-j2k"]).units
    study = ingest.load(unit)
    assert isinstance(study, ImageStudy)
    measures = measure_study(study)
    assert measures.region == "abdomen"
    assert why(measures) == {"lungs": "not-two-lungs"}
    assert "slice-overlap" in measures.quality_flags  # 3 mm slices every 2 mm
