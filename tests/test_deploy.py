"""The files for the larger shape hold together: units that systemd takes, a compose file, commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_cli import run

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def commands() -> Iterator[list[str]]:
    """Each command of the product that is started, in words."""
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        if "command" in service:
            yield service["command"]
    for unit in UNITS:
        [start] = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
        program, *words = shlex.split(start.removeprefix("ExecStart="))
        if program.endswith("/scanscribe"):
            yield words


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_the_commands_exist_with_their_options(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 2 if words[0] == "schedule" else 1
    code, said, _ = run(capfd, monkeypatch, *words[:depth], "--help")
    assert code == 0
    assert all(word in said for word in words if word.startswith("--"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed (Debian: systemd)")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/opt/scanscribe/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / unit.name).write_text(text.replace("User=scanscribe\nGroup=scanscribe\n", ""))
    names = [tmp_path / unit.name.replace("@.", "@cpu.") for unit in UNITS]
    shutil.copy(tmp_path / "scanscribe-worker@.service", tmp_path / "scanscribe-worker@cpu.service")
    told = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True)
    mine = [line for line in told.stderr.splitlines() if "scanscribe" in line]
    assert (told.returncode, mine) == (0, [])


def test_the_example_of_the_environment_has_what_the_units_ask_for() -> None:
    given = re.findall(r"^(\w+)=.", (DEPLOY / "systemd" / "scanscribe.env.example").read_text(), re.MULTILINE)
    for unit in UNITS:
        assert set(re.findall(r"\$\{(\w+)\}", unit.read_text())) <= set(given), unit.name


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_the_compose_file_holds_together_and_asks_for_its_secrets() -> None:
    command = ["docker-compose", "-f", DEPLOY / "compose.yaml", "-f", DEPLOY / "compose.gpu.yaml", "config"]
    bare = {name: value for name, value in os.environ.items() if name not in ("POSTGRES_PASSWORD", "SCANSCRIBE_DATA")}
    told = subprocess.run(command, capture_output=True, text=True, env=bare)
    assert told.returncode != 0 and "a password without special characters" in told.stderr
    secrets = {"POSTGRES_PASSWORD": "pw", "SCANSCRIBE_DATA": "/srv/data"}
    told = subprocess.run(command, capture_output=True, text=True, env=bare | secrets)
    assert told.returncode == 0, told.stderr
    services = yaml.safe_load(told.stdout)["services"]
    assert services.keys() == {"postgres", "server", "worker", "watcher", "receiver", "schedules"}
    ports = {name: each["ports"] for name, each in services.items() if "ports" in each}
    assert ports == {"server": ["127.0.0.1:4200:4200/tcp"], "receiver": ["127.0.0.1:11112:11112/tcp"]}
    watched, received = (services[name]["command"] for name in ("watcher", "receiver"))
    assert received[received.index("--inbox") + 1] == watched[1]
    assert not services["receiver"].get("depends_on")  # it takes what is sent, whatever else is down
