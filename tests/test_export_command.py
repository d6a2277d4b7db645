"""`scanscribe export`: one report or an output folder, in further formats and languages; what cannot be carried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.export import export
from pipelines.run import Job, UsageError, execute
from pipelines.run_folder import OutputError, RunFolder
from reports.formats import formats
from reports.lot.sampling import LotPlan
from tests.test_cli import run
from tests.test_run import lines, picture
from tests.tiny_reader import TinyReader

ROOT = Path(__file__).parents[1]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with reports of three pictures, in JSON."""
    TinyReader().install(monkeypatch)
    for name in [name for name in os.environ if name.startswith("SCANSCRIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "lot-b/b.png", "lot-b/c.png")):
        picture(tmp_path / "in" / name, seed)
    execute(Job((tmp_path / "in",), tmp_path / "out", formats=("json",)))
    return tmp_path / "out"


@pytest.fixture
def scanscribe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *args: run(capfd, monkeypatch, *map(str, args))


def test_an_output_folder_gets_formats_of_each_report_and_over_all(scanscribe, out: Path) -> None:
    code, printed, _ = scanscribe(
        "export", out, "--formats", "html,csv,lot", "--aql", "6.5", "--lot-size", "2", "--json"
    )
    assert code == 0
    told = json.loads(printed)
    assert (told["reports"], told["failures"], told["complete"]) == (3, [], True)
    assert [Path(file).name for file in told["files"]] == ["findings.csv", "lot.html"]
    for line in lines(out / "index.jsonl"):
        assert (out / line["formats"]["html"]).is_file()
    judged = json.loads((out / "lot.json").read_text())
    assert {each["plan"]["name"] for each in judged["verdicts"]} == {
        "n=2 (every item), Ac=0, Re=1, code letter A, level II, AQL 6.5, normal"
    }
    page = (out / "index.html").read_text()
    assert "./findings.csv" in page and "./lot.html" in page


def test_a_single_report_is_exported_and_its_line_kept_up(scanscribe, out: Path) -> None:
    first, *others = lines(out / "index.jsonl")
    code, printed, _ = scanscribe("export", out / first["id"], "--formats", "md,txt")
    assert (code, "Reports: 1, formats written in their folders: 2." in printed) == (0, True)
    again, *same = lines(out / "index.jsonl")
    assert set(again["formats"]) == {"json", "md", "txt"}
    assert same == others


def test_a_report_folder_that_stands_alone_is_exported_too(out: Path, tmp_path: Path) -> None:
    [line, *_] = lines(out / "index.jsonl")
    alone = tmp_path / "sent" / "by-mail"
    alone.parent.mkdir()
    (out / line["id"]).rename(alone)
    summary = export([alone], ["html"])
    assert (summary.reports, summary.failures) == (1, [])
    assert (alone / "report.html").is_file()
    assert [each.name for each in alone.parent.iterdir()] == ["by-mail"]


def test_another_language_lies_beside_the_reports_own(out: Path) -> None:
    [line, *_] = lines(out / "index.jsonl")
    before = (out / line["id"] / "report.json").read_bytes()
    export([out / line["id"]], ["json", "html"], language="zh-CN")
    assert (out / line["id"] / "report.json").read_bytes() == before
    assert json.loads((out / line["id"] / "report.zh-CN.json").read_text())["language"] == "zh-CN"
    assert 'lang="zh-CN"' in (out / line["id"] / "report.zh-CN.html").read_text()
    [again, *_] = lines(out / "index.jsonl")
    assert set(again["formats"]) == {"json", "json.zh-CN", "html.zh-CN"}


def test_what_a_report_cannot_carry_is_named_and_the_rest_written(scanscribe, out: Path) -> None:
    code, printed, _ = scanscribe("export", out, "--formats", "sr,html,csv", "--json")
    assert code == 1
    assert {failure["format"] for failure in json.loads(printed)["failures"]} == {"sr"}
    for line in lines(out / "index.jsonl"):
        assert set(line["errors"]) == {"sr"}
        assert set(line["formats"]) == {"json", "html"}
    assert (out / "findings.csv").is_file()
    code, printed, _ = scanscribe("export", out, "--formats", "sr")
    assert (code, "Could not be written" in printed) == (1, True)


def test_a_damaged_report_costs_that_report(scanscribe, out: Path) -> None:
    first, second, _ = lines(out / "index.jsonl")
    (out / first["id"] / "report.json").write_text("{")
    (out / second["id"] / "parts" / "slice-0000.png").write_bytes(b"torn")
    code, printed, _ = scanscribe("export", out, "--formats", "html,csv", "--json")
    failures = {(Path(f["place"]).name, f["format"]) for f in json.loads(printed)["failures"]}
    assert code == 1
    assert failures == {(first["id"], "html"), (second["id"], "html"), ("out", "csv")}
    assert sum("html" in line["formats"] for line in lines(out / "index.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--formats", "html"], "neither the folder of a report"),
        (["out", "--formats", "papyrus"], "unknown format papyrus"),
        (["out", "--formats", ","], "There is no format to write"),
        (["out", "--formats", "lot", "--aql", "3"], "has no AQL 3"),
        (["out", "--formats", "lot", "--inspection-level", "IV"], "inspection_level"),
        (["out", "--formats", "html", "--language", "fr"], "language"),
        (["out"], "--formats"),
    ],
)
def test_wrong_usage_is_told_and_changes_nothing(scanscribe, out: Path, arguments: list[str], message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, _, said = scanscribe("export", *arguments)
    assert code == 2
    assert message in " ".join(said.split())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_format_over_a_run_asks_for_the_output_folder(out: Path) -> None:
    [line, *_] = lines(out / "index.jsonl")
    with pytest.raises(UsageError, match=f"csv is written over a whole output folder.*name {out}"):
        export([out / line["id"]], ["csv"])
    with RunFolder(out), pytest.raises(OutputError, match="Another run"):
        export([out], ["csv"])


def test_help_lists_every_format_with_what_it_is(scanscribe, out: Path) -> None:
    code, printed, _ = scanscribe("export", "--help")
    words = " ".join(printed.replace("│", " ").split())
    assert code == 0
    for each in formats().values():
        assert f"{each.name} {each.summary}" in words


# In a run


def test_a_run_writes_its_tables_at_the_end_and_knows_them_for_its_own(out: Path) -> None:
    names = ("json", "csv", "parquet", "coco", "lot")
    job = Job((out.parent / "in",), out, formats=names, lot=LotPlan(size=2))
    first = execute(job)
    assert set(first.files) == {"csv", "parquet", "coco", "lot"}
    assert len(first.already_reported) == 3
    assert first.complete
    over_all = Job((out,), out, formats=names)  # inputs and output share a folder
    again = execute(over_all)
    assert (len(again.reported), again.rejected, again.passed_over) == (0, (), 0)


def test_tables_are_over_current_reports_only(out: Path) -> None:
    picture(out.parent / "in" / "a.png", 7)
    execute(Job((out.parent / "in",), out, formats=("json", "coco")))
    assert len(json.loads((out / "instances.json").read_text())["images"]) == 3
    assert len(lines(out / "index.jsonl")) == 4


def test_a_table_that_fails_is_told_and_costs_nothing_else(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.tables.write_csv", lambda reports, folder: 1 / 0)
    summary = execute(Job((out.parent / "in",), out, formats=("json", "csv", "coco")))
    assert "ZeroDivisionError" in summary.errors["csv"]
    assert set(summary.files) == {"coco"}
    assert not summary.complete


def test_settings_say_how_lots_are_judged(scanscribe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("scanscribe.toml").write_text('[lot]\naql = 4.0\ninspection_level = "S-2"\nsizes = { A17 = 1200 }\n')
    code, *_ = scanscribe("report", "in", "--out", "out", "--formats", "lot")
    assert code == 0
    plan = json.loads((out / "lot.json").read_text())["plan"]
    assert (plan["aql"], plan["inspection_level"], plan["sizes"]) == (4.0, "S-2", {"A17": 1200})
    monkeypatch.setenv("SCANSCRIBE_LOT__AQL", "0.65")
    scanscribe("report", "in", "--out", "out", "--formats", "lot")
    assert json.loads((out / "lot.json").read_text())["plan"]["aql"] == 0.65
    code, *_ = scanscribe("export", "out", "--formats", "lot", "--aql", "1.5")
    plan = json.loads((out / "lot.json").read_text())["plan"]
    assert (code, plan["aql"], plan["inspection_level"]) == (0, 1.5, "S-2")


# Formats of other packages

PLUGIN = """
from reports.formats import CannotCarryError, Format

def count(bundle):
    if not bundle.report.findings:
        raise CannotCarryError("There is nothing to count.")
    return {"count.txt": str(len(bundle.report.findings)).encode(), "more.txt": b"more"}

def total(reports, folder):
    (folder / "total.txt").write_text(str(sum(len(report.findings) for report in reports)))

COUNT = Format("count", "how many findings", "count.txt", "count_plugin:count")
TOTAL = Format("total", "how many findings in all", "total.txt", "count_plugin:total", scope="run")
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A real distribution that registers two formats, and one that cannot be loaded."""
    site = tmp_path / "site"
    info = site / "count_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "count_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: count-plugin\nVersion: 1.0\n")
    points = ("count = count_plugin:COUNT", "total = count_plugin:TOTAL", "broken = count_plugin:NOTHING")
    (info / "entry_points.txt").write_text("\n".join(("[scanscribe.formats]", *points)) + "\n")
    return site


def test_another_package_adds_formats_by_entry_point(out: Path, plugin: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{plugin}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "scanscribe.cli", "export", str(out), "--formats", "count,total,html", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["failures"] == []
    assert "The format broken of another package cannot be loaded" in done.stderr
    assert (out / "total.txt").read_text() == "3"
    for line in lines(out / "index.jsonl"):
        assert (out / line["formats"]["count"]).read_text() == "1"
        assert (out / line["id"] / "more.txt").read_text() == "more"
    help_text = subprocess.run(
        [sys.executable, "-m", "scanscribe.cli", "export", "--help"], env=environment, capture_output=True, text=True
    ).stdout
    assert "how many findings in all" in help_text
