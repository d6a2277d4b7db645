"""The command line. Each command imports what it needs when it runs, so that `scanscribe --help` is quick.

Exit codes: 0 all is done; 1 some inputs were refused or not got to; 2 wrong usage, or nothing can be done at all;
130 Ctrl-C.
With `--json` standard output carries exactly one object; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from scanscribe.commands.adapt import adapt
from scanscribe.commands.correct import correct
from scanscribe.commands.export import ListsFormats, export
from scanscribe.commands.ingest import ingest
from scanscribe.commands.ledger import LedgerUrl
from scanscribe.commands.ledger import app as ledger_app
from scanscribe.commands.receive import receive
from scanscribe.commands.schedule import app as schedule_app
from scanscribe.commands.send import send
from scanscribe.commands.status import status
from scanscribe.commands.watch import watch
from scanscribe.commands.worker import server, worker
from scanscribe.options import (
    Device,
    Inputs,
    Json,
    Lane,
    LogJson,
    MetricsPort,
    MinFree,
    Model,
    NotifyUrl,
    Out,
    Workers,
    flag,
    takes_settings,
)

if TYPE_CHECKING:
    from pipelines.run import Job, Listener, RunSummary
    from pipelines.store import StoredModel
    from scanscribe.settings import Settings

OK, SOME_REFUSED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
AFTER_CTRL_C = {  # command -> how to go on
    "report": "The same command goes on where it stopped.",
    "batch": "The same command goes on where it stopped.",
    "send": "The same command sends what is missing.",
    "train": "The same command with --resume goes on from the last checkpoint.",
    "adapt": "The same command with --resume goes on from the last checkpoint.",
    "evaluate": "With --predictions, the same command with --resume goes on from the last answer.",
}

app = typer.Typer(
    name="scanscribe",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
models_app = typer.Typer(help="The models that are installed.")
app.add_typer(models_app, name="models")
app.add_typer(ledger_app, name="ledger")
app.add_typer(schedule_app, name="schedule")


def _version(asked: bool) -> None:
    if asked:
        from scanscribe import __version__

        print(f"scanscribe {__version__}")
        raise typer.Exit


@app.callback()
def scanscribe(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turns CT studies and inspection photos into structured, evidence-linked draft reports. Not for diagnosis."""


@app.command(epilog="Example: [cyan]scanscribe report scans/ photo.png --out reports[/]")
@takes_settings
def report(
    inputs: Inputs,
    out: Out,
    chosen: Settings,
    as_json: Json = False,
) -> None:
    """Report files and folders now. Running it again goes on where it stopped."""
    from pipelines.run import Job, execute

    job = Job(tuple(inputs), out, **dict(chosen))
    run_job(execute, job, "Starting", as_json)


@app.command(epilog="Example: [cyan]scanscribe batch archive/ --out reports --formats json[/]")
@takes_settings
def batch(
    inputs: Inputs,
    out: Out,
    chosen: Settings,
    workers: Workers = False,
    lane: Lane = "normal",
    ledger: LedgerUrl = None,
    min_free: MinFree = 1024,
    log_json: LogJson = False,
    metrics: MetricsPort = None,
    notify: NotifyUrl = None,
    as_json: Json = False,
) -> None:
    """The same work as a Prefect flow, on this machine's server or that of PREFECT_API_URL. Resumable."""
    from flows.jobs import Crewing, run_batch
    from flows.seeing.seeing import seeing
    from pipelines.run import Job

    crewing = Crewing(lane, ledger) if workers else None
    job = Job(tuple(inputs), out, **dict(chosen))
    waiting = "Starting the flow server" if workers else "Starting the model and the flow server"
    with seeing(
        "batch", log_json=log_json, silent=not log_json, port=metrics, notify=notify, disks={"reports": out}
    ) as s:
        run_job(
            lambda job, listener: run_batch(job, listener, crewing, min_free=min_free << 20, seen=s),
            job,
            waiting,
            as_json,
        )


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: [cyan]scanscribe train --recipe detector --data data/ --out runs/detector[/]",
)
def train(context: typer.Context, as_json: Json = False) -> None:
    """Train a model from manifests. `scanscribe train --help` lists its options."""
    from pipelines.training.__main__ import cli

    if not as_json:
        raise typer.Exit(cli(context.args))
    terminal, said = sys.stderr, io.StringIO()
    try:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(said):
            code = cli(context.args)
    except SystemExit as left:  # the parser's way out, after it has said what is wrong
        code = left.code if isinstance(left.code, int) else OK
    finally:
        terminal.write(said.getvalue())
    summary: dict[str, Any] = {"command": "train", "exit_code": code}
    if code != OK:
        words = said.getvalue().strip()
        _, own, message = words.rpartition("scanscribe train: ")  # a manifest's faults take many lines
        message = (message if own else words.rpartition("\n")[2]).removeprefix("error: ")
        summary["error"] = {"code": "usage", "message": message}
    _print_json(summary)
    raise typer.Exit(code)


@app.command(epilog="Example: [cyan]scanscribe evaluate --data manifest.jsonl --out scores.json --html scores.html[/]")
def evaluate(
    data: Annotated[
        Path, typer.Option(help="Manifest (JSON lines that name images and labels), or a folder of data sets.")
    ],
    out: Annotated[Path, typer.Option(help="File for the figures (JSON); of a folder of data sets, a folder.")],
    predictions: Annotated[
        Path | None,
        typer.Option(help="File for the model's answers, a JSON line an image; of a folder of data sets, a folder."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with diagrams and the worst cases.")] = None,
    outside: Annotated[
        Path | None,
        typer.Option(help="Manifest or folder of images of other kinds: does the model notice that they are?"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split, such as train or val. (default all)")] = None,
    resume: Annotated[bool, flag("--resume", "Go on with the --predictions of a stopped run.")] = False,
    model: Model = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score the model on labelled data sets, beside trivial baselines and with intervals."""
    from pipelines import evaluation
    from pipelines.manifest import ManifestWarning
    from scanscribe import console
    from scanscribe.settings import settings

    chosen = settings(model=model, device=device)
    with console.telling(ManifestWarning), console.progress("Loading the model") as tell:
        figures = evaluation.evaluate(
            data,
            split=split,
            model=chosen.model,
            device=chosen.device,
            out=out,
            predictions=predictions,
            html=html,
            outside=outside,
            resume=resume,
            progress=lambda done, total: tell("Reading images", done, total),
        )
    sets = list(figures["sets"].values()) if "sets" in figures else [figures]
    if outside is not None and all(each["outside"] is None for each in sets):
        print("scanscribe: the model does not judge whether an image is of a kind that it knows.", file=sys.stderr)
    if as_json:
        _print_json(figures)
    else:
        for each in sets:
            console.show_figures(each)
        console.show_places({"All figures": out, "Answers": predictions, "Page": html})
    raise typer.Exit(SOME_REFUSED if any(each["failed"] for each in sets) else OK)


app.command(epilog="Example: [cyan]scanscribe adapt --data castings/manifest.jsonl --name castings[/]")(adapt)
app.command(epilog="Example: [cyan]scanscribe ingest archive/ --explain --save volumes[/]")(ingest)


app.command(epilog="Example: [cyan]scanscribe receive --inbox inbox --port 11112[/]")(receive)
app.command(epilog="Example: [cyan]scanscribe watch inbox --out reports[/]")(watch)
app.command(epilog="Example: [cyan]scanscribe worker --device cuda:0[/]")(worker)
app.command(epilog="Example: [cyan]scanscribe server[/]")(server)
app.command(epilog="Example: [cyan]scanscribe status --out reports[/]")(status)
app.command(epilog="Example: [cyan]scanscribe send reports --to PACS@archive.example:104[/]")(send)
app.command(cls=ListsFormats, epilog="Example: [cyan]scanscribe export reports --formats pdf,csv,lot[/]")(export)
app.command(epilog="Example: [cyan]scanscribe correct reports/0123456789abcdef --by edits.json[/]")(correct)


@app.command(epilog="Example: [cyan]scanscribe doctor --json[/]")
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what would fail, and how to mend it. Writes nothing."""
    from scanscribe import console
    from scanscribe.doctor import examine

    checks = examine()
    if as_json:
        _print_json({"ok": all(c.state != "fail" for c in checks), "checks": [c.as_dict() for c in checks]})
    else:
        console.show_checks(checks)
    raise typer.Exit(UNUSABLE if any(check.state == "fail" for check in checks) else OK)


@models_app.command("list", epilog="Example: [cyan]scanscribe models list[/]")
def list_models(as_json: Json = False) -> None:
    """List the installed models."""
    from pipelines.store import ModelError, stored_models
    from scanscribe import console

    damaged: list[ModelError] = []
    stored = list(stored_models(damaged.append))
    if as_json:
        _print_json({"models": [_model_facts(model) for model in stored], "damaged": list(map(str, damaged))})
    else:
        console.show_models(stored)
        for error in damaged:
            print(f"scanscribe: {error}", file=sys.stderr)
    raise typer.Exit(UNUSABLE if damaged else OK)


@models_app.command("verify", epilog="Example: [cyan]scanscribe models verify default[/]")
def verify_model(
    name: Annotated[str, typer.Argument(help="A model's name, or its folder.")] = "default",
    as_json: Json = False,
) -> None:
    """Check that a model's weights are the ones that it was published with."""
    from pipelines.store import find

    model = find(name)
    model.verify()
    if as_json:
        _print_json(_model_facts(model) | {"verified": True})
    else:
        print(f"{model.name} {model.version}: the weights are whole.")


def _model_facts(model: StoredModel) -> dict[str, Any]:
    facts = {
        "name": model.name,
        "version": model.version,
        "folder": str(model.folder),
        "weights_sha256": model.weights_sha256,
        "config_sha256": model.config_sha256,
    }
    if model.base is None or model.own_line is None:
        return facts
    return facts | {"adapts": asdict(model.base), "line": asdict(model.own_line)}


def run_job(work: Callable[[Job, Listener], RunSummary], job: Job, waiting: str, as_json: bool) -> NoReturn:
    """Do a job, show what came of it, and leave with its exit code."""
    from scanscribe import console

    words = {"look": "Looking at files", "report": "Reading and reporting"}
    with console.progress(waiting) as tell:
        summary = work(job, lambda step: tell(words[step.stage], step.done, step.total))
    if as_json:
        _print_json(summary.as_dict())
    else:
        console.show(summary)
    raise typer.Exit(OK if summary.complete else SOME_REFUSED)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, default=str) + "\n")


def main() -> None:
    """The entry point: runs a command and turns what goes wrong into a sentence and an exit code."""
    as_json = "--json" in sys.argv[1:]
    # torch's threads wait asleep: spinning gains 0.1 s a photo on an idle machine and makes a busy one 3 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only, or a name that is no text, ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _fail(*_explain(error), as_json, UNUSABLE)
    if code == INTERRUPTED:
        going_on = AFTER_CTRL_C.get(sys.argv[1] if sys.argv[1:] else "", "")
        _fail("interrupted", f"Interrupted. {going_on}".strip(), as_json, INTERRUPTED)
    sys.exit(code if isinstance(code, int) else OK)


def _explain(error: Exception) -> tuple[str, str]:
    """A code and a sentence for what stopped a command."""
    if usage := getattr(error, "format_message", None):  # of the parser: an unknown option, a missing argument
        context, words = getattr(error, "ctx", None), usage()
        words += "" if words.endswith((".", "?", ")")) else "."
        return "usage", f"{words} See `{context.command_path if context else 'scanscribe'} --help`."
    if code := getattr(error, "code", None):  # the product's own errors
        return str(code), str(error)
    if isinstance(error, ModuleNotFoundError):
        from pipelines.ingest.refusals import MissingPackageError

        return MissingPackageError.code, str(MissingPackageError(error.name))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from pipelines.store import home

        where = error.filename or f"the output folder or the state folder {home()}"
        return "system", f"The disk of {where} is full: free some space; the same command then goes on."
    if isinstance(error, OSError):
        return "system", f"{error.filename or 'A file'} cannot be used ({error.strerror}): check it and run again."
    traceback.print_exception(error)
    return "fault", "This is a fault of the program: report it with the lines above."


def _fail(code: str, message: str, as_json: bool, exit_code: int) -> int:
    words = f"scanscribe: {message}"
    if sys.stderr.isatty():  # a terminal would break lines within words
        words = textwrap.fill(words, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    print(words, file=sys.stderr)
    if as_json:
        _print_json({"error": {"code": code, "message": message}, "exit_code": exit_code})
    return exit_code


if __name__ == "__main__":
    main()
