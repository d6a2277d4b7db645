"""Evaluation through its doors: what is scored, beside what baseline, and that saved answers score the same again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.evaluation import PredictionsError, evaluate, read_predictions, rescore, score
from pipelines.evaluation.baselines import constant_answers, nearest_answers
from pipelines.evaluation.figures import DEFECT_FREE, Pair, image_type
from pipelines.evaluation.outside import outside_figures
from pipelines.evaluation.predictions import PredictedFinding, Prediction, to_json_lines
from pipelines.evaluation.worst import worst_cases
from pipelines.manifest import BoxLabel, Case, ManifestError, read_manifest
from pipelines.model_card import measured_parts, read_evaluations
from pipelines.reading import FieldReading, FindingReading, ModelIdentity, Reading
from pipelines.store import Calibration, ModelError, StoredModel
from pipelines.study import ImageStudy
from scanscribe.cli import main

BOX = (0.0, 0.0, 10.0, 10.0)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state folder of its own: thumbnails are kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCANSCRIBE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def defect(id_: str, *boxes: BoxLabel, group: str | None = None, split: str = "val") -> Case:
    types = tuple(sorted({box.type for box in boxes}))
    return Case(id_, Path("x.png"), split, group or id_, "defect", "tile", types, boxes, {}, None)


def ct(id_: str, types: tuple[str, ...] | None = None, group: str | None = None, **fields: str) -> Case:
    return Case(id_, Path("x.png"), "val", group or id_, "ct", None, types, (), fields, None)


def seen(type_: str, confidence: float, *, reported: bool = True) -> PredictedFinding:
    return PredictedFinding(type_, BOX, confidence, reported)


def tile(id_: str, *findings: PredictedFinding) -> Prediction:
    return Prediction(id_, "defect", 0.9, "tile", {}, findings)


def reading(value: str, **probabilities: float) -> FieldReading:
    return FieldReading(value, probabilities)


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def baselines(cases: list[Case], figure: str, train: list[Case] | None = None) -> dict[str, float]:
    """What the constant answers reach."""
    constant = constant_answers(cases, train or [])
    return score(cases, [Prediction(case.id) for case in cases], baselines=constant)["metrics"][figure]["baselines"]


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
            "f1_reported_minus_best": 2 / 4 - 2 / 3,
            "ece_detections": (0.1 + 0.6 + 0.8 + 0.3) / 4,
            "ece_detections_adaptive": (0.1 + 0.6 + 0.8 + 0.3) / 4,
            "image_type_accuracy": 3 / 4,
            "image_type_macro_f1": (2 / 3 + 0 + 1) / 3,
            "defect_type_accuracy": 1 / 2,
            "presence_auroc": 1.0,
            "report_types_match": 2 / 4,  # an image that was not read has no report
            "report_exact_match": 2 / 4,
        }
    )
    assert baselines(cases, "image_type_accuracy") == {"majority": 0.5, "normal": 0.5}
    assert baselines(cases, "map_50") == {"majority": 0.5, "normal": 0}  # all cracks are at the usual place
    assert baselines(cases, "presence_auroc") == {"majority": 0.5, "normal": 0.5}
    assert result["confusion"]["image type"] == {
        "truth": ["crack", "fray", DEFECT_FREE],
        "answer": ["crack", "fray", DEFECT_FREE],
        "counts": [[1, 0, 0], [1, 0, 0], [0, 0, 2]],
    }
    bins = result["calibration"]["detections"]["bins"]
    assert [(b["confidence"], b["correct"], b["n"]) for b in bins] == [
        (0.2, 1, 1),
        (0.3, 0, 1),
        (0.6, 0, 1),
        (0.9, 1, 1),
    ]
    assert result["calibration"]["detections"]["uncalibrated"] is None
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
            # By rank, the two that tie at .6 together.
            "ece_fields_adaptive": (0.1 + 0.2 + 0.3 + abs(0.6 + 0.6 - 1) + 0.5) / 6,
        }
    )
    assert result["metrics"]["covid19_auroc"]["n"] == 2
    assert baselines(cases, "region_accuracy") == pytest.approx({"majority": 2 / 3, "normal": 2 / 3})
    assert baselines(cases, "covid19_auroc") == {"majority": 0.5, "normal": 0.5}
    assert baselines(cases, "covid19_accuracy") == {"majority": 0.5, "normal": 0.5}
    assert result["confusion"]["laterality"]["answer"] == ["right", "left", "undetermined"]


def test_finding_types_need_five_positives() -> None:
    cases = [ct(str(i), ("nodule", "cyst") if i < 4 else ("nodule",) if i < 5 else ()) for i in range(10)]
    cases.append(ct("not labelled", None, region="chest"))
    answers = [
        Prediction(case.id, "ct", findings=(seen("nodule", 0.1 + 0.05 * (i < 5)),)) for i, case in enumerate(cases)
    ]
    result = score(cases, answers)
    auroc = result["metrics"]["finding_auroc_macro"]
    assert (auroc["value"], auroc["ci95"], auroc["n"]) == (1, [1, 1], 10)
    assert result["metrics"]["finding_f1_macro"]["value"] == pytest.approx(2 * 5 / 15)  # reported everywhere
    assert result["per_type"] == {"nodule": {"positives": 5, "auroc": 1, "f1": pytest.approx(2 * 5 / 15)}}
    assert baselines(cases, "finding_auroc_macro") == {"majority": 0.5, "normal": 0.5}


def test_the_majority_is_learned_in_training_where_it_can_be() -> None:
    cases = [ct("1", region="chest"), ct("2", region="chest"), ct("3", region="abdomen")]
    train = [ct("4", region="abdomen"), ct("5")]
    assert baselines(cases, "region_accuracy", train)["majority"] == pytest.approx(1 / 3)


def test_the_majority_puts_the_usual_defect_at_its_usual_place() -> None:
    train = [defect(str(i), BoxLabel("crack", (i, 0.0, i + 10.0, 10.0)), split="train") for i in range(3)]
    (answer,) = constant_answers([defect("9")], [*train, defect("7", split="train")])["majority"]
    assert answer.findings == (PredictedFinding("crack", (1, 0, 11, 10), 0.75, True),)
    assert constant_answers([defect("9")], train)["normal"][0].findings == ()


def test_the_nearest_neighbour_has_the_labels_of_the_most_similar_image(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    slope = Image.linear_gradient("L")
    pictures = {"up": slope, "down": slope.rotate(180), "left": slope.rotate(90), "dim": slope.point(lambda v: v // 2)}
    for name, picture in pictures.items():
        picture.resize((40, 20) if name != "dim" else (80, 80)).save(tmp_path / f"{name}.png")

    def at(name: str, *boxes: BoxLabel) -> Case:
        return replace(defect(name, *boxes), image=tmp_path / f"{name}.png")

    train = [at("up", CRACK), at("down", FRAY), at("left")]
    (answer,) = nearest_answers([at("dim")], train)
    assert [(f.type, f.bbox, f.reported) for f in answer.findings] == [("crack", (0, 0, 20, 40), True)]
    assert answer.findings[0].confidence > 0.99
    itself = nearest_answers([train[0]], train)[0]
    assert "crack" not in {finding.type for finding in itself.findings}  # never its own neighbour
    kept = sorted((tmp_path / "home" / "cache").iterdir())
    assert nearest_answers([at("dim")], train) == [answer]
    assert sorted((tmp_path / "home" / "cache").iterdir()) == kept
    (tmp_path / "up.png").write_bytes(b"damaged")
    assert nearest_answers([at("dim")], train)[0].findings[:1] != answer.findings


def test_a_report_matches_only_as_a_whole() -> None:
    cases = [ct("1", ("cyst",), region="chest"), ct("2", (), plane="axial"), ct("3", ("cyst",))]
    answers = [
        Prediction("1", "ct", fields={"region": reading("abdomen", abdomen=1.0)}, findings=(seen("cyst", 0.9),)),
        Prediction(
            "2", "ct", fields={"plane": reading("axial", axial=1.0)}, findings=(seen("cyst", 0.2, reported=False),)
        ),
        Prediction("3", "ct", findings=(seen("cyst", 0.9), seen("nodule", 0.9))),
    ]
    result = values(score(cases, answers))
    assert (result["report_types_match"], result["report_exact_match"]) == pytest.approx((2 / 3, 1 / 3))


def test_the_narrative_is_held_against_the_caption() -> None:
    cases = [replace(ct("1", ()), extra={"caption": "A cyst in the left kidney."}), ct("2", ())]
    answers = [Prediction("1", "ct", impression="A cyst in the left kidney"), Prediction("2", "ct")]
    result = score(cases, answers)["metrics"]
    assert (result["narrative_rouge_l"]["value"], result["narrative_bleu_4"]["value"]) == pytest.approx((1, 1))
    assert result["narrative_rouge_l"]["n"] == 1


def test_calibration_is_measured_before_and_after() -> None:
    cases = [defect(str(i), CRACK) if i < 2 else defect(str(i)) for i in range(4)]
    answers = [tile(str(i), PredictedFinding("crack", BOX, 0.5, True, 0.9)) for i in range(4)]
    result = score(cases, answers)
    assert values(result)["ece_detections"] == pytest.approx(0)
    assert values(result)["ece_detections_uncalibrated"] == pytest.approx(0.4)
    assert result["calibration"]["detections"] == {
        "bins": [{"confidence": 0.5, "correct": 0.5, "n": 4}],
        "uncalibrated": [{"confidence": 0.9, "correct": 0.5, "n": 4}],
    }


def test_images_of_other_kinds_are_told_apart_by_the_model_s_own_word() -> None:
    cases = [defect(str(i), group=f"g{i // 2}") for i in range(10)]
    flag = ("out-of-domain",)
    answers = [Prediction(str(i), in_domain=0.5 + i / 100, flags=flag if i == 0 else ()) for i in range(10)]
    strange = [Prediction(f"x{i}", in_domain=i / 10, flags=flag if i < 4 else ()) for i in range(6)]
    strange.append(Prediction("blank", error="blank: The picture shows nothing."))
    result = outside_figures(cases, answers, strange)
    assert result is not None
    # 60 pairs; 0.5 of the outside ties with 0.5 of a case.
    assert result["auroc"]["value"] == pytest.approx(59.5 / 60)
    low, high = result["auroc"]["ci95"]
    assert 0.9 < low <= result["auroc"]["value"] <= high <= 1
    assert (result["false_alarms"]["value"], result["caught"]["value"]) == pytest.approx((0.1, 4 / 6))
    assert (result["n"], result["refused"]) == (6, 1)
    assert outside_figures(cases, [Prediction(case.id) for case in cases], strange) is None


def test_the_worst_cases_are_those_that_lost_most_confidence() -> None:
    far = BoxLabel("crack", (50.0, 0.0, 60.0, 10.0))
    cases = [defect("1", CRACK), defect("2"), defect("3", CRACK), defect("4"), ct("5", ("cyst",), region="chest")]
    cases += [defect("6", far)]
    answers = [
        tile("1", seen("crack", 0.95)),
        tile("2", seen("crack", 0.9), seen("fray", 0.8, reported=False)),
        tile("3", seen("crack", 0.3, reported=False)),
        Prediction("4", error="damaged: text"),
        Prediction("5", "ct", fields={"region": reading("abdomen", abdomen=0.9, chest=0.1)}),
        tile("6", seen("crack", 0.6)),
    ]
    worst = worst_cases([Pair(i, *pair) for i, pair in enumerate(zip(cases, answers, strict=True))], 10)
    assert [(loss.pair.case.id, round(loss.amount, 2)) for loss in worst] == [
        ("5", 1.9),
        ("6", 1.6),
        ("4", 1),
        ("2", 0.9),
        ("3", 0.7),
    ]
    assert worst[0].reasons == ("cyst missed", "region abdomen, not chest")
    assert (worst[1].missed, worst[1].wrong) == ((far,), answers[5].findings)  # the right type at the wrong place
    assert worst[2].reasons == ("no answer (damaged)",)
    assert worst[3].reasons == ("crack at 90% is not labelled",)
    assert worst[4].reasons == ("crack missed",) and worst[4].missed == (CRACK,)


def test_images_with_many_types_have_no_image_type() -> None:
    cases = [defect("1", CRACK, FRAY), defect("2", CRACK, FRAY), defect("3", CRACK)]
    assert "image_type_accuracy" not in score(cases, [tile(case.id) for case in cases])["metrics"]


def test_the_type_of_an_image_is_that_of_most_boxes_then_of_the_larger_area() -> None:
    large = BoxLabel("fray", (0, 0, 20, 20))
    assert image_type(defect("1", CRACK, CRACK, large)) == "crack"
    assert image_type(defect("1", CRACK, large)) == "fray"
    assert image_type(defect("1")) == DEFECT_FREE


def test_cases_without_labels_are_in_no_figure() -> None:
    case = Case("1", Path("x.png"), None, "1", None, None, None, (), {}, None)
    empty = {"metrics": {}, "per_type": {}, "calibration": {}, "confusion": {}}
    assert score([case], [tile("1", seen("crack", 0.9))]) == score([], []) == empty


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
    finding = FindingReading("crack", BOX, 0, 0.7, reported=False, localisation="box", raw_confidence=0.9)
    fields = {"region": FieldReading("chest", {"chest": 0.8}, {"chest": 0.99})}
    made = Prediction.from_reading(
        "7", Reading("ct", 0.9, None, fields, (finding,), "words", quality_flags=("kind-uncertain",), domain=0.4), "m 1"
    )
    found = PredictedFinding("crack", BOX, 0.7, False, 0.9)
    told = {
        "contradicted": False,
        "impression": "words",
        "in_domain": 0.4,
        "flags": ("kind-uncertain",),
        "model": "m 1",
    }
    assert made == Prediction("7", "ct", 0.9, None, fields, (found,), **told)
    line = json.loads(to_json_lines([made]))
    assert line["findings"][0]["raw_confidence"] == 0.9
    assert line["fields"]["region"]["raw_probabilities"] == {"chest": 0.99}
    assert (line["in_domain"], line["impression"]) == (0.4, "words")


def test_predictions_that_say_less_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    finding = {"type": "crack", "bbox": BOX, "confidence": 0.7, "reported": True}
    path.write_text(json.dumps({"id": "1", "kind": "defect", "fields": {}, "findings": [finding]}) + "\n")
    (answer,) = read_predictions(path)
    assert answer == Prediction("1", "defect", findings=(PredictedFinding("crack", BOX, 0.7, True),))


COORDINATE = st.floats(0, 1e4)
PREDICTIONS = st.builds(
    Prediction,
    id=st.text(),
    kind=st.sampled_from(["ct", "defect"]) | st.none(),
    kind_confidence=st.floats(0, 1),
    product_line=st.none() | st.just("tile"),
    fields=st.dictionaries(
        st.text(),
        st.builds(
            FieldReading,
            st.text(),
            st.dictionaries(st.text(), st.floats(0, 1)),
            st.dictionaries(st.text(), st.floats(0, 1)),
        ),
        max_size=2,
    ),
    findings=st.lists(
        st.builds(
            PredictedFinding,
            st.text(),
            st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE),
            st.floats(0, 1),
            st.booleans(),
            st.none() | st.floats(0, 1),
        ),
        max_size=3,
    ).map(tuple),
    impression=st.text(),
    in_domain=st.none() | st.floats(0, 1),
    flags=st.lists(st.text(), max_size=2).map(tuple),
    model=st.text(),
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
    for metric in (*perfect, "report_exact_match"):
        assert result["metrics"][metric]["value"] == 1, metric
        assert all(value < 1 for value in result["metrics"][metric]["baselines"].values())
        assert set(result["metrics"][metric]["baselines"]) == {"majority", "normal", "nearest"}


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
        finding = FindingReading(type_, BOX, 0, 0.8, True, "box", raw_confidence=0.6)
        known = study.pixels[0, 0, 0] < 128  # the pictures of other kinds have bright corners
        flags = () if known else ("out-of-domain",)
        return Reading("defect", 0.9, line, {}, (finding,), "words", quality_flags=flags, domain=float(known))


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

    def note(done: int, total: int) -> None:
        calls.append((done, total))
        assert len(read_predictions(saved)) == done  # a process that is killed now loses nothing

    result = evaluate(data, out=out, predictions=saved, progress=note)
    answers = read_predictions(saved)
    assert [answer.id for answer in answers] == ["b", "a", "board", "broken", "odd"]
    assert [answer.product_line for answer in answers] == ["tile", "tile", "board", None, None]
    assert answers[3].error is not None
    assert answers[3].error.startswith("truncated: ")
    assert answers[4].error == "model-failed: RuntimeError"
    assert calls == [(i, 5) for i in range(1, 6)]
    assert json.loads(out.read_text()) == result
    assert (result["n"], result["groups"], result["failed"], result["split"]) == (5, 5, 2, None)
    assert (result["name"], result["manifest"]) == ("data", "data/manifest.jsonl")
    assert result["model"]["name"] == "fixed"
    assert result["metrics"]["image_type_accuracy"]["value"] == 0.5
    assert rescore(data, saved) == result | {"model": None}


def test_a_split_narrows_the_evaluation(data: Path, tmp_path: Path) -> None:
    saved = tmp_path / "predictions.jsonl"
    result = evaluate(data, split="val", predictions=saved)
    assert (result["n"], result["splits"]) == (2, {"none": 3, "val": 2})
    assert [answer.id for answer in read_predictions(saved)] == ["broken", "odd"]
    with pytest.raises(ManifestError, match="its splits are: val"):
        evaluate(data, split="test")


@pytest.mark.parametrize("torn", [b"", b'{"id": "boa'])
def test_an_interrupted_evaluation_goes_on(data: Path, tmp_path: Path, monkeypatch, torn: bytes) -> None:
    saved, read = tmp_path / "predictions.jsonl", []
    whole = evaluate(data, predictions=saved)
    lines = saved.read_bytes()

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(data, predictions=saved, progress=stop)
    assert saved.read_bytes() == b"".join(lines.splitlines(True)[:2])
    saved.write_bytes(saved.read_bytes() + torn)

    monkeypatch.setattr(
        FixedReader, "read", lambda *args, _read=FixedReader.read, **o: read.append(1) or _read(*args, **o)
    )
    assert evaluate(data, predictions=saved, resume=True) == whole
    assert saved.read_bytes() == lines
    assert len(read) == 2  # the board and the odd one: two were answered, one cannot be read
    read.clear()
    assert evaluate(data, predictions=saved, resume=True) == whole
    assert not read


def test_figures_of_several_data_sets_have_means(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    data.parent.rename(folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    lines = [json.loads(line) for line in (folder / "second" / "manifest.jsonl").read_text().splitlines()]
    fewer = "".join(json.dumps(line) + "\n" for line in lines[:2])
    (folder / "second" / "manifest.jsonl").write_text(fewer)
    page = tmp_path / "page.html"
    result = evaluate(folder, html=page)
    first, second = (result["sets"][name]["metrics"] for name in ("first", "second"))
    shared = set(result["means"])
    assert shared and shared <= set(first) & set(second)
    for name in shared:
        mean = (first[name]["value"] + second[name]["value"]) / 2
        assert result["means"][name] == {"value": pytest.approx(mean), "n": 2}
    assert "Means over data sets" in page.read_text()


def test_contradictions_are_counted_before_and_after_the_check() -> None:
    cases = [defect(str(i), CRACK) for i in range(4)]
    answers = [Prediction("0", "defect", refused=("Two spurs.",), contradicted=False)]
    answers += [Prediction(str(i), "defect", contradicted=i == 1) for i in (1, 2)]
    answers.append(Prediction("3", error="blank: nothing"))
    metrics = score(cases, answers)["metrics"]
    before, after = metrics["decoder_contradicts_findings"], metrics["report_contradicts_findings"]
    assert (before["value"], after["value"], before["n"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 3)


def test_answers_of_two_models_are_not_mixed(data: Path, tmp_path: Path, monkeypatch) -> None:
    saved = tmp_path / "predictions.jsonl"
    evaluate(data, predictions=saved)
    monkeypatch.setattr(FixedReader, "info", replace(FixedReader.info, weights_sha256="1" * 64))
    with pytest.raises(PredictionsError, match="another model"):
        evaluate(data, predictions=saved, resume=True)
    assert evaluate(data, predictions=saved)["n"] == 5
    with pytest.raises(PredictionsError, match="--predictions"):
        evaluate(data, resume=True)


def test_a_folder_of_data_sets_is_evaluated_one_by_one(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    other.mkdir()
    data.parent.rename(other / "first")
    (other / "train-only").mkdir()
    line = {"id": "1", "image": "../first/a.png", "split": "train", "region": "chest"}
    (other / "train-only" / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    out, saved, page = tmp_path / "figures", tmp_path / "answers", tmp_path / "page.html"
    result = evaluate(other, split="val", out=out, predictions=saved, html=page)
    assert {name: each["n"] for name, each in result["sets"].items()} == {"first": 2, "train-only": 0}
    assert {path.name: json.loads(path.read_text()) for path in out.iterdir()} == {
        f"{name}.json": each for name, each in result["sets"].items()
    }
    assert result["sets"]["train-only"]["splits"] == {"train": 1}
    assert result["means"] == {}  # of one data set there is none
    assert len(read_predictions(saved / "first.jsonl")) == 2
    assert "first" in page.read_text() and "train-only" not in page.read_text()
    with pytest.raises(ManifestError, match="no data set"):
        evaluate(other, split="test")
    with pytest.raises(ManifestError, match="no data sets"):
        evaluate(other / "first")


def test_images_of_other_kinds_are_read_beside_the_cases(data: Path, tmp_path: Path) -> None:
    strange, saved = tmp_path / "strange", tmp_path / "predictions.jsonl"
    strange.mkdir()
    for name in ("far.png", "further.png"):
        Image.radial_gradient("L").resize((40, 30)).save(strange / name)
    result = evaluate(data, predictions=saved, outside=strange)
    assert result["outside"]["n"] == 2
    assert result["outside"]["auroc"]["value"] == result["outside"]["caught"]["value"] == 1
    assert result["outside"]["false_alarms"]["value"] == 0
    assert len(read_predictions(saved)) == 5  # the others have a file of their own
    assert len(read_predictions(tmp_path / "predictions.outside.jsonl")) == 2
    lines = [{"id": str(i), "image": f"{name}.png"} for i, name in enumerate(("far", "further"))]
    (strange / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluate(data, outside=strange / "manifest.jsonl")["outside"] == result["outside"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ManifestError, match="no image"):
        evaluate(data, outside=tmp_path / "nothing")


class Page(HTMLParser):
    """What a page holds and what it reaches for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_needs_nothing_else_and_quotes_safely(data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[0] |= {"id": "<script>alert(1)</script>", "findings": [{"type": "fray", "bbox": [20, 20, 40, 30]}]}
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = tmp_path / "page.html"
    evaluate(data, html=html)
    page = Page(html.read_text())
    assert "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"https?://|@import", html.read_text())
    assert "<script>alert(1)</script>" in page.words  # as words
    assert page.links[0].startswith("data:image/png")
    assert page.tags.count("rect") >= 4  # each box with its halo: one labelled, one found
    for words in ("mAP at IoU 0.5", "nearest neighbour", "Reliability of detections", "Confusion", "fray missed"):
        assert words.lower() in page.words.lower(), words


def test_the_command_shows_figures_and_warns_before_it_reads(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"id": "gone", "image": "gone.png"}) + "\n")
    out, saved = str(tmp_path / "s.json"), str(tmp_path / "a.jsonl")
    command = ["scanscribe", "evaluate", "--data", str(data), "--out", out, "--predictions", saved]

    def run(*more: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    code, shown, said = run()
    assert code == 1  # three images could not be read
    assert "mAP at IoU 0.5" in shown and "always normal" in shown and "3 images could not be read" in shown
    assert "gone.png" in said and said.count("line 6") == 1
    code, shown, said = run("--resume", "--json")
    assert json.loads(shown)["n"] == 6
    monkeypatch.setattr(FixedReader, "load", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    code, shown, said = run()
    assert code == 130 and "--resume" in said
    assert "gone.png" in said


def test_the_model_card_tells_what_was_measured(data: Path) -> None:
    result = evaluate(data, outside=data.parent / "a.png")
    card = measured_parts({"mine": result, "more": result | {"n": 0, "splits": {"train": 9}, "metrics": {}}})
    assert card["data_rows"].splitlines()[1] == "| `more` | 9 | 0 | none |"
    assert "| mAP at IoU 0.5 | 1.000" in card["figures"] and "| majority |" in card["figures"]
    assert "mine, detections" in card["calibration"] and "| mine | 1 + 0 | 0.5" in card["outside"]
    assert "more" not in card["figures"]


def test_a_card_is_written_of_its_own_model_s_evaluations_only(data: Path, tmp_path: Path) -> None:
    stored = StoredModel(tmp_path, "fixed", "1", {}, Calibration(), "0" * 64, "0" * 64)
    with pytest.raises(ModelError, match="empty"):
        read_evaluations(stored)
    result = evaluate(data, out=tmp_path / "evaluation" / "mine.json")
    assert read_evaluations(stored) == {"mine": result}
    with pytest.raises(ModelError, match="other weights"):
        read_evaluations(replace(stored, weights_sha256="1" * 64))


def test_a_place_that_cannot_be_written_costs_no_evaluation(data: Path, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        evaluate(data, out=tmp_path, progress=lambda done, total: pytest.fail("an image was read"))
