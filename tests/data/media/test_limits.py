"""Caps are checked against the header, before anything of that size is allocated or decoded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.makers import coded, encode, huge_png

from mmllm.contract.errors import UserError
from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.limits import Limits
from mmllm.data.media.reader import VideoReader, probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

Make = Callable[..., Path]


def refusal(ref: MediaRef, limits: Limits, sampling: Sampling = Sampling(frames=16)) -> str:  # noqa: B008
    """The error, which names the file and a way out."""
    with pytest.raises(UserError) as caught:
        read_media(ref, sampling, limits=limits)
    message = str(caught.value)
    assert message.startswith(ref.path) and "Try: " in message
    return message


@pytest.mark.parametrize(
    ("limits", "part"),
    [
        (Limits(frames=15), "too many frames asked for, expected at most 15, got 16"),
        (Limits(pixels=3071), "picture that is too large, expected at most 3071 pixels, got 3072 pixels (64x48)"),
        (Limits(seconds=1.5), "duration that is too long, expected at most 1.5 s, got 1.6 s"),
        (Limits(megabytes=0.1), "too much memory, expected at most 0.1 MB, got 0 MB (16 frames of 64x48 pixels)"),
    ],
)
def test_each_cap_says_its_figure(make_video: Make, limits: Limits, part: str) -> None:
    ref = MediaRef("video", str(make_video()))
    assert part in refusal(ref, limits)
    assert len(read_media(ref, Sampling(frames=16), limits=Limits(16, 3072, 1.6, 0.15)).frames) == 16


def test_nothing_is_decoded_first(make_video: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_video())

    def decode(self: PyAVBackend) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PyAVBackend, "_decoded", decode)
    for limits in (Limits(pixels=3071), Limits(seconds=1.5)):
        for backend in ("pyav", "decord"):
            with pytest.raises(UserError, match="the header declares"):
                probe(MediaRef("video", path), backend, limits)
    with pytest.raises(AssertionError, match="decoded"):
        probe(MediaRef("video", path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """12000 x 12000 is more than our limit and less than Pillow's; 60000 x 60000 is more than both."""
    for side, part in ((12000, "got 144000000 pixels (12000x12000)"), (60000, "exceeds limit")):
        path = tmp_path / f"{side}.png"
        huge_png(side, tmp_path, path)
        assert part in refusal(MediaRef("image", str(path)), Limits())
        assert part in refusal(MediaRef("video", str(path)), Limits())
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "12000.png").rename(folder / "1.png")
    with pytest.raises(UserError, match=r"1\.png: the header declares a picture that is too large"):
        read_media(MediaRef("video", str(folder)), Sampling())


def test_pictures_that_grow_on_the_way_are_not_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stream of 64 x 48 that goes on with 640 x 480: the decoder refuses the latter by itself."""
    path, data = tmp_path / "grows.ts", b""
    for scale in (1, 10):
        part = tmp_path / f"{scale}.ts"
        encode(str(part), [coded(number).repeat(scale, 0).repeat(scale, 1) for number in range(20)])
        data += part.read_bytes()
    path.write_bytes(data)
    ref, ends = MediaRef("video", str(path)), Sampling(frames=16, sampler="linspace")
    assert read_media(ref, ends).frames.shape == (16, 48, 64, 3)
    assert "skipped" not in caplog.text
    try:
        assert read_media(ref, ends, limits=Limits(pixels=4000)).frames.shape == (16, 48, 64, 3)
    except UserError as error:  # a decoder of several threads may lose the last small pictures with the first large one
        assert "grows.ts" in str(error) and "frames are missing" in str(error)
    assert "packet(s) skipped" in caplog.text


def test_bytes_count_only_what_is_held(make_video: Make) -> None:
    ref, tight = MediaRef("video", str(make_video())), Limits(megabytes=0.1)
    assert "too much memory" in refusal(ref, tight)
    assert len(read_media(ref, Sampling(frames=16), limits=tight, convert=np.mean).frames) == 16


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_each_picture_is_converted_once_as_it_comes(
    make_video: Make, numbers: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody holds the pictures behind: with one worth of chunk at a time at most two are alive."""
    if backend == "decord":
        pytest.importorskip("decord")
        monkeypatch.setattr("mmllm.data.media.backends.decord.CHUNK_BYTES", 1)
    alive: set[int] = set()
    seen, most = [], 0

    def convert(picture: np.ndarray) -> int:
        nonlocal most
        assert picture.flags["C_CONTIGUOUS"] and picture.flags["WRITEABLE"]
        alive.add(id(picture))
        weakref.finalize(picture, alive.discard, id(picture))
        most = max(most, len(alive))
        seen.append(numbers(picture[None])[0])
        return seen[-1]

    with VideoReader(MediaRef("video", str(make_video(frames=40))), backend) as reader:
        clip = reader.read_indices([7, 3, 3, 39, 0, 7], convert)
    assert clip.frames == [7, 3, 3, 39, 0, 7]
    assert sorted(seen) == [0, 3, 7, 39] and most <= 2


def test_images_and_folders_are_converted_too(tmp_path: Path, make_picture: Callable) -> None:
    from PIL import Image

    for number in range(4):
        Image.fromarray(make_picture(number)).save(tmp_path / f"{number}.png")
    clip = read_media(MediaRef("video", str(tmp_path)), Sampling(frames=4, sampler="linspace"), convert=np.shape)
    assert clip.frames == [(48, 64, 3)] * 4
    assert read_media(MediaRef("image", str(tmp_path / "1.png")), Sampling(), convert=np.max).frames == [255]


def test_a_jump_that_misses_converts_nothing_twice(make_video: Make, numbers: Callable, monkeypatch) -> None:
    """What was found before it stays."""
    from mmllm.data.media.backends import pyav

    monkeypatch.setattr(pyav, "SEEK_FRAMES", 10)

    def missed(self: PyAVBackend, moment: float, margin: int) -> None:
        raise pyav._Missed

    monkeypatch.setattr(PyAVBackend, "_sought", missed)
    seen = []
    with VideoReader(MediaRef("video", str(make_video(frames=60)))) as reader:
        clip = reader.read_indices([0, 1, 40, 50], lambda picture: seen.append(numbers(picture[None])[0]) or seen[-1])
    assert clip.frames == seen == [0, 1, 40, 50]


@pytest.mark.parametrize("value", [0, -1, float("inf"), True, "4"])
def test_a_limit_is_a_positive_number(value: object) -> None:
    with pytest.raises(UserError, match=r"limits.frames: bad limit, expected a positive number"):
        Limits(frames=value)
