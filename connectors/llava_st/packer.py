"""Packing space and time: fewer tokens, each of which looks at its own region (LLaVA-ST, Li et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens

Cell = tuple[int, int, int]


@register("connector", "regional_attention")
class RegionalAttention(Part):
    """One token for every region of a clip: that of its centre, plus what it finds by attention within the region.

    The centre of an even number of tokens is the mean of the two in the middle.

    Args:
        cell: (frames, rows, columns) of a region; they have to divide the clip's.
        width: inside the attention.
        heads: of it.
    """

    def __init__(self, site: Site, *, cell: Cell = (1, 3, 3), width: int = 1024, heads: int = 8) -> None:
        super().__init__(site)
        if min(cell) < 1:
            raise ValueError(f"a cell is 1 or more each way, not {list(cell)}")
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.cell = cell
        outer = site.inputs[0].width
        self.to_q, self.to_k, self.to_v = (
            nn.Sequential(nn.Linear(outer, width), nn.GELU(), nn.Linear(width, width)) for _ in range(3)
        )
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.to_out = nn.Linear(width, outer, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: truncated normal; the attention's joint matrix uniform."""
        from transformers import initialization as init

        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    init.zeros_(module.bias)
        init.xavier_uniform_(self.attn.in_proj_weight)
        init.zeros_(self.attn.in_proj_bias)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """A token per region.

        Raises:
            ValueError: no raster, or regions that do not divide it.
        """
        spec = inputs[0]
        if spec.grid is None or not spec.grid.raster:
            raise ValueError(f"cuts a raster into regions, got {spec}")
        return spec.to_grid(self._grid(spec.grid))

    def _grid(self, grid: Grid) -> Grid:
        """The grid of regions. A single frame is a region of one, whatever the cell."""
        cell = self._cell(grid)
        sizes = (grid.t, grid.h, grid.w)
        if any(size % step for size, step in zip(sizes, cell, strict=True)):
            raise ValueError(f"cells of {'x'.join(map(str, cell))} do not divide a grid of {grid}")
        return Grid(*(size // step for size, step in zip(sizes, cell, strict=True)))

    def _cell(self, grid: Grid) -> Cell:
        return (1, *self.cell[1:]) if grid.t == 1 else self.cell

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, D] -> [B, t' h' w', D]; positions are the regions' means, sizes their sums."""
        tokens = inputs[0]
        grid, cell = self._grid(tokens.grid), self._cell(tokens.grid)
        regions = _regions(tokens.as_grid(), cell)
        centres = _centres(regions, cell)
        batch, count = regions.shape[:2]
        queries = self.ln_q(self.to_q(centres)).flatten(0, 1)[:, None]
        keys = self.ln_k(self.to_k(regions)).flatten(0, 1)
        values = self.ln_v(self.to_v(regions)).flatten(0, 1)
        found, _ = self.attn(queries, keys, values, need_weights=False)
        packed = centres + self.to_out(found[:, 0].unflatten(0, (batch, count)))
        positions = _regions(tokens.as_grid(tokens.positions), cell).mean(2)
        sizes = _regions(tokens.as_grid(tokens.sizes[..., None]), cell).sum((2, 3))
        times = tokens.times.unflatten(1, (grid.t, -1)).mean(2)
        followed = tokens.followed(_into(tokens.grid, grid, cell, tokens)) if tokens.sources is not None else None
        return VisualTokens(packed, tokens.media, grid, positions, sizes, times, sources=followed)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Regions in space, in time, an even number of tokens, a single frame."""
        clip = TokenSpec(MediaSpec("video", 4), 4 * 6 * 6, 8, Grid(4, 6, 6))
        yield {"width": 12, "heads": 2}, (clip,)
        yield {"cell": (2, 1, 1), "width": 8, "heads": 4}, (clip,)
        yield {"cell": (4, 2, 3), "width": 8, "heads": 1}, (clip,)
        yield {"cell": (4, 3, 3), "width": 8, "heads": 2}, (TokenSpec(MediaSpec("image", 1), 9, 8, Grid(1, 3, 3)),)


def _regions(values: Tensor, cell: Cell) -> Tensor:
    """[B, t, h, w, C] -> [B, regions, tokens of one, C]."""
    t, h, w = cell
    split = values.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def _centres(regions: Tensor, cell: Cell) -> Tensor:
    """[B, regions, C]: the middle token of each, or the mean of the middle ones along an axis of even length."""
    found = regions.unflatten(2, cell)
    for size in cell:
        first, last = (size - 1) // 2, size // 2
        found = found[:, :, first] if first == last else (found[:, :, first] + found[:, :, last]) / 2
    return found


def _into(before: Grid, after: Grid, cell: Cell, tokens: VisualTokens) -> Tensor:
    """[N], the region of each token."""
    t, h, w = (
        torch.arange(size, device=tokens.values.device) // step
        for size, step in zip((before.t, before.h, before.w), cell, strict=True)
    )
    return ((t[:, None, None] * after.h + h[:, None]) * after.w + w).flatten()
