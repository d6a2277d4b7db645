"""Ingest's two doors in one step, for tests: what a path gives, or why it is refused."""

from __future__ import annotations

from pathlib import Path

from pipelines.ingest import load, plan
from pipelines.study import ImageStudy, Rejection


def read(*paths: Path) -> ImageStudy:
    """The one study that `paths` hold."""
    planned = plan(paths)
    assert planned.rejections == ()
    assert len(planned.units) == 1
    study = load(planned.units[0])
    assert isinstance(study, ImageStudy), study
    return study


def refusal(path: Path) -> Rejection:
    """The one rejection that `path` gets, from `plan` or from `load`."""
    planned = plan([path])
    outcomes = [*planned.rejections, *map(load, planned.units)]
    assert len(outcomes) == 1
    assert isinstance(outcomes[0], Rejection), outcomes[0]
    assert outcomes[0].reason
    assert outcomes[0].remedy
    return outcomes[0]
