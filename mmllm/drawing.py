"""Frames with marks on them, as a picture or as a clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    import torch

    from mmllm.contract.grounding import Box
    from mmllm.processing.grounding import Found

SUFFIXES = (".png", ".mp4")
SIDE = 192
"""Least pixels of a drawn frame's height."""
TRACK, LONE, SPAN = (255, 214, 0), (0, 200, 255), (90, 220, 90)
"""Colours of a box of a tube, of a box without a moment, and of a span."""


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither a picture nor a clip.

    Raises:
        UserError: it is not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {path}", "neither a picture nor a clip", expected="FILE.png or FILE.mp4")


def save(frames: np.ndarray, path: Path, fps: int = 2) -> None:
    """Frames [T, H, W, 3] uint8 as rows of a picture, or as a clip."""
    from PIL import Image

    from mmllm.world.video import write_mp4

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        write_mp4(path, frames, fps=fps)
        return
    per_row = min(len(frames), 8)
    blank = np.zeros_like(frames[:1]).repeat(-len(frames) % per_row, axis=0)
    lines = np.concatenate([frames, blank]).reshape(-1, per_row, *frames.shape[1:])
    Image.fromarray(np.concatenate([np.concatenate(list(line), axis=1) for line in lines])).save(path)


def enlarged(pixels: torch.Tensor) -> np.ndarray:
    """Frames uint8 [T, 3, h, w] -> [T, H, W, 3], both sides even and the height at least `SIDE`."""
    import torch

    factor = max(1.0, SIDE / pixels.shape[-2])
    size = [round(side * factor / 2) * 2 for side in pixels.shape[-2:]]
    frames = torch.nn.functional.interpolate(pixels.float().cpu(), size=size, mode="bilinear")
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def marked(frames: np.ndarray, found: Found) -> np.ndarray:
    """Frames [T, H, W, 3] with the boxes of a tube at their moments, boxes without one everywhere, and spans as a bar.

    The bar below a frame is bright where the frame lies within a span.
    """
    from PIL import Image, ImageDraw

    last = max(1, len(frames) - 1)
    tube = {round(moment * last): box for moment, box in found.tube.boxes}
    drawn = []
    for number, frame in enumerate(frames):
        image = Image.fromarray(frame)
        pencil = ImageDraw.Draw(image)
        for box in found.boxes:
            pencil.rectangle(_corners(box, image.size), outline=LONE, width=2)
        if number in tube:
            pencil.rectangle(_corners(tube[number], image.size), outline=TRACK, width=2)
        if found.spans:
            inside = any(span.start - 0.5 / last <= number / last <= span.end + 0.5 / last for span in found.spans)
            width, height = image.size
            pencil.rectangle((0, height - 6, width, height), fill=SPAN if inside else (40, 40, 40))
        drawn.append(np.asarray(image))
    return np.stack(drawn)


def _corners(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in pixels, its corners the right way round."""
    (left, right), (top, bottom) = sorted((box.x0, box.x1)), sorted((box.y0, box.y1))
    width, height = size[0] - 1, size[1] - 1
    return left * width, top * height, right * width, bottom * height
