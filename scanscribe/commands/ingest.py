"""`scanscribe ingest`: what there is to read and why, without reporting it; CT volumes as arrays on request."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scanscribe.options import Inputs, Json, flag

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.ingest import Plan, SeriesVerdict
    from pipelines.study import Rejection

OK, SOME_REFUSED = 0, 1


def ingest(
    inputs: Inputs,
    explain: Annotated[bool, flag("--explain", "Say of every series why it got its verdict.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the Hounsfield units: a .npy and a .json a volume or slice.")
    ] = None,
    isotropic: Annotated[
        float | None,
        typer.Option(
            metavar="MM",
            min=0.05,  # as `pipelines.ingest.volume.isotropic` takes
            max=50,
            help="With --save: resample volumes to cubes of this size.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at files and folders: which series and pictures they hold, what each is good for, what is refused."""
    from pipelines import ingest as door
    from pipelines.run import check_inputs
    from scanscribe import console

    check_inputs(inputs)
    if isotropic is not None and save is None:
        raise typer.BadParameter("--isotropic needs --save.")
    with console.progress("Looking at files") as tell:
        plan = door.plan(inputs, progress=lambda done, total: tell("Looking at files", done, total))
        rejected = list(plan.rejections)
        series = list(plan.series)
        saved: dict[int, list[str]] = {}
        for number, each in enumerate(plan.series):
            if save is not None and each.unit is not None:
                tell("Decoding series", number, len(plan.series))
                series[number], saved[number] = _save(each, save, isotropic, rejected)
        plan = replace(plan, series=tuple(series))
    if as_json:
        found = _as_dict(plan, rejected, saved)
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        _show(plan, rejected, sum(map(len, saved.values())), explain=explain)
    raise typer.Exit(SOME_REFUSED if rejected else OK)


def _save(
    series: SeriesVerdict, folder: Path, isotropic: float | None, rejected: list[Rejection]
) -> tuple[SeriesVerdict, list[str]]:
    """Decode one series and write its volume, or each of its slices. Gives the verdict as the pixels leave it, and the
    files; what fails is added to `rejected`."""
    from pipelines import ingest as door
    from pipelines.ingest import volume
    from pipelines.study import Rejection

    assert series.unit is not None
    study = door.load(series.unit)
    failed = (study,) if isinstance(study, Rejection) else study.rejected_sources
    known = {each.path for each in rejected}
    rejected += [each for each in failed if each.path not in known]
    if isinstance(study, Rejection):
        return replace(series, verdict="refused", code=study.code, reason=study.reason, score=0, preferred=False), []
    if "unreadable-slices" in study.quality_flags:
        reason = f"Files of the series could not be read: {len(study.pixels):,} slices are left. {series.reason}"
        files = tuple(dict.fromkeys(source.path for source in study.sources))
        shape = (len(study.pixels), *study.pixels.shape[1:3])
        series = replace(series, verdict="slices", code="unreadable-slices", reason=reason, files=files, shape=shape)
    series = replace(series, flags=study.quality_flags)
    if series.verdict == "slices":
        parts = list(volume.slices(study))
    else:
        name = series.series_uid or study.key[:16]
        try:
            whole = study if isotropic is None else volume.isotropic(study, isotropic)
        except volume.NotAVolumeError as error:
            rejected.append(Rejection(series.files[0], error.code, str(error), "Save it without --isotropic."))
            return series, []
        parts = [(name if series.part == 1 else f"{name}_{series.part}", whole)]
    return series, [str(volume.save(part, folder, _file_name(name)).pixels) for name, part in parts]


def _file_name(uid: str) -> str:
    """A UID as a file name: what a damaged header puts there must not lead elsewhere."""
    return re.sub(r"[^0-9A-Za-z._-]", "_", uid).lstrip(".")[:100] or "unnamed"


def _as_dict(plan: Plan, rejected: list[Rejection], saved: dict[int, list[str]]) -> dict[str, Any]:
    series = []
    for number, each in enumerate(plan.series):
        facts = {name: getattr(each, name) for name in each.__slots__ if name != "unit"}
        series.append(facts | ({"saved": saved[number]} if number in saved else {}))
    return {
        "series": series,
        "pictures": [
            {"path": unit.path, "name": unit.name, "page": unit.page} for unit in plan.units if unit.kind != "series"
        ],
        "rejected": [asdict(each) for each in rejected],
        "passed_over": [asdict(each) for each in plan.passed_over],
    }


def _show(plan: Plan, rejected: list[Rejection], saved: int, *, explain: bool) -> None:
    from scanscribe.console import ROWS, output, refused

    console, shown = output(), None if explain else ROWS
    for rows, table in (
        (plan.series, _series(plan.series[:shown], explain=explain)),
        (rejected, refused(rejected[:shown])),
    ):
        if rows:
            console.print(table)
            if not explain and len(rows) > ROWS:
                console.print(f"… and {len(rows) - ROWS} more: add --explain or --json.")
    pictures = sum(unit.kind != "series" for unit in plan.units)
    written = f" Arrays written: {saved}." if saved else ""
    console.print(f"Series: {len(plan.series)}, pictures: {pictures}, refused files: {len(rejected)}.{written}")


def _series(series: Sequence[SeriesVerdict], *, explain: bool) -> Table:
    from rich.table import Table

    from scanscribe.console import plain, short

    table = Table(title="Series", title_justify="left")
    for name in ("series", "kind", "verdict", "score", "slices", "spacing (mm)", *(["why"] if explain else [])):
        table.add_column(name, overflow="fold")
    for each in series:
        name = each.unit.name if each.unit else Path(each.files[0]).name
        spacing = " x ".join("?" if mm is None else f"{mm:.2f}" for mm in each.spacing_mm or ())
        verdict = each.verdict if each.code is None else f"{each.verdict} ({each.code})"
        count = str(each.shape[0] if each.shape else len(each.files))
        why = f"{'Preferred of its study. ' if each.preferred else ''}{each.reason} First file: {short(each.files[0])}"
        row = (plain(name), each.kind, verdict, str(each.score), count, spacing)
        table.add_row(*row, *([plain(why)] if explain else []))
    return table
