"""Makes media files that misbehave out of a few real clips, and real frames whose numbers can be read off again."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

BITS = 12
SIZE = (80, 96)
"""Height and width of the re-encoded frames: crops of a real clip with their number painted into a corner."""
FRAMES = 24
FPS = 10

LONG = 400
"""Frames of a clip of each of `KINDS`, with B-frames, open groups and the like."""

KINDS = {
    "pyramid.mp4": {"g": "250", "x264-params": "bframes=3:b-pyramid=normal:scenecut=0"},
    "deep.mp4": {"g": "40", "x264-params": "bframes=8:b-adapt=2:b-pyramid=normal:ref=5:scenecut=0"},
    "open.mp4": {"g": "30", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"},
    "plain.mkv": {"g": "50", "x264-params": "bframes=0"},
    "refresh.mp4": {"g": "60", "x264-params": "intra-refresh=1:bframes=2"},
    "b.avi": {"g": "50", "x264-params": "bframes=2"},
    "b.ts": {"g": "50", "x264-params": "bframes=2"},
    "hevc.mp4": {"codec": "libx265", "g": "40", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "50", "auto-alt-ref": "1", "lag-in-frames": "16"},
}


def coded(number: int) -> np.ndarray:
    """A picture ``[48, 64, 3]`` whose 3 x 4 squares are the bits of ``number``: readable after any compression."""
    bits = (number >> np.arange(BITS) & 1).reshape(3, 4) * 255
    return np.kron(bits, np.ones((16, 16)))[..., None].repeat(3, -1).astype(np.uint8)


def decoded(frames: np.ndarray) -> list[int]:
    """The numbers in the corner of ``[T, H, W, 3]`` pictures."""
    bits = (frames[:, 8:48:16, 8:64:16, 0] > 128).reshape(len(frames), BITS)
    return (bits << np.arange(BITS)).sum(1).tolist()


@cache
def _real(videos: Path) -> np.ndarray:
    """Frames of a real clip."""
    import av

    with av.open(str(videos / "tablet_drawing.mp4")) as container:
        frames = (frame for number, frame in enumerate(container.decode(video=0)) if number < FRAMES)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def numbered(videos: Path, height: int = SIZE[0], width: int = SIZE[1]) -> list[np.ndarray]:
    """Real pictures ``[height, width, 3]`` with their numbers painted in."""
    pictures = _real(videos)[:, :height, :width].copy()
    for number, picture in enumerate(pictures):
        picture[:48, :64] = coded(number)
    return list(pictures)


def encode(
    target: Any,
    pictures: Iterable[np.ndarray],
    codec: str = "libx264",
    moments: Sequence[float] | None = None,
    rotation: int = 0,
    form: str | None = None,
    pixels: str = "yuv420p",
    **options: str,
) -> None:
    """Encode pictures, at 10 a second or at the moments (seconds) given."""
    import av

    container_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    speed = {"crf": "12"} if codec.startswith("libx26") else {"deadline": "realtime", "cpu-used": "8", "b": "1M"}
    with av.open(target, "w", format=form, options=container_options) as container:
        stream = None
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream(codec, rate=FPS, options=speed | options)
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
                if rotation:
                    stream.set_display_rotation(rotation)
                if moments is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if moments is not None:
                frame.time_base, frame.pts = stream.codec_context.time_base, round(moments[number] * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def remux(source: Path, target: Path, **options: str) -> None:
    """The same packets in another container."""
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


@cache
def _base(videos: Path, number: int) -> tuple[bytes, str]:
    """Bytes and suffix of the files that are cut and flipped: an avi, an mp4 with its index in front, an mkv."""
    if number % 3 == 0:
        return (videos / "stirfry.avi").read_bytes(), ".avi"
    suffix, options = (".mp4", {"movflags": "faststart"}) if number % 3 == 1 else (".mkv", {})
    source = videos / ("countdown_room.mp4" if number % 2 else "tablet_drawing.mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"base{suffix}"
        remux(source, path, **options)
        return path.read_bytes(), suffix


def truncate(number: int, videos: Path, target: Path) -> None:
    """The first part of a file: (number + 1) / 21 of it."""
    data, _ = _base(videos, number)
    target.write_bytes(data[: len(data) * (number + 1) // 21])


def flip(seed: int, videos: Path, target: Path) -> None:
    """Change 64 bytes anywhere, and some of them in the first two kilobytes."""
    data, draw = bytearray(_base(videos, seed)[0]), np.random.default_rng(seed)
    places = [*draw.integers(0, len(data), 60), *draw.integers(0, 2000, 4)]
    for place in places:
        data[place] ^= int(draw.integers(1, 256))
    target.write_bytes(data)


def flip_bits(data: bytes, seed: int) -> bytes:
    """Flip one to four bits somewhere between the header and the end of a file."""
    draw, changed = np.random.default_rng(seed), bytearray(data)
    for place in draw.integers(2000, len(data) - 1500, 1 + seed % 4):
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def suffix_of(number: int) -> str:
    """What the file of a number is called."""
    return (".avi", ".mp4", ".mkv")[number % 3]


def copy(name: str, videos: Path, target: Path) -> None:
    """A real file under another name."""
    shutil.copyfile(videos / name, target)


def write_bytes(data: bytes, videos: Path, target: Path) -> None:
    """A file of these bytes."""
    target.write_bytes(data)


def picture_file(form: str, videos: Path, target: Path) -> None:
    """A picture in a format of its own."""
    from PIL import Image

    with Image.open(videos / "apple.jpg") as image:
        image.save(target, format=form)


def sound(videos: Path, target: Path) -> None:
    """One second of silence."""
    import av

    with av.open(str(target), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def folder_of(files: dict[str, bytes], videos: Path, target: Path) -> None:
    """A folder of these files."""
    target.mkdir()
    for name, data in files.items():
        (target / name).write_bytes(data)


def uneven_folder(videos: Path, target: Path) -> None:
    """A folder of pictures that differ in size."""
    target.mkdir()
    for number, name in enumerate(("apple.jpg", "waterview.jpg")):
        shutil.copyfile(videos / name, target / f"{number}.jpg")


def half_image(videos: Path, target: Path) -> None:
    """The first half of a jpg."""
    data = (videos / "waterview.jpg").read_bytes()
    target.write_bytes(data[: len(data) // 2])


def encoded(videos: Path, target: Path, height: int = SIZE[0], width: int = SIZE[1], **how: Any) -> None:
    """The numbered frames as a video."""
    encode(str(target), numbered(videos, height, width), **how)


def one_frame(videos: Path, target: Path) -> None:
    """A video of one frame."""
    encode(str(target), numbered(videos)[:1])


def gif(videos: Path, target: Path) -> None:
    """The numbered frames as a GIF."""
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in numbered(videos)]
    first.save(target, format="gif", save_all=True, append_images=others, duration=1000 // FPS)


def rotated(rotation: int, turns: int, videos: Path, target: Path) -> None:
    """A video that is stored turned, with the matrix that turns it upright."""
    encode(str(target), [np.rot90(picture, -turns) for picture in numbered(videos)], rotation=rotation)


class _Unseekable:
    """A file that can only be written on, so that no duration and no index can be filled in."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        """Append."""
        self.data += data
        return len(data)


def piped(form: str, codec: str, videos: Path, target: Path) -> None:
    """A video without duration and index."""
    pipe = _Unseekable()
    encode(pipe, numbered(videos), codec=codec, form=form)
    target.write_bytes(pipe.data)


def transport_stream(videos: Path, height: int, width: int) -> bytes:
    """The numbered frames as MPEG-TS, with a key frame now and then."""
    pipe = _Unseekable()
    encode(pipe, numbered(videos, height, width), form="mpegts", g="8")
    return bytes(pipe.data)


def two_sizes(videos: Path, target: Path) -> None:
    """A stream whose pictures change their size on the way."""
    target.write_bytes(transport_stream(videos, *SIZE) + transport_stream(videos, 160, 200))


def headless(videos: Path, target: Path) -> None:
    """A stream that begins in the middle."""
    data = transport_stream(videos, *SIZE)
    target.write_bytes(data[len(data) // 188 // 3 * 188 :])


def patched(
    form: str, patches: dict[tuple[bytes, int], bytes], videos: Path, target: Path, codec: str = "libx264"
) -> None:
    """Overwrite bytes behind the marks of a header: {(mark, offset from its start): bytes}."""
    made = target.with_name(f"whole_{target.stem}.{form}")
    encoded(videos, made, codec=codec, pixels="rgb24" if codec == "rawvideo" else "yuv420p")
    data = bytearray(made.read_bytes())
    made.unlink()
    start = data.index(b"moov") if form in ("mp4", "mov") else 0
    for (mark, offset), value in patches.items():
        place = data.index(mark, start) + offset
        data[place : place + len(value)] = value
    target.write_bytes(data)


def huge_png(side: int, videos: Path, target: Path) -> None:
    """A small file that declares so many pixels a side."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    target.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def huge_jpg(videos: Path, target: Path) -> None:
    """A photo that declares 60000 pixels a side."""
    data = bytearray((videos / "apple.jpg").read_bytes())
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[place + 5 : place + 9] = struct.pack(">HH", 60000, 60000)
    target.write_bytes(data)


def huge_gif(videos: Path, target: Path) -> None:
    """A GIF that declares 65535 pixels a side."""
    gif(videos, target)
    data = bytearray(target.read_bytes())
    data[6:10] = struct.pack("<HH", 65535, 65535)
    target.write_bytes(data)


def fifo(videos: Path, target: Path) -> None:
    """A pipe that nobody writes to."""
    os.mkfifo(target)
