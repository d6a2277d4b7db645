"""The command line as a person and a script meet it: exit codes, one JSON object, sentences that help."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines.run
from pipelines.reading import OUT_OF_DOMAIN, Reading
from pipelines.store import ModelError, find
from scanscribe import cli
from tests.test_run import picture
from tests.tiny_reader import TinyReader

ROOT = Path(__file__).parents[1]


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["scanscribe", *args])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return int(left.value.code or 0), out, err


@pytest.fixture
def scanscribe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a command in an empty folder with a tiny reader."""
    for name in [name for name in os.environ if name.startswith("SCANSCRIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    TinyReader().install(monkeypatch)
    return lambda *args: run(capfd, monkeypatch, *map(str, args))


def test_report_exits_0_when_all_is_reported_and_1_when_something_is_refused(scanscribe, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    code, out, _ = scanscribe("report", "in", "--out", "out")
    assert code == 0
    assert "a.png" in out
    assert str(tmp_path / "out" / "index.html") in out
    (tmp_path / "in" / "b.png").touch()
    code, out, _ = scanscribe("report", "in", "--out", "out")
    assert code == 1
    assert "empty-file" in out
    assert "Copy the file again" in out


def test_what_was_not_assessed_is_not_said_to_have_no_finding(
    scanscribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = Reading("defect", 1.0, None, {}, (), "", quality_flags=(OUT_OF_DOMAIN,))
    monkeypatch.setattr(TinyReader, "read", lambda *args, **options: strange)
    picture(tmp_path / "in" / "a.png")
    code, out, _ = scanscribe("report", "in", "--out", "out")
    assert code == 0
    assert "not assessed" in out and "none reported" not in out
    assert "Not assessed: unlike" in (tmp_path / "out" / "index.html").read_text()


def test_json_prints_one_object_and_nothing_else(scanscribe, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").touch()
    code, out, _ = scanscribe("report", "in", "--out", "out", "--json")
    summary = json.loads(out)
    assert code == 1
    assert summary["complete"] is False
    assert len(summary["reported"]) == len(summary["rejected"]) == 1


def test_what_no_report_could_be_written_in_is_said_once(scanscribe, tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / "in" / f"{number}.png", seed=number)
    code, out, _ = scanscribe("report", "in", "--out", "out", "--formats", "json,sr,sc")
    assert code == 1
    assert out.count("could not be written") == 1 and "Of 5 reports, sr, sc could not be written" in out
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("SR, SC could not be written") == page.count("could not be written") == 5
    code, out, _ = scanscribe("report", "in/0.png", "--out", "other", "--formats", "json,sr,sc")
    assert code == 1 and "sr, sc could not be written" in out and "Of " not in out


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("report", "scanscribe report --help"),
        ("report a.png", "--out"),
        ("report nowhere.png --out out", "nowhere.png"),
        ("report a.png --out out --formats jsno", "known formats are json"),
        ("report a.png --out out --kind mri", "auto, ct, defect"),
        ("report a.png --out out --reference nowhere", "nowhere"),
        ("report a.png --out out --bogus", "--bogus"),
        ("report a.png --out a.png", "--out"),
        ("batch nowhere.png --out out", "nowhere.png"),
        ("report a.png --out out --mm-per-pixel wide", "as a number. See `"),
        ("bogus", "bogus"),
        ("models", "scanscribe models --help"),
        ("evaluate --data nowhere.jsonl --out x.json", "nowhere.jsonl"),
        ("train --recipe bogus --data . --out x", "bogus"),
    ],
)
def test_wrong_usage_exits_2_with_a_sentence_that_helps(scanscribe, tmp_path: Path, command: str, hint: str) -> None:
    picture(tmp_path / "a.png")
    code, out, err = scanscribe(*command.split())
    assert (code, out) == (2, "")
    assert hint in err
    code, out, _ = scanscribe(*command.split(), "--json")
    assert code == 2
    assert isinstance(json.loads(out), dict)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "report nope --out out",
        "batch nope --out out",
        "ingest nope",
        "watch nope --out out",
        "export nope --formats csv",
        "send nope --to A@127.0.0.1:1",
        "correct nope --by nope.json",
        "evaluate --data nope --out scores.json",
        "adapt --data nope --name line",
        "train --recipe detector --data nope --out run",
        "schedule create nightly nope --out out --every 1h",
        "schedule run nope",
        "ledger list --out nope",
        "ledger show 0123 --out nope",
        "ledger prune --out nope --older-than 1",
        "status --out nope",
    ],
)
def test_what_is_not_there_exits_2_whatever_the_command(scanscribe, tmp_path: Path, monkeypatch, command: str) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    code, _, err = scanscribe(*command.split())
    assert code == 2
    assert ("nope" in err or "0123" in err) and err.count("\n") == 1


def test_an_unknown_model_exits_2_and_names_what_there_is(scanscribe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.run.find", find)
    picture(tmp_path / "a.png")
    code, _, err = scanscribe("report", "a.png", "--out", "out", "--model", "bogus")
    assert code == 2
    assert "bogus" in err


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_defaults(
    scanscribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[pipelines.run.Job] = []
    work = pipelines.run.execute
    monkeypatch.setattr("pipelines.run.execute", lambda job, listener: (jobs.append(job), work(job, listener))[1])
    picture(tmp_path / "a.png")
    command = ("report", "a.png", "--out", "out")
    scanscribe(*command)
    (tmp_path / "scanscribe.toml").write_text('formats = ["json"]\nkind = "ct"\n')
    scanscribe(*command)
    monkeypatch.setenv("SCANSCRIBE_KIND", "defect")
    monkeypatch.setenv("SCANSCRIBE_FORMATS", "html, json")
    scanscribe(*command)
    scanscribe(*command, "--kind", "auto")
    assert [(job.formats, job.kind) for job in jobs] == [
        (("json", "html"), "auto"),
        (("json",), "ct"),
        (("html", "json"), "defect"),
        (("html", "json"), "auto"),
    ]


@pytest.mark.parametrize("text", ["kindd = 'ct'", "kind =", "formats = 3"])
def test_a_settings_file_that_cannot_be_used_is_named(scanscribe, tmp_path: Path, text: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "scanscribe.toml").write_text(text)
    code, _, err = scanscribe("report", "a.png", "--out", "out")
    assert code == 2
    assert "scanscribe.toml" in err


def test_names_from_outside_cannot_drive_the_terminal(scanscribe, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "\x1b[2J[red]x.png").touch()
    _, out, _ = scanscribe("report", "in", "--out", "out")
    assert "\x1b" not in out
    assert "[red]x" in out


def test_a_full_disk_is_told_as_that(scanscribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipelines.run, "execute", execute)
    code, _, err = scanscribe("report", picture(tmp_path / "a.png"), "--out", "out")
    assert code == 2 and "is full: free some space" in err


def test_ctrl_c_exits_130_with_a_sentence(scanscribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: TinyReader, *args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyReader, "read", interrupt)
    picture(tmp_path / "a.png")
    code, out, err = scanscribe("report", "a.png", "--out", "out", "--json")
    assert code == 130
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "goes on where it stopped" in err


@pytest.mark.parametrize(
    ("command", "door", "hint"),
    [
        ("train --recipe detector --data . --out x", "pipelines.training.__main__.cli", "--resume"),
        ("evaluate --data a.jsonl --out x.json", "pipelines.evaluation.evaluate", "--resume"),
    ],
)
def test_ctrl_c_says_how_that_command_goes_on(scanscribe, monkeypatch, command: str, door: str, hint: str) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(door, interrupt)
    code, out, err = scanscribe(*command.split(), "--json")
    assert code == 130
    assert json.loads(out)["exit_code"] == 130
    assert hint in err
    assert "where it stopped" not in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("", "--recipe"),
        ("--recipe detector --data . --out x --bogus", "--bogus"),
        ("--recipe bogus --data . --out x", "bogus"),
    ],
)
def test_train_prints_one_object_whatever_goes_wrong(scanscribe, options: str, word: str) -> None:
    code, out, err = scanscribe("train", *options.split(), "--json")
    said = json.loads(out)
    assert code == said["exit_code"] == 2
    assert said["error"]["code"]
    assert word in said["error"]["message"]
    assert word in err


def test_pictures_without_a_golden_sample_are_counted_once_on_standard_error(scanscribe, tmp_path: Path) -> None:
    for seed, name in enumerate(("in/a.png", "in/b.png", "in/c.png", "golden/a.png")):
        picture(tmp_path / name, seed)
    code, _, err = scanscribe("report", "in", "--out", "out", "--reference", "golden")
    assert code == 0
    assert err.count("2 pictures have no golden sample") == 1
    _, out, err = scanscribe("report", "in", "--out", "out", "--reference", "golden", "--json")
    assert "golden sample" not in err
    assert json.loads(out)["without_golden_sample"] == 2


REFUSED_SAMPLES = ('{"path": "examples/broken/truncated.png"}', '{"path": "examples/broken/not-an-image.jpg"}')


@pytest.mark.parametrize(
    ("exit_code", "index", "refused", "good"),
    [
        (1, True, REFUSED_SAMPLES, True),
        (1, False, REFUSED_SAMPLES, False),  # Python itself failed
        (1, True, (*REFUSED_SAMPLES, '{"path": "examples/steel/patches.png"}'), False),
        (1, True, REFUSED_SAMPLES[:1], False),
        (0, True, (), False),
        (2, True, REFUSED_SAMPLES, False),
    ],
)
def test_the_demo_fails_unless_exactly_the_broken_samples_are_refused(
    tmp_path: Path, exit_code: int, index: bool, refused: tuple[str, ...], good: bool
) -> None:
    for name in ("requirements.lock", "pyproject.toml", "bin/python", "ready"):  # `ready` is the newest: no set-up
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "demo-out").mkdir()
    (tmp_path / "demo-out" / "index.html").touch()  # of an earlier run
    (tmp_path / "demo-out" / "rejected.jsonl").write_text("".join(f"{line}\n" for line in refused))
    make_index = "touch demo-out/index.html" if index else ":"
    (tmp_path / "bin" / "scanscribe").write_text(f"#!/bin/sh\n{make_index}\nexit {exit_code}\n")
    for name in ("python", "scanscribe"):
        (tmp_path / "bin" / name).chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), "demo", "BIN=bin", "READY=ready"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == good, done.stderr


def test_doctor_names_each_thing_with_its_state_and_writes_nothing(scanscribe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    code, out, _ = scanscribe("doctor", "--json")
    found = json.loads(out)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["python"] == states["torch"] == states["flows"] == "ok"
    assert {"device", "codec JPEG-LS", "codec JPEG Lossless", "disk"} <= set(states)
    assert all(check["remedy"] for check in found["checks"] if check["state"] != "ok")
    assert code == (0 if found["ok"] else 2)
    assert not list(tmp_path.iterdir())


def test_doctor_finds_versions_that_do_not_fit_and_damaged_weights(scanscribe, tmp_path: Path, monkeypatch) -> None:
    from scanscribe import doctor

    real = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: {"torchvision": "0.20.0", "fastapi": "0.165.0"}.get(name) or real(name)
    )
    folder = tmp_path / "home" / "models" / "mine"
    folder.mkdir(parents=True)
    settings = {
        "name": "mine",
        "version": "1",
        "config": {},
        "calibration": {"evidence": {}, "temperature": {}, "point": {}},
    }
    (folder / "model.json").write_text(json.dumps(settings | {"weights_sha256": "0" * 64}))
    (folder / "weights.safetensors").write_bytes(b"damaged")
    monkeypatch.setenv("SCANSCRIBE_HOME", str(tmp_path / "home"))
    code, out, _ = scanscribe("doctor", "--json")
    failed = {check["name"]: check["remedy"] for check in json.loads(out)["checks"] if check["state"] == "fail"}
    assert code == 2
    assert "torchvision" in failed["torch"]
    assert "fastapi" in failed["flows"]
    assert failed["model mine"]
    code, out, _ = scanscribe("models", "list", "--json")
    assert "mine" in [model["name"] for model in json.loads(out)["models"]]
    assert scanscribe("models", "verify", "mine")[0] == 2
    (folder / "model.json").write_text("{torn")
    code, out, _ = scanscribe("models", "list", "--json")
    told = json.loads(out)
    assert code == 2 and "default" in [model["name"] for model in told["models"]]
    assert ["mine" in words for words in told["damaged"]] == [True]
    code, out, _ = scanscribe("doctor", "--json")
    states = {check["name"]: check["state"] for check in json.loads(out)["checks"]}
    assert (code, states["model default"], states["model"]) == (2, "ok", "fail")


def test_a_model_s_folder_needs_no_slash(scanscribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match=r"mine/model\.json cannot be read"):
        find("mine")
    for file in ("model.json", "weights.safetensors", "domain.safetensors"):
        shutil.copy(find("default").folder / file, tmp_path / "mine")
    code, out, _ = scanscribe("models", "verify", "mine", "--json")
    assert code == 0 and json.loads(out)["folder"] == "mine"


def test_a_terminal_that_knows_ascii_only_gets_the_reports(tmp_path: Path) -> None:
    picture(tmp_path / "照片.png")
    command = [
        sys.executable,
        "-m",
        "tests.watcher_process",
        "report",
        str(tmp_path / "照片.png"),
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "SCANSCRIBE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 reported" in done.stdout and "??.png" in done.stdout


@pytest.mark.parametrize("command", [[], ["report"], ["batch"], ["train"], ["evaluate"], ["doctor"], ["models"]])
def test_every_help_text_has_what_a_newcomer_needs(scanscribe, command: list[str]) -> None:
    code, out, _ = scanscribe(*command, "--help")
    assert code == 0
    assert "scanscribe" in out
    if command and command != ["models"]:
        assert "example" in out.lower()


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    check = "import sys; sys.argv = ['scanscribe', '--help']; from scanscribe import cli\ntry: cli.main()\nfinally: print([m for m in ('torch', 'prefect', 'pydantic', 'numpy', 'pydicom') if m in sys.modules])"  # noqa: E501
    before = os.times()
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    after = os.times()
    assert done.stdout.splitlines()[-1] == "[]"
    # 0.4 s; of the processor, as a busy machine may take its time.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


def test_the_library_door_reports_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scanscribe import report

    TinyReader().install(monkeypatch)
    summary = report(picture(tmp_path / "a.png"), out=tmp_path / "out", formats=["json"], language="zh-CN")
    assert summary.complete
    assert list(summary.reported[0].formats) == ["json"]
    assert json.loads((summary.out / summary.reported[0].formats["json"]).read_text())["language"] == "zh-CN"


@pytest.fixture(scope="module")
def bundled() -> None:
    try:
        find("default").verify()
    except ModelError as error:
        pytest.skip(f"the bundled model cannot be used: {error}")


@pytest.mark.usefixtures("bundled")
def test_the_samples_are_reported_from_end_to_end_with_the_bundled_model(tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "paths.py")], capture_output=True, text=True, check=True
    )
    command = ["report", *listed.stdout.splitlines(), "--reference", str(ROOT / "examples" / "golden")]
    done = subprocess.run(
        [sys.executable, "-m", "scanscribe.cli", *command, "--out", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert {refused["code"] for refused in summary["rejected"]} == {"truncated", "not-an-image"}
    kinds = {Path(entry["inputs"][0]["path"]).name.split(".")[0][:2]: entry["kind"] for entry in summary["reported"]}
    assert kinds == {
        "sc": "defect",
        "in": "defect",
        "pa": "defect",
        "cr": "defect",
        "bo": "defect",
        "IM": "ct",
        "CT": "ct",
    }
    from reports.schema import Report

    expected = {
        Path(sample["path"]).name: {finding["type"] for finding in sample["findings"]}
        for sample in json.loads((ROOT / "examples" / "expected.json").read_text())["samples"]
        if "findings" in sample
    }
    found = {Path(entry["inputs"][0]["path"]).name: set(entry["types"]) for entry in summary["reported"]}
    for name in ("board.png", "scratches.png"):
        assert found[name] == expected[name]
    strange = [Path(entry["inputs"][0]["path"]).name for entry in summary["reported"] if not entry["assessed"]]
    assert strange == ["CT_small.dcm"]
    index = (tmp_path / "index.html").read_text()
    assert (index.count("Not assessed"), index.count("No finding")) == (1, 1)  # that scan, and the phantom

    for entry in summary["reported"]:
        report = Report.model_validate_json((tmp_path / entry["formats"]["json"]).read_text())
        assert len(report.findings) == entry["findings"]
        assert (tmp_path / entry["formats"]["html"]).read_text().startswith("<!doctype html>")
