"""CT phantoms with known sizes: ellipsoids in the patient's own millimetres, sampled on any grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipelines.study import Geometry, ImageStudy, SourceFile

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
RIGHT, LEFT = (-75.0, 5.0, 0.0), (75.0, 5.0, 0.0)  # centres of the lungs in LPS
RIGHT_MM, LEFT_MM = (58.0, 80.0, 110.0), (50.0, 75.0, 105.0)  # their half axes
BODY_MM = (165.0, 115.0)
TOP_MM = 140.0


def ellipsoid_ml(half_axes: tuple[float, float, float]) -> float:
    return float(4 / 3 * np.pi * np.prod(half_axes) / 1000)


def ct(pixels: np.ndarray, geometry: Geometry, **changes: object) -> ImageStudy:
    """A study of HU with one source file a slice."""
    sources = tuple(SourceFile(f"{n}.dcm", f"{n:064x}", "application/dicom") for n in range(len(pixels)))
    return replace(ImageStudy("1" * 64, "series", "HU", pixels, sources, geometry), **changes)


def chest(
    spacing: tuple[float, float, float] = (6.0, 2.5, 2.5),
    field_mm: float = 400.0,
    bottom_mm: float = -TOP_MM,
    top_mm: float = TOP_MM,
    noise: float = 0.0,
    scale: float = 1.0,
) -> ImageStudy:
    """An axial chest: soft tissue, two lungs with vessels, trachea and main bronchi, a spine, and a table below.

    `scale` stretches the geometry alone.
    """
    size = round(field_mm / spacing[1]), round(field_mm / spacing[2])
    z = np.arange(bottom_mm + spacing[0] / 2, top_mm, spacing[0])
    y = (np.arange(size[0]) - (size[0] - 1) / 2) * spacing[1]
    x = (np.arange(size[1]) - (size[1] - 1) / 2) * spacing[2]
    Z, Y, X = np.meshgrid(z, y, x, indexing="ij", sparse=True)
    hu = np.full(np.broadcast_shapes(Z.shape, Y.shape, X.shape), -1000.0, np.float32)
    hu[np.broadcast_to((Y > 125) & (Y < 133) & (np.abs(X) < 180), hu.shape)] = -50  # the table
    hu[np.broadcast_to((X / BODY_MM[0]) ** 2 + (Y / BODY_MM[1]) ** 2 <= 1, hu.shape)] = 50
    for centre, half in ((RIGHT, RIGHT_MM), (LEFT, LEFT_MM)):
        inside = sum(((axis - c) / h) ** 2 for axis, c, h in zip((X, Y, Z), centre, half, strict=True)) <= 1
        hu[inside] = -850
        hu[inside & ((X - centre[0]) ** 2 + (Y - centre[1]) ** 2 < 4.5**2)] = 40  # a vessel
    hu[np.broadcast_to((X**2 + (Y - 85) ** 2 < 15**2), hu.shape)] = 400
    hu[np.broadcast_to((Z > 20) & (X**2 + (Y + 5) ** 2 < 8**2), hu.shape)] = -1000  # trachea
    branch = 20 - np.abs(X)  # down at 45 degrees on both sides, into the lungs
    hu[np.broadcast_to((np.abs(X) < 30) & (np.abs(Z - branch) < 8) & (np.abs(Y + 5) < 6), hu.shape)] = -1000
    if noise:
        hu += np.random.default_rng(0).normal(0, noise, hu.shape).astype(np.float32)
    corner = np.array([x[0], y[0], 0.0]) * scale
    geometry = Geometry(
        spacing_mm=(spacing[1] * scale, spacing[2] * scale),
        orientation=AXIAL,
        positions_mm=tuple((float(corner[0]), float(corner[1]), float(k * scale)) for k in z),
        slice_spacing_mm=spacing[0] * scale if len(z) > 1 else None,
        slice_thickness_mm=spacing[0] * scale,
    )
    return ct(np.rint(hu).astype(np.int16), geometry)
