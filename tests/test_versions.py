"""A later report on the same picture or series supersedes the former; a person's correction makes the next version."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from pipelines.correct import CorrectionError, correct, merge_patch
from pipelines.export import export
from pipelines.ingest.identifiers import DEFAULT_PATTERNS
from pipelines.run import Job, execute
from reports.bundle import load_bundle
from tests.test_cli import run
from tests.test_run import EXAMPLES, lines, picture
from tests.tiny_reader import TinyReader


def index(out: Path) -> dict[str, dict]:
    found = lines(out / "index.jsonl")
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def report_of(out: Path, report_id: str) -> dict:
    return json.loads((out / report_id / "report.json").read_text())


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> TinyReader:
    reader = TinyReader()
    reader.install(monkeypatch)
    return reader


@pytest.fixture
def scanscribe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *args: run(capfd, monkeypatch, *map(str, args))


@pytest.fixture
def out(tmp_path: Path, reader: TinyReader) -> Path:
    """An output folder with one report, of `a.png`."""
    execute(Job((picture(tmp_path / "a.png", 1),), tmp_path / "out"))
    return tmp_path / "out"


def test_a_run_that_ended_between_the_lines_of_two_versions_leaves_one_current(out: Path) -> None:
    [first] = index(out)
    [second] = execute(Job((picture(out.parent / "a.png", 2),), out)).reported
    path = out / "index.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["superseded_by"] is None]
    former = json.dumps(index(out)[first] | {"superseded_by": None})
    path.write_text("\n".join([former, *kept, ""]))
    execute(Job((out.parent / "a.png",), out))
    assert {key: line["superseded_by"] for key, line in index(out).items()} == {first: second.id, second.id: None}


def test_other_content_at_the_same_place_is_the_next_version(out: Path) -> None:
    [first] = index(out)
    before = (out / first / "report.json").read_bytes()
    [second] = execute(Job((picture(out.parent / "a.png", 2),), out)).reported

    assert (second.version, second.supersedes) == (2, first)
    assert report_of(out, second.id)["supersedes"] == first
    assert report_of(out, second.id)["version"] == 2
    found = index(out)
    assert (found[first]["superseded_by"], found[second.id]["superseded_by"]) == (second.id, None)
    assert (out / first / "report.json").read_bytes() == before
    assert load_bundle(out / first).report.superseded_by == second.id
    page = (out / "index.html").read_text()
    assert page.count("<li ") == 1
    assert f'href="./{first}/report.html"' in page

    third = execute(Job((picture(out.parent / "a.png", 3),), out)).reported[0]
    assert (third.version, third.supersedes) == (3, second.id)


def test_another_model_makes_the_next_version_and_another_file_does_not(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = index(out)
    other = execute(Job((picture(out.parent / "b.png", 2),), out)).reported[0]
    assert (other.version, other.supersedes) == (1, None)
    TinyReader("2").install(monkeypatch)
    again = execute(Job((out.parent / "a.png",), out)).reported[0]
    assert (again.version, again.supersedes) == (2, first)


def test_content_that_comes_back_is_a_new_version_too(out: Path) -> None:
    job = Job((out.parent / "a.png",), out)
    [first] = index(out)
    picture(out.parent / "a.png", 2)
    second = execute(job).reported[0]
    picture(out.parent / "a.png", 1)
    third = execute(job).reported[0]
    assert third.id not in (first, second.id)
    assert (third.version, third.supersedes) == (3, second.id)
    again = execute(job)
    assert [entry.id for entry in again.already_reported] == [third.id]
    assert [line["superseded_by"] for line in index(out).values()] == [second.id, third.id, None]


def test_a_copy_of_superseded_content_has_a_report_of_its_own(out: Path) -> None:
    shutil.copy(out.parent / "a.png", out.parent / "copy.png")
    picture(out.parent / "a.png", 2)
    execute(Job((out.parent / "a.png",), out))
    copy = execute(Job((out.parent / "copy.png",), out)).reported[0]
    assert (copy.version, copy.supersedes) == (1, None)
    assert len(index(out)) == 3


def test_the_same_content_on_another_request_never_supersedes_itself(out: Path) -> None:
    [first] = index(out)
    patterns = out.parent / "patterns.toml"  # finds the same, but that is known only after reading
    patterns.write_text(f"{DEFAULT_PATTERNS.read_text()}\n# ours\n")
    second = execute(Job((out.parent / "a.png",), out, identifiers=patterns)).reported[0]
    assert second.id != first
    assert (second.version, second.supersedes) == (2, first)
    assert {key: line["superseded_by"] for key, line in index(out).items()} == {first: second.id, second.id: None}


def test_parts_of_a_series_do_not_supersede_each_other(tmp_path: Path, reader: TinyReader) -> None:
    (tmp_path / "in").mkdir()
    for phase in (1, 2):
        for file in (EXAMPLES / "ct" / "phantom-series").iterdir():
            dataset = pydicom.dcmread(file)
            dataset.AcquisitionNumber = phase
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.save_as(tmp_path / "in" / f"{phase}-{file.name}")
    job = Job((tmp_path / "in",), tmp_path / "out", formats=("json",))
    assert [(entry.version, entry.supersedes) for entry in execute(job).reported] == [(1, None), (1, None)]
    assert len(execute(job).already_reported) == 2


def test_late_slices_make_version_2_of_the_series(tmp_path: Path, reader: TinyReader) -> None:
    folder = tmp_path / "in"
    shutil.copytree(EXAMPLES / "ct" / "phantom-series", folder)
    (folder / "IM0012.dcm").rename(tmp_path / "late.dcm")
    first = execute(Job((folder,), tmp_path / "out")).reported[0]
    elsewhere = tmp_path / "moved"
    folder.rename(elsewhere)
    (tmp_path / "late.dcm").rename(elsewhere / "IM0012.dcm")
    second = execute(Job((elsewhere,), tmp_path / "out")).reported[0]
    assert (second.version, second.supersedes) == (2, first.id)


def test_further_formats_are_written_without_reading_again(out: Path, reader: TinyReader) -> None:
    [first] = index(out)
    summary = execute(Job((out.parent / "a.png",), out, formats=("json", "md")))
    assert [entry.id for entry in summary.reported] == [first]
    assert reader.read_names == ["a.png"]
    assert set(index(out)[first]["formats"]) == {"json", "html", "md"}


EDIT = {"findings": [], "impression": "Dust, wiped off.", "disposition": "rework"}


def corrected(out: Path, edits: object) -> str:
    [current] = [line["id"] for line in index(out).values() if not line["superseded_by"]]
    (out.parent / "edits.json").write_text(json.dumps(edits))
    return correct(out / current, out.parent / "edits.json").report.id


def test_a_correction_is_the_next_version_in_the_same_formats(out: Path, reader: TinyReader) -> None:
    [first] = index(out)
    before = (out / first / "report.json").read_bytes()
    second = corrected(out, EDIT)
    report = report_of(out, second)
    assert (report["version"], report["supersedes"], report["status"]) == (2, first, "preliminary")
    assert (report["findings"], report["impression"], report["disposition"]) == ([], "Dust, wiped off.", "rework")
    assert report["disposition_rule"] is None
    assert "corrected" in report["quality_flags"]
    assert (out / first / "report.json").read_bytes() == before
    assert index(out)[first]["superseded_by"] == second
    assert index(out)[second]["findings"] == 0
    assert index(out)[first]["severity"] == "minor" and index(out)[second]["severity"] is None
    assert "Dust, wiped off." in (out / second / "report.html").read_text()
    assert load_bundle(out / second).images.slices

    execute(Job((out.parent / "a.png",), out))  # does not undo what a person corrected
    execute(Job((out.parent / "a.png",), out, formats=("md",)))
    assert reader.read_names == ["a.png"]
    assert "Dust, wiped off" in (out / second / "report.md").read_text()

    third = corrected(out, {"impression": "Nothing."})
    assert report_of(out, third)["version"] == 3


def test_text_that_contradicts_the_findings_stands_with_a_warning(scanscribe, out: Path) -> None:
    def by(edits: object, *options: str) -> tuple[int, str, str]:
        [current] = [line["id"] for line in index(out).values() if not line["superseded_by"]]
        (out.parent / "edits.json").write_text(json.dumps(edits))
        return scanscribe("correct", out / current, "--by", out.parent / "edits.json", *options)

    # The only scratch goes, and the sentence about it stays.
    code, printed, said = by({"findings": []})
    [second] = [line["id"] for line in index(out).values() if not line["superseded_by"]]
    report = report_of(out, second)
    assert code == 0 and "Version 2" in printed
    assert "Warning" in said and report["impression"] in said and "not among the findings" in " ".join(said.split())
    assert "contradicts-findings" in report["quality_flags"]
    assert "contradict each other" in (out / second / "report.html").read_text()
    # The next version is judged anew.
    code, printed, said = by({"impression": "Dust, wiped off."}, "--json")
    told = json.loads(printed)
    assert (code, told["contradictions"], said) == (0, [], "")
    assert report_of(out, told["id"])["quality_flags"] == [
        flag for flag in report["quality_flags"] if flag != "contradicts-findings"
    ]
    told = json.loads(by({"impression": "A deep crack."}, "--json")[1])
    [doubt] = told["contradictions"]
    assert (doubt["code"], doubt["sentence"]) == ("not-found", "A deep crack.")


def test_what_is_corrected_throughout_raises_no_warning(scanscribe, out: Path) -> None:
    [first] = index(out)
    finding = report_of(out, first)["findings"][0]
    (out.parent / "moved.json").write_text(json.dumps({"findings": [finding | {"severity": "critical"}]}))
    code, printed, said = scanscribe("correct", out / first, "--by", out.parent / "moved.json", "--json")
    assert (code, json.loads(printed)["contradictions"], said) == (0, [], "")
    [second] = [line["id"] for line in index(out).values() if not line["superseded_by"]]
    elsewhere = finding | {"location": "lower right" if finding["location"] != "lower right" else "upper left"}
    (out.parent / "moved.json").write_text(json.dumps({"findings": [elsewhere]}))
    code, _, said = scanscribe("correct", out / second, "--by", out.parent / "moved.json")
    assert code == 0 and finding["description"] in said and "it lies elsewhere" in said


def test_a_whole_corrected_report_is_taken_too_and_the_changes_are_told(scanscribe, out: Path) -> None:
    [first] = index(out)
    report = report_of(out, first)
    report["findings"][0]["severity"] = "critical"
    (out.parent / "whole.json").write_text(json.dumps(report))
    code, printed, _ = scanscribe("correct", out / first, "--by", out.parent / "whole.json", "--json")
    assert code == 0
    told = json.loads(printed)
    assert told["changes"] == [{"place": "findings.0.severity", "before": "minor", "after": "critical"}]
    assert (told["version"], told["supersedes"]) == (2, first)
    code, _, said = scanscribe("correct", out / first, "--by", out.parent / "whole.json")
    assert code == 2
    assert f"superseded by {told['id']}" in " ".join(said.split())
    (out.parent / "more.json").write_text('{"impression": "Seen."}')
    code, printed, _ = scanscribe("correct", out / told["id"], "--by", out.parent / "more.json")
    assert code == 0
    assert "Version 3" in printed and "Seen." in printed


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({}, "changes nothing"),
        ({"id": "0" * 16}, "id cannot be corrected"),
        ({"status": "final"}, "status cannot be corrected"),
        ({"disposition": "scrap"}, "disposition"),
        ({"comment": "x"}, "comment"),
        ({"quality_flags": 5}, "quality_flags"),
        ({"findings": [{"id": "F1"}]}, r"findings\.0\.type"),
        ([1], "no JSON object"),
    ],
)
def test_a_correction_that_cannot_be_is_refused_and_nothing_is_written(out: Path, edits: object, message: str) -> None:
    before = sorted(out.rglob("*"))
    with pytest.raises(CorrectionError, match=message):
        corrected(out, edits)
    assert sorted(out.rglob("*")) == before


def test_evidence_of_a_correction_has_to_be_there(out: Path) -> None:
    [first] = index(out)
    finding = report_of(out, first)["findings"][0]
    with pytest.raises(CorrectionError, match="same id"):
        corrected(out, {"findings": [finding, finding]})
    evidence = [finding["evidence"][0] | {"input_index": 3}]
    with pytest.raises(CorrectionError, match="input_index"):
        corrected(out, {"findings": [finding | {"evidence": evidence}]})


def test_a_corrected_report_keeps_its_words_so_that_it_has_no_other_language(out: Path) -> None:
    corrected(out, EDIT)
    summary = export([out], ["md"], language="zh-CN")
    [failure] = summary.failures
    assert "corrected this report" in failure.message


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=2), each, max_size=3),
)
objects = st.dictionaries(st.text(max_size=2), values, max_size=3)


@given(target=objects, patch=objects)
def test_a_merge_patch_changes_what_it_names_and_nothing_else(target: dict, patch: dict) -> None:
    merged = merge_patch(target, patch)
    assert {name: value for name, value in merged.items() if name not in patch} == {
        name: value for name, value in target.items() if name not in patch
    }
    assert not any(name in merged for name, value in patch.items() if value is None)
    assert all(merged[name] == value for name, value in patch.items() if not isinstance(value, dict | None))
    assert merge_patch(merged, patch) == merged


def current(out: Path) -> dict[str, list[str]]:
    """The names by which each content's current reports are known."""
    found: dict[str, list[str]] = {}
    for line in index(out).values():
        if line["superseded_by"] is None:
            [source] = line["inputs"]
            found.setdefault(source["sha256"], []).append(Path(source["path"]).name)
    return found


@pytest.mark.parametrize(("moved", "copied"), [("0.png", False), ("b.png", False), ("b.png", True)])
def test_content_keeps_its_report_when_another_takes_its_name(out: Path, moved: str, copied: bool) -> None:
    """Whichever of the two names comes first in a run; of a copy, the run that met it lies further back."""
    folder = out.parent
    (shutil.copy if copied else shutil.move)(folder / "a.png", folder / moved)
    if copied:
        execute(Job((folder,), out))
    former = sha256(folder / moved)
    picture(folder / "a.png", 2)
    execute(Job((folder,), out))
    wanted = {former: [moved], sha256(folder / "a.png"): ["a.png"]}
    assert current(out) == wanted
    again = execute(Job((folder,), out))
    assert not again.reported and current(out) == wanted


def test_content_keeps_its_report_in_an_archive(out: Path) -> None:
    folder = out.parent
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.write(folder / "a.png", "inside/a.png")
    execute(Job((folder,), out))
    former = sha256(folder / "a.png")
    picture(folder / "a.png", 2)
    execute(Job((folder / "a.png",), out))
    assert current(out)[former] == ["a.png"]
    [line] = [line for line in index(out).values() if line["inputs"][0]["sha256"] == former]
    assert line["inputs"][0]["path"].endswith("z.zip!inside/a.png")


def test_a_report_whose_content_is_nowhere_else_any_more_is_superseded(out: Path) -> None:
    folder = out.parent
    [first] = index(out)
    shutil.copy(folder / "a.png", folder / "b.png")
    execute(Job((folder,), out))
    picture(folder / "b.png", 3)
    execute(Job((folder,), out))
    picture(folder / "a.png", 2)
    execute(Job((folder,), out))
    assert index(out)[first]["superseded_by"]
    assert sorted(current(out).values()) == [["a.png"], ["b.png"]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
