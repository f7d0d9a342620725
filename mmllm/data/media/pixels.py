"""Decoded uint8 frames to the size an encoder wants, by the geometry it declares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmllm.contract.errors import UserError
from mmllm.contract.types import Geometry
from mmllm.data.media.limits import DEFAULTS, Limits


def to_geometry(
    frames: np.ndarray, geometry: Geometry, where: str = "picture in memory", limits: Limits = DEFAULTS
) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, geometry.height, geometry.width]; antialiased.

    Args:
        where: what the frames belong to, for errors.
        limits: `pixels` also bounds a frame between resizing and cropping.

    Raises:
        UserError: a long and narrow picture whose short side cannot be brought to size within the limit.
    """
    pixels = torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)
    if geometry.fit == "crop":
        size = _short_side(pixels, geometry)
        _check_size(pixels, size, where, limits)
        pixels = _resize(pixels, size, geometry)
        return _centre(pixels, geometry, 0).contiguous()
    if geometry.fit == "pad":
        scale = min(geometry.height / pixels.shape[2], geometry.width / pixels.shape[3])
        size = (max(1, round(pixels.shape[2] * scale)), max(1, round(pixels.shape[3] * scale)))
        return _centre(_resize(pixels, size, geometry), geometry, geometry.fill).contiguous()
    return _resize(pixels, (geometry.height, geometry.width), geometry).contiguous()


def _short_side(pixels: Tensor, geometry: Geometry) -> tuple[int, int]:
    height, width = pixels.shape[2:]
    short = geometry.short or min(geometry.height, geometry.width)
    # The library's rule of truncating the long side, so that frames equal those of the models' own processors.
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def _check_size(pixels: Tensor, size: tuple[int, int], where: str, limits: Limits) -> None:
    """Refuse what would be huge before it is cropped."""
    if size[0] * size[1] > max(limits.pixels, pixels.shape[2] * pixels.shape[3]):
        raise UserError(
            where,
            f"a picture of {pixels.shape[3]}x{pixels.shape[2]} pixels is too long and narrow to be cropped, it would be"
            f" resized to {size[1]}x{size[0]} first",
            expected=f"at most {limits.pixels} pixels",
            hint="cut the picture, or set fit: squash or pad in the encoder's transform",
        )


def _resize(pixels: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    if tuple(pixels.shape[2:]) == size:
        return pixels
    if geometry.resampler == "pillow":
        return _pillow(pixels, size, geometry.interpolation)
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(geometry.interpolation)
    return functional.resize(pixels, list(size), interpolation=mode, antialias=geometry.interpolation != "nearest")


def _pillow(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    from PIL import Image

    resample, wanted = Image.Resampling[interpolation.upper()], (size[1], size[0])
    frames = [Image.fromarray(frame).resize(wanted, resample) for frame in pixels.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)


def _centre(pixels: Tensor, geometry: Geometry, fill: int) -> Tensor:
    """Crop or pad around the middle."""
    from torchvision.transforms.v2 import functional

    height, width = geometry.height, geometry.width
    down, across = max(0, height - pixels.shape[2]), max(0, width - pixels.shape[3])
    if down or across:
        pad = [across // 2, down // 2, across - across // 2, down - down // 2]
        pixels = functional.pad(pixels, pad, fill=fill)
    halved = round if geometry.centre == "even" else int
    top, left = halved((pixels.shape[2] - height) / 2), halved((pixels.shape[3] - width) / 2)
    return pixels[:, :, top : top + height, left : left + width]
