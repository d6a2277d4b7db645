"""Draws the sample inputs beside this file: steel, tile and board pictures, a phantom CT series, and broken files.

Everything is computed from a seed; nothing is taken from any data set.  `expected.json` says what was drawn where.

    python examples/make_samples.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SEED = 20
# Values are rounded to 8 bits at the end, so that the same seed gives the same picture on every machine.
Random = np.random.RandomState  # its streams are frozen, those of np.random.Generator are not
Box = tuple[int, int, int, int]


def main(folder: Path) -> None:
    samples = [*steel(folder), *tile(folder), *board(folder), phantom(folder), *broken(folder)]
    samples.append(
        {
            "installed": "CT_small.dcm",  # part of pydicom; `examples/paths.py` finds it
            "kind": "ct",
            "shape": [1, 128, 128],
            "spacing_mm": [0.661468, 0.661468],
            "hu_range": [-896, 1167],
        }
    )
    facts = json.dumps({"seed": SEED, "samples": samples}, indent=1)
    (folder / "expected.json").write_text(facts + "\n", encoding="utf-8")


# ---------------------------------------------------------------- pictures


def noise(random: Random, shape: tuple[int, int], radius: tuple[float, float]) -> np.ndarray:
    """Smooth noise of unit variance; `radius` is its grain in pixels down and across."""
    spectrum = np.fft.rfft2(random.standard_normal(shape))
    down, across = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None]
    spectrum *= np.exp(-2 * np.pi**2 * ((down * radius[0]) ** 2 + (across * radius[1]) ** 2))
    field = np.fft.irfft2(spectrum, shape)
    return (field - field.mean()) / field.std()


def steel_surface(random: Random, size: int = 200) -> np.ndarray:
    """Hot-rolled strip under uneven light: rolling direction top to bottom, fine grain."""
    shape = (size, size)
    light = 112 + 9 * noise(random, shape, (70, 45))
    streaks = 3.5 * noise(random, shape, (60, 1.5)) + 3 * noise(random, shape, (25, 6))
    grain = 3.2 * noise(random, shape, (0.7, 0.6))
    return light + streaks + grain


def steel(folder: Path) -> list[dict[str, Any]]:
    random = Random(SEED)
    y, x = np.mgrid[:200, :200].astype(float)

    surface, boxes = steel_surface(random), []
    for x0, lean, top, bottom, width, strength in (
        (48, 0.02, 0, 199, 3.2, 95),
        (121, -0.05, 22, 178, 2.0, 75),
        (152, 0.03, 60, 199, 5.5, 110),
    ):
        centre = x0 + lean * (y - top) + 0.5 * noise(random, (200, 200), (14, 500))
        across = np.exp(-0.5 * ((x - centre) / (0.5 * width)) ** 2)
        ends = np.clip((y - top) / 14 + (top == 0), 0, 1) * np.clip((bottom - y) / 14 + (bottom == 199), 0, 1)
        mark = ends * across * np.clip(0.75 + 0.3 * noise(random, (200, 200), (5, 1.2)), 0.15, 1.3)
        surface += strength * mark
        boxes.append(box_of(mark > 0.25))
    scratches = save(folder / "steel" / "scratches.png", surface)

    dark, boxes_dark = steel_surface(random) - 8, []
    for cx, cy, half_width, half_length in ((62, 74, 5.5, 46), (134, 118, 7, 58), (151, 52, 3.5, 30)):
        ragged = 1 + 0.35 * noise(random, (200, 200), (9, 2.5))
        inside = ((x - cx - 2.5 * np.sin(y / 17)) / half_width) ** 2 + ((y - cy) / half_length) ** 2
        mark = inside_of((inside - ragged) * 7)
        dark -= 38 * mark
        boxes_dark.append(box_of(mark > 0.5))
    inclusion = save(folder / "steel" / "inclusion.png", dark)

    bright, boxes_patch = 168 + 1.3 * (steel_surface(random) - 112) + 13 * noise(random, (200, 200), (0.8, 0.8)), []
    for cx, cy, radius in ((60, 132, 38), (148, 62, 27)):
        outline = radius * (1 + 0.28 * noise(random, (200, 200), (13, 13)))
        mark = inside_of((np.hypot(x - cx, (y - cy) / 1.2) - outline) / 2.2)
        bright -= 88 * mark
        boxes_patch.append(box_of(mark > 0.5))
    patches = save(folder / "steel" / "patches.png", bright)
    return [
        picture(folder, scratches, "steel", "scratches", boxes),
        picture(folder, inclusion, "steel", "inclusion", boxes_dark),
        picture(folder, patches, "steel", "patches", boxes_patch),
    ]


def tile(folder: Path) -> list[dict[str, Any]]:
    """A ground ferrite tile with a crack that runs in from its lower edge."""
    random, shape = Random(SEED + 1), (320, 260)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    light = 74 - 26 * np.abs((x - 120) / 150) ** 2.5 - 10 * ((y - 150) / 200) ** 2
    grooves = 2.5 * noise(random, shape, (120, 0.7)) + np.clip(noise(random, shape, (70, 0.6)) - 1.6, 0, 2) * 6
    surface = light + grooves + 3.5 * noise(random, shape, (0.6, 0.6)) + 4 * noise(random, shape, (20, 20))
    centre = 141 + 3.5 * noise(random, shape, (13, 900)) + 0.06 * (y - 320)
    reach = np.clip((y - 214) / 25, 0, 1)
    mark = reach * np.exp(-0.5 * ((x - centre) / (0.6 + 1.1 * reach)) ** 2)
    path = save(folder / "tile" / "crack.png", surface * (1 - 0.75 * mark))
    return [picture(folder, path, "tile", "crack", [box_of(mark > 0.3)])]


def board(folder: Path) -> list[dict[str, Any]]:
    """A bare board, copper black as in a thresholded camera image, beside its golden sample."""
    random = Random(SEED + 2)
    golden = draw_board()
    faulty = golden.copy()
    pen = ImageDraw.Draw(faulty)
    pen.polygon([(206, 92), (219, 92), (213, 128), (201, 128)], fill=255)  # open: a gap right across a track
    pen.line([(352, 424), (357, 438), (352, 455), (358, 472)], fill=0, width=6)  # short: a bridge between two tracks
    pen.ellipse((516, 230, 525, 238), fill=255)  # pin-hole: a void inside a pad
    findings = [("open", (197, 92, 223, 128)), ("short", (343, 420, 367, 476)), ("pin-hole", (508, 222, 533, 246))]
    template = save(folder / "golden" / "board.png", etch(random, golden), binary=True)
    path = save(folder / "board" / "board.png", etch(random, faulty), binary=True)
    facts = picture(folder, path, "board", "", [])
    facts["reference"] = template.relative_to(folder).as_posix()
    facts["findings"] = [{"type": kind, "bbox": box} for kind, box in findings]
    return [facts]


def draw_board() -> Image.Image:
    image = Image.new("L", (640, 640), 255)
    pen = ImageDraw.Draw(image)

    def track(points: list[tuple[int, int]], width: int) -> None:
        pen.line(points, fill=0, width=width)
        for px, py in points:
            pen.ellipse((px - width // 2, py - width // 2, px + width // 2, py + width // 2), fill=0)

    def pad(px: int, py: int, radius: int, hole: int = 0) -> None:
        pen.ellipse((px - radius, py - radius, px + radius, py + radius), fill=0)
        if hole:
            pen.ellipse((px - hole, py - hole, px + hole, py + hole), fill=255)

    track([(0, 110), (300, 110), (372, 182), (372, 250)], 20)
    track([(0, 180), (250, 180), (320, 250), (320, 300), (366, 346)], 20)
    track([(430, 0), (430, 120), (500, 190), (640, 190)], 14)
    track([(140, 640), (140, 470), (194, 416), (470, 416), (520, 366), (640, 366)], 14)
    track([(180, 640), (180, 520), (220, 480), (500, 480), (560, 420), (640, 420)], 14)
    track([(60, 300), (60, 420), (96, 456), (96, 640)], 12)
    track([(520, 560), (440, 560), (400, 600), (400, 640)], 12)
    pad(372, 262, 24, 8)
    pad(372, 352, 22, 8)
    pad(60, 290, 24, 8)
    pad(524, 244, 34)
    pad(540, 560, 26, 9)
    pad(560, 80, 30, 11)
    pad(300, 570, 20)
    for row in range(4):
        pen.rectangle((230, 262 + 30 * row, 272, 276 + 30 * row), fill=0)
        pen.rectangle((140, 262 + 30 * row, 182, 276 + 30 * row), fill=0)
    return image


def etch(random: Random, drawing: Image.Image) -> np.ndarray:
    """Rounds corners and roughens edges, as etching and thresholding do."""
    soft = np.asarray(drawing.filter(ImageFilter.GaussianBlur(1.6)), dtype=float)
    rough = 13 * noise(random, soft.shape, (1.6, 1.6)) * (np.abs(soft - 127.5) < 100)
    return np.where(soft + rough > 127.5, 255, 0)


def inside_of(distance: np.ndarray) -> np.ndarray:
    """1 where `distance` to an outline is negative, 0 where it is positive, soft in between."""
    return 0.5 - 0.5 * np.tanh(0.5 * distance)


def box_of(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def save(path: Path, pixels: np.ndarray, *, binary: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    (image.convert("1") if binary else image).save(path, optimize=True)
    return path


def picture(folder: Path, path: Path, line: str, kind: str, boxes: list[Box]) -> dict[str, Any]:
    width, height = Image.open(path).size
    findings = [{"type": kind, "bbox": box} for box in boxes]
    facts = {"path": path.relative_to(folder).as_posix(), "kind": "defect", "product_line": line}
    return {**facts, "width": width, "height": height, "findings": findings}


# ---------------------------------------------------------------- the phantom

SLICES, SIZE, SPACING, STEP = 12, 256, 1.4, 5.0  # mm between pixels, mm between slices
FIRST = (-178.5, -178.5, -130.0)  # centre of the first pixel of the lowest slice, LPS mm
NODULE, NODULE_RADIUS = (-84.0, -22.0, -100.0), 6.0
HU = {"air": -1000, "fat": -100, "muscle": 40, "lung": -850, "bone": 400, "nodule": 40}


def phantom(folder: Path) -> dict[str, Any]:
    """A chest made of ellipses with one solid nodule in the right lung, as a DICOM series."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, generate_uid

    random = Random(SEED + 3)
    names = random.permutation(SLICES) + 1  # so that the order of names is not the order of slices
    directory = folder / "ct" / "phantom-series"
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(SLICES):
        z = FIRST[2] + STEP * index
        hu = phantom_slice(z)
        hu += np.where(hu > -950, 9, 2) * noise(random, hu.shape, (0.55, 0.55))
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = generate_uid(entropy_srcs=["scanscribe phantom", "slice", str(index)])
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.StudyInstanceUID = generate_uid(entropy_srcs=["scanscribe phantom", "study"])
        ds.SeriesInstanceUID = generate_uid(entropy_srcs=["scanscribe phantom", "series"])
        ds.FrameOfReferenceUID = generate_uid(entropy_srcs=["scanscribe phantom", "frame of reference"])
        ds.PatientName, ds.PatientID = "Phantom^Computed", "PHANTOM"
        ds.PatientBirthDate = ds.PatientSex = ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
        ds.StudyDate, ds.StudyTime, ds.Modality, ds.Manufacturer = "20250101", "120000", "CT", "ScanScribe"
        ds.StudyDescription, ds.SeriesDescription = "Computed phantom", "Chest phantom with one nodule"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.BodyPartExamined, ds.ConvolutionKernel, ds.KVP, ds.PatientPosition = "CHEST", "PHANTOM", "120", "HFS"
        ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 1, 1, index + 1
        ds.ImagePositionPatient = [FIRST[0], FIRST[1], z]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [SPACING, SPACING], STEP
        ds.PositionReferenceIndicator = ""
        ds.Rows = ds.Columns = SIZE
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.WindowCenter, ds.WindowWidth = [-600, 40], [1500, 400]
        ds.PixelData = np.clip(np.round(hu) + 1024, 0, 4095).astype("<u2").tobytes()
        ds.save_as(directory / f"IM{names[index]:04d}.dcm", enforce_file_format=True)
    return {
        "path": "ct/phantom-series",
        "kind": "ct",
        "shape": [SLICES, SIZE, SIZE],
        "spacing_mm": [SPACING, SPACING],
        "slice_spacing_mm": STEP,
        "first_position_mm": FIRST,
        "window": [-600, 1500],
        "body_part": "CHEST",
        "findings": [{"type": "nodule", "centre_mm": NODULE, "diameter_mm": 2 * NODULE_RADIUS, "laterality": "right"}],
        # The mean of a 7 mm square around each point, in the slice nearest to it.
        "hu": [
            {"tissue": tissue, "at_mm": at, "mean": HU[tissue]}
            for tissue, at in (
                ("air", (-160.0, -150.0, -100.0)),
                ("lung", (80.0, -40.0, -100.0)),
                ("lung", (-100.0, 25.0, -80.0)),
                ("muscle", (-50.0, 76.0, -100.0)),
                ("bone", (0.0, 62.0, -100.0)),
                ("nodule", NODULE),
            )
        ],
    }


def phantom_slice(z: float) -> np.ndarray:
    """Noise-free HU `[SIZE, SIZE]` of one slice: the mean over its thickness and over each pixel's area."""
    fine, layers = 2, 5
    offsets = (np.arange(SIZE * fine) + 0.5) / fine - 0.5
    x, y = np.meshgrid(FIRST[0] + SPACING * offsets, FIRST[1] + SPACING * offsets)
    total = np.zeros((SIZE, SIZE))
    for layer in range(layers):
        hu = anatomy(x, y, z + STEP * ((layer + 0.5) / layers - 0.5))
        total += hu.reshape(SIZE, fine, SIZE, fine).mean(axis=(1, 3))
    return total / layers


def anatomy(x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    """HU at points of the plane `z`. LPS: x grows to the patient's left, y to the back, z to the head."""

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    grow = 1 - 0.04 * ((z + 100) / 30) ** 2  # the lungs narrow a little above and below
    hu = np.full(x.shape, float(HU["air"]))
    hu[ellipse(0, 0, 162, 112)] = HU["fat"]
    hu[ellipse(0, 2, 148, 98)] = HU["muscle"]
    angle = np.arctan2((y - 2) / 90, x / 136)
    rib_cage = ellipse(0, 2, 140, 92) & ~ellipse(0, 2, 131, 84)
    hu[rib_cage & (np.cos(9 * angle + 0.09 * z) > 0.55) & (np.abs(x) > 30)] = HU["bone"]
    right, left = ellipse(-72, -4, 54 * grow, 74 * grow), ellipse(74, 0, 52 * grow, 72 * grow)
    hu[right | left] = HU["lung"]
    for k in range(14):  # vessels: thin branches that leave each hilum and wander from slice to slice
        side, reach, turn = (-1 if k % 2 else 1), 12 + 5.5 * (k // 2), 1.1 * k + 0.05 * (z + 100)
        at = side * (42 + reach * abs(np.cos(turn))), 4 + 0.9 * reach * np.sin(turn)
        hu[ellipse(*at, 3.4 - 0.13 * k, 2.8 - 0.1 * k) & (right | left)] = HU["muscle"]
    hu[ellipse(16, -28, 50, 44)] = HU["muscle"]  # heart
    hu[ellipse(24, 34, 13, 13)] = HU["muscle"]  # aorta
    hu[ellipse(0, 62, 21, 17) | ellipse(0, 90, 5, 14) | ellipse(-14, 82, 13, 5) | ellipse(14, 82, 13, 5)] = HU["bone"]
    hu[ellipse(0, 82, 7, 6)] = 20  # spinal canal
    hu[ellipse(0, -88, 16, 5)] = HU["bone"]  # sternum
    nodule = (x - NODULE[0]) ** 2 + (y - NODULE[1]) ** 2 + (z - NODULE[2]) ** 2 < NODULE_RADIUS**2
    hu[nodule] = HU["nodule"]
    return hu


# ---------------------------------------------------------------- broken files


def broken(folder: Path) -> list[dict[str, Any]]:
    directory = folder / "broken"
    directory.mkdir(parents=True, exist_ok=True)
    whole = (folder / "steel" / "scratches.png").read_bytes()
    (directory / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (directory / "not-an-image.jpg").write_text("This is a text file that calls itself a JPEG.\n", encoding="utf-8")
    return [
        {"path": "broken/truncated.png", "rejected": "truncated"},
        {"path": "broken/not-an-image.jpg", "rejected": "not-an-image"},
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
