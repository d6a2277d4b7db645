"""Manifests: what a line says, and every fault named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.manifest import BoxLabel, ManifestError, ManifestWarning, read_data_sets, read_manifest
from reports.taxonomy import CT_TYPES, DEFECT_TYPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.new("L", (40, 30)).save(folder / "a.png")
    Image.new("L", (40, 30)).save(folder / "b.png")
    return folder


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def faults(folder: Path, *lines: dict[str, Any] | str) -> list[tuple[int, str]]:
    with pytest.raises(ManifestError) as error:
        read_manifest(write(folder, *lines))
    return [(fault.line, fault.message) for fault in error.value.faults]


def box(type_: str, *bbox: float) -> dict[str, Any]:
    return {"type": type_, "bbox": list(bbox)}


def test_a_defect_line(folder: Path) -> None:
    line = {"id": "1", "image": "a.png", "template": "b.png", "split": "train", "group": "g", "width": 40}
    (case,) = read_manifest(write(folder, line | {"findings": [box("spur", 1, 2, 9, 8), box("open", 0, 0, 4, 4)]}))
    assert (case.kind, case.product_line, case.group, case.split) == ("defect", "board", "g", "train")
    assert case.finding_types == ("open", "spur")
    assert case.boxes == (BoxLabel("spur", (1, 2, 9, 8)), BoxLabel("open", (0, 0, 4, 4)))
    assert (case.image, case.template) == (folder / "a.png", folder / "b.png")
    assert case.extra == {"width": 40}


@pytest.mark.parametrize(
    ("product", "line"),
    [
        ("hot-rolled steel strip", "steel"),
        ("ferrite magnetic tile", "tile"),
        ("bare printed circuit board", "board"),
        ("tile", "tile"),
    ],
)
def test_a_defect_free_image_still_has_its_product_line(folder: Path, product: str, line: str) -> None:
    (case,) = read_manifest(write(folder, {"id": "1", "image": "a.png", "product": product, "findings": []}))
    assert (case.kind, case.product_line, case.finding_types, case.boxes) == ("defect", line, (), ())


def test_a_ct_line_keeps_known_fields_only(folder: Path) -> None:
    line = {"id": "1", "image": "a.png", "region": "chest", "contrast": "unknown", "plane": None, "covid19": True}
    line |= {"findings": ["nodule", "opacity", "nodule"], "lung_nodule": "benign", "caption": "text"}
    (case,) = read_manifest(write(folder, line))
    assert (case.kind, case.product_line, case.boxes) == ("ct", None, ())
    assert case.fields == {"region": "chest", "covid19": "true"}
    assert case.finding_types == ("nodule", "opacity")
    assert case.extra == {"lung_nodule": "benign", "caption": "text"}


def test_null_findings_are_not_labelled(folder: Path) -> None:
    (case,) = read_manifest(write(folder, {"id": "1", "image": "a.png", "region": "chest", "findings": None}))
    assert case.finding_types is None


def test_a_line_without_labels_is_legal(folder: Path) -> None:
    (case,) = read_manifest(write(folder, {"id": "1", "image": "a.png", "template": "b.png"}, "", "  "))
    assert (case.kind, case.product_line, case.finding_types, case.split, case.group) == (None, None, None, None, "1")


def test_boxes_are_clipped_by_up_to_one_pixel(folder: Path) -> None:
    (case,) = read_manifest(write(folder, {"id": "1", "image": "a.png", "findings": [box("crack", -1, 0, 41, 30.5)]}))
    assert case.boxes[0].bbox == (0, 0, 40, 30)


def test_a_split_narrows_and_an_unknown_one_is_a_fault(folder: Path) -> None:
    path = write(folder, *({"id": s, "image": "a.png", "split": s} for s in ("train", "val")))
    assert [case.id for case in read_manifest(path, split="val")] == ["val"]
    with pytest.raises(ManifestError, match="no case in split 'test'; its splits are: train, val"):
        read_manifest(path, split="test")


def test_a_group_in_two_splits_is_a_fault_with_both_lines(folder: Path) -> None:
    lines = [
        {"id": str(i), "image": "a.png", "split": s, "group": "g"} for i, s in enumerate(("train", "train", "val"))
    ]
    assert faults(folder, {"id": "x", "image": "b.png"}, *lines) == [
        (4, "group 'g' is in split 'val' here, in 'train' on line 2; images that belong together must share a split")
    ]
    twice = [{"id": "1", "image": "a.png", "split": s, "group": "g"} for s in ("train", "val")]
    assert [line for line, _ in faults(folder, *twice)] == [2, 2]  # also where the id is used twice
    write(folder, {"id": "x", "image": "b.png"}, *lines)
    with pytest.warns(ManifestWarning, match=r"flatter the model: line 4: group 'g'"):  # scoring goes on
        assert len(read_manifest(folder / "manifest.jsonl", lenient=True)) == 4


def test_boards_may_be_divided_as_published_but_that_is_told(folder: Path) -> None:
    lines = [{"id": s, "image": "a.png", "split": s, "group": "g", "product": "board"} for s in ("train", "val")]
    with pytest.warns(ManifestWarning, match=r"line 2: group 'g' is in split 'val' here, in 'train' on line 1"):
        assert len(read_manifest(write(folder, *lines))) == 2


def test_the_faults_of_all_data_sets_are_told_together(tmp_path: Path) -> None:
    for name, lines in {"one": ["{", "["], "two": [], "three": [json.dumps({"id": "1", "image": "../a.png"})]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.jsonl").write_text("\n".join(lines))
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(ManifestError) as error:
        read_data_sets(tmp_path)
    told = str(error.value).splitlines()
    assert [line.strip().partition(":")[0] for line in told[1:]] == ["one, line 1", "one, line 2", "two"]
    (tmp_path / "one" / "manifest.jsonl").unlink()
    (tmp_path / "two" / "manifest.jsonl").unlink()
    assert {name: len(cases) for name, cases in read_data_sets(tmp_path).items()} == {"three": 1}
    with pytest.raises(ManifestError, match="has no data sets"):
        read_data_sets(tmp_path / "three")


def test_every_fault_is_named_with_its_line(folder: Path) -> None:
    good = {"id": "1", "image": "a.png"}
    found = faults(
        folder,
        good,
        '{"id": "2", ',
        good,
        "",
        {"id": "3", "image": "gone.png", "template": "gone.png"},
        {"id": "4", "image": "a.png", "findings": [box("rust", 0, 0, 1, 1), box("crack", 0, 0, 50, 9)]},
        {"id": "5", "image": "a.png", "region": "knee", "covid19": 3},
        {"image": 7},
        {"id": "6", "image": "a.png", "product": "cheese"},
        {"id": "7", "image": "a.png", "region": "chest", "findings": [box("crack", 0, 0, 9, 9)]},
        {"id": "8", "image": "a.png", "findings": ["crack"]},
        [],
    )
    expected = [
        (2, "is not JSON"),
        (3, "already used on line 1"),
        (5, "image 'gone.png' is not a file"),
        (5, "template 'gone.png' is not a file"),
        (6, "unknown type 'rust'"),
        (6, "within 40 x 30 px"),
        (7, "region 'knee' is unknown"),
        (7, "covid19 3 is unknown"),
        (8, "'image' must be text"),
        (8, "has no 'id'"),
        (9, "product 'cheese' is unknown"),
        (10, "different kinds in one case: tile, ct"),
        (11, "has no bbox"),
        (12, "is not a JSON object"),
    ]
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, message), (_, part) in zip(found, expected, strict=True):
        assert part in message


def test_the_message_lists_the_faults_and_counts_those_beyond_its_cap(folder: Path) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(write(folder, *["nonsense"] * 1102))
    told = str(error.value).splitlines()
    assert told[0].endswith("manifest.jsonl: 1,102 faults")
    assert [line.split(":")[0].strip() for line in told[1:-1]] == [f"line {n}" for n in range(1, 101)]
    assert told[-1].strip() == "and 1,002 more"
    assert len(error.value.faults) == 1102


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(content)
    with pytest.raises(ManifestError):
        read_manifest(path)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "none.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a.png", "chest"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FINDING = st.fixed_dictionaries(
    {"type": st.sampled_from([*DEFECT_TYPES, *CT_TYPES]) | JSON, "bbox": st.lists(st.integers() | st.floats()) | JSON}
)
KEYS = ("id", "image", "split", "group", "product", "template", "region", "covid19", "width", "extra")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={key: JSON for key in KEYS} | {"findings": st.lists(FINDING) | JSON}),
        max_size=3,
    )
)
def test_any_json_is_read_or_faulted(folder: Path, lines: list[dict[str, Any]]) -> None:
    try:
        cases = read_manifest(write(folder, *lines))
    except ManifestError:
        return
    assert len(cases) == len(lines)
    for label in (label for case in cases for label in case.boxes):
        x0, y0, x1, y1 = label.bbox
        assert 0 <= x0 < x1 <= 40
        assert 0 <= y0 < y1 <= 30


@pytest.mark.filterwarnings("ignore::pipelines.manifest.ManifestWarning")  # DeepPCB's own split divides its boards
@pytest.mark.parametrize(
    ("name", "kind", "line", "count"),
    [
        ("neu-det", "defect", "steel", 1447),
        ("magnetic-tile", "defect", "tile", 568),
        ("deep-pcb", "defect", "board", 1000),
        ("medpix-ct", "ct", None, 917),
        ("covid-ct", "ct", None, 445),
        ("iq-othnccd", "ct", None, 1055),
    ],
)
def test_real_manifests_have_no_fault(shared_data: Path, name: str, kind: str, line: str | None, count: int) -> None:
    cases = read_manifest(shared_data / name / "manifest.jsonl")
    assert len(cases) == count
    assert {(case.kind, case.product_line) for case in cases} == {(kind, line)}


def test_scoring_goes_on_without_labels_and_files_that_cannot_be_used(folder: Path) -> None:
    lines = [
        {"id": "good", "image": "a.png", "region": "chest"},
        {"id": "gone", "image": "gone.png"},
        {"id": "odd", "image": "a.png", "region": "moon", "findings": [{"type": "open", "bbox": [0, 0, 400, 300]}]},
    ]
    path = folder / "lenient.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ManifestError) as raised:
        read_manifest(path)
    assert {fault.line for fault in raised.value.faults} == {2, 3}
    with pytest.warns(ManifestWarning, match="(?s)line 2.*line 3"):
        cases = read_manifest(path, lenient=True)
    assert [case.id for case in cases] == ["good", "gone", "odd"]
    assert cases[2].fields == {} and cases[2].boxes == ()
    path.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]) + "\n{")
    with pytest.raises(ManifestError, match=r"(?s)already used.*is not JSON"):
        read_manifest(path, lenient=True)
