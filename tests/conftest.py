"""Shared fixtures. Tests that need the research data skip, with the reason, where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the public research data (never part of the repository)."""
    folder = Path(os.environ.get("SCANSCRIBE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"research data not found at {folder}; set SCANSCRIBE_TEST_DATA to its folder")
    return folder
