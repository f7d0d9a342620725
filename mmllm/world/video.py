"""Frames -> files: H.264 in mp4, or a folder of jpg files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FPS = 8
"""Frames per second of every NanoWorld clip."""


def write_mp4(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write frames [T, H, W, 3] uint8 as an mp4 file (H.264, yuv420p). H and W must be even."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_jpgs(folder: Path, frames: np.ndarray) -> None:
    """Write frames [T, S, S, 3] uint8 as ``00001.jpg`` and so on into a folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"{i:05d}.jpg", quality=93, subsampling=0)
