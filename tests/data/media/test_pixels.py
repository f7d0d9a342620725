"""Frames brought to an encoder's size: what is kept, where the margin goes, what fills it."""

from __future__ import annotations

import numpy as np
import pytest

from mmllm.contract.types import Geometry
from mmllm.data.media.pixels import to_geometry


def columns(height: int, width: int) -> np.ndarray:
    """One frame whose every pixel is the number of its column."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, None, :, None], (1, height, width, 3))


@pytest.mark.parametrize(
    ("centre", "width", "first"), [("down", 13, 1), ("even", 13, 2), ("even", 11, 0), ("down", 14, 2)]
)
def test_half_of_an_odd_margin_is_rounded_as_the_geometry_says(centre, width, first):
    """A margin of 3 has 1.5 on the left: 1, or 2 as the even neighbour; one of 1 has 0 either way."""
    pixels = to_geometry(columns(10, width), Geometry(10, 10, "crop", centre=centre))
    assert pixels.shape == (1, 3, 10, 10)
    assert pixels[0, 0, 0].tolist() == list(range(first, first + 10))


def test_the_long_side_is_padded_around_the_middle():
    pixels = to_geometry(columns(6, 10), Geometry(10, 10, "pad", fill=99))
    assert pixels[0, 1, :, 3].tolist() == [99, 99, 3, 3, 3, 3, 3, 3, 99, 99]


def test_a_frame_of_the_size_is_not_touched():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    for fit in ("squash", "crop", "pad"):
        assert np.array_equal(to_geometry(frames, Geometry(8, 9, fit)).permute(0, 2, 3, 1).numpy(), frames)
