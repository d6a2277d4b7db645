"""Chaos around everything that makes reports: a watcher, a batch flow with workers, exports, and a server, all of which
are killed at random while inputs come in; and what must hold in the end.

    SCANSCRIBE_CHAOS_SEED=7 .venv/bin/python -m pytest tests/test_chaos.py -m chaos

The seed decides what is dropped, in which way and order, and who is killed when; a failing run prints it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from flows.ledger import Ledger
from flows.machine.owners import is_gone, process_id
from reports.bundle import load_bundle
from reports.files import is_temporary
from tests.phantom import phantom_slices
from tests.tiny_reader import CURSED

ROOT = Path(__file__).parents[1]
SLICES = 4
FORMATS = "json,html,csv"
NO_FULL_DISK = (
    "THE DISK IS NOT FILLED in this storm: no tmpfs can be mounted here (run it as root, with CAP_SYS_ADMIN)."
)


@dataclass
class Inputs:
    """What is put before a service, and what must become of it."""

    whole: dict[str, str] = field(default_factory=dict)  # content (of the first file) -> name
    broken: dict[str, str] = field(default_factory=dict)  # content -> name
    count: int = 0  # with copies


class Dropper:
    """Puts inputs into a folder as bad shares, scanners and people do."""

    def __init__(self, folder: Path, chance: random.Random, away: Path) -> None:
        self.folder, self.chance, self.away = folder, chance, away
        self.inputs = Inputs()
        self.slices = phantom_slices()[:SLICES]
        folder.mkdir(parents=True, exist_ok=True)
        away.mkdir(parents=True, exist_ok=True)

    def drop(self, count: int, first: int, *, pause: float) -> None:
        """About one in ten is a CT study, one in ten is broken, one in twelve a copy, a few make the model fail."""
        for number in range(first, first + count):
            kind = self.chance.random()
            if kind < 0.1:
                self._study(number)
            else:
                self._picture(number, broken=kind < 0.2, cursed=0.2 <= kind < 0.205)
            self.inputs.count += 1
            if kind > 0.92 and self.inputs.whole:
                self._copy(number)
            time.sleep(self.chance.random() * pause)

    def _picture(self, number: int, *, broken: bool, cursed: bool) -> None:
        pixels = np.random.default_rng(number).integers(14, 200, (40, 60), np.uint8)
        pixels[0, 0] = CURSED if cursed else 0
        made = self.away / f"{number:05}.png"
        Image.fromarray(pixels).save(made)
        data = made.read_bytes()
        data = data[: len(data) * 2 // 3] if broken else data
        made.write_bytes(data)
        (self.inputs.broken if broken or cursed else self.inputs.whole)[_hash(data)] = made.name
        self._place(made, self.folder / f"{number % 7}" / made.name)

    def _study(self, number: int) -> None:
        order = list(range(SLICES))
        self.chance.shuffle(order)
        folder = self.folder / f"study-{number:05}"
        for place in order:
            each: Dataset = self.slices[place]
            uid = f"1.2.{number + 1}"
            each.StudyInstanceUID, each.SeriesInstanceUID, each.ImagesInAcquisition = uid, f"{uid}.1", SLICES
            each.SOPInstanceUID = each.file_meta.MediaStorageSOPInstanceUID = f"{uid}.1.{place + 1}"
            made = self.away / f"{number:05}-{place}.dcm"
            each.save_as(made, enforce_file_format=True)
            if place == 0:
                self.inputs.whole[_hash(made.read_bytes())] = folder.name
            self._place(made, folder / f"{place}.dcm")

    def _copy(self, number: int) -> None:
        names = [name for name in self.inputs.whole.values() if name.endswith(".png")]
        if names and (found := list(self.folder.glob(f"*/{self.chance.choice(names)}"))):
            self.inputs.count += 1
            self._place(
                Path(shutil.copy(found[0], self.away / f"copy-{number:05}.png")), self.folder / f"copy-{number}.png"
            )

    def _place(self, made: Path, place: Path) -> None:
        """By rename, by a temporary name, or in slow chunks."""
        place.parent.mkdir(parents=True, exist_ok=True)
        way = self.chance.randrange(3)
        while True:
            try:
                if way == 0:
                    os.replace(made, place)
                elif way == 1:
                    shutil.copyfile(made, place.with_name(f"{place.name}.part"))
                    os.replace(place.with_name(f"{place.name}.part"), place)
                else:
                    data = made.read_bytes()
                    cuts = sorted(self.chance.randrange(len(data)) for _ in range(2))
                    with place.open("wb", buffering=0) as file:
                        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                            file.write(data[start:end])
                            time.sleep(self.chance.random() * 0.03)
                made.unlink(missing_ok=True)
                return
            except OSError:  # the disk is full: whoever copies tries again
                time.sleep(0.2)


class Supervised:
    """A command that is started again whenever it ends, until it is stopped or says that it is done."""

    def __init__(
        self, name: str, command: list[str], folder: Path, environment: dict[str, str], done: tuple[int, ...]
    ) -> None:
        self.name, self.command, self.environment, self.done = name, command, environment, done
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.finished, self.starts, self.codes = False, 0, Counter[int]()

    def tend(self) -> None:
        """Start it if it does not run."""
        if self.finished or (self.process and self.process.poll() is None):
            return
        if self.process:
            self.codes[self.process.returncode] += 1
            if self.process.returncode in self.done:
                self.finished = True
                return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.watcher_process", *self.command],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.starts += 1

    def kill(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        return True

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self.process.kill()
            self.process.wait()


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[bool]:
    """A disk of its own at `folder`, where this user may mount one; whether it could."""
    folder.mkdir(parents=True)
    mounted = (
        os.getuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    )
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=False)


class Chaos:
    """One run of it. All files are below `root`; the reports and the state may be on a small disk."""

    def __init__(
        self,
        root: Path,
        seed: int,
        *,
        inputs: int,
        kills: int,
        poll: bool,
        crew: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """With `crew` the watcher has workers read, too, several batches at a time, as on a GPU; a second one waits for
        the first one's device."""
        self.root, self.seed, self.inputs, self.kills, self.poll, self.say = root, seed, inputs, kills, poll, say
        self.crew = crew
        self.chance = random.Random(seed)
        self.disk = root / "disk"
        self.watched, self.batched = root / "inbox", root / "archive"
        self.out_watched, self.out_batched = self.disk / "watched", self.disk / "batched"
        self.killed = Counter[str]()
        self.was_full = False  # the disk, for a while
        self.began = time.monotonic()

    def run(self, patience: float) -> None:
        """Raises AssertionError with the seed where something was lost, done twice or torn.

        Where no small disk can be mounted, it is not filled: a warning says so.
        """
        mib = 160 + self.inputs // 4
        with small_disk(self.disk, mib) as mounted:
            if not mounted:
                warnings.warn(NO_FULL_DISK, stacklevel=2)
            try:
                self._run(patience, fill=mounted)
            except AssertionError as error:
                raise AssertionError(f"seed {self.seed}, after {self.elapsed}: {error}") from error
            finally:
                if mounted and sys.exc_info()[0]:  # to be looked at
                    shutil.copytree(self.disk, self.root / "kept", dirs_exist_ok=True, symlinks=True)

    @property
    def elapsed(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s"

    def _run(self, patience: float, *, fill: bool) -> None:
        home = self.disk / "home"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "SCANSCRIBE"))
        }
        environment |= {"SCANSCRIBE_HOME": str(home), "TINY_READER_SECONDS": "0.005"}
        environment |= {"TINY_READER_GPU": "1"} if self.crew else {}
        half = self.inputs // 2
        dropping = Dropper(self.watched, random.Random(self.seed + 1), self.root / "away-1")
        filling = Dropper(self.batched, random.Random(self.seed + 2), self.root / "away-2")
        filling.drop(self.inputs - half, 10**6, pause=0.0)
        free = ["--min-free", "8"]
        watch = ["watch", str(self.watched), "--out", str(self.out_watched), "--formats", FORMATS, *free]
        watch += ["--interval", "0.1", "--looks", "2", "--quiet", "5", "--refuse-after", "8", "--rescan", "3"]
        batch = ["batch", str(self.batched), "--out", str(self.out_batched), "--formats", FORMATS, "--workers"]
        watch += ["--poll"] * self.poll + ["--workers"] * self.crew
        work = ["worker", "--device", "cpu", *free]
        services = [
            Supervised("watch", watch, self.root, environment, ()),
            Supervised("worker", work, self.root, environment, ()),
            Supervised("flow", batch, self.root, environment, (0, 1)),
            Supervised("export", ["export", str(self.out_watched), "--formats", "md,csv"], self.root, environment, ()),
        ]
        if self.crew:
            services.append(Supervised("heir", [*work, "--wait"], self.root, environment, ()))
        thread = threading.Thread(target=dropping.drop, args=(half, 0), kwargs={"pause": 0.04})
        thread.start()
        until = time.monotonic() + patience
        try:
            self._kill(services, home, until, fill=fill)
            thread.join(max(until - time.monotonic(), 1))
            assert not thread.is_alive(), "the inputs are not all there in time"
            _, _, flow, exporting, *_ = services
            exporting.end()
            services.remove(exporting)
            while not (flow.finished and self._settled(home, dropping.inputs)):
                assert time.monotonic() < until, f"not settled in time: {self._counts(home)}"
                for each in services:
                    each.tend()
                time.sleep(0.5)
            self.say(f"seed {self.seed}: settled after {self.elapsed}; killed {dict(self.killed)}")
        finally:
            for each in services:
                each.end()
        for out in (self.out_watched, self.out_batched):
            export = ["export", str(out), "--formats", "md,csv"]
            last = Supervised("last", export, self.root, environment, (0,))
            last.tend()
            assert last.process and last.process.wait(300) == 0, "the last export failed"
        with _state(home):
            check(self.out_watched, dropping.inputs, quarantine=True)
            check(self.out_batched, filling.inputs, quarantine=False)

    def _kill(self, services: list[Supervised], home: Path, until: float, *, fill: bool) -> None:
        """Kill one of them after the other, and fill the disk once, while the others go on."""
        fill_at = self.kills // 2 if fill else -1
        while sum(self.killed.values()) < self.kills:
            assert time.monotonic() < until, f"only {dict(self.killed)} could be killed in time"
            for each in services:
                each.tend()
            time.sleep(self.chance.uniform(0.5, 10.0 if self.inputs > 100 else 3.0))
            if sum(self.killed.values()) == fill_at:
                fill_at = -1
                self._fill_disk(services)
            heirs = ["heir"] * self.crew
            target = self.chance.choice(["watch", "watch", "worker", "worker", *heirs, "flow", "server", "export"])
            if target == "server":
                self.killed["server"] += kill_server(home)
                continue
            [each] = [each for each in services if each.name == target]
            self.killed[target] += each.kill()

    def _fill_disk(self, services: list[Supervised]) -> None:
        """To the last byte, for a while."""
        ballast = self.disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        full = shutil.disk_usage(self.disk).free
        end = time.monotonic() + (15 if self.inputs > 100 else 5)
        while time.monotonic() < end:
            for each in services:
                each.tend()
            time.sleep(0.5)
        ballast.unlink()
        self.was_full = True
        self.say(f"seed {self.seed}: the disk was full ({full} bytes free) until {self.elapsed}")

    def _settled(self, home: Path, inputs: Inputs) -> bool:
        with _state(home), Ledger(self.out_watched) as ledger:
            counts = ledger.counts()
        open_items = counts["waiting"] + counts["claimed"] + counts["failed"]
        return not open_items and counts["done"] + counts["quarantined"] >= len(inputs.whole) + len(inputs.broken)

    def _counts(self, home: Path) -> dict[str, Any]:
        with _state(home):
            found = {}
            for out in (self.out_watched, self.out_batched):
                with Ledger(out) as ledger:
                    found[out.name] = ledger.counts()
        return found


def check(out: Path, inputs: Inputs, *, quarantine: bool) -> None:
    """Every input has one current report or one place in quarantine; all that is on disk is whole and on record."""
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    entries = {line["id"]: line for line in index}
    assert len(entries) == len(index), f"{out.name}: the index is not tidied"
    current = [line for line in index if line["superseded_by"] is None]
    of_content = Counter(line["inputs"][0]["sha256"] for line in current)
    refused = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    with Ledger(out) as ledger:
        rows = ledger.rows()
    assert not [row for row in rows if row.state not in ("done", "quarantined")], f"{out.name}: open items"
    kept = {}
    for reason in (out / "quarantine").glob("*/reason.json"):
        told = json.loads(reason.read_text())
        kept[told["item"]] = told
        for file in told["files"]:
            assert file["copy"] is None or (reason.parent / file["copy"]).is_file(), f"{out.name}: a copy is missing"
    held = {row.request for row in rows if row.state == "quarantined"}
    assert kept.keys() == held, f"{out.name}: quarantine {len(kept)}, on the ledger {len(held)}"
    contents = [_hash(Path(told["files"][0]["path"]).read_bytes()) for told in kept.values()]
    contents += [_hash(Path(each["path"]).read_bytes()) for each in refused if not quarantine]
    failed = Counter(dict.fromkeys(contents, 1)) if not quarantine else Counter(contents)
    for content, name in (inputs.whole | inputs.broken).items():
        found = of_content[content] + failed[content]
        assert found == 1, (
            f"{out.name}: {name} has {of_content[content]} reports, {failed[content]} places in quarantine"
        )
    assert not [name for content, name in inputs.broken.items() if of_content[content]], f"{out.name}: broken, reported"
    assert len(current) + len(failed) == len(inputs.whole) + len(inputs.broken), f"{out.name}: what nobody dropped"
    subjects = Counter(line["subject"] for line in current)
    assert set(subjects.values()) == {1}, f"{out.name}: two current reports on one subject"
    done = {row.request: row.report for row in rows if row.state == "done"}
    for line in current:
        assert done.get(line["request"]) == line["id"], f"{out.name}: {line['id']} is not on the ledger"
    check_files(out, entries)


def check_files(out: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Each report's files are there and open; no folder is without its line, and nothing half-written lies about."""
    folders = {path.name for path in out.iterdir() if path.is_dir() and len(path.name) == 16}
    assert folders == entries.keys(), f"{out.name}: folders {len(folders)}, lines {len(entries)}"
    leftovers = [path for path in out.rglob(".*") if is_temporary(path.name)]
    assert not leftovers, f"{out.name}: {leftovers[:3]}"
    for name, line in entries.items():
        bundle = load_bundle(out / name)
        assert (bundle.report.id, bundle.report.version) == (name, line["version"])
        assert len(bundle.report.findings) == line["findings"] and bundle.images.slices
        with Image.open(out / line["thumbnail"]) as thumbnail:
            thumbnail.load()
        for file in line["formats"].values():
            text = (out / file).read_text(encoding="utf-8")
            if file.endswith(".json"):
                assert json.loads(text)["id"] == name
            elif file.endswith(".html"):
                parser = _Tags()
                parser.feed(text)
                assert parser.seen["html"] == 2 and name in text, f"{file} is torn"
            else:
                assert text.strip(), f"{file} is empty"
    current = {name for name, line in entries.items() if line["superseded_by"] is None}
    with (out / "images.csv").open(encoding="utf-8-sig", newline="") as table:
        assert {row["report"] for row in csv.DictReader(table)} == current, f"{out.name}: the table lacks reports"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.seen[tag] += 1


@contextmanager
def _state(home: Path) -> Iterator[None]:
    before = os.environ.get("SCANSCRIBE_HOME")
    os.environ["SCANSCRIBE_HOME"] = str(home)
    try:
        yield
    finally:
        del os.environ["SCANSCRIBE_HOME"]
        if before is not None:
            os.environ["SCANSCRIBE_HOME"] = before


def kill_server(home: Path) -> bool:
    """The embedded Prefect server, whoever started it."""
    try:
        owner = json.loads((home / "prefect" / "server.json").read_text())["owner"]
        if is_gone(owner):
            return False
        os.kill(process_id(owner), signal.SIGKILL)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
