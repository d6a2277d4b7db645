"""Damaged files of every kind give a study or a rejection, soon and in little memory, and never end the process."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import KINDS, MAX_BYTES, SECONDS, Watched, every_kind, watch, whole

from pipelines.ingest import load, plan
from pipelines.study import ImageStudy


def check(watched: Watched) -> None:
    assert watched.failures == ()
    assert watched.slowest < SECONDS
    assert watched.peak_bytes < MAX_BYTES


def test_damaged_files_are_read_or_refused() -> None:
    watched = watch(every_kind(1_500))
    check(watched)
    assert 0.1 < watched.studies / watched.cases < 0.9  # the damage is neither too light nor too heavy to tell anything


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(8))
def test_more_damaged_files_are_read_or_refused(part: int) -> None:
    check(watch(every_kind(3_000, first_seed=100_000 * (part + 1))))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dicomdir", "noise", "pdf-text")])
def test_intact_files_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).write_bytes(whole(kind))
    planned = plan([tmp_path / kind])
    studies = [load(unit) for unit in planned.units]
    assert planned.rejections == ()
    assert studies
    assert all(isinstance(study, ImageStudy) for study in studies)
