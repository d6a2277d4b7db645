"""The worker: a process for each device that holds the model, and reads the batches that flows hand to the server.

Prefect brings the batches (a background task for each lane); the ledger says which units in them are still to be done,
and who has them. It runs until it is told to stop, whatever happens to the server meanwhile. On a GPU it has several
batches at a time: while the reports of one are written, the units of the next are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, ParamSpec

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.client.subscriptions import Subscription
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_worker import TaskWorker

from flows.crew import Handed, workers
from flows.jobs import LANES, Lane, from_plain
from flows.ledger import Ledger
from flows.ledger.items import TROUBLES, Items, Tally
from flows.machine.server import LocalServer, state_folder, waiting_for_server
from flows.machine.space import MIN_FREE, Room
from flows.seeing.log import EventLog
from pipelines import run
from pipelines.desk import may_be_gpu
from pipelines.reading import DeviceLostError
from pipelines.run import Session
from pipelines.store import home
from reports.writing import fault

PAUSE_S: Final = 2.0  # before another try when the server or the ledger fails
BATCHES_ON_A_GPU: Final = 4  # at a time; on a CPU, where model and files share the cores, it is one

_P = ParamSpec("_P")


class DeviceTakenError(Exception):
    """Another worker has the device."""

    code = "device-taken"


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker is told."""

    device: str = "auto"
    model: str = "default"  # loaded at the start; a batch may ask for another
    ledger: str | None = None  # URL
    wait: bool = False  # for the device, where another worker has it
    min_free: int = MIN_FREE  # bytes on the disks of reports and state, below which nothing is taken


@dataclass(slots=True)
class _Desk:
    """What a worker has open for one job."""

    plain: dict[str, Any]
    session: Session
    ledger: Ledger
    items: Items
    room: Room
    at_work: int = 0  # batches
    failed: bool = False  # nothing new begins here

    def close(self) -> None:
        self.session.__exit__(None, None, None)
        self.ledger.__exit__(None, None, None)


class Worker:
    """Serves batches on one device. `run` returns after `stop`, at the end of the items that are at work."""

    def __init__(self, work: Work, log: EventLog, tell: Callable[..., None] | None = None) -> None:
        """`tell` as for `flows.ledger.items.Items`."""
        self._work, self._log, self._tell = work, log, tell
        self._device = ""
        self._stopping = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._desk: _Desk | None = None  # all batches at a time are of one job
        self._coming: deque[object] = deque()  # batches that have no place yet, as they came
        self._server_lost = False
        self._lost: DeviceLostError | None = None
        self.tally = Tally()

    def stop(self) -> None:
        """Let `run` return soon. Safe in a signal handler."""
        self._stopping.set()
        if (desk := self._desk) is not None:
            desk.session.stop()

    def run(self) -> Tally:
        """Serve until `stop`.

        Raises ModelError, DeviceTakenError, DeviceLostError, and ServerError where none comes up at the start.
        """
        self._device = run.device_name(self._work.device)
        with LocalServer() as server, self._only_one():
            if not self._stopping.is_set():
                self._work_until_stopped(server)
        self._log("stopped", **asdict(self.tally))
        return self.tally

    def _work_until_stopped(self, server: LocalServer) -> None:
        global _worker
        run.load_reader(self._work.model, self._device)  # while the server starts
        url = server.url()
        _worker = self
        thread = threading.Thread(target=self._serve, args=(url,), name="serve", daemon=True)
        thread.start()
        while not self._stopping.wait(PAUSE_S):
            server.keep()
        with self._changed:
            self._changed.wait_for(self._is_free)
            self._close()
        thread.join(PAUSE_S)
        if self._lost is not None:
            raise self._lost

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """One worker a device of this machine. Raises DeviceTakenError, or waits for the device."""
        folder = state_folder() / "devices"
        folder.mkdir(mode=0o700, exist_ok=True)
        key = run.device_key(self._device)  # two processes that may use one GPU each both call it cuda:0
        with (folder / f"{key.replace(':', '-')}.lock").open("a+") as file:
            said = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    file.seek(0)
                    other = file.read().strip()
                    if not self._work.wait:
                        raise DeviceTakenError(
                            f"Another worker (process {other}) has the device {self._device}: stop it, name another "
                            "--device, or give --wait to take over when it ends."
                        ) from None
                    if not said:
                        self._log("waiting-for-device", device=self._device, process=other)
                    said = True
                    if self._stopping.wait(PAUSE_S):
                        yield  # without the device
                        return
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def _serve(self, url: str) -> None:
        """Take batches from the server until the worker stops; a server that is lost is waited for."""
        with temporary_settings({PREFECT_API_URL: url}):
            while not self._stopping.is_set():
                try:
                    asyncio.run(self._subscribe(url))
                except Exception as error:  # of the network; Prefect has many types for it
                    self._say_lost(url, type(error).__name__)
                self._stopping.wait(PAUSE_S)

    async def _subscribe(self, url: str) -> None:
        at_once = BATCHES_ON_A_GPU if may_be_gpu(self._device) else 1
        served, known = TaskWorker(*TASKS.values(), limit=at_once), False
        serving = asyncio.create_task(_take_from(url, served, at_once))
        answered = time.monotonic()
        next_look = 0.0
        while not serving.done() and not self._stopping.is_set():
            await asyncio.sleep(0.2)
            if (now := time.monotonic()) < next_look:
                continue
            present = await asyncio.to_thread(workers, url)
            if present is None:  # a subscription tries again by itself, and says nothing
                if now - answered > 2 * PAUSE_S:
                    self._say_lost(url)
                continue
            answered = now
            if self._server_lost:
                self._server_lost = False
                self._log("server-lost-over")
            if not known and (known := served.client_id in present):
                self._log("serving", device=self._device, pid=os.getpid())
            next_look = now + PAUSE_S if known else now
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    def _say_lost(self, url: str, error: str | None = None) -> None:
        if not self._server_lost:
            self._server_lost = True
            self._log("server-lost", message=waiting_for_server(url), error=error)

    def take(self, plain: dict[str, Any], batch: Sequence[Handed]) -> None:
        """Work on what of a batch is to be done. Several threads may be in here at a time."""
        try:
            with self._at_desk(plain) as desk:
                while desk and not desk.room() and not self._stopping.is_set():
                    self._stopping.wait(PAUSE_S)
                if desk and not self._stopping.is_set():
                    desk.session.refresh()
                    desk.items.settle_together(desk.session, [(b.request, list(b.files), b.unit) for b in batch])
        except Exception as error:
            known = isinstance(error, TROUBLES)
            self._log("broken", message=str(error) if known else fault(error), code=getattr(error, "code", "fault"))
            if isinstance(error, DeviceLostError):
                self._lost = error
                self.stop()
            self._stopping.wait(PAUSE_S)
            raise

    @contextlib.contextmanager
    def _at_desk(self, plain: dict[str, Any]) -> Iterator[_Desk | None]:
        """The desk for a job, opened when batches of another job, or those of one that failed, are done.

        None when the worker stops.  Nobody overtakes one who waits for that: it may be more urgent.
        """
        me = object()
        with self._changed:
            self._coming.append(me)
            self._changed.wait_for(lambda: self._coming[0] is me and (self._is_free() or self._serves(plain)))
            self._coming.popleft()
            self._changed.notify_all()
            if self._stopping.is_set():
                yield None
                return
            if not self._serves(plain):
                self._close()
                self._desk = self._open(plain)
            desk = self._desk
            assert desk is not None
            desk.at_work += 1
        try:
            yield desk
        except Exception:
            desk.failed = True
            raise
        finally:
            with self._changed:
                desk.at_work -= 1
                if desk.failed and self._is_free():
                    self._close()
                self._changed.notify_all()

    def _is_free(self) -> bool:
        return self._desk is None or not self._desk.at_work

    def _serves(self, plain: dict[str, Any]) -> bool:
        """Whether a batch of that job may begin at the desk that is open."""
        return self._desk is not None and self._desk.plain == plain and not self._desk.failed

    def _open(self, plain: dict[str, Any]) -> _Desk:
        job = replace(from_plain(plain), device=self._device)
        ledger = Ledger(job.out, self._work.ledger)
        items = Items(ledger, self._log, job.out, self._work.min_free, PAUSE_S, self._tell, self.tally)
        room = Room({"reports": job.out, "state folder": home()}, self._work.min_free, self._log)
        return _Desk(plain, Session(job, member=True), ledger, items, room)

    def _close(self) -> None:
        if self._desk is not None:
            desk, self._desk = self._desk, None
            desk.close()


async def _take_from(url: str, served: TaskWorker, at_once: int) -> None:
    """Take so many batches from the server at a time, and one more whenever one is done.

    `TaskWorker.start` takes a further one before there is a place for it; when it is killed, that one is lost. Here the
    server sends it as early, but has no receipt for it, and gives it to another worker when this one is gone.
    """
    keys = [TASKS[lane].task_key for lane in LANES]  # the server looks for work in this order
    running: set[asyncio.Task[None]] = set()
    subscription = Subscription(TaskRun, "/task_runs/subscriptions/scheduled", keys, served.client_id, url)
    async with served:
        try:
            async for each in subscription:
                running.add(asyncio.create_task(served.execute_task_run(each)))
                if len(running) == at_once:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:  # before the last are done: what the server has sent beyond them goes to another worker
            with contextlib.suppress(RuntimeError):  # it is not connected
                await subscription.websocket.close()


_worker: Worker | None = None  # of this process


def _take(plain: dict[str, Any], batch: Sequence[Handed]) -> None:
    if _worker is None:
        raise RuntimeError("no worker runs in this process")
    _worker.take(plain, batch)


def _anywhere(function: Callable[_P, None]) -> Callable[_P, None]:
    """Prefect knows a task by a hash of its function, the path of this file included: the same on all machines now."""
    function.__code__ = function.__code__.replace(co_filename="flows/worker.py")
    return function


@task(name="scanscribe-urgent", cache_policy=NO_CACHE, persist_result=False)
@_anywhere
def urgent(plain: dict[str, Any], batch: Sequence[Handed]) -> None:
    """A batch that goes before all others."""
    _take(plain, batch)


@task(name="scanscribe-normal", cache_policy=NO_CACHE, persist_result=False)
@_anywhere
def normal(plain: dict[str, Any], batch: Sequence[Handed]) -> None:
    """A batch."""
    _take(plain, batch)


@task(name="scanscribe-off-peak", cache_policy=NO_CACHE, persist_result=False)
@_anywhere
def off_peak(plain: dict[str, Any], batch: Sequence[Handed]) -> None:
    """A batch for when there is nothing else to do."""
    _take(plain, batch)


TASKS: Final[dict[Lane, Any]] = {"urgent": urgent, "normal": normal, "off-peak": off_peak}
