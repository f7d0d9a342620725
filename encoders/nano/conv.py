"""A small convolutional encoder that learns NanoWorld from scratch in minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Encoder, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Geometry, Grid, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens


@register("encoder", "nano_conv")
class NanoConv(Encoder):
    """Strided convolutions to a small grid, frame by frame, plus a learned position table.

    Args:
        size: side of the input in pixels.
        channels: width after each convolution; each one halves the side, except the last ones once `grid` is reached.
        grid: tokens per frame, (rows, columns).
        motion: also read the difference from the previous frame (zero at the first), so that motion is visible locally.
        frames: how many frames of a clip to read, evenly spaced; None = all.
    """

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(
        self,
        site: Site,
        *,
        size: int = 48,
        channels: tuple[int, ...] = (32, 64, 96, 128),
        grid: tuple[int, int] = (3, 3),
        motion: bool = False,
        frames: int | None = None,
    ) -> None:
        super().__init__(site)
        side = size
        for _ in channels:
            side = (side + 1) // 2
        if (side, side) != tuple(grid):
            raise ValueError(f"{len(channels)} halvings of {size} pixels give {side}x{side}, not {grid[0]}x{grid[1]}")
        self.geometry = Geometry(size, size, fit="squash", interpolation="bilinear")
        self.grid, self.motion, self.frames, self.per_frame = grid, motion, frames, not motion
        widths = (6 if motion else 3, *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in zip(widths, channels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in channels)
        self.places = nn.Parameter(torch.empty(channels[-1], *grid))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming convolutions (the library's default init is far too small for these), a small position table."""
        from transformers import initialization as init

        for conv in self.convs:
            init.kaiming_normal_(conv.weight, nonlinearity="relu")
            init.zeros_(conv.bias)
        init.normal_(self.places, std=0.02)

    def shrunk(self, side: int) -> NanoConv:
        """Fewer pixels through the same convolutions, the position table resized."""
        size = side * 2 ** len(self.convs)
        with torch.device("meta"):
            small = type(self)(self.site, **{**self.arguments, "size": size, "grid": (side, side)})
        places = self.places[None].float()  # the library resizes no bfloat16
        table = nn.functional.interpolate(places, size=(side, side), mode="bilinear", antialias=True).to(
            self.places.dtype
        )
        small.convs, small.norms = self.convs, self.norms
        small.places = nn.Parameter(table[0].detach(), requires_grad=False)
        return small.eval()

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """`grid` tokens per frame it reads."""
        grid = Grid(self.frames_of(media), *self.grid)
        return TokenSpec(media, grid.tokens, self.places.shape[0], grid)

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """[B, F, 3, h, w] uint8 -> tokens [B, F * rows * columns, C]."""
        batch, frames = pixels.shape[:2]
        x = self.normalise(pixels)
        if self.motion:
            before = torch.cat([x[:, :1], x[:, :-1]], dim=1)
            x = torch.cat([x, x - before], dim=2)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.functional.gelu(norm(conv(x)))
        x = (x + self.places).flatten(2).transpose(1, 2)
        return frame_tokens(x.unflatten(0, (batch, frames)).flatten(1, 2), media, Grid(frames, *self.grid), frames)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip, a clip with motion, an image."""
        yield {"size": 24, "channels": (8, 8, 8)}, (MediaSpec("video", 4),)
        yield {"size": 24, "channels": (8, 16, 8), "motion": True}, (MediaSpec("video", 3),)
        yield {"size": 16, "channels": (8, 8), "grid": (4, 4)}, (MediaSpec("image", 1),)
