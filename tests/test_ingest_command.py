"""`scanscribe ingest`: what it prints, the arrays that it saves, and resampling on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest_doors import read
from phantom import PHANTOM, phantom_slices, series
from pydicom.dataset import Dataset

from pipelines.ingest.volume import NotAVolumeError, affine, isotropic


def ingest(*arguments: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "scanscribe.cli", "ingest", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return done.returncode, json.loads(done.stdout)


def test_json_has_every_series_and_every_refused_file(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", phantom_slices())
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 64)
    code, found = ingest(folder, "--save", tmp_path / "out")
    assert code == 1
    (one,) = found["series"]
    uid = phantom_slices()[0].SeriesInstanceUID
    assert {"study_uid", "series_uid", "kind", "verdict", "code", "reason", "score", "files", "shape"} <= set(one)
    assert (one["series_uid"], one["verdict"], one["shape"]) == (uid, "volume", [12, 256, 256])
    assert one["spacing_mm"] == pytest.approx([5.0, 1.4, 1.4])
    assert one["files"] == [str(folder / f"{k:03d}.dcm") for k in range(12)]
    (refused,) = found["rejected"]
    assert (refused["path"], refused["code"]) == (str(folder / "broken.dcm"), "not-an-image")
    assert refused["reason"] and refused["remedy"]
    assert one["saved"] == [str(tmp_path / "out" / f"{uid}.npy")]
    np.testing.assert_array_equal(np.load(one["saved"][0]), read(PHANTOM).pixels)
    geometry = json.loads((tmp_path / "out" / f"{uid}.json").read_text())
    assert geometry["positions_mm"][0] == [float(v) for v in phantom_slices()[0].ImagePositionPatient]
    assert geometry["index_to_lps"][2] == pytest.approx([5.0, 0.0, 0.0, geometry["positions_mm"][0][2]])


def test_slices_are_saved_one_by_one_under_their_own_uids(tmp_path: Path) -> None:
    slices = phantom_slices()
    del slices[4]
    code, found = ingest(series(tmp_path / "ct", slices), "--save", tmp_path / "out")
    assert code == 0
    assert found["series"][0]["code"] == "missing-slices"
    assert [Path(name).name for name in found["series"][0]["saved"]] == [f"{ds.SOPInstanceUID}.npy" for ds in slices]
    for ds in slices:
        hu = np.load(tmp_path / "out" / f"{ds.SOPInstanceUID}.npy")
        np.testing.assert_array_equal(hu[0], ds.pixel_array.astype(int) - 1024)
        geometry = json.loads((tmp_path / "out" / f"{ds.SOPInstanceUID}.json").read_text())
        assert geometry["positions_mm"] == [[float(v) for v in ds.ImagePositionPatient]]


def test_verdict_changes_where_pixels_cannot_be_read(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", phantom_slices())
    broken = folder / "004.dcm"
    broken.write_bytes(broken.read_bytes()[:50_000])
    code, found = ingest(folder, "--save", tmp_path / "out")
    assert code == 1
    (one,) = found["series"]
    assert (one["verdict"], one["code"], one["shape"]) == ("slices", "unreadable-slices", [11, 256, 256])
    assert str(broken) not in one["files"]
    assert [(each["path"], each["code"]) for each in found["rejected"]] == [(str(broken), "truncated")]
    code, found = ingest(broken, "--save", tmp_path / "out")
    assert (found["series"][0]["verdict"], found["series"][0]["code"]) == ("refused", "truncated")


def test_a_series_that_cannot_be_resampled_does_not_end_the_others(tmp_path: Path) -> None:
    code, found = ingest(series(tmp_path / "ct", phantom_slices()), "--save", tmp_path / "out", "--isotropic", "0.05")
    assert code == 1
    assert [each["code"] for each in found["rejected"]] == ["not-a-volume"]
    assert found["series"][0]["verdict"] == "volume" and not list((tmp_path / "out").glob("*.npy"))


def test_a_uid_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    slices = phantom_slices()
    for ds in slices:
        ds.SeriesInstanceUID = "../../escaped"
    _, found = ingest(series(tmp_path / "ct", slices), "--save", tmp_path / "out")
    (name,) = found["series"][0]["saved"]
    assert Path(name).parent == tmp_path / "out"


def test_explain_is_for_people(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scanscribe.cli", "ingest", PHANTOM, "--explain"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "volume" in words and "Preferred" in words and "Series: 1, pictures: 0, refused files: 0." in words


def test_names_of_files_are_shown_as_they_are_and_obeyed_by_nothing(tmp_path: Path) -> None:
    name = "a very long [red] name that does not fit into a column of a table \x1b[31m.png"
    (tmp_path / name).write_bytes(b"no picture")
    command = [sys.executable, "-m", "scanscribe.cli", "ingest", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    words = "".join(done.stdout.replace("│", " ").split())
    assert "[red]" in words and "column" in words and "\x1b" not in words


def test_isotropic_needs_a_folder_to_save_to() -> None:
    code, found = ingest(PHANTOM, "--isotropic", "2")
    assert code == 2
    assert "--save" in found["error"]["message"]


@pytest.mark.parametrize("mm", ["0", "-1", "51"])
def test_a_voxel_size_that_is_none_is_wrong_usage(tmp_path: Path, mm: str) -> None:
    code, found = ingest(PHANTOM, "--save", str(tmp_path / "out"), "--isotropic", mm)
    assert code == 2
    assert "--isotropic" in found["error"]["message"]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("mm", [1.4, 2.5, 5.0])
def test_isotropic_volume_samples_the_old_one_where_its_voxels_lie(mm: float) -> None:
    study = read(PHANTOM)
    cubes = isotropic(study, mm, device="cpu")
    assert cubes.geometry.spacing_mm == (mm, mm)
    assert cubes.geometry.slice_spacing_mm == mm
    old, new = affine(study.geometry), affine(cubes.geometry)
    assert old is not None and new is not None
    random = np.random.default_rng(0)
    for index in random.integers(0, cubes.pixels.shape, (50, 3)):
        place = np.linalg.inv(old) @ new @ [*index, 1]  # the same millimetres in the old volume
        low = np.floor(place[:3] + 1e-9).astype(int)
        part = place[:3] - low
        expected = 0.0
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, part, 1 - part))
            at = tuple(np.minimum(low + corner, np.array(study.pixels.shape) - 1))
            expected += weight * study.pixels[at]
        assert cubes.pixels[tuple(index)] == pytest.approx(expected, abs=0.05)


def test_the_old_voxel_size_gives_the_old_voxels(tmp_path: Path) -> None:
    slices = phantom_slices()
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient[2] = 1.4 * k
    study = read(series(tmp_path / "s", slices))
    np.testing.assert_allclose(isotropic(study, 1.4, device="cpu").pixels, study.pixels, atol=0.01)


def test_what_is_no_volume_is_not_resampled(tmp_path: Path) -> None:
    def tilt(slices: list[Dataset]) -> list[Dataset]:
        for k, ds in enumerate(slices):
            ds.ImagePositionPatient[1] += 1.5 * k
        return slices

    with pytest.raises(NotAVolumeError):
        isotropic(read(series(tmp_path / "s", tilt(phantom_slices()))), 2.0, device="cpu")
    with pytest.raises(NotAVolumeError):
        isotropic(read(PHANTOM), 0.0, device="cpu")
