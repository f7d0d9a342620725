"""Ordinary containers open, what would open other files does not, and time counts from the first frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.makers import coded, decoded, encode

from mmllm.contract.errors import UserError
from mmllm.data.media.reader import probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

ORDINARY: dict[str, dict[str, Any]] = {
    "clip.mp4": {},
    "clip.m4v": {"codec": "mpeg4"},
    "clip.mov": {},
    "clip.3gp": {"codec": "mpeg4"},
    "clip.f4v": {},
    "clip.avi": {},
    "clip.mkv": {},
    "clip.webm": {"codec": "libvpx"},
    "clip.gif": {"codec": "gif", "pixels": "rgb8"},
    "clip.apng": {"codec": "apng", "pixels": "rgb24"},
    "clip.ts": {},
    "clip.m2ts": {},
    "clip.mpg": {"codec": "mpeg2video"},
    "clip.vob": {"codec": "mpeg2video"},
    "clip.m2v": {"codec": "mpeg2video"},
    "clip.flv": {"codec": "flv"},
    "clip.ogv": {"codec": "libvpx"},
    "clip.wmv": {"codec": "wmv2"},
    "clip.asf": {"codec": "wmv1"},
    "clip.h264": {},
    "clip.hevc": {"codec": "libx265", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "clip.ivf": {"codec": "libvpx"},
    "clip.y4m": {"codec": "rawvideo"},
    "clip.mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "clip.nut": {},
}
OTHERS = {
    "concat": "ffconcat version 1.0\nfile 'sibling.mp4'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nsibling.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="dash:profile">\n</MPD>\n',
    "imf": '<?xml version="1.0"?>\n<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">\n',
}
EIGHT = Sampling(frames=8)


def item(path: Path) -> MediaRef:
    return MediaRef("video", str(path))


def late(path: Path, start: float, codec: str = "libx264", frames: int = 40, **options: str) -> None:
    """Numbered frames, 10 a second, whose time stamps begin at `start` seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "12"} | options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(coded(number), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(start * 1000) + number * 100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_containers_open(name: str, tmp_path: Path) -> None:
    """Also under a name that says nothing."""
    path = tmp_path / name
    pictures = [coded(number).repeat(2, 0).repeat(2, 1) for number in range(12)]
    encode(str(path), pictures, **({"bf": "0"} | ORDINARY[name]))
    assert probe(item(path)).frames == 12
    assert len(set(decoded(read_media(item(path), EIGHT).frames[:, ::2, ::2]))) == 8


@pytest.mark.parametrize("suffix", [".mp4", None])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_opens_other_files_is_refused(kind: str, suffix: str | None, tmp_path: Path) -> None:
    """A playlist, a manifest or a network description, whatever it is called."""
    for name in ("sibling.mp4", "sibling.ts"):
        encode(str(tmp_path / name), map(coded, range(12)))
    own = {"concat": ".ffconcat", "hls": ".m3u8", "sdp": ".sdp", "dash": ".mpd", "imf": ".xml"}[kind]
    path = tmp_path / f"list{suffix or own}"
    path.write_text(OTHERS[kind])
    with pytest.raises(UserError) as caught:
        read_media(item(path), EIGHT)
    assert str(path) in str(caught.value) and "not a video" in str(caught.value)


def test_a_pattern_of_names_is_only_a_name(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(4):
        Image.fromarray(coded(number)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "%d.jpg").write_bytes((tmp_path / "3.jpg").read_bytes())
    assert decoded(read_media(item(tmp_path / "%d.jpg"), EIGHT).frames) == [3]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("late.mp4", {}),
        ("late.mov", {}),
        ("late.mkv", {}),
        ("late.webm", {"codec": "libvpx"}),
        ("late.wmv", {"codec": "wmv2"}),
        ("late.ts", {}),
        ("late.flv", {}),
        ("late.nut", {}),
    ],
)
def test_time_counts_from_the_first_frame(
    name: str, options: dict[str, str], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stamps that begin at 5,000 s are no damage; where packets are counted and where the duration is trusted."""
    if backend == "decord":
        pytest.importorskip("decord")
    path = tmp_path / name
    for start in (0.0, 3.0, 5000.0):
        late(path, start, **options)
        header = probe(item(path))
        assert (header.frames, header.fps) == (40, 10.0)
        clip = read_media(item(path), EIGHT, backend)
        assert decoded(clip.frames) == [2, 7, 12, 17, 22, 26, 31, 36] and clip.repeated == 0
        assert clip.times == pytest.approx(np.array([2, 7, 12, 17, 22, 26, 31, 36]) / 10)
        part = read_media(MediaRef("video", str(path), 2.0, 3.0), Sampling(frames=2), backend)
        assert decoded(part.frames) == [22, 27]
    monkeypatch.setattr("mmllm.data.media.containers.COUNT_BYTES", 0)
    assert probe(item(path)).frames == pytest.approx(40, abs=2)


def test_a_late_file_that_is_cut_off_is_still_noticed(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    late(path, 5000.0, frames=400)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="frames are missing"):
        read_media(item(path), EIGHT)
