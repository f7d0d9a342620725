"""Nano encoders that see motion: a frame is told from the one before it, and the first from none."""

from __future__ import annotations

import torch

from mmllm.contract.parts import Site
from mmllm.contract.types import MediaSpec, Needs
from mmllm.encoders.nano.conv import NanoConv
from mmllm.encoders.nano.views import NanoView


@torch.no_grad()
def test_a_frame_depends_on_itself_and_the_one_before():
    torch.manual_seed(0)
    encoder = NanoConv(Site(), size=24, channels=(8, 8, 8), motion=True).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, 4, 3, 24, 24), dtype=torch.uint8, generator=generator)
    plain = encoder(pixels, MediaSpec("video", 4), Needs()).by_frame()
    for changed in range(4):
        other = pixels.clone()
        other[:, changed] = 255 - other[:, changed]
        moved = (encoder(other, MediaSpec("video", 4), Needs()).by_frame() - plain).abs().amax((0, 2, 3)) > 1e-6
        assert moved.tolist() == [frame in (changed, changed + 1) for frame in range(4)]
    still = encoder(pixels[:, :1], MediaSpec("image", 1), Needs()).by_frame()
    torch.testing.assert_close(still[:, 0], plain[:, 0], atol=1e-6, rtol=0)


def test_motion_is_seen_at_the_frame_after_it_and_ahead_at_the_frame_before_it():
    """A pixel turns white between the second and the third frame of four, and stays so."""
    view = NanoView(Site(), sees="motion", size=24, channels=(8, 8, 8))
    pixels = torch.zeros(1, 4, 3, 24, 24, dtype=torch.uint8)
    pixels[:, 2:, :, 5, 7] = 255
    seen = view.normalise(pixels)[0, :, :, 5, 7] > 0
    since, ahead, both = seen.unbind(1)
    assert since.tolist() == [False, False, True, False]
    assert ahead.tolist() == [False, True, False, False]
    assert not both.any()
    pixels[:, 3, :, 5, 7] = 0
    assert (view.normalise(pixels)[0, :, 2, 5, 7] > 0).tolist() == [False, False, True, False]
