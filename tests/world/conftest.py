"""One tiny world, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmllm.world.make import make_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny world with seed 0."""
    out = tmp_path_factory.mktemp("world") / "tiny"
    make_world(out, "tiny", seed=0, jobs=1)
    return out
