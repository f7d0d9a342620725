"""Data that tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.small_runs import conversations


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Twelve conversations over clips, with answers of unequal length and some without media."""
    return conversations(tmp_path_factory.mktemp("data"), 12, clip=lambda index: index % 3 != 0)
