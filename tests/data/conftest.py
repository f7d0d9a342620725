"""Small media files made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.makers import coded, decoded


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
