"""Evaluation through its doors: what is scored, beside what baseline, and that saved answers score the same again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.evaluation import PredictionsError, evaluate, read_predictions, rescore, score
from pipelines.evaluation.predictions import PredictedFinding, Prediction, to_json_lines
from pipelines.evaluation.scoring import DEFECT_FREE, image_type
from pipelines.manifest import BoxLabel, Case, read_manifest
from pipelines.reading import FieldReading, FindingReading, ModelIdentity, Reading
from pipelines.study import ImageStudy

BOX = (0.0, 0.0, 10.0, 10.0)


def defect(id_: str, *boxes: BoxLabel, group: str | None = None, split: str = "val") -> Case:
    types = tuple(sorted({box.type for box in boxes}))
    return Case(id_, Path("x.png"), split, group or id_, "defect", "tile", types, boxes, {}, None, None)


def ct(id_: str, types: tuple[str, ...] | None = None, group: str | None = None, **fields: str) -> Case:
    return Case(id_, Path("x.png"), "val", group or id_, "ct", None, types, (), fields, None, None)


def seen(type_: str, confidence: float, *, reported: bool = True) -> PredictedFinding:
    return PredictedFinding(type_, BOX, confidence, reported)


def tile(id_: str, *findings: PredictedFinding) -> Prediction:
    return Prediction(id_, "defect", 0.9, "tile", {}, findings)


def reading(value: str, **probabilities: float) -> FieldReading:
    return FieldReading(value, probabilities)


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in result["metrics"].items()}


CRACK, FRAY = BoxLabel("crack", BOX), BoxLabel("fray", BOX)


def test_defect_figures() -> None:
    cases = [defect("1", CRACK), defect("2", FRAY), defect("3"), defect("4")]
    answers = [
        tile("1", seen("crack", 0.9)),
        tile("2", seen("crack", 0.6), seen("fray", 0.2, reported=False)),
        tile("3", seen("crack", 0.3, reported=False)),
        Prediction("4", error="damaged-file: The file is cut off."),
    ]
    result = score(cases, answers)
    assert values(result) == pytest.approx(
        {
            "kind_accuracy": 3 / 4,  # what cannot be read is wrong
            "product_line_accuracy": 3 / 4,
            "map_33": 1.0,
            "map_50": 1.0,
            "map_50_95": 1.0,
            "f1_reported": 2 / 4,  # one hit, one false alarm, two boxes
            "f1_best": 2 / 3,  # from 0.9 up
            "ece_detections": (0.1 + 0.6 + 0.8 + 0.3) / 4,
            "image_type_accuracy": 3 / 4,
            "image_type_macro_f1": (2 / 3 + 0 + 1) / 3,
            "defect_type_accuracy": 1 / 2,
            "presence_auroc": 1.0,
        }
    )
    assert result["metrics"]["image_type_accuracy"]["baseline"] == 0.5  # always defect-free
    assert result["metrics"]["map_50"]["baseline"] == 0
    assert result["per_type"]["crack"] == {"boxes": 1, "ap_33": 1, "ap_50": 1, "ap_50_95": 1}
    assert set(result["per_type"]) == {"crack", "fray"}


def test_unreported_candidates_count_for_average_precision_only() -> None:
    cases = [defect("1", CRACK)]
    result = values(score(cases, [tile("1", seen("crack", 0.4, reported=False))]))
    assert (result["map_50"], result["f1_best"], result["f1_reported"]) == (1, 1, 0)
    assert (result["image_type_accuracy"], result["defect_type_accuracy"]) == (0, 1)


def test_ct_figures() -> None:
    cases = [
        ct("1", region="chest", laterality="left", covid19="true"),
        ct("2", region="chest", laterality="right", covid19="false"),
        ct("3", region="abdomen", laterality="right"),
    ]
    answers = [
        Prediction(
            "1",
            "ct",
            fields={
                "region": reading("chest", chest=0.8, abdomen=0.2),
                "laterality": reading("left", left=0.9, right=0.1),
                "covid19": reading("true", true=0.7, false=0.3),
            },
        ),
        Prediction(
            "2",
            "ct",
            fields={
                "region": reading("undetermined", chest=0.6, abdomen=0.4),
                "laterality": reading("undetermined", left=0.5, right=0.5),
                "covid19": reading("true", true=0.6, false=0.4),
            },
        ),
        Prediction("3", "defect"),
    ]
    result = score(cases, answers)
    assert values(result) == pytest.approx(
        {
            "kind_accuracy": 2 / 3,
            "region_accuracy": 1 / 3,
            "laterality_accuracy": 1 / 3,
            "laterality_answered": 1 / 3,
            "laterality_accuracy_answered": 1.0,
            "covid19_accuracy": 1 / 2,
            "covid19_auroc": 1.0,
            "covid19_f1": 2 / 3,
            # By bin: .9 right; .8 right; .7 right; .6 once right, once wrong; .5 ("left") wrong.
            "ece_fields": (0.1 + 0.2 + 0.3 + abs(0.6 + 0.6 - 1) + 0.5) / 6,
        }
    )
    metrics = result["metrics"]
    assert metrics["region_accuracy"]["baseline"] == pytest.approx(2 / 3)
    assert (metrics["covid19_auroc"]["baseline"], metrics["covid19_auroc"]["n"]) == (0.5, 2)
    assert metrics["covid19_f1"]["baseline"] == pytest.approx(2 / 3)


def test_finding_types_need_five_positives() -> None:
    cases = [ct(str(i), ("nodule", "cyst") if i < 4 else ("nodule",) if i < 5 else ()) for i in range(10)]
    cases.append(ct("not labelled", None, region="chest"))
    answers = [
        Prediction(case.id, "ct", findings=(seen("nodule", 0.1 + 0.05 * (i < 5)),)) for i, case in enumerate(cases)
    ]
    result = score(cases, answers)
    assert result["metrics"]["finding_auroc_macro"] == {"value": 1, "ci95": [1, 1], "baseline": 0.5, "n": 10}
    assert result["per_type"] == {"nodule": {"positives": 5, "auroc": 1}}


def test_the_majority_is_learned_in_training_where_it_can_be() -> None:
    cases = [ct("1", region="chest"), ct("2", region="chest"), ct("3", region="abdomen")]
    answers = [Prediction(case.id, "ct") for case in cases]
    train = [ct("4", region="abdomen"), ct("5")]
    assert score(cases, answers, train=train)["metrics"]["region_accuracy"]["baseline"] == pytest.approx(
        1 / 3, abs=1e-6
    )


def test_images_with_many_types_have_no_image_type() -> None:
    cases = [defect("1", CRACK, FRAY), defect("2", CRACK, FRAY), defect("3", CRACK)]
    assert "image_type_accuracy" not in score(cases, [tile(case.id) for case in cases])["metrics"]


def test_the_type_of_an_image_is_that_of_most_boxes_then_of_the_larger_area() -> None:
    large = BoxLabel("fray", (0, 0, 20, 20))
    assert image_type(defect("1", CRACK, CRACK, large)) == "crack"
    assert image_type(defect("1", CRACK, large)) == "fray"
    assert image_type(defect("1")) == DEFECT_FREE


def test_cases_without_labels_are_in_no_figure() -> None:
    case = Case("1", Path("x.png"), None, "1", None, None, None, (), {}, None, None)
    assert score([case], [tile("1", seen("crack", 0.9))]) == {"metrics": {}, "per_type": {}}


def test_few_groups_have_no_interval() -> None:
    answers = [tile(str(i), *[seen("crack", 0.9)] * (i % 2)) for i in range(10)]
    few = score([defect(str(i), CRACK, group=f"g{i % 4}") for i in range(10)], answers)["metrics"]["map_50"]
    enough = score([defect(str(i), CRACK, group=f"g{i % 5}") for i in range(10)], answers)["metrics"]["map_50"]
    assert few["value"] == enough["value"] == pytest.approx(51 / 101)
    assert few["ci95"] is None
    assert enough["ci95"] is not None


def test_the_interval_holds_the_value_and_repeats() -> None:
    random = np.random.default_rng(0)
    cases = [defect(str(i), CRACK) for i in range(40)]
    answers = [tile(str(i), seen("crack" if random.random() < 0.7 else "fray", random.random())) for i in range(40)]
    result = score(cases, answers)
    for name in ("map_50", "f1_reported", "image_type_accuracy"):
        low, high = result["metrics"][name]["ci95"]
        assert low < result["metrics"][name]["value"] < high
    assert score(cases, answers) == result


def test_answers_must_fit_the_manifest() -> None:
    with pytest.raises(PredictionsError, match=r"1 case\(s\)"):
        score([defect("1")], [])
    with pytest.raises(PredictionsError, match="twice"):
        score([defect("1")], [tile("1"), tile("1")])


def test_a_reading_becomes_a_prediction() -> None:
    finding = FindingReading("crack", BOX, 0, 0.7, reported=False, localisation="box")
    fields = {"region": reading("chest", chest=0.8)}
    made = Prediction.from_reading("7", Reading("ct", 0.9, None, fields, (finding,), "words"))
    assert made == Prediction("7", "ct", 0.9, None, fields, (PredictedFinding("crack", BOX, 0.7, False),))
    line = json.loads(to_json_lines([made]))
    assert line["findings"] == [{"type": "crack", "bbox": [0, 0, 10, 10], "confidence": 0.7, "reported": False}]
    assert line["fields"] == {"region": {"value": "chest", "probabilities": {"chest": 0.8}}}


COORDINATE = st.floats(0, 1e4)
PREDICTIONS = st.builds(
    Prediction,
    id=st.text(),
    kind=st.sampled_from(["ct", "defect"]) | st.none(),
    kind_confidence=st.floats(0, 1),
    product_line=st.none() | st.just("tile"),
    fields=st.dictionaries(
        st.text(), st.builds(FieldReading, st.text(), st.dictionaries(st.text(), st.floats(0, 1))), max_size=2
    ),
    findings=st.lists(
        st.builds(
            PredictedFinding,
            st.text(),
            st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE),
            st.floats(0, 1),
            st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    error=st.none() | st.text(),
)


@given(st.lists(PREDICTIONS, max_size=3))
def test_saved_predictions_are_read_back_whole(
    tmp_path_factory: pytest.TempPathFactory, made: list[Prediction]
) -> None:
    path = tmp_path_factory.mktemp("saved") / "predictions.jsonl"
    path.write_text(to_json_lines(made), "utf-8")
    assert read_predictions(path) == made


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": "1", "fields": {}, "findings": [{}]}', "3"])
def test_a_faulty_predictions_file_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(to_json_lines([tile("1")]) + line + "\n")
    with pytest.raises(PredictionsError, match="line 2"):
        read_predictions(path)
    with pytest.raises(PredictionsError, match="cannot be read"):
        read_predictions(tmp_path / "none.jsonl")


@pytest.mark.filterwarnings("ignore::pipelines.manifest.ManifestWarning")
@pytest.mark.parametrize(
    ("name", "perfect"),
    [
        ("neu-det", ("map_33", "map_50", "map_50_95", "f1_reported", "f1_best", "defect_type_accuracy")),
        ("deep-pcb", ("map_33", "map_50_95", "f1_reported")),
        ("magnetic-tile", ("map_50", "image_type_accuracy", "image_type_macro_f1", "presence_auroc")),
        ("medpix-ct", ("region_accuracy", "plane_accuracy", "laterality_accuracy", "finding_auroc_macro")),
        ("covid-ct", ("covid19_accuracy", "covid19_auroc", "covid19_f1")),
    ],
)
def test_on_real_labels_the_right_answer_scores_one(
    shared_data: Path, tmp_path: Path, name: str, perfect: tuple[str, ...]
) -> None:
    manifest = shared_data / name / "manifest.jsonl"
    answers = [
        Prediction(
            case.id,
            case.kind,
            1.0,
            case.product_line,
            {field: FieldReading(value, {value: 1.0}) for field, value in case.fields.items()},
            tuple(PredictedFinding(box.type, box.bbox, 1 - i / 100, True) for i, box in enumerate(by_majority(case)))
            or tuple(PredictedFinding(type_, BOX, 1.0, True) for type_ in case.finding_types or ()),
        )
        for case in read_manifest(manifest, split="val")
    ]
    saved, out = tmp_path / "predictions.jsonl", tmp_path / "scores.json"
    saved.write_text(to_json_lines(answers))
    result = rescore(manifest, saved, split="val", out=out)
    assert json.loads(out.read_text()) == result
    assert result["n"] == len(answers)
    for metric in ("kind_accuracy", *perfect):
        assert result["metrics"][metric]["value"] == 1, metric
        if metric != "covid19_f1":  # always "covid" does well on a data set with many of them
            assert result["metrics"][metric]["baseline"] < 1


def by_majority(case: Case) -> list[BoxLabel]:
    """Boxes of the image's type first: the most confident finding names the type of an image."""
    return sorted(case.boxes, key=lambda box: box.type != image_type(case))


class FixedReader:
    """Stands in for the model, so that the way from manifest to figures is tested apart from any weights."""

    info = ModelIdentity("fixed", "1", "0" * 64, "0" * 64, "cpu")

    @classmethod
    def load(cls, model: str | Path, device: str) -> FixedReader:
        return cls()

    def read(self, study: ImageStudy, *, kind: str = "auto", reference: ImageStudy | None = None) -> Reading:
        if study.name == "odd.png":
            raise RuntimeError("text that could quote the image")
        assert study.pixels.shape[1:] == (30, 40)
        type_ = "spur" if reference is not None else "crack"
        line = "board" if reference is not None else "tile"
        return Reading("defect", 0.9, line, {}, (FindingReading(type_, BOX, 0, 0.8, True, "box"),), "words")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of five images: two good ones, one with a golden sample, a broken file and one the model fails on."""
    monkeypatch.setitem(sys.modules, "pipelines.reader", SimpleNamespace(Reader=FixedReader))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b", "board", "golden", "odd"):
        Image.linear_gradient("L").resize((40, 30)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    lines = [
        {"id": "b", "image": "b.png", "findings": [{"type": "crack", "bbox": [0, 0, 10, 10]}]},
        {"id": "a", "image": "a.png", "product": "ferrite magnetic tile", "findings": []},
        {"id": "board", "image": "board.png", "template": "golden.png"},
        {"id": "broken", "image": "broken.png", "split": "val"},
        {"id": "odd", "image": "odd.png", "split": "val"},
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "manifest.jsonl"


def test_every_line_of_the_manifest_gets_a_line(data: Path, tmp_path: Path) -> None:
    out, saved, calls = tmp_path / "new" / "scores.json", tmp_path / "new" / "predictions.jsonl", []
    result = evaluate(data, out=out, predictions=saved, progress=lambda done, total: calls.append((done, total)))
    answers = read_predictions(saved)
    assert [answer.id for answer in answers] == ["b", "a", "board", "broken", "odd"]
    assert [answer.product_line for answer in answers] == ["tile", "tile", "board", None, None]
    assert answers[3].error is not None
    assert answers[3].error.startswith("truncated: ")
    assert answers[4].error == "model-failed: RuntimeError"
    assert calls == [(i, 5) for i in range(1, 6)]
    assert json.loads(out.read_text()) == result
    assert (result["n"], result["groups"], result["failed"], result["split"]) == (5, 5, 2, None)
    assert result["model"]["name"] == "fixed"
    assert result["metrics"]["image_type_accuracy"]["value"] == 0.5
    assert rescore(data, saved) == result | {"model": None}


def test_a_split_narrows_the_evaluation(data: Path, tmp_path: Path) -> None:
    saved = tmp_path / "predictions.jsonl"
    assert evaluate(data, split="val", predictions=saved)["n"] == 2
    assert [answer.id for answer in read_predictions(saved)] == ["broken", "odd"]
