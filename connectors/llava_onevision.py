"""LLaVA-OneVision's any-resolution packing: the views of an image joined, the padding cut, a newline after each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.connectors.common.precision import without_autocast
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


@register("connector", "any_resolution")
class AnyResolution(Part):
    """Puts the tokens of an image's tiles where they lie in the image (Li et al. 2024, section 3.2).

    An image of several views becomes its whole view, then the joint grid of its tiles without the padding, scaled down
    where it is larger than `most` views, with a learned newline after each row. A video, or an image of one view, ends
    with one newline.

    Args:
        most: the joint grid may be as large as this many views before it is scaled down.
    """

    SLACK = 1.1  # a grid larger by less than this factor along each side is left alone

    def __init__(self, site: Site, *, most: int = 9) -> None:
        super().__init__(site)
        self.most = most
        self.newline = nn.Parameter(torch.empty(site.inputs[0].width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, scaled by the width as in LLaVA."""
        from transformers import initialization as init

        init.normal_(self.newline, std=self.newline.shape[0] ** -0.5)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The whole view, the joint rows with their newlines; or all tokens and one newline.

        Raises:
            ValueError: an image of several views without a raster grid, or whose crop is larger than its tiles.
        """
        spec = inputs[0]
        if spec.media.tiles is None:
            return TokenSpec(spec.media, spec.tokens + 1, spec.width)
        rows, columns = self._joint(spec.media, spec.grid)
        return TokenSpec(spec.media, spec.grid.h * spec.grid.w + rows * (columns + 1), spec.width)

    def _joint(self, media: MediaSpec, grid: Grid | None) -> tuple[int, int]:
        """Rows and columns of the joint grid of an image's tiles, as the LLM gets it."""
        if grid is None or not grid.raster or grid.t != media.frames:
            raise ValueError("joins the tiles of an image: each view needs a raster grid")
        rows, columns = media.crop
        if rows > media.tiles[0] * grid.h or columns > media.tiles[1] * grid.w:
            raise ValueError(f"a crop of {rows}x{columns} tokens, the tiles have {grid.h}x{grid.w} each")
        ratio = math.sqrt(rows * columns / (self.most * grid.h * grid.w))
        return (int(rows // ratio), int(columns // ratio)) if ratio > self.SLACK else (rows, columns)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, views h w, C] -> [B, N, C]; newlines have size 0."""
        tokens = inputs[0]
        batch, _, width = tokens.values.shape
        line = self.newline.to(tokens.values.dtype)
        if tokens.media.tiles is None:
            values = torch.cat([tokens.values, line.expand(batch, 1, -1)], dim=1)
            positions = torch.cat([tokens.positions, tokens.positions[:, -1:]], dim=1)
            sizes = torch.cat([tokens.sizes, tokens.sizes.new_zeros(batch, 1)], dim=1)
            return VisualTokens(values, tokens.media, None, positions, sizes, tokens.times)
        whole = tokens.grid.h * tokens.grid.w
        joint = _resized(_without_padding(tokens), *self._joint(tokens.media, tokens.grid))
        rows, columns = joint.shape[1:3]
        values = torch.cat([joint, line.expand(batch, rows, 1, width)], dim=2).flatten(1, 2)
        values = torch.cat([tokens.values[:, :whole], values], dim=1)
        area = math.prod(tokens.media.crop) / (rows * columns)
        sizes = tokens.sizes.new_tensor([[*[area] * columns, 0.0]]).expand(rows, -1).flatten()
        sizes = torch.cat([tokens.sizes[:, :whole], sizes.expand(batch, -1)], dim=1)
        centres = _centres(rows, columns, tokens.positions).expand(batch, -1, -1)
        positions = torch.cat([tokens.positions[:, :whole], centres], dim=1)
        return VisualTokens(values, tokens.media, None, positions, sizes, tokens.times)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip, an image of one view, tiles with padding above and at the side, tiles that are scaled down."""
        yield {}, (TokenSpec(MediaSpec("video", 2), 12, 6, Grid(2, 2, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 1), 9, 6, Grid(1, 3, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 3, (1, 2), (3, 4)), 27, 6, Grid(3, 3, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 3, (2, 1), (4, 3)), 27, 6, Grid(3, 3, 3)),)
        yield {"most": 1}, (TokenSpec(MediaSpec("image", 5, (2, 2), (6, 4)), 45, 6, Grid(5, 3, 3)),)


def _without_padding(tokens: VisualTokens) -> Tensor:
    """[B, rows, columns, C]: the tiles side by side, without what the image does not cover."""
    (down, across), (rows, columns) = tokens.media.tiles, tokens.media.crop
    joint = tokens.as_grid()[:, 1:].unflatten(1, (down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    top, left = (joint.shape[1] - rows) // 2, (joint.shape[2] - columns) // 2
    return joint[:, top : top + rows, left : left + columns]


def _resized(joint: Tensor, rows: int, columns: int) -> Tensor:
    """[B, h, w, C] -> [B, rows, columns, C], bilinear without antialiasing, in float32."""
    if joint.shape[1:3] == (rows, columns):
        return joint
    with without_autocast(joint):
        image = joint.movedim(-1, 1).float()
        return nn.functional.interpolate(image, (rows, columns), mode="bilinear").movedim(1, -1).to(joint.dtype)


def _centres(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows * (columns + 1), 3]: second 0, y and x of each token's centre; a newline lies at the right edge."""
    y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
    x = (torch.arange(columns + 1, device=like.device, dtype=like.dtype) + 0.5).clamp(max=columns) / columns
    centres = torch.stack([y[:, None].expand(-1, columns + 1), x.expand(rows, -1)], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(centres[:, :1]), centres], dim=1)
