"""`scanscribe adapt`: few labelled images of an owner's product line become a model that reports on it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scanscribe.options import Device, Json, Model, flag

if TYPE_CHECKING:
    from pipelines.store import StoredModel


def adapt(
    data: Annotated[
        Path,
        typer.Option(help="Manifest of 50 to 500 labelled images of the line: JSON lines, as for training."),
    ],
    model: Model = None,
    name: Annotated[
        str | None, typer.Option(help="What the new model is called. (default like the manifest's product)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the new model, in place of the model store.", show_default=False)
    ] = None,
    device: Device = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, such as steps=2000 or seed=2."),
    ] = None,
    resume: Annotated[bool, flag("--resume", "Go on from the checkpoint of a stopped run.")] = False,
    as_json: Json = False,
) -> None:
    """Adapt a model to a product line of your own, with few labelled images. The model itself stays as it is.

    Each line of the manifest has an id, image, group, product, and findings with
    types of your own and boxes, or without boxes where only the image is labelled:

    {"id": "a1", "image": "a1.png", "group": "part 7", "product": "casting",
    "findings": [{"type": "pore", "bbox": [10, 20, 40, 60]}]}
    """
    from pipelines.adapt import adapt as make
    from pipelines.manifest import ManifestWarning
    from scanscribe import console
    from scanscribe.settings import settings

    chosen = settings(model=model, device=device)
    with console.telling(ManifestWarning), console.progress("Reading the images") as tell:
        stored = make(
            data,
            model=chosen.model,
            name=name,
            out=out,
            device=chosen.device,
            overrides=changes or (),
            resume=resume,
            progress=tell,
        )
    if as_json:
        assert stored.base is not None and stored.own_line is not None
        facts = {"name": stored.name, "folder": str(stored.folder), "weights_sha256": stored.weights_sha256}
        about = {"adapts": asdict(stored.base), "line": asdict(stored.own_line), **stored.adapted}
        sys.stdout.write(json.dumps({**facts, **about}) + "\n")
    else:
        _show(stored, by_name=out is None)


def _show(stored: StoredModel, *, by_name: bool) -> None:
    from rich.table import Table

    from pipelines.evaluation.names import name_of
    from scanscribe.console import output, plain, short

    assert stored.own_line is not None
    console = output()
    table = Table(title="Images", title_justify="left")
    for heading in ("type", "trained on", "held out"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, (trained, held) in stored.adapted["images_of_type"].items():
        table.add_row(plain(kind), str(trained), str(held))
    table.add_section()
    counts = (str(stored.adapted[part]["images"]) for part in ("trained_on", "held_out"))
    table.add_row("all", *counts)
    console.print(table)
    table = Table(title="On what was held out", title_justify="left")
    for heading in ("figure", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for key, row in stored.adapted["metrics"].items():
        interval = " to ".join(f"{bound:.3f}" for bound in row["ci95"] or ())
        table.add_row(name_of(key), f"{row['value']:.3f}", interval)
    console.print(table)
    console.print(plain(stored.adapted["note"]), soft_wrap=True)
    folder = short(str(stored.folder))
    model = stored.folder.name if by_name else folder
    use = f"scanscribe report PHOTOS --out REPORTS --model {model}"
    console.print(plain(f"{folder} is the model. To report on {stored.own_line.name}: {use}"), soft_wrap=True)
