"""Decoded frames to the size an encoder wants, on uint8, by the geometry it declares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmllm.contract.types import Geometry


def to_geometry(frames: np.ndarray, geometry: Geometry) -> Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, geometry.height, geometry.width]; antialiased."""
    pixels = torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)
    if geometry.fit == "crop":
        pixels = _resize(pixels, _short_side(pixels, geometry), geometry)
        return _centre(pixels, geometry, 0).contiguous()
    if geometry.fit == "pad":
        scale = min(geometry.height / pixels.shape[2], geometry.width / pixels.shape[3])
        size = (round(pixels.shape[2] * scale), round(pixels.shape[3] * scale))
        return _centre(_resize(pixels, size, geometry), geometry, geometry.fill).contiguous()
    return _resize(pixels, (geometry.height, geometry.width), geometry).contiguous()


def _short_side(pixels: Tensor, geometry: Geometry) -> tuple[int, int]:
    height, width = pixels.shape[2:]
    short = geometry.short or min(geometry.height, geometry.width)
    # The library's rule, truncating the long side, so that frames equal those of the models' own processors.
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


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
    """Cut or pad around the middle."""
    from torchvision.transforms.v2 import functional

    height, width = geometry.height, geometry.width
    down, across = max(0, height - pixels.shape[2]), max(0, width - pixels.shape[3])
    if down or across:
        pad = [across // 2, down // 2, across - across // 2, down - down // 2]
        pixels = functional.pad(pixels, pad, fill=fill)
    halved = round if geometry.centre == "even" else int
    top, left = halved((pixels.shape[2] - height) / 2), halved((pixels.shape[3] - width) / 2)
    return pixels[:, :, top : top + height, left : left + width]
