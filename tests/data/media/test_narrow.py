"""Long and narrow pictures cost no more than others: the sizes in between are bounded before anything is resized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm.contract.errors import UserError
from mmllm.contract.types import Geometry
from mmllm.data.media import pixels
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.limits import Limits
from mmllm.data.media.loading import MediaLoader
from mmllm.data.media.pixels import to_geometry
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.tiling import Tiling
from mmllm.data.media.types import MediaRef

SIDE = 224
NARROW = ((1, 60000), (60000, 1), (3, 20000))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of every picture that is made by resizing; none is made that is too large for a test."""
    made, real = [], pixels._resize

    def resize(frames: torch.Tensor, size: tuple[int, int], geometry: Geometry) -> torch.Tensor:
        made.append(size[0] * size[1])
        assert made[-1] <= Limits().pixels
        return real(frames, size, geometry)

    monkeypatch.setattr(pixels, "_resize", resize)
    return made


@pytest.mark.parametrize("resampler", ["torch", "pillow"])
@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("shape", NARROW)
def test_no_size_in_between_is_huge(shape: tuple[int, int], fit: str, resampler: str, sizes: list[int]) -> None:
    picture, geometry = np.full((1, *shape, 3), 200, np.uint8), Geometry(SIDE, SIDE, fit, resampler=resampler)
    if fit == "crop":
        with pytest.raises(UserError) as caught:
            to_geometry(picture, geometry, "banner.png")
        message = str(caught.value)
        assert message.startswith("banner.png: a picture of") and "at most 64000000 pixels" in message
        assert sizes == []
    else:
        made = to_geometry(picture, geometry)
        assert made.shape == (1, 3, SIDE, SIDE) and made.max() == 200
        assert max(sizes) <= SIDE * SIDE


def test_a_banner_that_fits_is_cropped_as_ever(sizes: list[int]) -> None:
    """A hundred to one is no bomb."""
    made = to_geometry(np.full((1, 10, 1000, 3), 7, np.uint8), Geometry(SIDE, SIDE, "crop"))
    assert made.shape == (1, 3, SIDE, SIDE) and sizes == [SIDE * SIDE * 100]
    # a picture that is cropped at its own size is as large as it is
    whole = np.zeros((1, SIDE, 1000, 3), np.uint8)
    assert to_geometry(whole, Geometry(SIDE, SIDE, "crop"), limits=Limits(pixels=1000)).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (1, 1), (50, 7000)])
def test_tiles_of_narrow_images(shape: tuple[int, int], sizes: list[int]) -> None:
    tiling = Tiling(28, 2)
    views, spec = tiling.views(np.full((*shape, 3), 90, np.uint8))
    rows, columns = spec.tiles
    assert views.shape == (1 + rows * columns, 28, 28, 3) and len(views) == spec.frames
    assert max(sizes) <= 36 * 28 * 28
    assert 1 <= spec.crop[0] <= 2 * rows and 1 <= spec.crop[1] <= 2 * columns


def test_the_error_of_a_file_names_it(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "banner.png"
    Image.new("RGB", (60000, 1)).save(path)
    ref, wanted = MediaRef("image", str(path)), {"eyes": Geometry(SIDE, SIDE, "crop")}
    with GuardedReader() as reader:
        with pytest.raises(UserError, match=r"banner.png: a picture of 60000x1 pixels is too long and narrow"):
            MediaLoader(reader).load(ref, Sampling(frames=1), wanted)
        tiles = MediaLoader(reader).load(ref, Sampling(frames=1), wanted, Tiling(28, 2))
        assert tiles.pixels[wanted["eyes"]].shape[1:] == (3, SIDE, SIDE)
