"""Photos of every pixel format through `plan` and `load`: colours, scale, pages, damage, size."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from ingest_doors import read, refusal
from PIL import Image, ImageCms, ImageDraw

from pipelines.ingest import FileRef, load, pictures, plan
from pipelines.study import ImageStudy

RNG = np.random.RandomState(3)
NOISE = RNG.randint(0, 255, (48, 40, 3), np.uint8)
DEEP = RNG.randint(0, 65535, (48, 40, 3)).astype(np.uint16)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 8 or 16 bit written by hand, for the kinds that Pillow cannot write."""
    height, width = pixels.shape[:2]
    depth = 8 * pixels.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---------------------------------------------------------------- colours


def test_transparency_is_put_on_white_and_said(tmp_path: Path) -> None:
    rgba = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    study = read(tmp_path / "a.png")
    assert (study.pixels[0, :10] == 255).all()
    np.testing.assert_array_equal(study.pixels[0, 10:], NOISE[10:])
    assert study.quality_flags == ("transparency-on-white",)


def test_an_alpha_channel_that_hides_nothing_is_no_flag(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])).save(tmp_path / "a.png")
    study = read(tmp_path / "a.png")
    np.testing.assert_array_equal(study.pixels[0], NOISE)
    assert study.quality_flags == ()


@pytest.mark.parametrize("colour_type", [2, 6])
def test_16_bit_colour_png_is_reduced_and_said(tmp_path: Path, colour_type: int) -> None:
    channels = DEEP if colour_type == 2 else np.dstack([DEEP, np.full(DEEP.shape[:2], 65535, np.uint16)])
    (tmp_path / "a.png").write_bytes(png(channels, colour_type))
    study = read(tmp_path / "a.png")
    np.testing.assert_array_equal(study.pixels[0], (DEEP >> 8).astype(np.uint8))
    assert study.quality_flags == ("reduced-to-8-bit",)


def test_16_bit_colour_tiff_is_reduced_and_said(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", DEEP, photometric="rgb")
    study = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(study.pixels[0], (DEEP >> 8).astype(np.uint8))
    assert study.quality_flags == ("reduced-to-8-bit",)


def wide_gamut() -> bytes:
    """An ICC profile of matrix and tone curve whose primaries are Adobe RGB's, built from sRGB's by its tags."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    count = struct.unpack_from(">I", data, 128)[0]
    for entry in range(count):
        tag, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * entry)
        if tag in primaries:
            struct.pack_into(">3i", data, offset + 8, *(round(v * 65536) for v in primaries[tag]))
        if tag == b"desc":  # a name that does not say sRGB
            data[offset : offset + 100] = data[offset : offset + 100].replace(b"\0s\0R\0G\0B", b"\0w\0i\0d\0e")
    return bytes(data)


@pytest.mark.parametrize("kind", ["grey", "colour", "grey in colour", "deep"])
def test_a_picture_is_the_same_however_many_strips_it_is_converted_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    grey = NOISE[..., 0]
    pixels = {"grey": grey, "colour": NOISE, "grey in colour": np.stack([grey] * 3, -1), "deep": DEEP[..., 0]}[kind]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = grey if kind == "grey in colour" else pixels
    for strip in (pictures.STRIP_PIXELS, 7 * 40):  # whole; seven of 48 rows
        monkeypatch.setattr(pictures, "STRIP_PIXELS", strip)
        found = read(tmp_path / "a.png").pixels[0]
        np.testing.assert_array_equal(found, expected)
        assert found.flags.c_contiguous


def test_colours_go_to_srgb_by_the_icc_profile(tmp_path: Path) -> None:
    plain = np.full((40, 40, 3), (60, 200, 60), np.uint8)
    plain[:20] = (128, 128, 128)
    Image.fromarray(plain).save(tmp_path / "a.png", icc_profile=wide_gamut())
    study = read(tmp_path / "a.png")
    assert np.abs(study.pixels[0, 0, 0].astype(int) - 128).max() <= 1  # grey stays grey
    red, green, _ = study.pixels[0, 30, 0].astype(int)
    assert red < 30 < 190 < green  # Adobe RGB's green lies outside sRGB: red is cut off
    assert study.quality_flags == ()


def test_a_profile_that_says_srgb_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels[0], NOISE)


@pytest.mark.parametrize("profile", [b"nonsense", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_cannot_be_used_is_said(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=profile)
    study = read(tmp_path / "a.png")
    np.testing.assert_array_equal(study.pixels[0], NOISE)
    assert study.quality_flags == ("colours-approximate",)


def test_cmyk_without_profile_is_said_to_be_approximate(tmp_path: Path) -> None:
    Image.fromarray(NOISE).convert("CMYK").save(tmp_path / "a.tif")
    study = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(study.pixels[0], NOISE)
    assert study.quality_flags == ("colours-approximate",)


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 10, 200])
    image.paste(2, (0, 0, 20, 20))
    image.save(tmp_path / "a.png", transparency=2)
    study = read(tmp_path / "a.png")
    assert study.pixels[0, 0, 0].tolist() == [255, 255, 255]
    assert study.pixels[0, 30, 30].tolist() == [200, 10, 10]
    assert study.quality_flags == ("transparency-on-white",)


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_the_resolution_tag_gives_the_scale(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(NOISE).save(tmp_path / f"a.{suffix}", dpi=(254, 508))
    rows, columns = read(tmp_path / f"a.{suffix}").geometry.spacing_mm or (0, 0)
    assert (rows, columns) == pytest.approx((0.05, 0.1), rel=2e-3)


@pytest.mark.parametrize("dpi", [(72, 72), (96, 96), (1, 1), (0, 0)])
def test_a_default_resolution_is_no_scale(tmp_path: Path, dpi: tuple[int, int]) -> None:
    for suffix in ("png", "jpg", "bmp"):
        Image.fromarray(NOISE).save(tmp_path / f"a.{suffix}", dpi=dpi)
        assert read(tmp_path / f"a.{suffix}").geometry.spacing_mm is None


def test_a_camera_cannot_know_the_scale(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x829A] = 0.01  # exposure time
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", dpi=(300, 300), exif=exif)
    assert read(tmp_path / "a.jpg").geometry.spacing_mm is None


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_a_turned_picture_has_its_scale_turned(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / f"a.{suffix}", dpi=(254, 508), exif=exif)
    study = read(tmp_path / f"a.{suffix}")
    assert study.pixels.shape == (1, 40, 48, 3)
    assert study.geometry.spacing_mm == pytest.approx((0.1, 0.05), rel=2e-3)


# ---------------------------------------------------------------- pages and frames


def frames(count: int) -> list[Image.Image]:
    found = []
    for number in range(count):
        image = Image.new("RGB", (40, 30), (20, 20, 20))
        ImageDraw.Draw(image).rectangle((number, 0, number + 9, 9), (250, 250, 250))
        found.append(image)
    return found


@pytest.mark.parametrize(("suffix", "called"), [("gif", "frame"), ("png", "frame"), ("webp", "frame"), ("tif", "page")])
@pytest.mark.parametrize("zipped", [False, True])
def test_each_frame_is_a_picture_whatever_the_order(tmp_path: Path, suffix: str, called: str, zipped: bool) -> None:
    path = tmp_path / f"a.{suffix}"
    first, *rest = frames(5)
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=rest, **options)
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)
        path = tmp_path / "a.zip"
    units = plan([path]).units
    assert [unit.name for unit in units] == [f"a.{suffix} {called} {n}" for n in range(1, 6)]
    for number in (0, 1, 2, 3, 4, 2, 0):  # forth and back
        study = load(units[number])
        assert isinstance(study, ImageStudy)
        grey = study.pixels[0] if study.pixels.ndim == 3 else study.pixels[0, ..., 0]
        assert np.flatnonzero(grey[0] > 200).tolist() == list(range(number, number + 10))
        assert study.sources[0].page == number


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_each_frame_is_turned_as_the_file_asks(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = [RNG.randint(0, 255, (30, 40, 3), np.uint8) for _ in range(3)]
    first, *rest = map(Image.fromarray, pixels)
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, exif=exif, **options)
    units = plan([tmp_path]).units
    for number in (0, 1, 2, 1, 1):
        study = load(units[number])
        assert isinstance(study, ImageStudy)
        np.testing.assert_array_equal(study.pixels[0], np.rot90(pixels[number], -1))


def test_a_file_of_many_pages_is_hashed_and_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = frames(20)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    opened = []
    plain = FileRef.open
    monkeypatch.setattr(FileRef, "open", lambda ref: opened.append(ref) or plain(ref))
    units = plan([tmp_path]).units
    opened.clear()
    for unit in units:
        assert isinstance(load(unit), ImageStudy)
    assert len(opened) == 2  # once to decode, once to hash


def test_an_animation_that_would_never_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_FILM_PIXELS", 40 * 30 * 4)
    first, *rest = frames(5)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert refusal(tmp_path / "a.gif").code == "too-large"


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
@pytest.mark.parametrize("lost", [4, 12, 16, 100])
def test_a_file_cut_short_by_a_few_bytes_is_told_apart(tmp_path: Path, suffix: str, lost: int) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert refusal(path).code == "truncated"


def test_bytes_after_the_end_do_no_harm(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("ab") as file:
        file.write(b"appended by a mail server")
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels[0], NOISE)


def test_a_decompression_bomb_is_refused_in_words(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 50_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    refused = refusal(tmp_path / "bomb.png")
    assert refused.code == "too-large"
    assert "60,000 x 50,000 pixels (3,000 megapixels)" in refused.reason
    assert "500 megapixels" in refused.reason


def test_a_jpeg_that_declares_more_pixels_than_it_can_hold_is_not_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(NOISE).save(path)
    data = path.read_bytes()
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    path.write_bytes(data[:at] + struct.pack(">HH", 20_000, 20_000) + data[at + 4 :])
    assert refusal(path).code == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_almost_nothing_but_one_value_is_read(tmp_path: Path, progressive: bool) -> None:
    pixels = np.full((2000, 2000), 100, np.uint8)
    pixels[:40, :40] = 0
    Image.fromarray(pixels).save(tmp_path / "a.jpg", optimize=True, progressive=progressive)
    assert read(tmp_path / "a.jpg").pixels.shape == (1, 2000, 2000)


# ---------------------------------------------------------------- large pictures


def test_a_large_picture_lies_in_a_file_and_equals_the_small_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = RNG.randint(0, 255, (300, 200, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    whole = read(tmp_path / "a.png").pixels
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(pictures, "STRIP_PIXELS", 1000)
    mapped = read(tmp_path / "a.png").pixels
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, whole)
    np.testing.assert_array_equal(whole[0], np.rot90(pixels))


SCAN = """
import sys
from pathlib import Path
from pipelines.run import Job, execute
summary = execute(Job((Path(sys.argv[1]),), Path(sys.argv[2]), kind="defect"))
assert len(summary.reported) == 1, summary
# Of this process only: `ru_maxrss` begins with what the one that started it takes.
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("mode", "suffix", "most_mib"), [("L", "png", 1024), ("RGB", "jpg", 2048), ("RGB", "tif", 2048)]
)
def test_a_scan_of_20000_by_20000_is_reported_in_bounded_memory(
    tmp_path: Path, mode: str, suffix: str, most_mib: int
) -> None:
    side = 20_000
    tile = Image.open(Path(__file__).parents[1] / "examples" / "steel" / "scratches.png").convert("L")
    image = Image.new(mode, (side, side), "gray")
    for number, (x, y) in enumerate(((300, 500), (9_900, 10_100), (19_700, 19_700))):
        image.paste(tile.rotate(90 * number), (x, y))
    if mode == "RGB":
        ImageDraw.Draw(image).rectangle((50, 50, 90, 90), (200, 30, 30))
    image.save(tmp_path / f"scan.{suffix}", **({"compression": "tiff_lzw"} if suffix == "tif" else {}))
    image.close()
    done = subprocess.run(
        [sys.executable, "-c", SCAN, tmp_path / f"scan.{suffix}", tmp_path / "out"],
        capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"{mode} {suffix}: peak {peak} MiB")
    assert peak <= most_mib
    [page] = (tmp_path / "out").glob("*/report.html")
    assert page.stat().st_size < 20 << 20
