"""Damaged, lying and odd files: a clean clip of the right length or an error that names file and cause, in time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from helpers.damage import CASES, Case
from helpers.makers import decoded

from mmllm.contract.errors import UserError
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.limits import Limits
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

SECONDS = 6.0
ASKED = 16


@pytest.fixture(scope="module", params=["pyav", "decord"])
def reader(request: pytest.FixtureRequest):
    """One reader for all files of a back end: it has to survive them all."""
    if request.param == "decord":
        pytest.importorskip("decord")
    with GuardedReader(request.param, Limits(timeout=SECONDS)) as reader:
        yield reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are made, once for both back ends."""
    return tmp_path_factory.mktemp("damaged")


def test_there_are_enough() -> None:
    assert len(CASES) == len({case.name for case in CASES}) >= 60


@pytest.mark.shared
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged(case: Case, reader: GuardedReader, folder: Path, shared: Path) -> None:
    path = folder / case.name
    if not path.exists():
        case.make(shared / "data" / "videos", path)
    ref, start = MediaRef(case.kind, str(path)), time.monotonic()
    try:
        clip = reader.read(ref, Sampling(frames=ASKED))
    except UserError as error:
        message = str(error)
        assert case.outcome != "clip", message
        assert case.name in message and len(message.replace(str(path), "")) > 20, message
        # decord really hangs on one of them; nothing else may need the limit, and nothing may crash
        assert "died" not in message, message
        assert reader.backend == "decord" or "took too long" not in message, message
    else:
        assert case.outcome != "error"
        header = reader.probe(ref)
        count = 1 if header.kind == "image" else ASKED
        assert clip.frames.shape == (count, header.height, header.width, 3)
        assert clip.frames.dtype == np.uint8 and clip.times.shape == (count,)
        assert (np.diff(clip.times) >= 0).all() and 0 <= clip.times[0] <= clip.times[-1] <= header.duration
        assert case.size in (None, (header.height, header.width))
        if case.moments:
            shown = np.searchsorted(np.array(case.moments), clip.times + 1e-3, side="right") - 1
            assert decoded(clip.frames) == shown.tolist()
            assert clip.repeated == 0 and len(set(shown.tolist())) > len(case.moments) // 3
    assert time.monotonic() - start < SECONDS + 2
