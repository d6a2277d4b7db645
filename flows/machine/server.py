"""The Prefect server of this machine: one quiet process on loopback with SQLite, shared by whatever flows run here.

The first that needs it starts it, the others find it through a file in the state folder, the last that leaves stops
it. Each user holds a lock on a file, by which the server notices, too, when all of them were killed. Prefect's own
in-process server takes longer to start and prints tracebacks when it stops.
`PREFECT_API_URL` in the environment means that the user runs a server: then none is started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, TracebackType

from flows.machine.owners import is_gone, process_id, this_process
from pipelines.store import home
from reports.files import atomic_write

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
ANSWER_S = 5.0
LONELY_S = 3.0  # without a user, until the server stops by itself


class ServerError(Exception):
    """There is no Prefect server to talk to. The message says how to mend it."""

    code = "prefect-server"


def state_folder() -> Path:
    """`home()`, made if it is absent. Raises ServerError where it cannot be made or written."""
    folder = home()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ServerError(
            f"The state folder {folder} cannot be used ({error.strerror}): "
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
    home = os.environ.get("PREFECT_HOME", str(state_folder() / "prefect"))
    ours = {
        "PREFECT_HOME": home,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(Path(home, "ui")),  # else beside the package, which may be another's
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # what ended 90 days ago is removed
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",  # notification blocks that no flow here uses
        "PREFECT_CLIENT_MAX_RETRIES": "2",  # of a call, after 2 and 4 s: with more a lost server is told after minutes
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # what a user must know is said by the command line, not by Prefect's log
        "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def check_server(url: str) -> None:
    """Raises ServerError where no Prefect server answers there."""
    import httpx

    try:
        httpx.get(f"{url}/health", timeout=ANSWER_S).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise lost_server(url, error) from None


def lost_server(url: str, error: Exception) -> ServerError:
    """What to tell a person when a server that is needed does not answer."""
    return ServerError(
        f"The Prefect server at {url.rpartition('@')[2]} does not answer ({type(error).__name__}): see that it runs "
        "and that PREFECT_API_URL is right, or use `scanscribe report`, which needs none. What is done stays; the same "
        "command goes on where it stopped."
    )


def running_server() -> str:
    """The address of the server that is used: the one that the user named, or this machine's if it runs."""
    return os.environ.get("PREFECT_API_URL", "") or _running(Path(prefect_environment()["PREFECT_HOME"]))


def waiting_for_server(url: str) -> str:
    """What a service tells a person meanwhile."""
    return (
        f"The Prefect server at {url.rpartition('@')[2]} does not answer: see that it runs and that PREFECT_API_URL is "
        "right. Work goes on when it does."
    )


class LocalServer:
    """A handle on the server: entering returns at once, `url` waits until the API answers, the last one to leave stops
    the server."""

    def __init__(self) -> None:
        self._given = os.environ.get("PREFECT_API_URL", "")
        self._process: subprocess.Popen[bytes] | None = None
        self._users = -1

    def __enter__(self) -> LocalServer:
        if self._given:
            return self
        self._folder = Path(prefect_environment()["PREFECT_HOME"])
        self._folder.mkdir(parents=True, exist_ok=True)
        self._users = os.open(_users_file(self._folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._users, fcntl.LOCK_SH)  # waits while a server that nobody used is stopping
        if not _running(self._folder):
            self._start()
        return self

    def _start(self) -> None:
        with self._log().open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.machine.server"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **prefect_environment()},
                start_new_session=True,  # Ctrl-C in the terminal reaches the flow, which then stops its server
            )

    def _log(self) -> Path:
        return self._folder / "server.log"

    def url(self) -> str:
        """The API's address, e.g. `http://127.0.0.1:41234/api`, once it answers.

        A server that has died is started again, at the same address if that is free.  Raises ServerError when it does
        not come up.
        """
        if self._given:
            return self._given
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (url := _running(self._folder)):
            code = self._process.poll() if self._process else 0
            if code == 0 or code == -signal.SIGKILL:  # 0: it found another one starting
                time.sleep(0.2)
                if not _running(self._folder):
                    self._start()
            elif code is not None or time.monotonic() > deadline:
                raise ServerError(
                    f"The local Prefect server did not start; its log is {self._log()}. Mend what it names, or use "
                    "`scanscribe report`, which needs no server, or set PREFECT_API_URL to a server that runs."
                )
            time.sleep(0.05)
        return url

    def keep(self) -> None:
        """Start it again if it has died."""
        with contextlib.suppress(ServerError):
            self.url()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._users < 0:
            return
        try:
            fcntl.flock(self._users, fcntl.LOCK_UN)
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # others use it
            return
        else:
            self._stop()
        finally:
            os.close(self._users)
            self._users = -1

    def _stop(self) -> None:
        """Nobody else uses it. One that is still making its data base ends by itself when that is whole."""
        _, owner = _read(self._folder)
        if not owner or is_gone(owner):
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id(owner), signal.SIGTERM)
            while not is_gone(owner):
                if time.monotonic() > deadline:
                    os.kill(process_id(owner), signal.SIGKILL)
                    deadline += STOP_TIMEOUT_S
                time.sleep(0.02)


def _users_file(folder: Path) -> Path:
    return folder / "server.users"


def _read(folder: Path) -> tuple[str, str]:
    """The address of the server whose data are in `folder`, and its process; empty where there is none."""
    try:
        noted = json.loads((folder / "server.json").read_text("utf-8"))
        return str(noted["url"]), str(noted["owner"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def _running(folder: Path) -> str:
    """The address of the server, if one runs."""
    url, owner = _read(folder)
    return url if owner and not is_gone(owner) else ""


def serve() -> None:
    """Run the server in this process for as long as somebody uses it; its address stands in `server.json`."""
    folder = Path(os.environ["PREFECT_HOME"])
    alone = (folder / "server.lock").open("w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # another one has just been started
    os.truncate(folder / "server.log", 0)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:  # where the former one was, so that its clients find this one
        listener.bind(("127.0.0.1", int(_read(folder)[0].rpartition(":")[2].partition("/")[0])))
    except (OSError, ValueError):
        listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    os.environ["PREFECT_SERVER_UI_API_URL"] = url  # for its page; Prefect reads its settings when it is imported
    import uvicorn
    from prefect.server.api.server import create_app

    # What uvicorn says of its stopping, and of clients that it cuts off, is no news to anybody.
    server = uvicorn.Server(uvicorn.Config(create_app(final=True), log_level="critical", timeout_graceful_shutdown=2))

    def announce() -> None:
        while not server.started:
            time.sleep(0.02)
        atomic_write(folder / "server.json", json.dumps({"url": url, "owner": this_process()}))

    def stop_when_lonely() -> None:
        users = os.open(_users_file(folder), os.O_RDWR | os.O_CREAT, 0o600)
        since = None
        while True:
            time.sleep(0.5)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= LONELY_S and server.started:
                server.should_exit = True
                return  # the lock is held until the process ends: who needs a server waits, and starts the next one
            fcntl.flock(users, fcntl.LOCK_UN)

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops by it, and raises it once more at its end
    for watch in (announce, stop_when_lonely):
        threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])
    # `server.json` stays: the next server takes the same port, and that this one has ended its owner tells.


if __name__ == "__main__":
    serve()
