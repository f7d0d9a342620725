"""Small encoders that each see a single cue, for studies of several encoders in one bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.nano.conv import NanoConv

CONTRAST = 2.0
"""How steeply a difference saturates at one: an edge between dark colours counts as much as one between bright ones,
and compression artefacts of a video count for little."""


@register("encoder", "nano_view")
class NanoView(NanoConv):
    """The layers of `nano_conv` over one view of the pixels.

    Args:
        sees: "colour" (the mean colour of each cell of the grid), "shape" (where neighbouring pixels differ in any
            channel) or "motion" (where neighbouring frames do: before, after, both; blank for a still).
        size, channels, grid, frames: as for `nano_conv`.
    """

    def __init__(
        self,
        site: Site,
        *,
        sees: Literal["colour", "shape", "motion"],
        size: int = 48,
        channels: tuple[int, ...] = (32, 64, 96, 128),
        grid: tuple[int, int] = (3, 3),
        frames: int | None = None,
    ) -> None:
        super().__init__(site, size=size, channels=channels, grid=grid, frames=frames)
        self.sees, self.per_frame = sees, sees != "motion"

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, F, 3, h, w] -> the view, of the same shape."""
        return VIEWS[self.sees](super().normalise(pixels), self.grid)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """Each view of a clip, one of an image."""
        for sees in VIEWS:
            yield {"sees": sees, "size": 24, "channels": (8, 8, 8)}, (MediaSpec("video", 4),)
        yield {"sees": "shape", "size": 16, "channels": (8, 8), "grid": (4, 4)}, (MediaSpec("image", 1),)


def _colour(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every pixel takes the mean colour of its cell."""
    frames = pixels.flatten(0, 1)
    cells = nn.functional.adaptive_avg_pool2d(frames, grid)
    return nn.functional.interpolate(cells, frames.shape[-2:], mode="nearest").view_as(pixels)


def _shape(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Edges, in three equal channels: the largest difference, over channels, from the pixel above and to the left."""
    down = nn.functional.pad(pixels.diff(dim=-2).abs(), (0, 0, 1, 0))
    across = nn.functional.pad(pixels.diff(dim=-1).abs(), (1, 0, 0, 0))
    return _centred(_seen(torch.maximum(down, across))).expand_as(pixels)


def _motion(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """What changed since the previous frame, what will change by the next one, and where both happen.

    The direction of a motion is from the first to the second: no colour is needed to tell it.
    """
    changed = _seen(pixels.diff(dim=1).abs())
    none = torch.zeros_like(pixels[:, :1, :1])
    before, after = torch.cat([none, changed], dim=1), torch.cat([changed, none], dim=1)
    return _centred(torch.cat([before, after, before * after], dim=2))


def _seen(difference: Tensor) -> Tensor:
    """[B, F, 3, h, w] -> [B, F, 1, h, w] in 0..1, independent of the colours."""
    return (CONTRAST * difference.amax(2, keepdim=True)).square().tanh()


def _centred(view: Tensor) -> Tensor:
    """0..1 -> -1..1: otherwise, where there is nothing to see, the norms would get zeros, whose gradients explode."""
    return 2 * view - 1


VIEWS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "colour": _colour,
    "shape": _shape,
    "motion": _motion,
}
