"""What the command line shows: progress on standard error, tables of reports and of refused inputs."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipelines.run import RunSummary
from pipelines.run_folder import IndexEntry
from pipelines.store import StoredModel
from pipelines.study import Rejection
from reports.formats import by_reason
from reports.taxonomy import title
from reports.texts import percent
from scanscribe.doctor import Check

MOST_ALIKE = 3  # reports that lack a format for the same reason, until that is said once for all of them
ROWS = 40  # a terminal is no place for a thousand rows; the HTML index has them all
DISPOSITION_STYLE = {"reject": "bold red", "hold": "yellow", "rework": "yellow", "accept": "green"}

err = Console(stderr=True)


@contextmanager
def progress(waiting: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, only on a terminal; call the value with what is done: words, count, total."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(waiting, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def output() -> Console:
    """Standard output; piped into a file, lines are not cut at 80 characters."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def show(summary: RunSummary) -> None:
    """Tables of the reports and of the refused inputs, what came of the run, and where to look."""
    console = output()
    count = len(summary.reported) + len(summary.already_reported)
    if count:
        entries = functools.partial(itertools.chain, summary.reported, summary.already_reported)
        alike = Counter(line for entry in entries() for line in unwritten(entry.errors))
        often = {line: reports for line, reports in alike.items() if reports > MOST_ALIKE}
        console.print(_reports(itertools.islice(entries(), ROWS), often))
        if count > ROWS:
            console.print(f"… and {count - ROWS} more: see the index.")
        for line, reports in often.items():
            console.print(Text(f"Of {reports} reports, {line}", "red"), soft_wrap=True)
    if summary.rejected:
        console.print(refused(summary.rejected[:ROWS]))
        if len(summary.rejected) > ROWS:
            console.print(f"… and {len(summary.rejected) - ROWS} more: see {summary.out / 'rejected.jsonl'}.")
    counts = [f"{len(summary.reported)} reported"]
    counts += [f"{len(summary.already_reported)} already there"] if summary.already_reported else []
    counts += [f"{len(summary.rejected)} refused"] if summary.rejected else []
    counts += [f"{summary.passed_over} other files left alone"] if summary.passed_over else []
    console.print(f"{', '.join(counts)}; reading took {summary.seconds:.1f} s. Drafts for qualified review.")
    for file in summary.files.values():
        console.print(Text(f"Wrote {short(str(summary.out / file))}"), soft_wrap=True)
    for line in unwritten(summary.errors):
        console.print(Text(line, "red"), soft_wrap=True)
    console.print(Text(f"Open {summary.index.resolve()}"), soft_wrap=True)
    if summary.left:
        err.print(f"scanscribe: {summary.left} not got to: the same command goes on with them.", soft_wrap=True)
    if lacking := summary.without_golden_sample:
        words = "1 picture has" if lacking == 1 else f"{lacking} pictures have"
        err.print(f"scanscribe: {words} no golden sample of the same name: read without one.", soft_wrap=True)


def _reports(entries: Iterable[IndexEntry], left_out: Collection[str]) -> Table:
    """A row a report, with what could not be written of it, but for the lines in `left_out`."""
    table = Table(title="Reports", title_justify="left")
    table.add_column("id", no_wrap=True)
    table.add_column("kind")
    table.add_column("what", overflow="fold")
    table.add_column("findings", overflow="fold")
    table.add_column("disposition")
    table.add_column("confidence", justify="right")
    for entry in entries:
        findings = "none reported" if entry.assessed else "not assessed"
        if entry.findings:
            findings = f"{entry.findings}: {', '.join(map(title, entry.types))}"
        table.add_row(
            entry.id,
            entry.kind,
            plain(entry.title),
            findings,
            Text(entry.disposition or "", DISPOSITION_STYLE.get(entry.disposition or "", "")),
            "" if entry.confidence is None else percent(entry.confidence),
        )
        for line in unwritten(entry.errors):
            if line not in left_out:
                table.add_row("", "", Text(line, "red"))
    return table


def refused(rejections: Sequence[Rejection]) -> Table:
    """Inputs that were refused, each with its remedy."""
    table = Table(title="Refused", title_justify="left", title_style="italic red")
    for name in ("input", "code", "why", "what would mend it"):
        table.add_column(name, overflow="fold")
    for rejection in rejections:
        table.add_row(plain(short(rejection.path)), rejection.code, plain(rejection.reason), plain(rejection.remedy))
    return table


def show_models(stored: Sequence[StoredModel]) -> None:
    """The installed models and where they lie."""
    table = Table()
    for name in ("name", "version", "weights", "adapts", "folder"):
        table.add_column(name, overflow="fold")
    for model in stored:
        adapts = ""
        if model.base is not None and model.own_line is not None:
            adapts = f"{model.base.name} {model.base.version} to {model.own_line.name}"
        folder = plain(short(str(model.folder)))
        table.add_row(model.name, model.version, model.weights_sha256[:12], plain(adapts), folder)
    output().print(table)


def show_checks(checks: Sequence[Check]) -> None:
    """The doctor's findings, a line each."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False)
    for check in checks:
        remedy = f" → {check.remedy}" if check.remedy else ""
        table.add_row(Text(check.state, styles[check.state]), check.name, plain(check.message + remedy))
    output().print(table)


def show_figures(figures: Mapping[str, Any]) -> None:
    """The figures of one data set beside their baselines."""
    from pipelines.evaluation.names import BASELINES, name_of

    split = f", {figures['split']}" if figures["split"] else ""
    table = Table(title=f"{figures['name']}{split}: {figures['n']} images", title_justify="left")
    for name in ("figure", "value", "95 % interval", *BASELINES.values(), "images"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, metric in figures["metrics"].items():
        interval = " to ".join(map(_figure, metric["ci95"] or ()))
        trivial = [_figure(metric["baselines"].get(baseline)) for baseline in BASELINES]
        table.add_row(name_of(name), _figure(metric["value"]), interval, *trivial, str(metric["n"]))
    console = output()
    console.print(table)
    if outside := figures["outside"]:
        rates = {name: outside[name]["value"] for name in ("auroc", "caught", "false_alarms")}
        console.print(
            f"{outside['n']} images of other kinds: AUROC {rates['auroc']:.3f}; {rates['caught']:.1%} of them "
            f"are flagged, and {rates['false_alarms']:.1%} of the images above by mistake."
        )
    if figures["failed"]:
        console.print(f"{figures['failed']} images could not be read; the predictions file says why.")


def show_places(places: Mapping[str, Path | None]) -> None:
    """Where what was written lies."""
    for what, path in places.items():
        if path is not None:
            output().print(Text(f"{what}: {path.resolve()}"), soft_wrap=True)


@contextmanager
def telling(category: type[Warning]) -> Iterator[None]:
    """Warnings of that category are told on standard error when they come, each once; others are left to Python."""
    told: set[str] = set()
    show = warnings.showwarning

    def tell(message: Warning | str, kind: type[Warning], *where: Any, **how: Any) -> None:
        if not issubclass(kind, category):
            show(message, kind, *where, **how)
        elif (words := str(message)) not in told:
            told.add(words)
            err.print(Text(f"scanscribe: {words}"), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", category)
        warnings.showwarning = tell  # type: ignore[assignment]
        yield


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def short(path: str) -> str:
    """A path as seen from the folder one is in, when it lies there."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def unwritten(errors: Mapping[str, str]) -> Iterator[str]:
    """A line a reason, with the formats (the keys of `errors`) that could not be written for it."""
    for reason, names in by_reason(errors).items():
        yield f"{', '.join(names)} could not be written: {plain(reason)}"


def plain(text: str) -> Text:
    """Text from outside, with nothing in it that a terminal would obey."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
