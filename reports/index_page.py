"""The HTML index of a run: a row a report with its thumbnail, filters and counts, and what was refused with its remedy.

Everything is in the page from the start; a little script of its own (allowed by its hash) only hides rows.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from reports.files import atomic_write
from reports.formats import by_reason
from reports.html import environment

INDEX: Final = "index.html"
KINDS: Final = {"ct": "CT", "defect": "Inspection"}
DISPOSITIONS: Final = ("reject", "hold", "rework", "accept")  # the most urgent first


def write_index(
    out: Path,
    lines: Collection[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    *,
    formers: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Writes `OUT/index.html` over current records of `index.jsonl` and those of `rejected.jsonl`; returns its path.

    `formers` are the files of superseded reports by their ids, `files` those over the whole run by their formats.
    Paths are relative to `out`.  `lines` are passed several times, and the page is written as it is made: of many
    reports neither need be in memory.  Raises OSError.
    """
    env = environment()
    script = env.get_template("index.js").render()
    counts = {name: Counter[Any]() for name in ("kind", "disposition", "types")}
    for line in lines:
        counts["kind"][line["kind"]] += 1
        counts["disposition"][line.get("disposition")] += 1
        counts["types"].update(line["types"])
    html = env.get_template("index.html.j2").generate(
        lines=lines,
        rejected=rejected,
        formers=formers or {},
        files=files or {},
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        kinds=_ordered(counts["kind"], KINDS),
        kind_titles=KINDS,
        dispositions=_ordered(counts["disposition"], DISPOSITIONS),
        types=sorted(counts["types"].items()),
        href=lambda path: _href(out, path),
        by_reason=by_reason,
    )
    path = out / INDEX
    atomic_write(path, (part.encode("utf-8", "replace") for part in html))
    return path


def _ordered(counts: Counter[Any], order: Iterable[str]) -> list[tuple[str, int]]:
    return [(value, counts[value]) for value in order if counts[value]]


def _href(out: Path, path: str) -> str:
    """A link from the index to a file of the run; quoted, so that no name can be read as a scheme or a host."""
    relative = relpath(path, out) if Path(path).is_absolute() else path
    return "./" + quote(Path(relative).as_posix(), errors="replace")
