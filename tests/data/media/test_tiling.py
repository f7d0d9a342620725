"""Any-resolution tiling against the processor of LLaVA-OneVision in the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.data.media.tiling import Tiling

SIZES = [(100, 100), (667, 1000), (1000, 667), (403, 580), (30, 400), (400, 30), (97, 64), (64, 128), (333, 334)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_views_equal_the_library(height: int, width: int) -> None:
    from transformers import LlavaOnevisionImageProcessor

    size, up_to = 64, (4, 3)
    pinpoints = [[size * i, size * j] for i in range(1, up_to[0] + 1) for j in range(1, up_to[1] + 1)]
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
    processor = LlavaOnevisionImageProcessor(
        size={"height": size, "width": size}, image_grid_pinpoints=pinpoints, image_mean=mean, image_std=std
    )
    rng = np.random.default_rng(height * width)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    views, spec = Tiling(size, 4, up_to).views(image)
    assert spec.frames == len(views) == len(expected) == 1 + spec.tiles[0] * spec.tiles[1]
    ours = (torch.tensor(views).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert (ours - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_crop_is_what_the_library_keeps(height: int, width: int) -> None:
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    spec = Tiling(64, 7, (4, 3)).spec(height, width)
    rows, columns = spec.tiles[0] * 7, spec.tiles[1] * 7
    kept = unpad_image(torch.zeros(1, rows, columns), (height, width)).shape[1:]
    assert spec.crop == tuple(kept)
    assert spec.crop[0] in (rows, spec.crop[0]) and spec.crop[1] <= columns
