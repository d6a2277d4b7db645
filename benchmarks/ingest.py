"""How fast DICOM is read: a 64-slice series to a volume in Hounsfield units, its memory, and ten thousand headers.

    .venv/bin/python benchmarks/ingest.py [--quick] [--series FOLDER]

Compared with pydicom on the same files: the decoding of their pixels on one core, divided by the cores, and its header
pass divided by the cores.  The series is drawn (512 x 512, 12 of 16 bits, noise like a scanner's) unless a folder is
named, and is measured uncompressed and in JPEG 2000; the disk cache is warm.  Its headers have 126 elements; those
of real CT files at hand have 131 to 268.  The last line of the output is one JSON object with each figure beside its
target.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SLICES, SIDE = 64, 512
HEADERS = 10_000
TYPICAL = {  # what scanners write beside what is read here
    **dict.fromkeys(
        ("InstanceCreationDate", "SeriesDate", "AcquisitionDate", "ContentDate", "PatientBirthDate"), "20250101"
    ),
    **dict.fromkeys(("InstanceCreationTime", "SeriesTime", "AcquisitionTime", "ContentTime"), "120000.000000"),
    **dict.fromkeys(
        ("InstitutionName", "StationName", "StudyDescription", "SeriesDescription", "ProtocolName"), "CHEST"
    ),
    **dict.fromkeys(("ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "OperatorsName"), "DRAWN"),
    **dict.fromkeys(("AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientSex", "PatientAge"), ""),
    **dict.fromkeys(("ScanOptions", "FilterType", "RotationDirection", "BodyPartExamined", "PatientPosition"), "CT"),
    **dict.fromkeys(("DataCollectionDiameter", "ReconstructionDiameter", "DistanceSourceToDetector"), "500"),
    **dict.fromkeys(("DistanceSourceToPatient", "GantryDetectorTilt", "TableHeight", "SliceLocation"), "100"),
    **dict.fromkeys(("ExposureTime", "XRayTubeCurrent", "Exposure", "GeneratorPower"), "100"),
    **dict.fromkeys(("SingleCollimationWidth", "TotalCollimationWidth", "SpiralPitchFactor", "CTDIvol"), 1.0),
}
MEASURE_MEMORY = """
import sys
from pathlib import Path
from pipelines.ingest import load, plan
import pipelines.ingest.dicom, pipelines.ingest.series
def status(field):  # kilobytes: VmRSS now, VmHWM at its highest since the process began
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
unit = plan([Path(sys.argv[1])]).units[0]
before = status("VmRSS")
study = load(unit)
print((status("VmHWM") - before) * 1024 / study.pixels.nbytes)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and headers: less than a minute")
    parser.add_argument("--series", type=Path, help="folder with one CT series to read instead of the drawn one")
    asked = parser.parse_args()
    repeats, count = (3, 2_000) if asked.quick else (9, HEADERS)
    with tempfile.TemporaryDirectory() as scratch:
        plain = asked.series or draw(Path(scratch, "plain"), compressed=False)
        claims = series(plain, "series", repeats)
        if asked.series is None:
            claims += series(draw(Path(scratch, "j2k"), compressed=True), "JPEG 2000 series", max(repeats // 3, 1))
        claims += headers(plain, Path(scratch, "many"), count, repeats=max(repeats // 3, 1))
    print(f"{'claim':<64}{'value':>8}  target")
    for claim in claims:
        met = "met" if claim["met"] else "MISSED"
        print(f"{claim['claim']:<64}{claim['value']:>8} {claim['unit']:<6} at most {claim['target']}  {met}")
    machine = f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "ingest", "machine": machine, "claims": claims}))


def draw(folder: Path, *, compressed: bool) -> Path:
    """A CT series of noise on a body-like disc."""
    folder.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body = np.where(x * x + y * y < 0.6, 1060, 24)
    study, series_uid, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(SLICES):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, generate_uid(), "CT"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series_uid, frame
        ds.PatientName, ds.PatientID, ds.StudyDate, ds.StudyTime = "Drawn^Disc", "DRAWN", "20250101", "120000"
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 1, number + 1, 1
        for keyword, value in TYPICAL.items():
            setattr(ds, keyword, value)
        step, code, image = Dataset(), Dataset(), Dataset()
        step.ScheduledProcedureStepDescription, step.ScheduledProcedureStepID = "Chest", "1"
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99DRAWN", "Chest"
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = CTImageStorage, study
        ds.RequestAttributesSequence, ds.ProcedureCodeSequence = [step], [code]
        ds.ReferencedImageSequence = ds.SourceImageSequence = [image, image]
        private = ds.private_block(0x0029, "DRAWN", create=True)
        for element in range(1, 31):
            private.add_new(element, "LO", "of the maker's own")
        ds.KVP, ds.SliceThickness, ds.ConvolutionKernel, ds.Manufacturer = 120, 5, "DRAWN", "ScanScribe"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-180, -180, 5.0 * number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.WindowCenter, ds.WindowWidth = [0.7, 0.7], 40, 400
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.Rows = ds.Columns = SIDE
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
        values = np.clip(body + random.normal(0, 12, body.shape), 0, 4095).astype("<u2")
        ds.PixelData = values.tobytes()
        if compressed:
            ds.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        ds.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return folder


def series(folder: Path, what: str, repeats: int) -> list[dict[str, object]]:
    """From disk to a volume, header pass and decoding, against pydicom's decoding; and the peak of memory."""
    from pipelines.ingest import load, plan
    from pipelines.ingest.dicom import forget_headers
    from pipelines.study import ImageStudy

    paths = sorted(folder.iterdir())

    def ours() -> None:
        forget_headers()
        study = load(plan([folder]).units[0])
        assert isinstance(study, ImageStudy) and len(study.pixels) == len(paths)

    def raw() -> None:
        for path in paths:
            pydicom.dcmread(path).pixel_array  # noqa: B018 - decodes

    ours()  # starts the children that decode, which live as long as the process
    ratio, seconds = compare(ours, raw, repeats)
    print(f"{what}: {seconds * 1000:.0f} ms for {len(paths)} files")
    peak = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, folder], capture_output=True, check=True, text=True, cwd=ROOT
    )
    return [
        claim(f"{what} from disk to HU, of pydicom's decoding / cores", ratio, "times", 1.5),
        claim(f"{what}: peak memory, of the volume's bytes", float(peak.stdout), "times", 2.2),
    ]


def headers(source: Path, folder: Path, count: int, *, repeats: int) -> list[dict[str, object]]:
    """The header pass over many files, against pydicom's. Files differ in position, number and instance."""
    from pipelines.ingest import plan
    from pipelines.ingest.dicom import forget_headers

    folder.mkdir()
    originals = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    for ds in originals:
        ds.Rows = ds.Columns = 8  # the pixels are not touched, and the disk is small
        ds.PixelData = bytes(128)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for number in range(count):
        ds = originals[number % len(originals)]
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        ds.InstanceNumber = number + 1
        ds.ImagePositionPatient = [0, 0, float(number)]
        ds.save_as(folder / f"{number:05d}")
    paths = sorted(folder.iterdir())

    def ours() -> None:
        forget_headers()
        assert len(plan([folder]).units[0].files) == count

    def raw() -> None:
        for path in paths:
            pydicom.dcmread(path, stop_before_pixels=True)

    ratio, seconds = compare(ours, raw, repeats)
    print(f"{count:,} headers: {seconds:.1f} s")
    return [claim(f"{count:,} headers to series, of pydicom's header pass / cores", ratio, "times", 1.15)]


def compare(ours: Callable[[], None], raw: Callable[[], None], repeats: int) -> tuple[float, float]:
    """(our wall time over that of `raw` divided by the cores, our seconds): the best of interleaved runs."""
    mine, theirs = [], []
    for _ in range(repeats):
        for work, times in ((ours, mine), (raw, theirs)):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return min(mine) / (min(theirs) / CORES), min(mine)


def claim(what: str, value: float, unit: str, target: float) -> dict[str, object]:
    return {"claim": what, "value": round(value, 2), "unit": unit, "target": target, "met": value <= target}


if __name__ == "__main__":
    main()
