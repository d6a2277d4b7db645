"""The bundled model on the project's own samples, and the model store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.engine import Completion
from encoders import Dense
from pipelines import ingest
from pipelines.inputs import channels, grey8, pad, resize, window
from pipelines.look import Candidate, Seen
from pipelines.reader import Reader, point_or_pass
from pipelines.reading import DeviceLostError, NotFiniteError, Reading
from pipelines.reporting import build_report
from pipelines.sight import Frame, Sight, frame, sight
from pipelines.store import ModelError, find
from pipelines.study import ImageStudy
from reports.grammar import ID, POINTERS, TOKENS, from_tokens
from reports.language import contradictions
from reports.taxonomy import CT_FIELDS, DEFECT_TYPES
from reports.texts import words

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPECTED = {
    sample["path"]: sample
    for sample in json.loads((EXAMPLES / "expected.json").read_text())["samples"]
    if "path" in sample
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load("default", "cpu")


def load(path: str) -> ImageStudy:
    study = ingest.load(ingest.plan([EXAMPLES / path]).units[0])
    assert isinstance(study, ImageStudy)
    return study


def write(reader: Reader, *seen: Seen) -> Reading:
    reading = reader.write(seen)[0]
    assert isinstance(reading, Reading)
    return reading


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(0.0, w) * max(0.0, h)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def test_a_board_is_compared_with_its_golden_sample(reader: Reader) -> None:
    reading = reader.read(load("board/board.png"), reference=load("golden/board.png"))
    assert (reading.kind, reading.product_line) == ("defect", "board")
    said = [finding for finding in reading.findings if finding.reported]
    drawn = EXPECTED["board/board.png"]["findings"]
    assert sorted(f.type for f in said) == sorted(d["type"] for d in drawn)
    for defect in drawn:
        assert any(f.type == defect["type"] and overlap(f.bbox, defect["bbox"]) > 0.3 for f in said)
    assert all(f.confidence > 0.5 for f in said)


def test_a_board_equal_to_its_golden_sample_is_free(reader: Reader) -> None:
    board = load("golden/board.png")
    assert not [f for f in reader.read(board, reference=board).findings if f.reported]


def test_scratches_are_found_where_they_were_drawn(reader: Reader) -> None:
    reading = reader.read(load("steel/scratches.png"))
    said = [finding for finding in reading.findings if finding.reported]
    assert {f.type for f in said} == {"scratches"}
    drawn = EXPECTED["steel/scratches.png"]["findings"]
    assert all(max(overlap(f.bbox, defect["bbox"]) for defect in drawn) > 0.5 for f in said)
    assert sum(max(overlap(f.bbox, defect["bbox"]) for f in said) > 0.5 for defect in drawn) >= 2


def test_what_is_written_parses_and_agrees_with_the_findings(reader: Reader) -> None:
    for path in ("steel/patches.png", "tile/crack.png", "ct/phantom-series"):
        reading = reader.read(load(path))
        draft = from_tokens(reading.tokens)
        assert draft.kind == reading.kind and draft.line == reading.product_line
        for name, value in draft.fields.items():
            assert max(reading.fields[name].probabilities, key=reading.fields[name].probabilities.__getitem__) == value
        for finding in reading.findings:
            assert 0 <= finding.confidence <= 1
        said = {f.type for f in reading.findings if f.reported}
        assert bool(reading.impression) == bool(said)
        for name in said:
            assert any(words("en").noun(name, plural=p) in reading.impression.lower() for p in (False, True))
        assert all(f.reported for f in reading.findings if f.confidence >= 0.5)


def test_a_sentence_of_the_decoder_that_contradicts_the_findings_is_refused(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reader.look(load("tile/crack.png"))
    right = write(reader, seen)
    start = right.tokens.index("<impression>")
    assert reader._engine is not None

    def writes(*impression: str) -> Reading:
        ids = [ID[token] for token in (*right.tokens[:start], "<impression>", *impression, "<end>")]
        engine = SimpleNamespace(generate=lambda requests: [Completion(each, ids, "eos") for each in requests])
        with monkeypatch.context() as patch:
            patch.setattr(reader, "_engine", engine)
            return write(reader, seen)

    wrong = writes("count:two", "type:blowhole", "zone:lower left")
    assert wrong.refused == ("Two blowholes, in the lower left of the image.",)
    assert "blowhole" not in wrong.impression and wrong.impression == right.impression
    assert writes("<clear>").refused[0].startswith("No defect of the assessed types")
    assert writes(*right.tokens[start + 1 : -1]).refused == right.refused == ()
    assert not contradictions(right.draft(), [right.impression])


def test_what_the_picture_as_a_whole_shows_is_reported_where_no_box_is_sure(reader: Reader) -> None:
    seen = reader.look(load("steel/scratches.png"))
    assert seen.shows == "scratches"
    doubtful = [dataclasses.replace(candidate, score=0.05) for candidate in seen.candidates]
    said = [f for f in write(reader, dataclasses.replace(seen, candidates=doubtful)).findings if f.reported]
    assert [f.type for f in said] == ["scratches"]
    nothing = dataclasses.replace(seen, candidates=doubtful, shows=None)
    assert not [f for f in write(reader, nothing).findings if f.reported]


def test_the_surest_finding_has_the_type_that_the_picture_as_a_whole_shows_most(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect, study = reader._looker._detect, load("steel/scratches.png")
    before = reader.look(study)

    def with_patches(*args: object, **options: bool) -> Dense:
        found = detect(*args, **options)  # type: ignore[arg-type]
        presence_BT = found.presence_BT.clone()
        presence_BT[:, DEFECT_TYPES.index("patches")] = 1 + presence_BT.amax(1)
        return found._replace(presence_BT=presence_BT)

    monkeypatch.setattr(reader._looker, "_detect", with_patches)
    seen = reader.look(study)
    scores = [candidate.score for candidate in seen.candidates]
    assert before.candidates[0].type == before.shows == "scratches" and seen.shows == "patches"
    assert seen.candidates[0].type == "patches" and scores == sorted(scores, reverse=True) and scores[0] > scores[1]
    of_type = [[c.bbox for c in each.candidates if c.type == "scratches"] for each in (before, seen)]
    assert np.allclose(of_type[0][:5], of_type[1][:5], atol=0.1)  # within a type nothing moves


def test_a_volume_names_its_slices_and_windows(reader: Reader) -> None:
    study = load("ct/phantom-series")
    reading = reader.read(study)
    assert reading.kind == "ct" and set(reading.fields) == set(CT_FIELDS)
    assert reading.slices_read == tuple(range(len(study.pixels)))
    assert reading.windows[0] == "soft tissue"
    assert all(finding.slice_index in reading.slices_read for finding in reading.findings)
    for field in reading.fields.values():
        assert sum(field.probabilities.values()) == pytest.approx(1)


def test_types_that_are_not_told_from_chance_are_named_and_never_reported(reader: Reader) -> None:
    study = load("ct/phantom-series")
    seen = reader.look(study)
    sure = [dataclasses.replace(candidate, score=0.999) for candidate in seen.candidates]
    seen = dataclasses.replace(seen, candidates=sure)
    open_minded = dataclasses.replace(reader.calibration, point={}, evidence={}, assessed={})
    careful = dataclasses.replace(open_minded, assessed={"ct": ("cyst", "effusion")})
    said = {}
    for name, calibration in (("all", open_minded), ("two", careful)):
        other = Reader(reader.model, calibration, reader.info, reader.device)
        reading = write(other, seen)
        said[name] = {f.type for f in reading.findings if f.reported}
    assert len(said["all"]) > 2 and said["two"] == {"cyst", "effusion"}
    report = build_report(study, reading, reader.info)
    [unsure] = [item for item in report.not_assessed if item.code == "unsure-findings"]
    assert "nodule" in unsure.what and "cyst" not in unsure.what and "better than chance" in unsure.reason


def test_the_kind_can_be_forced(reader: Reader) -> None:
    strip = load("steel/scratches.png")
    assert reader.read(strip, kind="ct").kind == "ct"
    assert reader.read(strip, kind="defect").kind_confidence == 1.0
    volume = load("ct/phantom-series")
    forced = reader.read(volume, kind="defect")
    assert forced.kind == "defect" and forced.slices_read == (len(volume.pixels) // 2,)
    assert {f.slice_index for f in forced.findings} <= set(forced.slices_read)


@pytest.mark.parametrize("path", ["steel/inclusion.png", "steel/patches.png", "tile/crack.png"])
def test_drawn_defects_are_found_with_their_type(reader: Reader, path: str) -> None:
    said = [f for f in reader.read(load(path)).findings if f.reported]
    for defect in EXPECTED[path]["findings"]:
        assert any(f.type == defect["type"] and overlap(f.bbox, defect["bbox"]) > 0.3 for f in said)


def test_no_sure_item_is_lost_for_want_of_slots(reader: Reader) -> None:
    board = load("board/board.png")
    seen = reader.look(board, reference=load("golden/board.png"))
    many = [Candidate("open", (8.0 * i, 8.0, 8.0 * i + 6, 30.0), 0.99) for i in range(POINTERS + 8)]
    reading = write(reader, dataclasses.replace(seen, candidates=many))
    assert sum(f.reported for f in reading.findings) == len(many)


def test_reading_twice_says_the_same(reader: Reader) -> None:
    strip = load("steel/inclusion.png")
    first, second = (dataclasses.replace(reader.read(strip), timing_s={}) for _ in range(2))
    assert first == second


def test_what_was_seen_is_written_alike_alone_and_together(reader: Reader) -> None:
    seen = [reader.look(load(path)) for path in ("steel/patches.png", "ct/phantom-series", "tile/crack.png")]
    seen += [dataclasses.replace(seen[0], candidates=[])]
    assert reader.write(seen) == [write(reader, each) for each in seen]
    assert reader.write([]) == []


def test_a_study_whose_scores_are_not_finite_fails_alone(reader: Reader) -> None:
    good = reader.look(load("steel/inclusion.png"))
    bad = dataclasses.replace(good, visual=torch.full_like(good.visual, float("nan")))
    first, failed, last = reader.write([good, bad, good])
    assert isinstance(failed, NotFiniteError) and failed.code == "not-finite"
    assert first == last == write(reader, good)


@pytest.mark.parametrize("shape", [(16, 16), (17, 900), (700, 20), (64, 64, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_odd_pictures_are_read(reader: Reader, shape: tuple[int, ...], dtype: type) -> None:
    if len(shape) == 3 and dtype is np.uint16:
        pytest.skip("colour is 8-bit")
    template = load("steel/scratches.png")
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (1, *shape)).astype(dtype)
    reading = reader.read(dataclasses.replace(template, pixels=pixels))
    for finding in reading.findings:
        x0, y0, x1, y1 = finding.bbox
        assert 0 <= x0 < x1 <= shape[1] and 0 <= y0 < y1 <= shape[0]


def test_boxes_come_back_to_the_pictures_own_pixels() -> None:
    picture = np.zeros((100, 300), np.uint8)
    picture[20:40, 60:90] = 255
    seen = frame(picture, 150, square=True)
    assert seen.grey_HW.shape == (160, 160)
    ys, xs = np.nonzero(seen.grey_HW > 191)
    box = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], np.float32)
    assert np.abs(seen.boxes(box)[0] - [60, 20, 90, 40]).max() <= 2


def test_windows_and_grey_levels() -> None:
    hu = np.array([-1000, -160, 40, 240, 3000], np.int16)
    assert window(hu, 40, 400).tolist() == [0, 0, 128, 255, 255]
    assert grey8(np.array([[0, 1000], [2000, 4000]], np.uint16)).max() == 255
    assert resize(np.zeros((10, 20), np.uint8), 5).shape == (2, 5)
    framed, offset = pad(channels(np.zeros((40, 70), np.uint8)), square=False)
    assert framed.shape == (3, 64, 96) and offset == (13, 12)


def test_pointing_takes_items_one_after_another() -> None:
    p = torch.full((1, len(TOKENS)), 1e-12)
    p[0, ID["evidence:0"]], p[0, ID["evidence:1"]], p[0, ID["<impression>"]] = 0.3, 0.6, 0.1

    def pointed(threshold: float, *sure: int) -> str:
        hints = torch.full((1, POINTERS), threshold)
        hints[0, list(sure)] = 0
        return TOKENS[int(point_or_pass(p.log(), hints))]

    # Given that item 0 is passed over, item 1 has 0.6 of 0.7.
    assert pointed(0.5) == "evidence:1"
    assert pointed(0.2) == "evidence:0"
    assert pointed(0.9) == "<impression>"
    assert pointed(0.9, 2) == "evidence:2"


def test_the_reading_path_loads_neither_timm_nor_torchvision() -> None:
    code = "import sys, pipelines.reader; sys.exit(any(m in sys.modules for m in ('timm', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bundled_model_is_small_whole_and_has_a_card() -> None:
    model = find("default")
    model.verify()
    assert model.weights.stat().st_size <= 24 * 2**20
    card = (model.folder / "MODEL_CARD.md").read_text()
    assert model.weights_sha256 in card and "Not for diagnosis" in card
    assert set(model.calibration.evidence) == {"steel", "tile", "board", "ct"}
    assert len(DEFECT_TYPES) == model.config["detector"]["types"]


def test_models_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="choose from: default"):
        find("nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        find(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(find("default").folder, damaged)
    (damaged / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="damaged"):
        Reader.load(damaged, "cpu")
    (damaged / "model.json").write_text("{}")
    with pytest.raises(ModelError, match="not the settings"):
        find(damaged)
    with pytest.raises(ModelError, match="no device"):
        Reader.load("default", "abacus")


def test_studies_read_together_are_as_read_alone_and_one_that_fails_fails_alone(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.look.TOGETHER_CLOSER", {"cpu": 1 << 20})  # as on a GPU
    board, golden = load("board/board.png"), load("golden/board.png")
    sights = [sight(load(path)) for path in ("steel/patches.png", "ct/phantom-series", "steel/inclusion.png")]
    sights += [sight(board, reference=golden), sight(board, kind="ct"), sight(load("tile/crack.png"))]
    together = reader.read_many(sights)
    for each, one in zip(sights, together, strict=True):
        alone = reader.read_many([each])[0]
        assert not isinstance(one, Exception) and not isinstance(alone, Exception)
        assert (one.kind, one.product_line, one.impression) == (alone.kind, alone.product_line, alone.impression)
        assert one.domain == pytest.approx(alone.domain, abs=1e-3)
        pairs = zip((f for f in one.findings if f.reported), (f for f in alone.findings if f.reported), strict=True)
        for found, expected in pairs:
            assert found.type == expected.type
            assert found.bbox == pytest.approx(expected.bbox, abs=0.1)
            assert found.confidence == pytest.approx(expected.confidence, abs=1e-3)
    broken = dataclasses.replace(sights[2], glances=())
    outcomes = reader.read_many([sights[0], broken, sights[3]])
    assert [isinstance(each, Exception) for each in outcomes] == [False, True, False]


def test_frames_filled_up_to_a_power_of_two_are_seen_as_alone(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: three strips and three tiles make batches of four, six glances one of eight."""
    names = ("steel/patches", "steel/inclusion", "steel/scratches", *["tile/crack"] * 3)
    sights = [sight(load(f"{name}.png")) for name in names]
    alone = [reader.look_many([each])[0] for each in sights]
    filled, as_input = [], reader._looker._input

    def noted(frames: Sequence[Frame]) -> Tensor:
        x_B3HW = as_input(frames)
        filled.append((len(frames), len(x_B3HW)))
        return x_B3HW

    monkeypatch.setattr("pipelines.look.TOGETHER_CLOSER", {"cpu": 1 << 21})
    monkeypatch.setattr(reader._looker, "_powers_of_two", True)
    monkeypatch.setattr(reader._looker, "_input", noted)
    together = reader.look_many(sights)
    assert filled[0] == (6, 8) and (3, 4) in filled[1:]
    for one, expected in zip(together, alone, strict=True):
        assert (one.line, one.shows) == (expected.line, expected.shows)
        assert one.domain == pytest.approx(expected.domain, abs=1e-3)
        sure = [[each for each in seen.candidates if each.score > 0.3] for seen in (one, expected)]
        for found, known in zip(*sure, strict=True):
            assert found.type == known.type and found.bbox == pytest.approx(known.bbox, abs=0.1)


def test_what_filled_the_memory_is_let_go_before_the_next_try(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def scarce(sights: list[Sight]) -> list[object]:
        assert not [each for each in kept if each() is not None]
        large = torch.zeros(1)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reader, "look_many", scarce)
    monkeypatch.setattr(reader._looker, "_share", 1.0)
    errors = reader.read_many([sight(load("steel/patches.png"))] * 4)
    assert [type(each) for each in errors] == [torch.OutOfMemoryError] * 4
    assert len(kept) == 7


def test_a_gpu_that_fails_is_no_fault_of_a_study(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sights: list[Sight]) -> list[object]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...")

    monkeypatch.setattr(reader, "look_many", fail)
    with pytest.raises(DeviceLostError, match=r"an illegal memory access was encountered\).*start the same command"):
        reader.read_many([sight(load("steel/patches.png"))] * 2)


def test_kernels_start_on_the_gpu_that_the_model_is_on(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, current = reader.look(load("steel/patches.png")), list[torch.device]()
    used: list[list[torch.device]] = []

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        current.append(place)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(reader, "device", torch.device("cuda:1"))
    monkeypatch.setattr(reader._looker, "look", lambda sights: used.append([*current]) or [seen])
    monkeypatch.setattr(reader, "_decode", lambda seen: used.append([*current]) or [])
    reader.look_many([sight(load("steel/patches.png"))])
    reader.write([])
    assert used == [[torch.device("cuda:1")]] * 2 and not current


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_reads_what_the_first_reads() -> None:
    sights = [sight(load(f"steel/{name}.png")) for name in ("patches", "scratches")]
    first, second = (Reader.load(device=f"cuda:{number}").read_many(sights) for number in range(2))
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Reading) and isinstance(other, Reading)
        assert [each.type for each in one.findings] == [each.type for each in other.findings]


def test_fewer_go_together_when_the_memory_does_not_suffice(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    look, sizes = reader.look_many, []

    def scarce(sights: list[Sight]) -> list[object]:
        sizes.append(len(sights))
        if len(sights) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(sights)

    monkeypatch.setattr(reader, "look_many", scarce)
    monkeypatch.setattr(reader._looker, "_share", 1.0)  # put back at the end
    strip = sight(load("steel/patches.png"))
    assert not [each for each in reader.read_many([strip] * 3) if isinstance(each, Exception)]
    assert sizes == [3, 1, 2, 1, 1]
