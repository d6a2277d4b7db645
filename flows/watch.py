"""The watcher: what comes to lie in a folder is reported once it is complete, whatever happens in between.

One thread looks, plans and reports, or hands what is complete to workers; events only tell it where to look first, a
full look finds the rest. What is done stands in the ledger, so that a start after any end goes on where the former
stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from watchfiles import watch as watch_files

from flows.crew import LEAST_A_BATCH, MOST_OUT, Crew, Handed
from flows.jobs import Lane
from flows.ledger import OPEN, Ledger
from flows.ledger.items import CHANGED, TROUBLES, Items, Tally, let_go, refusal_key
from flows.machine.mounts import network_type
from flows.machine.server import LocalServer, check_server
from flows.machine.space import MIN_FREE, Room
from flows.seeing.log import EventLog
from flows.settle import Drop, Patience, Settling, is_temporary_name
from pipelines import run
from pipelines.ingest import FileRef, Unit, load
from pipelines.reading import DeviceLostError
from pipelines.run import Job, Session, UsageError
from pipelines.run_folder import INDEX, IndexEntry, OutputError, written_by_runs
from pipelines.store import home
from pipelines.study import Rejection

BURST_S: Final = 30.0  # of work, until the index is written and other commands can have the output folder
PAUSE_S: Final = 2.0  # before another try when the disk, the ledger or the folder fails
SCAN_SHARE: Final = 5  # a full look takes at most this part of the time: 1/5

# What a file that is still being copied can look like.
_UNFINISHED: Final = """
    truncated empty-file damaged-image damaged-file damaged-archive damaged-document not-an-image not-found unreadable
    document-alone no-pixels
"""
UNFINISHED: Final = frozenset(_UNFINISHED.split())


@dataclass(frozen=True, slots=True)
class Watching:
    """How a folder is watched."""

    folder: Path
    patience: Patience = field(default_factory=Patience)
    rescan_s: float = 60.0  # between full looks where there are events
    poll: bool = False  # full looks only; always so on network file systems
    min_free: int = MIN_FREE  # bytes on the disk of the reports, below which no work is taken
    once: bool = False  # end when all that is complete is reported


@dataclass(frozen=True, slots=True)
class _AtWork:
    """A drop that workers have."""

    requests: set[str]
    files: dict[str, float]  # path -> when it had last changed
    vanished: set[str] = field(default_factory=set)  # requests whose files were not there


class Watcher:
    """Watches one folder. `run` returns after `stop`, at the end of the item that is at work."""

    def __init__(
        self,
        job: Job,
        watching: Watching,
        ledger: Ledger,
        log: EventLog,
        tell: Callable[..., None] | None = None,
        *,
        lane: Lane | None = None,
    ) -> None:
        """`lane` is that of the workers that read; without one this process does.

        Raises UsageError, PatternError and ModelError for what can be told to be wrong before any work.

        The job's inputs are the folder.  `tell` is that of `flows.ledger.items.Items`.
        """
        self._root = Path(os.path.abspath(watching.folder))
        if not self._root.is_dir():
            raise UsageError(f"There is no folder {watching.folder} to watch: make it, or check the spelling.")
        self._job, self._watching, self._ledger, self._log = replace(job, inputs=(self._root,)), watching, ledger, log
        run.check_job(self._job)
        self._patience = watching.patience
        self._out = Path(os.path.realpath(job.out))
        root = os.path.realpath(self._root)
        mine = [os.path.realpath(folder) for folder in (self._out, home())]
        mine = [folder for folder in mine if _within(folder, root) and folder != root]
        self._mine = tuple(f"{self._root}{folder.removeprefix(root)}" for folder in mine)
        self._shared = self._out == Path(root) or _within(root, str(self._out))  # reports lie among the inputs
        self._network = network_type(self._root)
        self._poll = watching.poll or bool(self._network)
        self._mounted = os.path.ismount(self._root)
        self._news: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
        self._stopping = self._deaf = False
        self._returns = 0  # of a folder that was lost
        self._settling = Settling(self._patience, ledger.seen())
        self._troubles: dict[str, str] = {}  # what is wrong now -> the sentence that was said
        self._looked = self._next_look = self._next_scan = 0.0
        self._room = Room({"reports": self._out, "state folder": home()}, watching.min_free, log)
        self._items = Items(ledger, log, job.out, watching.min_free, self._patience.interval, tell)
        self._lane = lane
        self._crew: Crew | None = None
        self._handing: list[Handed] = []  # of the drop that is looked at
        self._keys: set[str] = set()  # of all that it holds
        self._at_work: list[_AtWork] = []
        self._next_tidying = 0.0
        self._woken: dict[str, float] = {}  # request -> when its row had last changed
        self._refused: dict[str, set[str]] = {}  # file -> requests in quarantine
        self._refused_when = -1  # how many this watcher had refused by then

    @property
    def settling(self) -> int:
        """How many files are there that are not taken yet."""
        return len(self._settling.open)

    @property
    def complete(self) -> bool:
        """Whether all that is in the folder could be read, and has its report in all formats."""
        tally = self._items.tally
        closed = self._troubles.keys() & {"folders-unreadable", "folder-lost"}
        return not (tally.refused or tally.lacking or self.settling or closed)

    def stop(self) -> None:
        """Let `run` return soon. Safe in a signal handler."""
        self._stopping = True
        self._news.put(())

    def run(self) -> Tally:
        """Watch until `stop`, or with `once` until all that is complete is reported.

        Raises ModelError where the model does not load, DeviceLostError where the GPU fails, ServerError where workers
        have no server; with `once` also what else has no use in waiting for.
        """
        with contextlib.ExitStack() as stack:
            work = self._work
            if self._lane is None:
                run.load_reader(self._job.model, self._job.device)
            else:
                server = stack.enter_context(LocalServer())
                url = server.url()
                if self._watching.once:
                    check_server(url)
                self._crew = Crew(self._job, self._ledger, server, self._log)
                member = stack.enter_context(Session(self._job, member=True))
                work = functools.partial(self._work_with_crew, self._crew, member)
            return self._watch(work)

    def _watch(self, work: Callable[[], None]) -> Tally:
        handed = self._ledger.hand_over()
        polling = str(self._poll).lower()
        self._log("watching", known=len(self._settling), handed_over=handed, polling=polling, pid=os.getpid())
        with self._events():
            while not self._stopping:
                try:
                    self._look()
                    work()
                    self._fine("broken")
                except TROUBLES as error:
                    if self._watching.once or isinstance(error, DeviceLostError):  # another process may use it
                        raise
                    self._trouble("broken", f"{error}", code=error.code)
                    self._wait(PAUSE_S)
                if self._watching.once and self._at_end():
                    break
                self._wait(self._patience.interval)
        left = len(self._settling.open)  # what is not complete, or to be tried again
        self._log("stopped", **asdict(self._items.tally), left=left)
        return self._items.tally

    def _at_end(self) -> bool:
        """With `once`: whether nothing is left that may be taken. Raises OutputError when the disk forbids to."""
        if self._room.words:
            raise OutputError(self._room.words)
        return not (self._crew or self._settling.unsettled() or self._settling.ready(time.time()))

    # Looking

    def _look(self) -> None:
        """See what has changed: where events say, at files that are not taken, and now and then everywhere."""
        now = time.time()
        if now < self._looked:  # else nothing would be due until the clock is there again
            self._settling.turned_back(self._looked - now)
            self._next_look = self._next_scan = 0.0
        self._looked = now
        if not self._there():
            return
        news: set[str] = set()
        with contextlib.suppress(queue.Empty):
            while True:
                news.update(self._news.get_nowait())
        inside: dict[str, bool] = {}
        for path in news - {str(self._root)}:
            self._look_at(path, now, inside)
        if now < self._next_look:
            return
        self._next_look = now + self._patience.interval
        if now >= self._next_scan:
            self._look_everywhere(now)
            return
        for path in self._settling.open - news:
            self._look_at(path, now, inside)

    def _look_at(self, path: str, now: float, inside: dict[str, bool]) -> None:
        """A file, or all files of a folder, that may be new, changed or gone.

        Links are never followed: a folder that others can write to must not be a door to the rest of the machine.
        `inside` remembers of folders whether the way to them is without links.
        """
        folder = os.path.dirname(path)
        if folder not in inside:
            inside[folder] = os.path.realpath(folder) == self._real(folder)
        if not inside[folder] or self._is_none_of_ours(path):
            return
        try:
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                for file, its in _walk(path, self._is_none_of_ours, []):
                    self._see(file, its, now)
            elif stat.S_ISREG(info.st_mode):
                self._see(path, info, now)
        except (FileNotFoundError, NotADirectoryError):
            if not self._there():  # it was lost meanwhile, with all that it holds
                return
            known = path in self._settling
            self._gone([path] if known else [each for each in self._settling.paths() if _within(each, path)])
        except OSError:  # the full look says so, if it lasts
            self._next_scan = min(self._next_scan, now + PAUSE_S)

    def _look_everywhere(self, now: float) -> None:
        started = time.monotonic()
        unreadable: list[str] = []
        met = set()
        for path, info in _walk(str(self._root), self._is_none_of_ours, unreadable):
            met.add(path)
            self._see(path, info, now)
        if not self._there():  # it was lost meanwhile: what was not met need not be gone
            return
        closed = tuple(f"{folder}/" for folder in unreadable)
        self._gone([path for path in self._settling.paths() if path not in met and not path.startswith(closed)])
        self._say_if(
            "folders-unreadable", bool(unreadable), f"{len(unreadable)} folders cannot be read: check their rights."
        )
        words = (
            "The system sends no events (its limit of watches may be reached): everything is looked at all the time."
        )
        self._say_if("no-events", self._deaf, words)
        self._wake_failed(now)
        pause = self._patience.interval if self._poll or self._deaf else self._watching.rescan_s
        self._next_scan = now + max(pause, SCAN_SHARE * (time.monotonic() - started))

    def _see(self, path: str, info: os.stat_result, now: float) -> None:
        # The time of the last change of the entry is that of the copying, where the clock is our own.
        arrived = now if self._network and not self._watching.once else info.st_ctime
        # Another file may have come with the same size and time. What a network file system says of that is no rule.
        stamp = info.st_mtime_ns if self._network else max(info.st_mtime_ns, info.st_ctime_ns)
        self._settling.look(path, info.st_size, stamp, now, arrived)

    def _gone(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._settling.gone(path)
        if paths:
            self._ledger.unsee(paths)

    def _is_none_of_ours(self, path: str) -> bool:
        """Temporary and hidden names, and what runs write."""
        inside = path.removeprefix(f"{self._root}/").split("/")
        if any(map(is_temporary_name, inside)) or any(_within(path, mine) for mine in self._mine):
            return True
        return self._shared and written_by_runs(self._out, path)

    def _real(self, folder: str) -> str:
        return os.path.realpath(self._root) + folder.removeprefix(str(self._root))

    def _wake_failed(self, now: float) -> None:
        """Items to be tried again, or whose owner died; those whose content is gone are no items any more."""
        self._heal_reports(now)
        before, self._woken = self._woken, {}
        for row in [row for state in OPEN for row in self._ledger.rows(state)]:
            if not self._ledger.is_due(row):
                continue
            here = [path for path in row.files if os.path.lexists(path)]
            gone = row.files and not here and row.files[0].startswith(f"{self._root}/")
            # Its files were planned since it was woken, and are something else by now.
            replaced = before.get(row.request) == row.changed and all(map(self._settling.is_taken, row.files))
            if gone or replaced:
                self._ledger.forget([row.request])
                self._log("vanished", item=row.request[:16])
            else:
                self._woken[row.request] = row.changed
                self._settling.again([path for path in here if path not in self._settling.open], now)

    def _heal_reports(self, now: float) -> None:
        """Let everything be reported anew whose reports went with the output folder."""
        if os.path.exists(self._out / INDEX) or not self._room():
            return
        if lost := self._ledger.rows("done"):
            files = [path for row in lost for path in row.files]
            self._ledger.retry(row.request for row in lost)
            self._settling.again([path for path in files if path not in self._settling.open], now)
            self._log("reports-lost", items=len(lost), message="The output folder has no index: all is reported anew.")

    def _there(self) -> bool:
        """Whether the folder is there: a share that is not mounted any more must not look like an empty folder."""
        try:
            os.scandir(self._root).close()
            there = os.path.ismount(self._root) or not self._mounted
        except OSError:
            there = False
        self._returns += there and "folder-lost" in self._troubles
        self._say_if("folder-lost", not there, "The watched folder is not there: waiting until it is back.")
        if not there:
            self._next_scan = 0.0
        return there

    @contextlib.contextmanager
    def _events(self) -> Iterator[None]:
        """What the system says has changed comes into `_news`, for as long as the block runs."""
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                returns, listening = self._returns, False
                try:
                    for changes in watch_files(
                        self._root,
                        watch_filter=None,
                        debounce=200,
                        step=50,
                        stop_event=over,
                        rust_timeout=int(PAUSE_S * 1000),
                        yield_on_timeout=True,
                        raise_interrupt=False,
                        force_polling=False,
                    ):
                        if not listening:  # what changed before is for a full look to find
                            listening, self._next_scan = True, 0.0
                        self._deaf = False
                        self._news.put(tuple({path for _, path in changes}))
                        if "folder-lost" in self._troubles or returns != self._returns:
                            break  # what comes back is another folder to the system
                except Exception:  # no folder, or too many for the system
                    self._deaf = True
                    self._next_scan = 0.0
                over.wait(PAUSE_S)

        if not self._poll:
            threading.Thread(target=listen, name="events", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _wait(self, seconds: float) -> None:
        """Until there is news, but at most so long."""
        with contextlib.suppress(queue.Empty):
            self._news.put(self._news.get(timeout=seconds))

    # Working

    def _work(self) -> None:
        """Report what is complete."""
        drop = self._settling.ready(time.time())
        stale = not self._tidied()
        if (drop is None and not stale) or "folder-lost" in self._troubles or not self._room():
            return
        until = time.monotonic() + BURST_S
        with Session(self._job) as session:
            while drop is not None and not self._stopping and time.monotonic() < until and self._room():
                self._take(session, drop)
                self._look()
                drop = None if "folder-lost" in self._troubles else self._settling.ready(time.time())
            session.finish()

    def _work_with_crew(self, crew: Crew, session: Session) -> None:
        """Let workers report what is complete, and take what they have done. `session` is one beside theirs."""
        session.refresh()
        self._collect(crew, session)
        until = time.monotonic() + BURST_S
        drop = self._settling.ready(time.time())
        while drop is not None and not self._stopping and time.monotonic() < until and len(crew) < MOST_OUT:
            if "folder-lost" in self._troubles or not self._room():
                break
            self._take(session, drop)
            self._look()
            drop = self._settling.ready(time.time())
        if not self._tidied() and (not crew or time.monotonic() > self._next_tidying):
            self._next_tidying = time.monotonic() + BURST_S
            with Session(self._job) as owner:
                owner.finish()

    def _collect(self, crew: Crew, session: Session) -> None:
        """What workers have settled is taken, unless it has changed since."""
        settled = crew.settled()
        if settled:
            session.refresh()
        for handed, row in settled:
            item = handed.request[:16]
            replaced = row is not None and row.code == CHANGED and session.request(handed.unit) != handed.request
            for drop in self._at_work:
                if handed.request in drop.requests and (row is None or replaced):
                    drop.vanished.add(handed.request)
                drop.requests.discard(handed.request)
            if row is None:
                self._log("vanished", item=item)
            elif replaced:
                let_go(self._ledger, self._log, self._out, handed.request)
            elif row.state == "done":
                self._items.tally.reported += 1
                self._items.tally.lacking += session.reported(handed.request) is None
                self._log("done", item=item, report=row.report)
            else:
                self._items.tally.refused += 1
                self._log("refused", item=item, code=row.code)
        for drop in [each for each in self._at_work if not each.requests]:
            same = [path for path, changed in drop.files.items() if self._settling.changed(path) == changed]
            if drop.vanished:  # not seen: on a share that comes back they are taken anew
                self._settling.again(same, time.time() + self._patience.interval)
            else:
                self._ledger.see(self._settling.take(same))
            self._at_work.remove(drop)

    def _hand_out(self, paths: Sequence[str]) -> None:
        """Let workers have the units of a drop; its files are at work until these are settled."""
        assert self._crew is not None and self._lane is not None
        new = [each for each in self._handing if each.request not in self._crew]
        for start in range(0, len(new), LEAST_A_BATCH):
            self._crew.give(new[start : start + LEAST_A_BATCH], self._lane)
        requests = {each.request for each in self._handing}
        self._at_work.append(_AtWork(requests, {path: self._settling.changed(path) for path in paths}))
        self._settling.again(paths, math.inf)

    def _tidied(self) -> bool:
        """Whether the pages over the whole folder are written; a former process may have died before that."""
        page = self._job.out / "index.html"
        try:
            return page.stat().st_mtime_ns >= (self._job.out / INDEX).stat().st_mtime_ns
        except FileNotFoundError:
            return not (self._job.out / INDEX).exists()

    def _take(self, session: Session, drop: Drop) -> None:
        """Report a drop and put it on record; what fails for now is taken later."""
        plan = session.plan(drop.inputs, named=False) if drop.inputs else None
        later: dict[str, float] = {}
        refused: list[tuple[Rejection, Path]] = []
        for rejection in plan.rejections if plan else ():
            if rejection.code == "missing-from-file-set":  # it comes after its DICOMDIR, and is read by itself then
                continue
            path = next((each for each in drop.inputs if _names(each, rejection.path)), drop.inputs[0])
            if when := self._unfinished(rejection, [str(path)]):
                later[str(path)] = when
            else:
                refused.append((rejection, path))
        if drop.study and later:  # a slice that is still being copied
            self._settling.again(drop.new, max(later.values()))
            return
        session.start([Path(path) for path in drop.new], [rejection for rejection, _ in refused])
        units = list(plan.units) if plan else []
        self._handing, self._keys = [], set()
        try:
            while refused and not self._stopping:
                self._refuse(session, *refused[0], later)
                del refused[0]
            while units and not self._stopping:
                files = list(dict.fromkeys(str(file.path) for file in units[0].files))
                if later.keys().isdisjoint(files) and (when := self._report(session, units[0], files)):
                    later |= dict.fromkeys([*files, *(str(each.path) for each in units[0].documents)], when)
                del units[0]
        finally:  # what is settled stays so, whatever broke off the rest
            undone = {str(file.path) for unit in units for file in (*unit.files, *unit.documents)}
            undone |= {str(path) for _, path in refused}
            if drop.study and (later or undone):
                later, self._handing = dict.fromkeys(drop.new, max(later.values(), default=0.0)), []
            for file, when in later.items():
                self._settling.again([file], when)
            left = [path for path in drop.new if path not in later and path not in undone]
            if not (later or undone):
                self._clear_quarantine(left)
            if self._handing:
                self._hand_out(left)
            else:
                self._ledger.see(self._settling.take(left))

    def _refuse(self, session: Session, rejection: Rejection, path: Path, later: dict[str, float]) -> None:
        """An input that its header or content rules out goes to quarantine like one that cannot be decoded."""
        key = refusal_key(rejection, path)
        self._keys.add(key)
        when = self._items.settle(session, key, [str(path)], lambda: session.conclude(rejection))
        if when:
            later[str(path)] = when

    def _report(self, session: Session, unit: Unit, files: list[str]) -> float | None:
        """Report a unit; the time at which to come back to it, or None where that is settled."""
        request = session.request(unit)
        key = request or refusal_key(Rejection(unit.path, "unreadable", "", ""), unit.files[0].path)
        self._keys.add(key)
        session.met(unit, request)
        if self._crew is not None and request:
            return self._prepare_for_crew(session, unit, request, files)
        held: list[float] = []

        def work() -> IndexEntry | Rejection | None:
            prepared = session.prepare(unit)
            if isinstance(prepared, Rejection) and (when := self._unfinished(prepared, files)):
                held.append(when)
                return None
            return session.conclude(prepared)

        when = self._items.settle(session, key, files, work, lambda: session.request(unit))
        return held[0] if held else when

    def _clear_quarantine(self, paths: Sequence[str]) -> None:
        """What the files of a drop held before is gone: if that was refused, it is in quarantine no more."""
        if self._refused_when != self._items.tally.refused:
            self._refused_when, self._refused = self._items.tally.refused, {}
            for row in self._ledger.rows("quarantined"):
                for path in row.files:
                    self._refused.setdefault(path, set()).add(row.request)
        for request in {each for path in paths for each in self._refused.get(path, ())}.difference(self._keys):
            former = self._ledger.get(request)
            if former and former.state == "quarantined" and not set(former.files).difference(paths):
                let_go(self._ledger, self._log, self._out, request)

    def _prepare_for_crew(self, session: Session, unit: Unit, request: str, files: list[str]) -> float | None:
        """Have a unit handed out, if it opens; otherwise the time at which to come back to it."""
        if self._items.settled(session, request, files):
            return None
        seen = load(unit)
        if isinstance(seen, Rejection) and (when := self._unfinished(seen, files)):
            return when
        self._handing.append(Handed(request, tuple(files), unit))
        return None

    def _unfinished(self, why: Rejection, files: list[str]) -> float | None:
        """When to look again at files that may still be in the middle of being copied; None when that took too long."""
        now = time.time()
        age = now - max(map(self._settling.changed, files))
        if why.code not in UNFINISHED or age >= self._patience.refuse_after:
            return None
        return now + min(max(age / 2, self._patience.interval), self._patience.refuse_after - age)

    # Saying

    def _say_if(self, event: str, wrong: bool, words: str) -> None:
        self._trouble(event, words) if wrong else self._fine(event)

    def _trouble(self, event: str, words: str, **facts: str) -> None:
        """Say what is wrong, once."""
        if self._troubles.get(event) != words:
            self._troubles[event] = words
            self._log(event, message=words, **facts)

    def _fine(self, event: str) -> None:
        """Say that what was wrong is not any more."""
        if self._troubles.pop(event, None):
            self._log(f"{event}-over")


def _walk(folder: str, leave_out: Callable[[str], bool], unreadable: list[str]) -> Iterator[tuple[str, os.stat_result]]:
    """All regular files below a folder. What vanishes meanwhile is left out, folders that cannot be read are named."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    except OSError:
        unreadable.append(folder)
        return
    for entry in entries:
        if leave_out(entry.path):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, leave_out, unreadable)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path, entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError:  # a folder that can be listed and not entered; a share that is failing
            unreadable.append(folder)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _names(path: Path, name: str) -> bool:
    """Whether a rejection's path is that file, or a member or page of it."""
    own = FileRef(str(path)).name
    return name == own or name.startswith(f"{own}!")
