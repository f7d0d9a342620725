"""Frames that nobody asked for are jumped over and left out, and those asked for stay exactly the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.makers import KINDS, LONG, coded, decoded, encode

from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.reader import VideoReader
from mmllm.data.media.types import MediaRef


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of frames that come out of the decoder from now on, in its only place."""
    total, real = [0], PyAVBackend._decoded

    def decode(self: PyAVBackend):
        for frame in real(self):
            total[0] += 1
            yield frame

    monkeypatch.setattr(PyAVBackend, "_decoded", decode)
    return total


@pytest.mark.parametrize("threads", ["one", "several"])
@pytest.mark.parametrize("name", list(KINDS))
def test_the_same_frames(tmp_path: Path, name: str, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads == "several":
        monkeypatch.setattr("mmllm.data.media.backends.pyav.SMALL_PIXELS", 0)
    path = tmp_path / name
    encode(str(path), map(coded, range(LONG)), **KINDS[name])
    draw = np.random.default_rng(len(name))
    for count in (1, 2, 3, 5, 8, 12, 16, 40):
        low = int(draw.integers(0, LONG // 2))
        wanted = draw.integers(low, LONG, count).tolist()
        with VideoReader(MediaRef("video", str(path))) as reader:
            assert reader.probe.frames == LONG
            assert decoded(reader.read_indices(wanted).frames) == wanted
            # a second read of the same open file
            assert decoded(reader.read_indices(wanted[::-1]).frames) == wanted[::-1]


@pytest.mark.parametrize(
    ("options", "most"),
    [({"g": "400", "x264-params": "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0"}, 170), ({"g": "30"}, 130)],
)
def test_less_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], most: int) -> None:
    """Of 400 frames, by leaving out and by jumping."""
    path, wanted = tmp_path / "clip.mp4", [10, 120, 250, 380]
    encode(str(path), map(coded, range(LONG)), **options)
    total = counted(monkeypatch)
    with VideoReader(MediaRef("video", str(path))) as reader:
        assert decoded(reader.read_indices(wanted).frames) == wanted
    assert total[0] < most


@pytest.mark.parametrize("offset", range(-6, 7))
def test_a_jump_never_costs_more_than_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """Wanted frames just before and behind a key frame, whose place in the index is in decoding time."""
    path, wanted = tmp_path / "clip.mp4", [*range(10, 230, 20), 250 + offset, 271, 290]
    encode(str(path), map(coded, range(300)), **{"g": "250", "x264-params": "bframes=3:b-adapt=0:scenecut=0"})
    total = counted(monkeypatch)
    with VideoReader(MediaRef("video", str(path))) as reader:
        assert decoded(reader.read_indices(wanted).frames) == wanted
    assert total[0] <= 300


def test_uneven_times(tmp_path: Path) -> None:
    """Nothing is left out where frames stay on screen for longer than usual, and the end is judged as ever."""
    draw, path = np.random.default_rng(0), tmp_path / "uneven.mp4"
    moments = np.cumsum(draw.choice([0.02, 0.04, 0.04, 0.5], 200)).round(3)
    moments -= moments[0]
    params = "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0"
    encode(str(path), map(coded, range(200)), moments=moments.tolist(), **{"x264-params": params})
    with VideoReader(MediaRef("video", str(path))) as reader:
        for _ in range(20):
            times = np.sort(draw.uniform(0, reader.probe.duration, 6))
            shown = np.searchsorted(moments, times + 1e-4, side="right") - 1
            assert decoded(reader.read_times(times.tolist()).frames) == shown.tolist()
