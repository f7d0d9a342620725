"""The damaged, lying and odd files: one case a file, with what is known about it.

Used by ``test_damaged.py`` and by ``scripts/bench/damaged_media.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers.makers import (
    FPS,
    FRAMES,
    SIZE,
    copy,
    encoded,
    fifo,
    flip,
    folder_of,
    gif,
    half_image,
    headless,
    huge_gif,
    huge_jpg,
    huge_png,
    one_frame,
    patched,
    picture_file,
    piped,
    rotated,
    sound,
    suffix_of,
    truncate,
    two_sizes,
    uneven_folder,
    write_bytes,
)

Make = Callable[[Path, Path], None]
"""make(folder of the real clips, path to write)"""


@dataclass(frozen=True)
class Case:
    """One file.

    Args:
        name: its name.
        group: row of the table in docs/measurements.md.
        make: writes it.
        kind: what it is read as.
        outcome: "clip" or "error" where only that is right; None where either is.
        moments: seconds at which its numbered frames come on screen, where the content is known.
        size: height and width of the upright picture, where known.
    """

    name: str
    group: str
    make: Make
    kind: str = "video"
    outcome: str | None = None
    moments: tuple[float, ...] = ()
    size: tuple[int, int] | None = None


EVEN = tuple(number / FPS for number in range(FRAMES))
UNEVEN = tuple(float(moment) for moment in np.cumsum([0, *[0.04, 0.04, 0.3, 0.1] * 5, 0.04, 0.04, 0.5]).round(3))
BIG = struct.pack(">I", 0x7FFFFFFF)
ZERO = bytes(4)


def _known(name: str, group: str, make: Make, moments: tuple[float, ...] = EVEN, size: Any = SIZE) -> Case:
    return Case(name, group, make, outcome="clip", moments=moments, size=size)


def _broken(name: str, group: str, make: Make, kind: str = "video") -> Case:
    return Case(name, group, make, kind, outcome="error")


def _cut_and_flipped() -> list[Case]:
    cut = [Case(f"cut_{n:02d}{suffix_of(n)}", "cut off at 20 points", partial(truncate, n)) for n in range(20)]
    return cut + [Case(f"flip_{n:02d}{suffix_of(n)}", "bytes changed, 20 seeds", partial(flip, n)) for n in range(20)]


def _wrong() -> list[Case]:
    name, nothing = "wrong name or kind", "nothing to see"
    return [
        Case("avi_as.mp4", name, partial(copy, "stirfry.avi"), outcome="clip", size=(240, 320)),
        Case("mp4_as.avi", name, partial(copy, "tablet_drawing.mp4"), outcome="clip", size=(224, 224)),
        Case("jpg_as.mp4", name, partial(copy, "apple.jpg"), size=(225, 224)),
        _broken("mp4_as.jpg", name, partial(copy, "tablet_drawing.mp4")),
        _broken("mp4_as.png", name, partial(copy, "tablet_drawing.mp4"), "image"),
        Case("png_as.jpg", name, partial(picture_file, "PNG"), "image", "clip", size=(225, 224)),
        _broken("text.mp4", name, partial(write_bytes, b"this is no video\n" * 50)),
        _broken("text.txt", name, partial(write_bytes, b"this is no video\n" * 50)),
        _broken("fifo.mp4", name, fifo),
        _broken("empty.mp4", nothing, partial(write_bytes, b"")),
        _broken("zeros.mp4", nothing, partial(write_bytes, bytes(1 << 16))),
        _broken("noise.mp4", nothing, partial(write_bytes, np.random.default_rng(0).bytes(1 << 16))),
        _broken("sound.m4a", nothing, sound),
        _broken("sound.mp4", nothing, sound),
        _broken("no_images", nothing, partial(folder_of, {"notes.txt": b"x", "clip.mp4": b"x"})),
        _broken("bad_image", nothing, partial(folder_of, {"1.jpg": b"no image"})),
        _broken("two_sizes", nothing, uneven_folder),
        _broken("half.jpg", nothing, half_image, "image"),
    ]


def _lying() -> list[Case]:
    large, long = "declares a huge picture", "declares no or a huge duration or count"
    side = struct.pack(">H", 60000)
    sides = {(b"avc1", 28): side * 2, (b"tkhd", 80): (side + bytes(2)) * 2}
    wide = struct.pack("<II", 60000, 60000)
    durations = [(b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)]
    return [
        # the stream itself says better, and is asked first
        _known("huge.mp4", large, partial(patched, "mp4", sides)),
        _broken("huge_raw.mov", large, partial(patched, "mov", {(b"raw ", 28): side * 2}, codec="rawvideo")),
        Case("huge.avi", large, partial(patched, "avi", {(b"avih", 40): wide, (b"strf", 12): wide})),
        _broken("huge.png", large, partial(huge_png, 60000), "image"),
        _broken("large.png", large, partial(huge_png, 12000), "image"),
        _broken("huge.jpg", large, huge_jpg, "image"),
        _broken("huge.gif", large, huge_gif),
        Case("zero_duration.mp4", long, partial(patched, "mp4", dict.fromkeys(durations, ZERO))),
        Case("huge_duration.mp4", long, partial(patched, "mp4", dict.fromkeys(durations, BIG))),
        Case("huge_count.mp4", long, partial(patched, "mp4", {(b"stts", 12): BIG, (b"stsz", 12): BIG})),
        Case("huge_step.mp4", long, partial(patched, "mp4", {(b"stts", 16): BIG})),
        Case("huge_count.avi", long, partial(patched, "avi", {(b"avih", 24): BIG, (b"strh", 40): BIG})),
        Case("huge_duration.mkv", long, partial(patched, "mkv", {(b"\x44\x89\x88", 3): struct.pack(">d", 1e15)})),
        _known("one_frame.mp4", long, one_frame, (0.0,)),
    ]


def _odd() -> list[Case]:
    other, turned, timed = "other container", "rotated, odd size, B-frames", "variable rate, no duration"
    vp9, pyramid = "libvpx-vp9", "bframes=3:b-pyramid=normal:open-gop=1:keyint=10:scenecut=0"
    return [
        _known("numbered.gif", other, gif),
        _known("vp9.webm", other, partial(encoded, codec=vp9)),
        _known("vp8.webm", other, partial(encoded, codec="libvpx")),
        _known("h264.mkv", other, encoded),
        _known("h264.mov", other, encoded),
        _known("h264.avi", other, encoded),
        _known("turned_90.mp4", turned, partial(rotated, 90, 1)),
        _known("turned_180.mp4", turned, partial(rotated, 180, 2)),
        _known("turned_270.mov", turned, partial(rotated, -90, 3)),
        _known("odd_444.mp4", turned, partial(encoded, height=81, width=97, pixels="yuv444p"), size=(81, 97)),
        _known("odd_vp9.webm", turned, partial(encoded, height=81, width=97, codec=vp9), size=(81, 97)),
        _known("pyramid.mp4", turned, partial(encoded, **{"x264-params": pyramid})),
        _known("uneven.mp4", timed, partial(encoded, moments=UNEVEN), UNEVEN),
        _known("uneven.mkv", timed, partial(encoded, moments=UNEVEN), UNEVEN),
        _known("raw.h264", timed, partial(encoded, form="h264"), ()),
        _known("stream.ts", timed, encoded),
        _known("piped.webm", timed, partial(piped, "webm", vp9)),
        _known("piped.mkv", timed, partial(piped, "matroska", "libx264")),
        Case("two_sizes.ts", timed, two_sizes, size=SIZE),
        Case("headless.ts", timed, headless, outcome="clip", size=SIZE),
    ]


CASES = [*_cut_and_flipped(), *_wrong(), *_lying(), *_odd()]
