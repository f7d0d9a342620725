"""Frames and times that the reader delivers, for every kind of media and both back ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.reader import VideoReader, probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef, Probe

Make = Callable[..., Path]
CLIPS = {
    "cloud_text.mp4": 96,
    "cooking.mp4": 288,
    "countdown_room.mp4": 146,
    "driving.mp4": 300,
    "hitting_baseball.mp4": 300,
    "stirfry.avi": 270,
    "tablet_drawing.mp4": 150,
    "yoga.mp4": 300,
}


def video(path: Path, **bounds: float) -> MediaRef:
    """A video item."""
    return MediaRef("video", str(path), **bounds)


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(CLIPS))
def test_real_clips_frame_for_frame(shared: Path, name: str) -> None:
    """Both back ends give the frames of a plain decode, in order and shuffled, with the frame count of the header."""
    import av

    pytest.importorskip("decord")
    path = shared / "data" / "videos" / name
    order = np.random.default_rng(0).permutation(CLIPS[name])[:12].tolist()
    wanted = sorted({*order, 0, CLIPS[name] - 1})
    with av.open(str(path)) as container:
        plain = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted}
    for backend in ("pyav", "decord"):
        with VideoReader(video(path), backend) as reader:
            assert reader.probe.frames == CLIPS[name]
            for indices in (wanted, order, [order[0]] * 3 + order[1:3]):
                clip = reader.read_indices(indices)
                assert np.array_equal(clip.frames, np.stack([plain[i] for i in indices])), (backend, indices)
                assert clip.times == pytest.approx(np.array(indices) / reader.probe.fps)
                assert (clip.repeated, clip.frames.dtype) == (0, np.uint8)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "x264"),
    [
        ("closed.mp4", None),
        ("open.mp4", "open-gop=1:bframes=3:b-adapt=0:scenecut=0"),
        ("webm_like.mkv", None),
        ("stream.ts", None),
        ("shuffled.avi", None),
    ],
)
def test_long_files_jump_to_the_right_frame(
    make_video: Make, numbers: Callable, name: str, x264: str | None, backend: str
) -> None:
    """Far apart, out of order, next to key frames: B-frames, open GOPs and containers without display times."""
    if backend == "decord":
        pytest.importorskip("decord")
    path = make_video(name, frames=1600, fps=25, gop=30, x264=x264)
    wanted = [1599, 0, 779, 780, 781, 1500, 3, 1499, 1501]
    with VideoReader(video(path), backend) as reader:
        assert (reader.probe.frames, reader.probe.fps) == (1600, 25.0)
        assert numbers(reader.read_indices(wanted).frames) == wanted
        assert numbers(reader.read_indices([1599]).frames) == [1599]


def test_frames_before_an_edit_list_are_not_counted(make_video: Make, numbers: Callable, tmp_path: Path) -> None:
    """A cut without decoding keeps the frames from the key frame on, and says from when on they are shown."""
    import av

    whole, cut = make_video(frames=40, gop=20, x264="bframes=0"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        early = round(0.7 / float(source.streams.video[0].time_base))
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - early, packet.dts - early, stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 40  # stored
    with VideoReader(video(cut)) as reader:
        assert (reader.probe.frames, reader.probe.fps) == (33, 10.0)
        assert numbers(reader.read_indices([0, 1, 32]).frames) == [7, 8, 39]


def test_bounds_and_times(make_video: Make, numbers: Callable) -> None:
    """Times count from the start of the file; a moment shows the last frame that has come by then."""
    path = make_video(frames=40)
    clip = read_media(video(path, start=2.0, end=3.0), Sampling(frames=4))
    assert numbers(clip.frames) == [21, 23, 26, 29]
    assert clip.times.tolist() == [2.1, 2.3, 2.6, 2.9]
    assert clip.frames.shape == (4, 48, 64, 3)
    with VideoReader(video(path)) as reader:
        assert numbers(reader.read_times([1.0, 0.99, 1.09, 0.0, 4.0]).frames) == [10, 9, 10, 0, 39]
    late = read_media(video(path, start=3.5, end=60.0), Sampling(frames=2))
    assert numbers(late.frames) == [36, 38]
    assert len(read_media(video(path, start=1.0), Sampling(fps=2.0)).times) == 6


def test_more_frames_than_there_are(make_video: Make, numbers: Callable) -> None:
    """Frames repeat; this is no missing tail."""
    clip = read_media(video(make_video(frames=4)), Sampling(frames=8))
    assert numbers(clip.frames) == [0, 0, 1, 1, 2, 2, 2, 3]
    assert clip.repeated == 0


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_rotated_video(make_video: Make, make_picture: Callable, rotation: int, turns: int) -> None:
    """The display matrix is applied, and the header's size is that of the upright picture."""
    path = make_video(frames=6, rotation=rotation)
    clip = read_media(video(path), Sampling(frames=1))
    upright = np.rot90(make_picture(2), turns)
    assert clip.frames.shape[1:] == upright.shape
    assert (probe(video(path)).height, probe(video(path)).width) == upright.shape[:2]
    assert np.array_equal(clip.frames[0, 8::16, 8::16] > 128, upright[8::16, 8::16] > 128)


def test_images(tmp_path: Path) -> None:
    """One frame at time 0, turned upright by EXIF, RGB from grey and transparent pictures."""
    from PIL import Image

    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15] = (255, 0, 0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    ref = MediaRef("image", str(tmp_path / "turned.png"))
    assert probe(ref) == Probe("image", 1, 1.0, 30, 20)
    clip = read_media(ref, Sampling(frames=16))
    assert np.array_equal(clip.frames, np.rot90(pixels, -1)[None])
    assert clip.times.tolist() == [0.0]
    assert np.array_equal(read_media(video(tmp_path / "turned.png"), Sampling()).frames, clip.frames)
    Image.new("LA", (8, 6), (100, 128)).save(tmp_path / "grey.png")
    assert read_media(MediaRef("image", str(tmp_path / "grey.png")), Sampling()).frames.mean() == 100
    Image.fromarray(np.full((6, 8), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_media(MediaRef("image", str(tmp_path / "deep.png")), Sampling()).frames.mean() == 128


def test_gif(tmp_path: Path) -> None:
    """An animated GIF is a video with the rate of its delays; a still one may be an image."""
    from PIL import Image

    pictures = [Image.fromarray(np.full((12, 16, 3), shade, np.uint8)) for shade in range(0, 200, 20)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200)
    assert probe(video(path)) == Probe("gif", 10, 5.0, 12, 16)
    clip = read_media(video(path), Sampling(frames=10, sampler="linspace"))
    assert clip.frames[:, 0, 0, 0].tolist() == list(range(0, 200, 20))
    assert clip.times[-1] == 1.8
    pictures[3].save(tmp_path / "still.gif")
    assert read_media(MediaRef("image", str(tmp_path / "still.gif")), Sampling()).frames.mean() == 60


def test_folder_of_frames(tmp_path: Path, make_picture: Callable, numbers: Callable) -> None:
    """Files by number, 3 frames per second unless said otherwise; other files do not count."""
    from PIL import Image

    for number in range(12):
        Image.fromarray(make_picture(number)).save(tmp_path / f"{number + 1}.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no frame")
    assert probe(video(tmp_path)) == Probe("folder", 12, 3.0, 48, 64)
    clip = read_media(video(tmp_path), Sampling(frames=12, sampler="linspace"))
    assert numbers(clip.frames) == list(range(12)) and clip.repeated == 0
    assert clip.times.tolist() == pytest.approx(np.arange(12) / 3)
    assert read_media(video(tmp_path, fps=1.0), Sampling(fps=0.5)).times.tolist() == [0.0, 2.0, 4.0, 6.0, 7.0, 9.0]


def test_decord_falls_back(make_video: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without decord PyAV reads the file, and one warning says so."""
    import sys

    monkeypatch.setitem(sys.modules, "decord", None)
    path = make_video()
    with caplog.at_level(logging.WARNING):
        clip = read_media(video(path), Sampling(), "decord")
    assert np.array_equal(clip.frames, read_media(video(path), Sampling()).frames)
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: decord is not installed; reading it with pyav instead"
    ]


def test_small_files_start_no_threads(make_video: Make) -> None:
    with PyAVBackend.open(str(make_video())) as backend:
        assert backend._stream.codec_context.thread_count == 1
