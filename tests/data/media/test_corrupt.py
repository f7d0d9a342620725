"""Frames that the decoder finds damaged are told with the seconds, or refused; they are never read as if whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.makers import KINDS, LONG, coded, encode, flip_bits

from mmllm.contract.errors import UserError
from mmllm.contract.types import Geometry
from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.damage import Damage, describe
from mmllm.data.media.doctor import MediaFile, examine
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.loading import Caches, MediaLoader
from mmllm.data.media.reader import VideoReader, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import Clip, MediaRef

REAL = Path(__file__).resolve().parents[2] / "assets" / "tablet_drawing.mp4"
SIXTEEN = Sampling(frames=16)
SEEDS = 16
# small files with a frame count, which one thread decodes: of several, one may lose a flag now and then
CODECS = {
    "real.mp4": None,
    "b_frames.mp4": {"x264-params": "bframes=3:b-pyramid=normal:keyint=12"},
    "cavlc.mp4": {"x264-params": "cabac=0:keyint=12"},
    "part_4.avi": {"codec": "mpeg4"},
    "av1.mp4": {"codec": "libsvtav1", "svtav1-params": "lp=1"},
}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Sixty frames of a real clip."""
    clip = read_media(MediaRef("video", str(REAL)), Sampling(frames=60))
    return [frame[:160, :192] for frame in clip.frames]


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """``damaged(first, last, frames=60, gop=20, x264=...)``: a clip with bytes of some frames overwritten, by time."""
    import av

    def make(first: int, last: int, frames: int = 60, gop: int = 20, x264: str = "bframes=0:scenecut=0") -> Path:
        path = tmp_path / "damaged.mp4"
        encode(str(path), map(coded, range(frames)), **{"g": str(gop), "x264-params": x264})
        with av.open(str(path)) as container:
            packets = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
            places = [place for _, *place in sorted(packets)]
        data = bytearray(path.read_bytes())
        for start, size in places[first : last + 1]:
            # behind the length and the head of the slice
            data[start + size // 2 : start + size] = bytes(b ^ 0x55 for b in data[start + size // 2 : start + size])
        path.write_bytes(data)
        return path

    return make


def item(path: Path) -> MediaRef:
    return MediaRef("video", str(path))


@pytest.mark.parametrize("name", CODECS)
def test_flipped_bits_are_told(name: str, pictures: list[np.ndarray], tmp_path: Path) -> None:
    """Of the readable files with other frames nearly all; no decoder notices every bit, and what it misses is mild."""
    path = tmp_path / name
    if CODECS[name] is None:
        path.write_bytes(REAL.read_bytes())
    else:
        encode(str(path), pictures, **CODECS[name])
    whole, data = read_media(item(path), SIXTEEN), path.read_bytes()
    assert whole.corrupt == ()
    other, unseen = 0, []
    for seed in range(SEEDS):
        path.write_bytes(flip_bits(data, seed))
        try:
            clip = read_media(item(path), SIXTEEN)
        except UserError:
            continue
        difference = np.abs(clip.frames.astype(int) - whole.frames).mean((1, 2, 3))
        other += bool(difference.any())
        if difference.any() and not clip.corrupt:
            unseen.append(difference.max())
        if clip.corrupt:
            assert all(0 <= start <= end <= 20 for start, end in clip.corrupt)
            with pytest.raises(UserError, match=r"the video is damaged, .* s\. Try: --corrupt warn"):
                read_media(item(path), SIXTEEN, corrupt="error")
    assert other >= 10
    assert len(unseen) <= 0.25 * other and max(unseen, default=0) < 10


@pytest.mark.parametrize("threads", ["one", "several"])
@pytest.mark.parametrize("name", list(KINDS))
def test_no_whole_file_is_called_damaged(name: str, threads: str, tmp_path: Path, monkeypatch) -> None:
    """Nor where frames are jumped over, and behind open groups of pictures."""
    if threads == "several":
        monkeypatch.setattr("mmllm.data.media.backends.pyav.SMALL_PIXELS", 0)
    path = tmp_path / name
    encode(str(path), map(coded, range(LONG)), **KINDS[name])
    for count in (1, 3, 8, 40):
        assert read_media(item(path), Sampling(frames=count), corrupt="error").corrupt == ()


@pytest.mark.parametrize("guarded", [False, True])
def test_times_are_named_and_end_at_the_next_key_frame(damaged: Callable, guarded: bool, caplog) -> None:
    path = damaged(25, 26)
    with GuardedReader() as reader, caplog.at_level(logging.WARNING):
        read = reader.read if guarded else read_media
        clip = read(item(path), Sampling(frames=60, sampler="linspace"))
    assert clip.corrupt == (pytest.approx((2.5, 3.9)),)
    text = f"{path}: the video is damaged, which may reach the frames at 2.50-3.90 s"
    assert [record.getMessage() for record in caplog.records] == [text]
    assert read_media(MediaRef("video", str(path), 0.0, 2.3), SIXTEEN, corrupt="error").corrupt == ()
    assert read_media(MediaRef("video", str(path), 4.0, 5.9), SIXTEEN, corrupt="error").corrupt == ()
    # damage before the frames that are taken has reached them
    assert read_media(MediaRef("video", str(path), 3.0, 3.5), SIXTEEN).corrupt == ((2.5, 3.5),)


def test_error_refuses_through_the_process_too(damaged: Callable) -> None:
    import pickle

    path = damaged(25, 26)
    with GuardedReader(corrupt="error") as reader, pickle.loads(pickle.dumps(reader)) as twin:
        for reading in (reader, twin):
            with pytest.raises(UserError) as caught:
                reading.read(item(path), SIXTEEN)
            assert str(path) in str(caught.value) and "--corrupt warn" in str(caught.value)
            assert reading.read(MediaRef("video", str(path), 0.0, 2.0), SIXTEEN).corrupt == ()


def test_lost_packets_and_flags_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet that does not decode reaches what follows it, as far as the next key frame."""
    path = tmp_path / "av1.mp4"
    pictures = [coded(number).repeat(3, 0).repeat(3, 1) for number in range(40)]
    encode(str(path), pictures, codec="libsvtav1", **{"g": "20", "svtav1-params": "lp=1"})
    lost = Damage.lose
    seen: list[int | None] = []
    monkeypatch.setattr(Damage, "lose", lambda self, pts: seen.append(pts) or lost(self, pts))
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    clip = read_media(MediaRef("video", str(path), 0.0, 1.9), Sampling(frames=20, sampler="linspace"))
    assert seen and clip.corrupt and clip.corrupt[-1][1] <= 1.95


def test_a_b_frame_before_a_damaged_frame_counts() -> None:
    """It is predicted from it, although it is shown first."""

    class Frame:
        def __init__(self, kind: int, corrupt: bool = False, key: bool = False) -> None:
            self.pict_type, self.is_corrupt, self.key_frame = kind, corrupt, key

    damage = Damage()
    frames = [Frame(1, key=True), Frame(3), Frame(2), Frame(3), Frame(3), Frame(2, True), Frame(2), Frame(1, key=True)]
    for number, frame in enumerate(frames):
        if number:
            damage.take(frames[number - 1], number - 1.0, float(number), None)
        damage.passes(frame, float(number), None)
    damage.take(frames[-1], 7.0, 7.0, None)
    assert damage.spans() == ((3.0, 6.0),)
    assert damage.spans() == ()


def test_it_is_looked_ahead_for_the_last_frame(damaged: Callable) -> None:
    """The last frame that is taken is a B-frame, and what it is predicted from comes on screen two frames later."""
    path = damaged(6, 6, x264="bframes=2:b-adapt=0:b-pyramid=none:scenecut=0")
    with VideoReader(item(path)) as reader:
        assert reader.read_indices([2, 3]).corrupt == ()
        assert reader.read_indices([3, 4]).corrupt == ((pytest.approx(0.4), pytest.approx(0.4)),)


def test_many_spans_are_one_short_line() -> None:
    text = describe("clip.mp4", tuple((2.0 * n, 2.0 * n + (n % 2)) for n in range(40)))
    assert "at 0.00, 2.00-3.00, 4.00, 6.00-7.00, 8.00 s and 35 more spans" in text and len(text) < 150


def test_a_back_end_that_cannot_tell_is_no_help_with_error(damaged: Callable) -> None:
    path = damaged(25, 26)
    for refused in (
        lambda: VideoReader(item(path), "decord", corrupt="error"),
        lambda: GuardedReader("decord", corrupt="error"),
    ):
        with pytest.raises(UserError, match=r"back end decord does not detect damaged frames.*--backend pyav"):
            refused()
    with pytest.raises(UserError, match="expected error or warn, got maybe"):
        GuardedReader(corrupt="maybe")
    assert PyAVBackend.tells_damage


def test_damaged_clips_are_not_kept(damaged: Callable, tmp_path: Path, caplog) -> None:
    """So the cache never makes them look whole, and `error` refuses them behind `warn`."""
    path, wanted = damaged(25, 26), {"eyes": Geometry(32, 32)}
    caches = Caches.open(tmp_path / "cache", ("frames", "features"), None)
    caches.encoders = {"eyes": "digest"}
    with GuardedReader() as warns, GuardedReader(corrupt="error") as refuses:
        for _ in range(2):
            caplog.clear()
            loaded = MediaLoader(warns, caches).load(item(path), SIXTEEN, wanted)
            assert loaded.corrupt and loaded.keys == {} and "the video is damaged" in caplog.text
        with pytest.raises(UserError, match="the video is damaged"):
            MediaLoader(refuses, caches).load(item(path), SIXTEEN, wanted)
        whole = MediaRef("video", str(path), 0.0, 2.0)
        first = MediaLoader(warns, caches).load(whole, SIXTEEN, wanted)
        assert first.corrupt == () and first.keys
        again = MediaLoader(refuses, caches).load(whole, SIXTEEN, wanted)
        assert torch.equal(*(loaded.pixels[wanted["eyes"]] for loaded in (first, again)))
        assert caches.frames.rate.hits == 1


def test_the_doctor_calls_it_corrupt(damaged: Callable) -> None:
    path = damaged(25, 38)
    for quick, names in ((False, ["corrupt"]), (True, [])):
        (facts,) = examine([MediaFile("video", str(path))], {}, quick)
        assert [name for name, _ in facts["problems"]] == names
    (facts,) = examine([MediaFile("video", str(path))], {})
    # an earlier look that did not look for damage is no answer
    earlier = {facts["name"]: {key: value for key, value in facts.items() if key != "look"} | {"problems": []}}
    assert next(examine([MediaFile("video", str(path))], earlier))["problems"] == facts["problems"]
    assert "the video is damaged, which may reach the frames at 2.50-" in facts["problems"][0][1]


def test_the_flag_reaches_the_reader() -> None:
    import argparse

    from mmllm.cli.common import media_reader, reader_flags

    parser = argparse.ArgumentParser()
    reader_flags(parser)
    for words, choice in (([], "warn"), (["--corrupt", "error"], "error")):
        options = parser.parse_args(words)
        assert media_reader(options.backend, options.time_limit, options.corrupt).corrupt == choice
    with pytest.raises(UserError, match="decord does not detect damaged frames"):
        media_reader("decord", 60.0, "error")


def test_a_clip_is_whole_unless_told() -> None:
    assert Clip(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1)).corrupt == ()
