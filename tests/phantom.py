"""The example's CT phantom as data sets that tests edit and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

PHANTOM = Path(__file__).parents[1] / "examples" / "ct" / "phantom-series"
Edit = Callable[[Dataset], None]


def phantom_slices() -> list[Dataset]:
    """The phantom's data sets in position order, uncompressed."""
    slices = [pydicom.dcmread(path) for path in PHANTOM.iterdir()]
    for ds in slices:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return sorted(slices, key=lambda ds: float(ds.ImagePositionPatient[2]))


def series(folder: Path, slices: list[Dataset]) -> Path:
    """Write data sets as 000.dcm, 001.dcm, ..."""
    folder.mkdir(exist_ok=True)
    for k, ds in enumerate(slices):
        ds.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)
    return folder


def one(folder: Path, edit: Edit = lambda ds: None) -> Path:
    """A file with the phantom's sixth slice, edited."""
    ds = phantom_slices()[5]
    edit(ds)
    path = folder / "one.dcm"
    ds.save_as(path, enforce_file_format=True)
    return path


def item(**values: object) -> Dataset:
    """A sequence item."""
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds
