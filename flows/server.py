"""The Prefect server of the batch flow: one quiet process on loopback with SQLite, up for as long as the flow runs.

Prefect's own in-process server takes longer to start and prints tracebacks when it stops. This one is started first,
while the model loads; it ends with the process that started it, however that process ends.
`PREFECT_API_URL` in the environment means that the user runs a server: then none is started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, TracebackType

from pipelines.store import home

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class ServerError(Exception):
    """The batch flow has no Prefect server to talk to. The message says how to mend it."""

    code = "prefect-server"


def state_folder() -> Path:
    """`home()`, made if it is absent. Raises ServerError."""
    folder = home()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(
            f"The state folder {folder} cannot be made ({error.strerror}): "
            "set SCANSCRIBE_HOME to a folder that can be written."
        ) from None
    return folder


def import_prefect() -> ModuleType:
    """prefect, quiet and local. It reads its settings when it is imported, so import it here first."""
    os.environ.update(prefect_environment())
    import prefect.settings

    return prefect


def prefect_environment() -> dict[str, str]:
    """The settings that keep Prefect local and quiet, as environment variables; those that the user set stay."""
    ours = {
        "PREFECT_HOME": str(state_folder() / "prefect"),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # notification blocks that no flow here uses
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # what a user must know is said by the command line, not by Prefect's log
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }
    return {name: os.environ.get(name, value) for name, value in ours.items()}


class LocalServer:
    """A handle on the server process: entering returns at once, `url` waits until the API answers, leaving stops it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._url = os.environ.get("PREFECT_API_URL", "")
        self._log = Path()

    def __enter__(self) -> LocalServer:
        if self._url:
            return self
        environment = {**os.environ, **prefect_environment()}
        folder = Path(environment["PREFECT_HOME"])
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.server"],
                stdin=subprocess.PIPE,  # the server stops when this closes, even if this process is killed
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal reaches the flow, which then stops its server
            )
        return self

    def url(self) -> str:
        """The API's address, e.g. `http://127.0.0.1:41234/api`. Raises ServerError when it does not come up."""
        if not self._url:
            assert self._process is not None
            assert self._process.stdout is not None
            ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
            port = self._process.stdout.readline().strip().decode() if ready else ""
            if not port:
                self._process.kill()
                raise ServerError(
                    f"The local Prefect server did not start; its log is {self._log}. Mend what it names, or use "
                    "`scanscribe report`, which needs no server, or set PREFECT_API_URL to a server that runs."
                )
            self._url = f"http://127.0.0.1:{port}/api"
        return self._url

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._url:  # it is still making its data base: it ends by itself when that is whole
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """Run the server in this process until standard input closes; prints its port once the API answers."""
    import uvicorn
    from prefect.server.api.server import create_app

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = create_app(ephemeral=True, final=True)  # ephemeral: no UI, no scheduler, only what records flow and task runs
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))

    def report_port() -> None:
        while not server.started:
            time.sleep(0.02)
        migration.close()
        with contextlib.suppress(BrokenPipeError):  # the owner is gone
            print(port, flush=True)

    def stop_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    migration = (Path(os.environ["PREFECT_HOME"]) / "server.lock").open("w")
    fcntl.flock(migration, fcntl.LOCK_EX)  # one server at a time makes or migrates the data base
    for watch in (report_port, stop_with_parent):
        threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve()
