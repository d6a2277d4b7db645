"""CT pixels with their place: index to millimetres, resampling on request, arrays on disk with geometry beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipelines.ingest.pixels import AIR_HU
from pipelines.study import Geometry, ImageStudy
from reports.writing import all_or_none

MAX_VOXELS: Final = 2_000_000_000
SLAB_VOXELS: Final = 1 << 25  # of the output in one step: bounds what the interpolation needs beside it


class NotAVolumeError(ValueError):
    """The study cannot be resampled. The message says why."""

    code = "not-a-volume"


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save` wrote."""

    pixels: Path
    geometry: Path


def affine(geometry: Geometry) -> np.ndarray | None:
    """`[4, 4]` float64: (slice, row, column, 1) to LPS millimetres (PS3.3 C.7.6.2.1.1); None without a full geometry.

    The slice step is the mean of the positions' steps: exact for volumes and for evenly sheared slices.
    """
    if geometry.positions_mm is None or geometry.orientation is None or geometry.spacing_mm is None:
        return None
    rows_mm, columns_mm = geometry.spacing_mm
    along_row, along_column = np.array(geometry.orientation[:3]), np.array(geometry.orientation[3:])
    first, last = np.array(geometry.positions_mm[0]), np.array(geometry.positions_mm[-1])
    matrix = np.eye(4)
    matrix[:3, 0] = (last - first) / max(len(geometry.positions_mm) - 1, 1)
    matrix[:3, 1] = along_column * rows_mm
    matrix[:3, 2] = along_row * columns_mm
    matrix[:3, 3] = first
    return matrix


def isotropic(study: ImageStudy, mm: float, *, device: str = "auto") -> ImageStudy:
    """The volume resampled to cubes of `mm`, linearly, on the GPU when there is one. float32 HU, `[S, H, W]`.

    The first voxel keeps its place; the last one is the last whose centre lies within the old volume.  Raises
    NotAVolumeError for anything but evenly spaced, unsheared slices, which would have to be made up.
    """
    geometry = study.geometry
    flags = {"missing-slices", "irregular-spacing", "missing-geometry", "mixed-orientation", "gantry-tilt"}
    matrix = affine(geometry)
    if study.units != "HU" or matrix is None or geometry.slice_spacing_mm is None or flags & set(study.quality_flags):
        raise NotAVolumeError(
            "Only a series of evenly spaced, unsheared slices with known pixel size can be resampled."
        )
    if not 0.05 <= mm <= 50:
        raise NotAVolumeError("The voxel size must lie between 0.05 and 50 mm.")
    old_mm = (geometry.slice_spacing_mm, *(geometry.spacing_mm or ()))
    size = [1 + math.floor((n - 1) * old / mm + 1e-6) for n, old in zip(study.pixels.shape, old_mm, strict=True)]
    if math.prod(size) > MAX_VOXELS:
        raise NotAVolumeError(f"The resampled volume would have more than {MAX_VOXELS:,} voxels: choose larger ones.")
    step = matrix[:3, 0] * (mm / geometry.slice_spacing_mm)
    x, y, z = (matrix[:3, 3] + step * np.arange(size[0])[:, None]).T.tolist()
    positions = tuple(zip(x, y, z, strict=True))
    resampled = replace(
        geometry, spacing_mm=(mm, mm), slice_spacing_mm=mm, slice_thickness_mm=None, positions_mm=positions
    )
    pixels = _interpolate(study.pixels, [mm / old for old in old_mm], size, device)
    return replace(study, pixels=pixels, geometry=resampled, dicom=None)


def _interpolate(volume: np.ndarray, steps: list[float], size: list[int], device: str) -> np.ndarray:
    """Trilinear values at index (i, j, k) * steps; one axis after the other, slab by slab."""
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    places = [np.arange(n) * step for n, step in zip(size, steps, strict=True)]
    out = np.empty(size, np.float32)
    slab = max(1, SLAB_VOXELS // (volume.shape[1] * volume.shape[2]))
    for start in range(0, size[0], slab):
        wanted = places[0][start : start + slab]
        low, high = int(wanted[0]), min(int(wanted[-1]) + 2, len(volume))
        part = torch.from_numpy(np.ascontiguousarray(volume[low:high], dtype=np.float32)).to(chosen)
        for axis, at in enumerate((wanted - low, *places[1:])):
            below = torch.from_numpy(at.astype(np.int64)).to(chosen).clamp(max=part.shape[axis] - 1)
            weight = torch.from_numpy(at - np.floor(at)).to(chosen, torch.float32)
            above = (below + 1).clamp(max=part.shape[axis] - 1)
            weight = weight.reshape([-1 if each == axis else 1 for each in range(3)])
            part = torch.lerp(part.index_select(axis, below), part.index_select(axis, above), weight)
        out[start : start + slab] = part.cpu().numpy()
    return out


def save(study: ImageStudy, folder: Path, name: str) -> Saved:
    """Write `NAME.npy` (HU, `[S, H, W]`, int16 or float32) and `NAME.json` with its geometry, both whole or neither.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels, geometry = f"{name}.npy", f"{name}.json"
    with all_or_none(folder) as temporary:
        np.save(temporary / pixels, study.pixels)
        (temporary / geometry).write_text(json.dumps(describe(study), indent=2) + "\n", encoding="utf-8")
    return Saved(folder / pixels, folder / geometry)


def describe(study: ImageStudy) -> dict[str, Any]:
    """The geometry of a CT study and what its pixels are, as plain JSON values. Millimetres, LPS."""
    geometry = study.geometry
    matrix = affine(geometry)
    rows_mm, columns_mm = geometry.spacing_mm or (None, None)
    return {
        "study_uid": study.study_uid,
        "series_uid": study.series_uid,
        "sop_instance_uids": [source.sop_instance_uid for source in study.sources],
        "frames": [1 + (source.page or 0) for source in study.sources],
        "shape": list(study.pixels.shape),
        "dtype": str(study.pixels.dtype),
        "units": "HU",
        "padding_hu": AIR_HU if "padding-masked" in study.quality_flags else None,
        "coordinates": "LPS",
        "axes": ["slice", "row", "column"],
        "spacing_mm": [geometry.slice_spacing_mm, rows_mm, columns_mm],
        "slice_thickness_mm": geometry.slice_thickness_mm,
        "orientation": geometry.orientation,
        "positions_mm": geometry.positions_mm,
        "index_to_lps": None if matrix is None else matrix.tolist(),
        "quality_flags": list(study.quality_flags),
    }


def slices(study: ImageStudy) -> Iterator[tuple[str, ImageStudy]]:
    """Each slice of a series as a study of its own, with its name: the SOP instance UID, frames numbered from 1."""
    positions = study.geometry.positions_mm
    for index, source in enumerate(study.sources):
        place = replace(
            study.geometry, positions_mm=positions[index : index + 1] if positions else None, slice_spacing_mm=None
        )
        uid = source.sop_instance_uid or f"{study.key[:16]}_{index + 1}"
        name = uid if source.page is None else f"{uid}_{source.page + 1}"
        yield name, replace(study, pixels=study.pixels[index : index + 1], sources=(source,), geometry=place)
