"""What is wrong with a file is said in one line that names it and what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmllm.contract.errors import UserError
from mmllm.data.media.reader import VideoReader, probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

Make = Callable[..., Path]


def complaint(kind: str, text: object, sampling: Sampling | None = None, backend: str = "pyav") -> str:
    """The error for an item, checked to be one line that names the file and a way out."""
    with pytest.raises(UserError) as caught:
        ref = MediaRef.parse(kind, str(text))
        read_media(ref, sampling or Sampling(), backend)
    message = str(caught.value)
    assert message.startswith(str(text).split("#")[0])
    assert "Try: " in message and "\n" not in message
    return message


def audio_file(path: Path) -> Path:
    """One second of silence."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_each_kind_of_bad_file_has_its_own_text(tmp_path: Path, make_video: Make) -> None:
    """Missing, empty, text, cut off, audio, no frames in a folder, no image, damaged image."""
    clip = make_video("clip.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "notes.txt").write_text("this is no video\n" * 50)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    texts = {
        complaint("video", tmp_path / "clop.mp4"): "no such file or folder",
        complaint("video", tmp_path / "empty.mp4"): "the file is empty",
        complaint("video", tmp_path / "text.mp4"): "not a video, it cannot be opened",
        complaint("video", tmp_path / "notes.txt"): "not a video but a text file",
        complaint("video", tmp_path / "cut.mp4"): "cannot be opened, its index (moov) is missing",
        complaint("video", audio_file(tmp_path / "sound.m4a")): "only audio",
        complaint("video", tmp_path / "folder"): "the folder holds no image",
        complaint("image", tmp_path / "text.jpg"): "not an image",
        complaint("image", clip): "an image item names a video",
        complaint("image", tmp_path / "folder"): "an image item names a folder",
        complaint("image", tmp_path / "none.jpg"): "no such file or folder (image item)",
    }
    for message, part in texts.items():
        assert part in message
    assert len(texts) == 11
    assert complaint("video", tmp_path / "clop.mp4").endswith(f"Try: {clip}")


def test_damaged_image(tmp_path: Path) -> None:
    """The header is fine, the pixels are not."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    assert "the image is damaged" in complaint("image", tmp_path / "half.jpg")


def test_frames_of_a_folder_differ_in_size(tmp_path: Path) -> None:
    """The odd file is named."""
    from PIL import Image

    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    Image.new("RGB", (6, 8)).save(tmp_path / "2.png")
    message = complaint("video", tmp_path, Sampling(frames=2, sampler="linspace"))
    assert "2.png: the frames of a folder differ in size, expected 6x8 (height x width), got 8x6" in message


@pytest.mark.parametrize(
    ("fragment", "part"),
    [
        ("#t=9,12", "starts after the end of the clip, expected a start below 1.600 s, got 9 s"),
        ("#t=1,1", "zero length"),
        ("#t=1,0.5", "negative length"),
        ("#t=1.6", "starts after the end"),
    ],
)
def test_bounds_that_hold_nothing(make_video: Make, fragment: str, part: str) -> None:
    """Said with the bound, by the probe already."""
    path = make_video()
    message = complaint("video", f"{path}{fragment}")
    assert part in message and fragment in message
    with pytest.raises(UserError):
        probe(MediaRef.parse("video", f"{path}{fragment}"))


def test_an_end_behind_the_clip_is_cut_and_logged(make_video: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Common in benchmarks: clamped, but not in silence."""
    with caplog.at_level(logging.INFO):
        clip = read_media(MediaRef.parse("video", f"{make_video()}#t=1,99"), Sampling(frames=2))
    assert clip.times.tolist() == [1.1, 1.3]
    assert "ends after the clip" in caplog.text


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_missing_tail(
    make_video: Make, numbers: Callable, caplog: pytest.LogCaptureFixture, tmp_path: Path, backend: str
) -> None:
    """One missing frame is repeated with a warning; half a file is an error. The index stands in front here."""
    whole = make_video(frames=200, gop=10, movflags="faststart")
    data, cut = whole.read_bytes(), tmp_path / "cut.mp4"
    head = data.index(b"mdat")
    cut.write_bytes(data[: head + (len(data) - head) * 97 // 100])
    with caplog.at_level(logging.WARNING), VideoReader(MediaRef("video", str(cut)), backend) as reader:
        assert reader.probe.frames == 200
        clip = reader.read_indices([199, 0, 50, 100])
        last = numbers(clip.frames)[0]
        assert 185 < last < 199
        assert (clip.repeated, numbers(clip.frames)[1:]) == (1, [0, 50, 100])
        assert "1 of 4 frames are missing" in caplog.text and str(cut) in caplog.text
        with pytest.raises(UserError, match="2 of 4 frames are missing"):
            reader.read_indices([199, 0, 198, 100])
    cut.write_bytes(data[: head + (len(data) - head) // 2])
    assert "of 16 frames are missing" in complaint("video", cut, Sampling(frames=16), backend)
    with (
        pytest.raises(UserError, match="1 of 1 frames are missing"),
        VideoReader(MediaRef("video", str(cut))) as reader,
    ):
        reader.read_indices([150])


def test_a_cut_file_without_a_frame_count(make_video: Make, tmp_path: Path) -> None:
    """Its packets are counted, and the duration in the header tells that they are too few."""
    whole = make_video("whole.mkv", frames=200, gop=10)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "frames are missing" in complaint("video", cut, Sampling(frames=16))


def test_bad_requests(make_video: Make) -> None:
    """Unknown back end, frames and moments outside the file, nothing at all."""
    ref = MediaRef("video", str(make_video()))
    with pytest.raises(UserError, match=r"unknown back end 'decrod'. Try: decord"):
        VideoReader(ref, "decrod")
    with pytest.raises(UserError, match="unknown back end"):
        probe(ref, "opencv")
    with VideoReader(ref) as reader:
        with pytest.raises(UserError, match="no such frame, expected 0 to 15, got 16"):
            reader.read_indices([0, 16])
        with pytest.raises(UserError, match=r"no such moment, expected 0 to 1.600 seconds, got 2"):
            reader.read_times([2.0])
        with pytest.raises(UserError, match="no frames asked for"):
            reader.read_indices([])
    with pytest.raises(UserError, match="fps is for folders of frames"):
        probe(MediaRef("video", ref.path, fps=2.0))
    with pytest.raises(UserError, match="the path cannot be read"):
        probe(MediaRef("video", "x" * 5000))
    with pytest.raises(UserError, match="unknown kind of media"):
        MediaRef("audio", "a.wav")
    with pytest.raises(UserError, match="an image has no start and end"):
        MediaRef.parse("image", "a.jpg#t=1")
