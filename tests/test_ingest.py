"""Pictures, folders and archives through `plan` and `load`."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from ingest_doors import read, refusal
from PIL import Image

from pipelines.ingest import FileRef, Plan, load, plan
from pipelines.study import ImageStudy, Rejection

EXAMPLES = Path(__file__).parents[1] / "examples"
GREY = (np.arange(48 * 32, dtype=np.uint16).reshape(48, 32) % 251).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], np.full_like(GREY, 90)], axis=-1)


def codes(planned: Plan) -> dict[str, str]:
    return {Path(r.path).name: r.code for r in planned.rejections}


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "gif"])
def test_grey_picture_of_any_lossless_format_keeps_its_values(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GREY).save(path, **({"lossless": True} if suffix == "webp" else {}))
    study = read(path)
    assert study.units == "display"
    np.testing.assert_array_equal(study.pixels, GREY[None])


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
def test_colour_picture_keeps_its_values(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read(path).pixels, RGB[None])


def test_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.jpg", quality=95)
    study = read(tmp_path / "a.jpg")
    assert study.sources[0].media_type == "image/jpeg"
    assert study.pixels.shape == (1, 30, 40, 3)
    assert np.abs(study.pixels.mean(axis=(0, 1, 2)) - (200, 30, 60)).max() < 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_stays_16_bit(tmp_path: Path, suffix: str) -> None:
    deep = GREY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    study = read(tmp_path / f"a.{suffix}")
    assert study.pixels.dtype == np.uint16
    np.testing.assert_array_equal(study.pixels[0], deep)


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    deep = (GREY.astype(np.uint16) * 200).astype(">u2")
    Image.frombytes("I;16B", (32, 48), deep.tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels[0], deep)


def test_each_page_of_a_tiff_is_a_unit(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16) * 257), Image.fromarray(RGB)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    units = plan([tmp_path / "scan.tif"]).units
    assert [unit.name for unit in units] == ["scan.tif page 1", "scan.tif page 2", "scan.tif page 3"]
    studies = [load(unit) for unit in units]
    assert all(isinstance(s, ImageStudy) for s in studies)
    assert [(s.pixels.dtype.name, s.pixels.shape) for s in studies if isinstance(s, ImageStudy)] == [
        ("uint8", (1, 48, 32)),
        ("uint16", (1, 48, 32)),
        ("uint8", (1, 48, 32, 3)),
    ]
    assert len({s.key for s in studies if isinstance(s, ImageStudy)}) == 3


def test_transparency_becomes_white(tmp_path: Path) -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[0] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png").pixels[0]
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(RGB).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert read(tmp_path / "palette.png").pixels.shape == (1, 48, 32, 3)
    np.testing.assert_allclose(read(tmp_path / "cmyk.tif").pixels[0], RGB, atol=2)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image = Image.new("L", (40, 20))
    image.paste(255, (0, 0, 40, 10))  # the upper half is white: turned, the right half is
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    pixels = read(tmp_path / f"a.{suffix}").pixels[0]
    assert pixels.shape == (40, 20)
    assert pixels[:, 14:].min() > 200
    assert pixels[:, :6].max() < 50


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "notes.txt")
    assert read(tmp_path / "notes.txt").sources[0].media_type == "image/png"
    assert [unit.name for unit in plan([tmp_path]).units] == ["notes.txt"]


def test_source_names_its_content_and_key_ignores_the_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(GREY).save(tmp_path / name)
    first, second = read(tmp_path / "a.png"), read(tmp_path / "b.png")
    assert first.sources[0].sha256 == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert first.sources[0].path == str(tmp_path / "a.png")
    assert first.key == second.key


# ---------------------------------------------------------------- what is refused


def png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty-file"),
        (b"plain text in disguise", "not-an-image"),
        (png(0, 5), "no-pixels"),
        (png(30_000, 20_000), "too-large"),
        (png(100_000, 100_000), "too-large"),
        (png(50, 50), "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\1" * 200, "damaged-image"),
        (b"%PDF-1.7 ...", "damaged-document"),
        (b"PK\x03\x04 and no more", "damaged-archive"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 64, "not-an-image"),
    ],
)
def test_bad_content_is_refused_with_its_code(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert refusal(path).code == code


@pytest.mark.parametrize(("suffix", "keep"), [("png", 0.6), ("jpg", 0.5), ("tif", 0.6), ("bmp", 0.5), ("webp", 0.5)])
def test_truncated_picture_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert refusal(path).code in ("truncated", "damaged-image")


def test_floating_point_tiff_is_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "a.tif")
    assert refusal(tmp_path / "a.tif").code == "unsupported-pixel-format"


def test_missing_path_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing.png").code == "not-found"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert refusal(tmp_path / "a.png").code == "unreadable"


def test_file_that_vanishes_after_planning_is_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    unit = plan([tmp_path]).units[0]
    (tmp_path / "a.png").unlink()
    outcome = load(unit)
    assert isinstance(outcome, Rejection)
    assert outcome.code == "not-found"


def test_pipes_and_sockets_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        assert codes(plan([tmp_path])) == {"pipe.png": "not-a-file", "s.png": "not-a-file"}


# ---------------------------------------------------------------- folders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b/2.png", "b/10.png", "a.png", ".hidden/x.png", "__MACOSX/y.png", "c/z.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(root / name)
    for name in ("readme.txt", "labels.json", ".DS_Store", "b/Thumbs.db", "DICOMDIR", "c/report.docx"):
        (root / name).write_text("no image")
    return root


def test_folder_is_walked_in_a_fixed_order(tree: Path) -> None:
    assert [unit.files[0].name for unit in plan([tree]).units] == [
        str(tree / name) for name in ("a.png", "b/10.png", "b/2.png", "c/z.png")
    ]


def test_nothing_is_skipped_in_silence(tree: Path) -> None:
    planned = plan([tree])
    assert codes(planned) == {"report.docx": "not-an-image"}
    passed = {Path(item.path).relative_to(tree).as_posix(): item.reason for item in planned.passed_over}
    assert set(passed) == {
        ".DS_Store",
        ".hidden",
        "DICOMDIR",
        "__MACOSX",
        "b/Thumbs.db",
        "labels.json",
        "readme.txt",
    }
    assert all(passed.values())


def test_companion_file_named_by_the_user_is_refused(tree: Path) -> None:
    assert refusal(tree / "readme.txt").code == "not-an-image"


def test_loops_of_links_end_and_a_file_is_met_once(tree: Path) -> None:
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "again.png").symlink_to(tree / "a.png")
    (tree / "broken.png").symlink_to(tree / "gone.png")
    planned = plan([tree, tree, tree / "a.png"])
    assert len(planned.units) == 4
    assert codes(planned)["broken.png"] == "not-found"
    passed = {Path(item.path).relative_to(tree).as_posix(): item.reason for item in planned.passed_over}
    assert passed["again.png"] == f"the same as {tree / 'a.png'}"
    assert passed["b/loop"] == f"the same as {tree}"


def test_a_second_hard_link_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    planned = plan([tmp_path])
    assert len(planned.units) == 1
    assert [(item.path, item.reason) for item in planned.passed_over] == [
        (str(tmp_path / "b.png"), f"the same as {tmp_path / 'a.png'}")
    ]


@pytest.mark.parametrize(
    ("ref", "parent", "basename"),
    [
        (FileRef("in/hello!a.png"), "in", "hello!a.png"),
        (FileRef("in!/a.png"), "in!", "a.png"),
        (FileRef("a.png"), ".", "a.png"),
        (FileRef("x!.zip", "a!b.png"), "x!.zip", "a!b.png"),
        (FileRef("x.zip", "sub/a.png"), "x.zip!sub", "a.png"),
    ],
)
def test_exclamation_marks_belong_to_the_name(ref: FileRef, parent: str, basename: str) -> None:
    assert (ref.parent, ref.basename) == (parent, basename)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "empty-folder"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_not_one(tmp_path: Path) -> None:
    for name, pixels in (("1.png", GREY), ("2.png", GREY[::-1])):
        Image.fromarray(pixels).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.write(tmp_path / "1.png", "a.png")
        z.write(tmp_path / "2.png", "a.png")
    planned = plan([tmp_path / "x.zip"])
    assert len(planned.units) == 1
    assert [(r.path, r.code) for r in planned.rejections] == [(f"{tmp_path}/x.zip!a.png", "duplicate-member")]
    assert planned.rejections[0].remedy


@pytest.mark.parametrize("odd", [".", "./", "\\", "C:/a.png", "/"])
def test_a_member_with_an_odd_name_costs_only_itself(tmp_path: Path, odd: str) -> None:
    Image.fromarray(GREY).save(tmp_path / "1.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr(zipfile.ZipInfo(odd), b"x")
        z.write(tmp_path / "1.png", "z.png")
    planned = plan([tmp_path / "x.zip"])
    assert [unit.name for unit in planned.units] == ["z.png"]
    assert len(planned.rejections) + len(planned.passed_over) <= 1


def test_progress_counts_every_file(tree: Path) -> None:
    calls: list[tuple[int, int]] = []
    plan([tree], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/bad\xff.png"
    Image.fromarray(GREY).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    study = load(plan([tmp_path]).units[0])
    assert isinstance(study, ImageStudy)
    study.sources[0].path.encode()  # can be written to a report


# ---------------------------------------------------------------- archives


def test_members_of_an_archive_are_read_without_unpacking(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted(tree.rglob("*")):
            z.write(path, path.relative_to(tree))
    before = set(tmp_path.iterdir())
    planned = plan([archive])
    assert [unit.files[0].name for unit in planned.units] == [
        f"{archive}!{name}" for name in ("a.png", "b/10.png", "b/2.png", "c/z.png")
    ]
    assert [r.code for r in planned.rejections] == ["not-an-image"]
    study = load(planned.units[0])
    assert isinstance(study, ImageStudy)
    np.testing.assert_array_equal(study.pixels[0], GREY)
    assert study.key == read(tree / "a.png").key
    assert set(tmp_path.iterdir()) == before


def test_dicom_series_in_an_archive_equals_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as z:
        for path in (EXAMPLES / "ct" / "phantom-series").iterdir():
            z.write(path, path.name)
    assert plan([tmp_path / "ct.zip"]).units[0].path == str(tmp_path / "ct.zip")
    assert read(tmp_path / "ct.zip").key == read(EXAMPLES / "ct").key


def test_archive_in_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as inner:
        inner.writestr("a.txt", "a")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.write(tmp_path / "inner.zip", "inner.zip")
    assert refusal(tmp_path / "outer.zip").code == "nested-archive"


def locked(path: Path, *, every: bool) -> Path:
    """An archive whose members (or just the first) say that they are encrypted."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a.png", png(4, 4))
        z.writestr("b.png", png(4, 4))
    data = bytearray(path.read_bytes())
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        data[at + 8] |= 1
        at = at + 4 if every else len(data)
    path.write_bytes(data)
    return path


def test_archive_with_a_password_is_refused_once(tmp_path: Path) -> None:
    assert refusal(locked(tmp_path / "x.zip", every=True)).code == "password-locked"


def test_locked_member_is_refused_by_name(tmp_path: Path) -> None:
    planned = plan([locked(tmp_path / "x.zip", every=False)])
    assert [(r.path.rsplit("!")[-1], r.code) for r in planned.rejections] == [("a.png", "password-locked")]
    assert [unit.name for unit in planned.units] == ["b.png"]


def test_archive_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("zeros.dcm", b"\0" * 1_000_000)
    data = path.read_bytes().replace(struct.pack("<I", 1_000_000), struct.pack("<I", 0xFFFF_0000))
    path.write_bytes(data)
    assert refusal(path).code == "archive-bomb"


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "b/../../a.png", "C:/a.png"])
def test_member_that_names_a_place_outside_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.write(EXAMPLES / "steel" / "scratches.png", "good.png")
        z.writestr(zipfile.ZipInfo(name), (EXAMPLES / "steel" / "scratches.png").read_bytes())
    planned = plan([tmp_path / "x.zip"])
    assert [unit.name for unit in planned.units] == ["good.png"]
    assert [each.code for each in planned.rejections] == ["path-traversal"]


def test_damaged_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.write(EXAMPLES / "steel" / "scratches.png", "a.png")
    data = bytearray(path.read_bytes())
    data[5000] ^= 0xFF
    path.write_bytes(data)
    assert refusal(path).code == "damaged-archive"


def test_office_document_is_not_taken_for_an_archive_of_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.docx", "w") as z:
        z.writestr("[Content_Types].xml", "<xml/>")
        z.writestr("media/a.png", png(4, 4))
    assert refusal(tmp_path / "x.docx").code == "unsupported-format"


# ---------------------------------------------------------------- the door itself


def test_units_are_small_and_picklable() -> None:
    for unit in plan([EXAMPLES]).units:
        pickled = pickle.dumps(unit)
        assert pickle.loads(pickled) == unit
        assert len(pickled) < 500 + 200 * len(unit.files)


def test_importing_ingest_loads_neither_torch_nor_pydicom() -> None:
    program = "import sys, pipelines.ingest; print([m for m in ('torch', 'pydicom', 'pydantic') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
