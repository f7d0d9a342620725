"""Images and folders of frames: odd entries are refused at once, and Pillow's warnings never come out raw."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.makers import huge_png
from PIL import Image, ImageOps

from mmllm.contract.errors import UserError
from mmllm.contract.types import Geometry
from mmllm.data.media.backends.stills import load_image
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.limits import Limits
from mmllm.data.media.loading import Caches, MediaLoader
from mmllm.data.media.reader import read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

FOUR = Sampling(frames=4)


def _socket(path: Path) -> None:
    # the address of a socket may not be long
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nothing.jpg"),
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
}


@pytest.fixture
def frames(tmp_path: Path, make_picture: Callable) -> Path:
    """A folder of four frames, one of them a link to a file elsewhere."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(make_picture(number)).save(folder / f"{number}.png")
    (folder / "2.png").rename(tmp_path / "elsewhere.png")
    (folder / "2.png").symlink_to(tmp_path / "elsewhere.png")
    return folder


@pytest.mark.parametrize("kind", ODD)
def test_no_regular_file_is_refused_by_name(kind: str, frames: Path, numbers: Callable) -> None:
    ref = MediaRef("video", str(frames))
    assert numbers(read_media(ref, Sampling(frames=4, sampler="linspace")).frames) == [0, 1, 2, 3]
    ODD[kind](frames / "4.jpg")
    with GuardedReader(limits=Limits(timeout=5)) as reader:
        for read in (reader.read, read_media):
            start = time.monotonic()
            with pytest.raises(UserError) as caught:
                read(ref, FOUR)
            assert str(caught.value).startswith(f"{frames / '4.jpg'}: not a regular file in a folder of frames")
            assert time.monotonic() - start < 4


def test_a_pipe_is_not_hashed_either(tmp_path: Path) -> None:
    """The caches look at a file in the parent, where nothing stops them."""
    os.mkfifo(tmp_path / "pipe.mp4")
    caches = Caches.open(tmp_path / "cache", ("frames",), None)
    with GuardedReader() as reader, pytest.raises(UserError, match="neither a file nor a folder"):
        MediaLoader(reader, caches).load(MediaRef("video", str(tmp_path / "pipe.mp4")), FOUR, {"a": Geometry(8, 8)})


def palette(path: Path) -> None:
    """A palette picture whose transparency is given as bytes."""
    image = Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 8, "P")
    image.putpalette([value for entry in range(8) for value in (entry * 30, 255 - entry * 30, entry)])
    image.save(path, format="png", transparency=bytes([0, 128, 255, 7, 9, 11, 13, 255]))


def bad_exif(path: Path) -> None:
    """A photo whose EXIF data point outside of themselves."""
    exif = Image.Exif()
    exif[271] = "a maker with a long name"
    data = bytearray(exif.tobytes())
    place = data.index(b"\x01\x0f") if b"\x01\x0f" in data else data.index(b"\x0f\x01")
    data[place + 8 : place + 12] = b"\x7f\x7f\x7f\x7f"
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path, format="jpeg", exif=bytes(data))


def bomb(path: Path) -> None:
    """More pixels than Pillow likes."""
    huge_png(10000, path.parent, path)


@pytest.mark.parametrize("make", [palette, bad_exif, bomb])
@pytest.mark.parametrize("kind", ["image", "folder"])
def test_no_raw_warning(make: Callable, kind: str, tmp_path: Path, capfd, caplog) -> None:
    """Neither here nor from the process; what matters is said with the file's name."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "1.png"
    make(path)
    ref = MediaRef("image", str(path)) if kind == "image" else MediaRef("video", str(path.parent))
    with GuardedReader() as reader, warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        for read in (reader.read, read_media):
            caplog.clear()
            if make is bomb:
                with pytest.raises(UserError, match=r"1.png: the header declares a picture that is too large"):
                    read(ref, FOUR)
                continue
            read(ref, FOUR)
            told = [record.getMessage() for record in caplog.records]
            assert all(str(path) in text for text in told)
            assert len(told) == (make is bad_exif)
    assert [str(one.message) for one in heard] == []
    assert "arning" not in capfd.readouterr().err


def test_the_pixels_are_those_of_pillow(tmp_path: Path) -> None:
    """For every orientation, with transparency and without."""
    draw = np.random.default_rng(0)
    for orientation in range(10):
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(draw.integers(0, 255, (5, 7, 3), np.uint8)).save(path, exif=exif)
        with Image.open(path) as image:
            assert np.array_equal(load_image(str(path)), np.array(ImageOps.exif_transpose(image).convert("RGB")))
    palette(tmp_path / "p.png")
    with warnings.catch_warnings(), Image.open(tmp_path / "p.png") as image:
        warnings.simplefilter("ignore")
        assert np.array_equal(load_image(str(tmp_path / "p.png")), np.array(image.convert("RGB")))
    for mode, colour in (("LA", (90, 0)), ("RGBA", (9, 80, 70, 0)), ("1", 1), ("CMYK", (1, 2, 3, 4)), ("L", 7)):
        form = "tiff" if mode == "CMYK" else "png"
        Image.new(mode, (4, 3), colour).save(tmp_path / "m", format=form)
        with Image.open(tmp_path / "m") as image:
            assert np.array_equal(load_image(str(tmp_path / "m")), np.array(image.convert("RGB")))


def test_formats_that_run_programs_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    Image.new("RGB", (8, 8)).save(path, format="eps")
    with pytest.raises(UserError, match=r"page.jpg: not an image"):
        load_image(str(path))
    with pytest.raises(UserError, match=r"record 3: not an image"):
        load_image(BytesIO(path.read_bytes()), where="record 3")
