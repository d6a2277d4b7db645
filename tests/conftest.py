"""Shared fixtures. Tests that need the research data skip, with the reason, where it is absent."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.machine.server import LocalServer
from tests.orthanc import free_port


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test does to the environment ends with it: importing Prefect, as flows do, sets its settings there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the public research data (never part of the repository)."""
    folder = Path(os.environ.get("SCANSCRIBE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"research data not found at {folder}; set SCANSCRIBE_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of its own on a free port; it refuses to run as root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    programs, as_user = found[-1].parent, []
    data = tmp_path_factory.mktemp("postgres")
    if os.getuid() == 0:
        if not shutil.which("runuser"):
            pytest.skip("runuser is missing, and PostgreSQL does not run as root")
        as_user = ["runuser", "-u", "postgres", "--"]
        data = Path("/tmp") / f"scanscribe-postgres-{os.getpid()}"
        data.mkdir()
        shutil.chown(data, "postgres")
    port = free_port()
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, programs / "initdb", "-D", data / "db", "-A", "trust", "-U", "ledger", "-N"], **quiet)
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*as_user, programs / "pg_ctl", "-D", data / "db", "-w", "-l", data / "log"]
    subprocess.run([*control, "-o", options, "start"], **quiet)
    try:
        yield f"postgresql://ledger@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        if as_user:
            shutil.rmtree(data)


@pytest.fixture(scope="session")
def new_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes state folders with an empty Prefect data base, of which the first takes ten seconds."""
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCANSCRIBE_HOME", str(made))
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        with LocalServer() as server:
            server.url()

    def make() -> Path:
        home = tmp_path_factory.mktemp("state")
        shutil.copytree(made / "prefect", home / "prefect", ignore=shutil.ignore_patterns("server*"))
        return home

    return make
