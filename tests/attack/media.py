"""Damaged, lying and odd media files, asked about by `mmllm ask`."""

from __future__ import annotations

import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attack.bench import Bench
from attack.case import UNTOLD, Case, Expect, Ran, Write

GREY_LEVELS = 10.0
"""Largest mean difference of a frame of a damaged file from that of the clean one, where nothing was said."""
IMAGES = (".png", ".jpg")
SECONDS = 20
"""The time that the reader gives a file."""


def fixed(bench: Bench) -> list[Write]:
    """Files whose damage is known, and good ones."""
    rows = [*_by_hand(), *_good(), *_of_the_tests()]
    return [lambda here, bench, row=row: row[1](here, bench, row[0], row[2]) for row in rows]


def ask(bench: Bench, path: Path | str, note: str, expect: Expect, kind: str | None = None, **more: Any) -> Case:
    """Ask about one file."""
    kind = kind or ("image" if Path(path).suffix in IMAGES else "video")
    flags = ["--max-new-tokens", "2", "--time-limit", str(SECONDS)]
    return Case(["ask", "--model", str(bench.model), *flags, f"--{kind}", str(path), "What?"], note, expect, **more)


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """A good file with random damage."""
    clean = draw.choice(bench.media())
    target = here / clean.name
    shutil.copytree(clean, target) if clean.is_dir() else shutil.copyfile(clean, target)
    file = draw.choice(sorted(target.iterdir())) if target.is_dir() else target
    data = bytearray(file.read_bytes())
    how = draw.choice(list(DAMAGE))
    where = DAMAGE[how](data, draw, bench)
    file.write_bytes(data)
    note = f"{how} {where} of {clean.name}"
    check = same_frames(clean, target) if how in ("flips", "zeroes") else None
    return ask(bench, target, note, "either", check=check)


def _place(data: bytearray, draw: random.Random) -> tuple[int, str]:
    """A place in a file: head, body or tail."""
    part = draw.choice(["head", "body", "body", "tail"])
    low, high = {"head": (0, 2000), "body": (0, len(data)), "tail": (len(data) - 2000, len(data))}[part]
    return draw.randrange(max(0, low), min(high, len(data))), part


def _flips(data: bytearray, draw: random.Random, bench: Bench) -> str:
    count, parts = draw.choice([1, 1, 4, 16, 64, 400]), set()
    for _ in range(count):
        place, part = _place(data, draw)
        data[place] ^= 1 << draw.randrange(8)
        parts.add(part)
    return f"{count} bits in the {'/'.join(sorted(parts))}"


def _zeroes(data: bytearray, draw: random.Random, bench: Bench) -> str:
    place, part = _place(data, draw)
    length = min(draw.choice([4, 64, 512, 4096, len(data) // 10, len(data) // 2]), len(data) - place)
    data[place : place + length] = bytes(length)
    return f"{length} bytes from {place} ({part})"


def _truncated(data: bytearray, draw: random.Random, bench: Bench) -> str:
    length = draw.randrange(len(data))
    del data[length:]
    return f"after {length} bytes"


def _header(data: bytearray, draw: random.Random, bench: Bench) -> str:
    other = draw.choice([path for path in bench.media() if path.is_file()])
    length = draw.choice([4, 12, 64, 1024])
    data[:length] = other.read_bytes()[:length]
    return f"{length} bytes from {other.name} at the start"


def _cut_out(data: bytearray, draw: random.Random, bench: Bench) -> str:
    place, part = _place(data, draw)
    length = draw.choice([1, 7, 188, 5000])
    del data[place : place + length]
    return f"{length} bytes from {place} ({part})"


def _put_in(data: bytearray, draw: random.Random, bench: Bench) -> str:
    place, part = _place(data, draw)
    data[place:place] = draw.randbytes(draw.choice([1, 16, 3000]))
    return f"noise at {place} ({part})"


def _sizes(data: bytearray, draw: random.Random, bench: Bench) -> str:
    places = [draw.randrange(0, min(4096, len(data) - 4)) // 4 * 4 for _ in range(draw.choice([1, 3]))]
    for place in places:
        data[place : place + 4] = draw.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)])
    return f"huge words at {places}"


DAMAGE: dict[str, Callable[[bytearray, random.Random, Bench], str]] = {
    "flips": _flips,
    "zeroes": _zeroes,
    "truncated": _truncated,
    "header swapped": _header,
    "cut out": _cut_out,
    "put in": _put_in,
    "sizes": _sizes,
}


def same_frames(clean: Path, damaged: Path) -> Callable[[Ran], str | None]:
    """What must hold of an answer about a damaged file: the clean frames, or a warning that names it."""

    def check(ran: Ran) -> str | None:
        if ran.code not in (0, 3) or any(
            damaged.name in line and not line.startswith("error: ") for line in ran.err.splitlines()
        ):
            return None
        first, second = read(clean), read(damaged)
        if first.shape != second.shape:
            return f"answered about frames of {second.shape} instead of {first.shape} without a warning"
        differences = np.abs(first.astype(np.int16) - second).reshape(len(first), -1).mean(1)
        if differences.max() <= GREY_LEVELS:
            return None
        wrong = [f"{number}: {value:.0f}" for number, value in enumerate(differences) if value > GREY_LEVELS]
        what = f"answered about other frames without a warning; grey levels off in frame {', '.join(wrong)}"
        return what if flagged(damaged) else f"{UNTOLD}: {what}"

    return check


def flagged(path: Path) -> bool:
    """Whether FFmpeg's decoder, asked on its own and with one thread, finds anything wrong in a file.

    Few formats hold checksums: a flipped bit that decodes to other pixels makes another video, not a damaged one.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for packet in container.demux(stream):
                if packet.is_corrupt or any(frame.is_corrupt for frame in packet.decode()):
                    return True
    except (av.error.FFmpegError, OSError, IndexError):
        return True
    return False


def read(path: Path) -> np.ndarray:
    """The frames that the model of the bench is given, at full size, uint8 [T, H, W, 3]."""
    import logging

    from mmllm.data.media.guard import GuardedReader
    from mmllm.data.media.sampling import Sampling
    from mmllm.data.media.types import MediaRef

    ref = MediaRef("image" if path.suffix in IMAGES else "video", str(path))
    logging.disable(logging.CRITICAL)  # the command has said it all before
    try:
        with GuardedReader() as reader:
            return reader.read(ref, Sampling(4)).frames
    finally:
        logging.disable(logging.NOTSET)


Asked = Callable[[Path, Bench, str, Expect], Case]
Row = tuple[str, Asked, Expect]


def _good() -> list[Row]:
    def whole(name: str) -> Asked:
        return lambda here, bench, note, expect: ask(bench, bench.root / name, note, expect)

    names = ["real.mp4", "front.mp4", "clip.mkv", "clip.avi", "clip.webm", "stream.ts", "clip.gif", "still.png"]
    names += ["still.jpg", "frames"]
    good = [(f"good {name}", whole(f"media/{name}"), "answer") for name in names]
    return [*good, *((f"stamps from 5,000 s: {name}", whole(f"late/{name}"), "answer") for name in LATE)]


LATE = ("late.mkv", "late.ts")


def _of_the_tests() -> list[Row]:
    """The files of tests/helpers/damage.py, with what is known of them there."""
    from helpers.damage import CASES

    def written(known: Any) -> Asked:
        def write(here: Path, bench: Bench, note: str, expect: Expect) -> Case:
            known.make(bench.videos, here / known.name)
            return ask(bench, here / known.name, note, expect, known.kind)

        return write

    outcomes: dict[str | None, Expect] = {"clip": "answer", "error": "refuse", None: "either"}
    expected = {known.name: outcomes[known.outcome] for known in CASES}
    expected["two_sizes"] = "either"  # each frame is resized as it comes
    return [(f"{known.group}: {known.name}", written(known), expected[known.name]) for known in CASES]


def _by_hand() -> list[Row]:
    def named(name: str, write: Callable[[Path, Bench], Any], kind: str | None = None) -> Asked:
        def make_it(here: Path, bench: Bench, note: str, expect: Expect) -> Case:
            write(here / name, bench)
            return ask(bench, here / name, note, expect, kind)

        return make_it

    def path(text: str, kind: str = "video") -> Asked:
        def ask_it(here: Path, bench: Bench, note: str, expect: Expect) -> Case:
            for file in (bench.root / "media/real.mp4", bench.root / "media/still.png"):
                shutil.copyfile(file, here / file.name)
            return ask(bench, text.replace("HERE", str(here)), note, expect, kind)

        return ask_it

    concat = "ffconcat version 1.0\nfile sibling.mp4\n"
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsibling.mp4\n#EXT-X-ENDLIST\n"
    rows: list[Row] = [
        ("empty file", named("clip.mp4", lambda p, b: p.write_bytes(b"")), "refuse"),
        ("text named .mp4", named("clip.mp4", lambda p, b: p.write_text("no video\n" * 99)), "refuse"),
        ("ffconcat named .mp4", named("clip.mp4", _beside(concat)), "refuse"),
        ("ffconcat named .mkv", named("clip.mkv", _beside(concat)), "refuse"),
        ("playlist named .mp4", named("clip.mp4", _beside(playlist)), "refuse"),
        ("playlist named .ts", named("clip.ts", _beside(playlist)), "refuse"),
        ("FIFO", named("clip.mp4", lambda p, b: os.mkfifo(p)), "refuse"),
        ("FIFO as image", named("still.png", lambda p, b: os.mkfifo(p)), "refuse"),
        ("FIFO in a frame folder", named("frames", _folder_with(os.mkfifo)), "refuse"),
        ("text in a frame folder", named("frames", _folder_with(lambda p: p.write_text("no image"))), "refuse"),
        ("empty file in a frame folder", named("frames", _folder_with(lambda p: p.write_bytes(b""))), "refuse"),
        ("dangling link in a frame folder", named("frames", _folder_with(lambda p: p.symlink_to("x"))), "refuse"),
        ("1 x 60,000 image", named("still.png", lambda p, b: _png(p, 1, 60000)), "either"),
        ("60,000 x 1 image", named("still.png", lambda p, b: _png(p, 60000, 1)), "either"),
        ("1 x 1 image", named("still.png", lambda p, b: _png(p, 1, 1)), "answer"),
        ("image of 0 pixels", named("still.png", lambda p, b: _png(p, 0, 5)), "refuse"),
        ("image with a text of 50 MB unpacked", named("still.png", _text_bomb), "either"),
        ("folder named .mp4", named("clip.mp4", lambda p, b: p.mkdir()), "refuse"),
        ("folder named .png", named("still.png", lambda p, b: p.mkdir()), "refuse"),
        ("link to itself", named("clip.mp4", lambda p, b: p.symlink_to(p)), "refuse"),
        ("SVG named .png", named("still.png", lambda p, b: p.write_text("<svg width='9' height='9'/>")), "refuse"),
        ("no such file", path("HERE/nothing.mp4"), "refuse"),
        ("/dev/zero", path("/dev/zero"), "refuse"),
        ("/dev/zero as image", path("/dev/zero", "image"), "refuse"),
        ("/dev/null", path("/dev/null"), "refuse"),
        ("/proc/self/mem", path("/proc/self/mem"), "refuse"),
        ("path with a zero byte", path("HERE/real\x00.mp4"), "refuse"),
        ("path of 5,000 characters", path("HERE/" + "x" * 5000 + ".mp4"), "refuse"),
        ("path with a lone surrogate", path("HERE/\udcff.mp4"), "refuse"),
        ("path with a line break", path("HERE/a\nb.mp4"), "refuse"),
        ("empty path", path(""), "refuse"),
        ("remote", path("https://example.org/a.mp4"), "refuse"),
        ("protocol file:", path("file:HERE/real.mp4"), "either"),
        ("protocol concat:", path("concat:HERE/real.mp4|HERE/real.mp4"), "refuse"),
        ("protocol subfile", path("subfile,,start,0,end,9,,:HERE/real.mp4"), "refuse"),
        ("protocol data:", path("data:video/mp4;base64,AAAA"), "refuse"),
        ("an image as video", path("HERE/still.png"), "either"),
        ("a video as image", path("HERE/real.mp4", "image"), "refuse"),
        ("bounds on an image", path("HERE/still.png#t=1,2", "image"), "refuse"),
    ]
    bounds = [("1,2", "answer"), ("2,1", "refuse"), ("nan", "refuse"), ("inf,inf", "refuse"), ("-1", "refuse")]
    bounds += [("0,0", "refuse"), ("900,901", "refuse"), ("1e5", "refuse"), ("9" * 400, "refuse"), (",", "refuse")]
    bounds += [("1,2,3", "refuse"), ("0,1e-9", "refuse"), (f"{'0' * 6000}1,2", "either"), ("٣", "either")]
    rows += [(f"bounds #t={text[:20]}", path(f"HERE/real.mp4#t={text}"), expect) for text, expect in bounds]
    return rows


def _beside(text: str) -> Callable[[Path, Bench], None]:
    """A text beside the clip that it names."""

    def write(path: Path, bench: Bench) -> None:
        shutil.copyfile(bench.root / "media/real.mp4", path.with_name("sibling.mp4"))
        path.write_text(text)

    return write


def _folder_with(write: Callable[[Path], Any]) -> Callable[[Path, Bench], None]:
    """A folder of frames of which one is something else."""

    def make_it(path: Path, bench: Bench) -> None:
        shutil.copytree(bench.root / "media/frames", path)
        for number in range(1, 13):  # whichever frames are sampled
            if number % 2:
                file = path / f"{number:05d}.jpg"
                file.unlink()
                write(file)

    return make_it


def _png(path: Path, width: int, height: int, *chunks: tuple[bytes, bytes]) -> None:
    rows = zlib.compress(b"".join(b"\x00" + b"\x7f\x30\x30" * width for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)


def _text_bomb(path: Path, bench: Bench) -> None:
    _png(path, 40, 40, (b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(50_000_000))))
