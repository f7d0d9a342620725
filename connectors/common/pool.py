"""Pooling on the grid: average by kernel, average to a size, bilinear resizing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens

Size = tuple[int, int, int]


@register("connector", "pool")
class Pool(Part):
    """Fewer tokens by pooling time, rows and columns, each axis on its own.

    Every mode is separable, so a pooling is three small matrices; positions and sizes are pooled with the same
    matrices as the values.

    Args:
        grid: output grid (t, rows, columns); windows of axis i are [floor(i n / m), ceil((i + 1) n / m)).
        kernel: instead of `grid`: divide each axis by this factor; the output has ceil(n / k) cells.
        mode: "average" (cells of `kernel` do not overlap; the last is smaller) or "bilinear" (each frame resized
            without antialiasing, as LLaVA-OneVision does; time is averaged).
        still_grid, still_kernel: the same for images; default: `grid` or `kernel` with one frame.
    """

    def __init__(
        self,
        site: Site,
        *,
        grid: Size | None = None,
        kernel: Size | None = None,
        mode: Literal["average", "bilinear"] = "average",
        still_grid: Size | None = None,
        still_kernel: Size | None = None,
    ) -> None:
        super().__init__(site)
        if (grid is None) == (kernel is None):
            raise ValueError("give either grid or kernel")
        if min(grid or kernel) < 1:
            raise ValueError(f"sizes are at least 1, not {list(grid or kernel)}")
        self.mode = mode
        self.video = (grid, kernel)
        if still_grid is None and still_kernel is None:
            still_grid, still_kernel = grid and (1, *grid[1:]), kernel and (1, *kernel[1:])
        self.still = (still_grid, still_kernel)

    def output_grid(self, media: MediaSpec, grid: Grid) -> Grid:
        """The grid that a clip's grid is pooled to."""
        target, kernel = self.still if media.kind == "image" else self.video
        if target is None:
            target = tuple(math.ceil(n / k) for n, k in zip((grid.t, grid.h, grid.w), kernel, strict=True))
        return Grid(*target)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One input on a raster grid.

        Raises:
            ValueError: it has none.
        """
        spec = inputs[0]
        if spec.grid is None or not spec.grid.raster:
            raise ValueError(f"pools a raster grid, got {spec}")
        return spec.to_grid(self.output_grid(spec.media, spec.grid))

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, C] -> [B, t' h' w', C]."""
        tokens = inputs[0]
        target = self.output_grid(tokens.media, tokens.grid)
        axes = self._axes(tokens.media, tokens.grid, target, tokens.values.device)
        values = _apply(tokens.as_grid(), axes, tokens.values.dtype)
        positions = _apply(tokens.as_grid(tokens.positions), axes, tokens.positions.dtype)
        shares = tuple(axis / axis.sum(0, keepdim=True).clamp_min(1e-9) for axis in axes)
        sizes = _apply(tokens.as_grid(tokens.sizes[..., None]), shares, tokens.sizes.dtype)
        followed = tokens.followed(_into(shares)) if tokens.sources is not None else None
        return VisualTokens(values, tokens.media, target, positions, sizes[..., 0], tokens.times, sources=followed)

    def _axes(self, media: MediaSpec, grid: Grid, target: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        _, kernel = self.still if media.kind == "image" else self.video
        kernel = kernel or (None, None, None)
        weights = _bilinear if self.mode == "bilinear" else _average
        return (
            _average(grid.t, target.t, kernel[0], device),
            weights(grid.h, target.h, kernel[1], device),
            weights(grid.w, target.w, kernel[2], device),
        )

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Windows that divide and that do not, both modes, a clip and an image."""
        clip = TokenSpec(MediaSpec("video", 4), 4 * 3 * 5, 6, Grid(4, 3, 5))
        still = TokenSpec(MediaSpec("image", 1), 15, 6, Grid(1, 3, 5))
        yield {"kernel": (2, 2, 2)}, (clip,)
        yield {"grid": (3, 2, 2)}, (clip,)
        yield {"kernel": (1, 2, 2), "mode": "bilinear"}, (clip,)
        yield {"grid": (2, 2, 2)}, (still,)


def _into(axes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[t h w], the cell that weighs each token most."""
    time, rows, columns = (axis.argmax(0) for axis in axes)
    cells = (time[:, None, None] * axes[1].shape[0] + rows[:, None]) * axes[2].shape[0] + columns
    return cells.flatten()


def _average(size: int, cells: int, kernel: int | None, device: torch.device) -> Tensor:
    """[cells, size] rows summing to 1: means over windows of `kernel`, or over adaptive windows."""
    matrix = torch.zeros(cells, size, device=device)
    for cell in range(cells):
        if kernel is None:
            start, end = cell * size // cells, -(-(cell + 1) * size // cells)
        else:
            start, end = cell * kernel, min((cell + 1) * kernel, size)
        matrix[cell, start:end] = 1 / (end - start)
    return matrix


def _bilinear(size: int, cells: int, kernel: int | None, device: torch.device) -> Tensor:
    """[cells, size] rows summing to 1: bilinear interpolation at the cells' centres, half-pixel convention."""
    eye = torch.eye(size, device=device)[None]
    return torch.nn.functional.interpolate(eye, size=cells, mode="linear", align_corners=False)[0].T


def _apply(values: Tensor, axes: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """[B, t, h, w, C] by the matrices of the three axes -> [B, t' h' w', C]; small axes first in float32."""
    time, rows, columns = axes
    # In float32 even under autocast: positions are seconds and coordinates.
    with without_autocast(values):
        return _matrices(values.float(), time, rows, columns).to(dtype)


def _matrices(values: Tensor, time: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    out = torch.einsum("ij,bthjc->bthic", columns, values)
    out = torch.einsum("ij,btjwc->btiwc", rows, out)
    return torch.einsum("ij,bjhwc->bihwc", time, out).flatten(1, 3)
