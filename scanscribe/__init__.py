"""ScanScribe's library door: `from scanscribe import report`. The command line is `scanscribe.cli`.

Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.run import RunSummary
    from reports.texts import Language

__all__ = ["__version__", "report"]
__version__ = version("scanscribe")


def report(
    *inputs: str | Path,
    out: str | Path,
    formats: Sequence[str] = ("json", "html"),
    model: str = "default",
    device: str = "auto",
    kind: str = "auto",
    reference: str | Path | None = None,
    rules: str | Path | None = None,
    language: Language = "en",
    mm_per_pixel: float | None = None,
    identifiers: str | Path | None = None,
) -> RunSummary:
    """Report files, folders, DICOM series folders and zip archives into the folder `out`.

    Bad inputs are in `RunSummary.rejected`, each with a code, a reason and a remedy. What `out` has already is not made
    again. Raises `pipelines.run.UsageError` for arguments that cannot work and `pipelines.run_folder.OutputError` for
    an output folder that cannot be written.
    """
    from pipelines.ingest.identifiers import DEFAULT_PATTERNS
    from pipelines.run import Job, execute
    from reports.rules import DEFAULT_RULES

    return execute(
        Job(
            inputs=tuple(map(Path, inputs)),
            out=Path(out),
            formats=tuple(formats),
            model=model,
            device=device,
            kind=kind,
            reference=Path(reference) if reference else None,
            rules=Path(rules) if rules else DEFAULT_RULES,
            language=language,
            mm_per_pixel=mm_per_pixel,
            identifiers=Path(identifiers) if identifiers else DEFAULT_PATTERNS,
        )
    )
