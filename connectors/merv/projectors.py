"""MERV's projectors before the fusion: from an encoder's grid to the common one, by convolution or attention.

The default, an average and a linear layer, is `pool` and `linear`. Whatever brings the tokens to the grid, a `linear`,
an `mlp` or a `fused_mlp` follows it. Sources: Chung et al. 2025, appendix; the C-abstractor is that of Cha et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.connectors.common.pool import Pool
from mmllm.connectors.common.projectors import Projector
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens

EXPAND = 4
"""Factor by which the inner layer of an MLP is wider than its input."""


@register("connector", "fused_mlp")
class FusedMLP(Projector):
    """Three linear layers with GELU between them; the first widens its input fourfold.

    Args:
        width: output width, a number or "llm".
    """

    def __init__(self, site: Site, *, width: int | str = "llm") -> None:
        super().__init__(site)
        self.out_width = site.width(width)
        before, inner = site.inputs[0].width, EXPAND * site.inputs[0].width
        self.layers = nn.Sequential(
            nn.Linear(before, inner),
            nn.GELU(),
            nn.Linear(inner, self.out_width),
            nn.GELU(),
            nn.Linear(self.out_width, self.out_width),
        )

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        return self.layers(values)


@register("connector", "conv3d_pool")
class Conv3dPool(Part):
    """A 3 x 3 x 3 convolution over time, rows and columns, then an average over adaptive windows.

    Args:
        grid: output grid (t, rows, columns).
        still_grid: the same for images; default: one frame.
        width: output width, a number or "llm".
    """

    def __init__(
        self,
        site: Site,
        *,
        grid: tuple[int, int, int],
        still_grid: tuple[int, int, int] | None = None,
        width: int | str = "llm",
    ) -> None:
        super().__init__(site)
        self.conv = nn.Conv3d(site.inputs[0].width, site.width(width), 3, padding=1)
        self.pool = Pool(site, grid=grid, still_grid=still_grid)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One input on a raster grid.

        Raises:
            ValueError: it has none.
        """
        return self.pool.output_spec(*inputs).to_width(self.conv.out_channels)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, C] -> [B, t' h' w', width]."""
        maps = self.conv(inputs[0].as_grid().movedim(-1, 1))
        return self.pool(inputs[0].with_values(maps.flatten(2).transpose(1, 2)))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Fewer cells, windows that do not divide, more cells; a clip and an image."""
        yield {"grid": (2, 2, 2)}, (_clip(Grid(4, 3, 5)),)
        yield {"grid": (3, 4, 3), "width": 6}, (_clip(Grid(2, 2, 5)),)
        yield {"grid": (2, 2, 2)}, (_still(Grid(1, 3, 5)),)


class FrameResampler(Part):
    """A part that resamples the tokens of each frame, on its own, to a grid of rows and columns."""

    def __init__(self, site: Site, grid: tuple[int, int]) -> None:
        super().__init__(site)
        if min(grid) < 1:
            raise ValueError(f"sizes are at least 1, not {list(grid)}")
        self.grid = grid

    def pool_of(self, spec: TokenSpec) -> Pool:
        """The average over adaptive windows of each frame of these tokens.

        Raises:
            ValueError: they have no raster grid.
        """
        if spec.grid is None:
            raise ValueError(f"reads frames of a raster grid, got {spec}")
        grid = (spec.grid.t, *self.grid)
        return Pool(self.site, grid=grid, still_grid=grid)


@register("connector", "c_abstractor")
class CAbstractor(FrameResampler):
    """Convolutional blocks, an average over adaptive windows, and blocks again, frame by frame.

    Args:
        grid: rows and columns of an output frame.
        width: output width, a number or "llm".
        depth: number of blocks before the average, and as many after it.
    """

    def __init__(self, site: Site, *, grid: tuple[int, int], width: int | str = "llm", depth: int = 3) -> None:
        super().__init__(site, grid)
        if depth < 1:
            raise ValueError(f"depth is at least 1, not {depth}")
        self.out_width = site.width(width)
        first = [site.inputs[0].width, *[self.out_width] * (depth - 1)]
        self.before = nn.Sequential(*(Bottleneck(channels, self.out_width) for channels in first))
        self.after = nn.Sequential(*(Bottleneck(self.out_width, self.out_width) for _ in range(depth)))

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The same frames on another grid.

        Raises:
            ValueError: the input has no raster grid.
        """
        return self.pool_of(inputs[0]).output_spec(*inputs).to_width(self.out_width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, C] -> [B, t rows columns, width]."""
        tokens = inputs[0]
        maps = self.before(tokens.as_grid().flatten(0, 1).movedim(-1, 1))
        maps = self.after(nn.functional.adaptive_avg_pool2d(maps, self.grid))
        values = maps.flatten(2).transpose(1, 2).unflatten(0, (-1, tokens.grid.t)).flatten(1, 2)
        # The values are pooled as maps; positions and sizes, which exist per token, by the same windows.
        cells = self.pool_of(tokens.spec)(tokens.with_values(tokens.values[..., :1]))
        return cells.with_values(values)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Another width, the same width, one frame with more cells than there were."""
        yield {"grid": (2, 2), "width": 12}, (_clip(Grid(3, 3, 5)),)
        yield {"grid": (1, 2), "width": 8, "depth": 1}, (_clip(Grid(2, 2, 4)),)
        yield {"grid": (3, 3), "depth": 1}, (_still(Grid(1, 2, 2)),)


class Bottleneck(nn.Module):
    """One block of the C-abstractor: widen, depthwise convolution, reweigh the channels, project, add the input.

    Args:
        before, after: channels.
    """

    SQUEEZE = 4

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.widen = ConvNorm(before, after, 1)
        self.around = ConvNorm(after, after, 3, groups=after)
        squeezed = max(1, round(before / self.SQUEEZE))
        self.squeeze, self.excite = nn.Conv2d(after, squeezed, 1), nn.Conv2d(squeezed, after, 1)
        self.merge = ConvNorm(after, after, 1)
        self.skip = nn.Identity() if before == after else ConvNorm(before, after, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[M, before, h, w] -> [M, after, h, w]."""
        silu = nn.functional.silu
        inner = silu(self.around(silu(self.widen(maps))))
        gate = self.excite(silu(self.squeeze(inner.mean((2, 3), keepdim=True)))).sigmoid()
        return silu(self.merge(inner * gate) + self.skip(maps))


class ConvNorm(nn.Module):
    """A convolution without bias, then a layer norm over the channels of each cell."""

    def __init__(self, before: int, after: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.LayerNorm(after)

    def forward(self, maps: Tensor) -> Tensor:
        """[M, before, h, w] -> [M, after, h, w]."""
        return self.norm(self.conv(maps).movedim(1, -1)).movedim(-1, 1)


@register("connector", "attentive_pool")
class AttentivePool(FrameResampler):
    """Learned queries attend to the tokens of each frame; the width stays.

    The tokens of a frame are a set: each query learns where to look, so a token's position is the mean of its frame.

    Args:
        grid: rows and columns that the queries stand for.
        heads: of the attention; must divide the width.
    """

    def __init__(self, site: Site, *, grid: tuple[int, int], heads: int = 8) -> None:
        super().__init__(site, grid)
        width = site.inputs[0].width
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(grid[0] * grid[1], width))
        self.norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query, self.to_keys_values = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, EXPAND * width), nn.Linear(EXPAND * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal; layers that feed a residual sum start smaller by a factor of root two."""
        from transformers import initialization as init

        init.trunc_normal_(self.queries, std=0.02)
        for layer in (self.to_query, self.to_keys_values, self.merge, self.widen, self.narrow):
            adds = layer in (self.merge, self.narrow)
            init.trunc_normal_(layer.weight, std=0.02 / 2**0.5 if adds else 0.02)
            init.zeros_(layer.bias)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The same frames with `grid` tokens each, as a set.

        Raises:
            ValueError: the input has no grid.
        """
        if inputs[0].grid is None:
            raise ValueError(f"looks at the frames of a grid, got {inputs[0]}")
        return inputs[0].to_grid(self._grid(inputs[0].grid))

    def _grid(self, grid: Grid) -> Grid:
        return Grid(grid.t, *self.grid, raster=False)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, C] -> [B, t rows columns, C]."""
        tokens, count = inputs[0], self.queries.shape[0]
        batch, frames = tokens.values.shape[0], tokens.grid.t
        values = self._look(tokens.by_frame().flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)
        centres = tokens.by_frame(tokens.positions).mean(2).repeat_interleave(count, 1)
        sizes = (tokens.by_frame(tokens.sizes).sum(2) / count).repeat_interleave(count, 1)
        values, grid = values.to(tokens.values.dtype), self._grid(tokens.grid)
        return replace(tokens, values=values, grid=grid, positions=centres, sizes=sizes, extras={})

    def _look(self, frames: Tensor) -> Tensor:
        """[M, h w, C] -> [M, queries, C]."""
        keys, values = self.to_keys_values(self.norm(frames)).chunk(2, dim=-1)
        query = self.to_query(self.queries).expand(frames.shape[0], -1, -1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, keys, values)]
        seen = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        tokens = self.queries + self.merge(seen)
        return tokens + self.narrow(nn.functional.gelu(self.widen(self.inner_norm(tokens))))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip, an image with more queries than tokens."""
        yield {"grid": (2, 2)}, (_clip(Grid(3, 3, 5)),)
        yield {"grid": (3, 2), "heads": 2}, (_still(Grid(1, 2, 2)),)


def _clip(grid: Grid) -> TokenSpec:
    return TokenSpec(MediaSpec("video", grid.t), grid.tokens, 8, grid)


def _still(grid: Grid) -> TokenSpec:
    return TokenSpec(MediaSpec("image", 1), grid.tokens, 8, grid)
