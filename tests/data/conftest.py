"""Small media files made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

BITS = 12


def coded(number: int) -> np.ndarray:
    """A picture ``[48, 64, 3]`` whose 3 x 4 squares are the bits of ``number``: readable after any compression."""
    bits = (number >> np.arange(BITS) & 1).reshape(3, 4) * 255
    return np.kron(bits, np.ones((16, 16)))[..., None].repeat(3, -1).astype(np.uint8)


def decoded(frames: np.ndarray) -> list[int]:
    """The numbers in ``[T, 48, 64, 3]`` pictures."""
    bits = (frames[:, 8::16, 8::16, 0] > 128).reshape(len(frames), BITS)
    return (bits << np.arange(BITS)).sum(1).tolist()


@pytest.fixture
def make_video(tmp_path: Path) -> Callable[..., Path]:
    """``make_video(name, frames, fps=10, gop=12, rotation=0, x264=None, movflags=None)`` -> path."""
    import av

    def make(
        name: str = "clip.mp4",
        frames: int = 16,
        fps: int = 10,
        gop: int = 12,
        rotation: int = 0,
        x264: str | None = None,
        movflags: str | None = None,
    ) -> Path:
        path = tmp_path / name
        options = {"g": str(gop), "crf": "12"} | ({"x264-params": x264} if x264 else {})
        with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            for number in range(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(coded(number), format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return make


@pytest.fixture
def numbers() -> Callable[[np.ndarray], list[int]]:
    """Reads the numbers off coded pictures."""
    return decoded


@pytest.fixture
def make_picture() -> Callable[[int], np.ndarray]:
    """Draws a number as a coded picture."""
    return coded
