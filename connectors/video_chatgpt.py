"""Video-ChatGPT's tokens: one mean per frame, then one mean per position (Maaz et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


@register("connector", "temporal_spatial_mean")
class TemporalSpatialMean(Part):
    """T temporal tokens (mean over the cells of a frame), then S = h w spatial tokens (mean over time)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """T + S tokens without a grid.

        Raises:
            ValueError: the input has no grid.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"averages over frames and cells of a grid, got {spec}")
        return TokenSpec(spec.media, spec.grid.t + spec.grid.h * spec.grid.w, spec.width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, T S, C] -> [B, T + S, C]."""
        tokens = inputs[0]
        values = self._means(tokens.by_frame())
        positions = self._means(tokens.by_frame(tokens.positions))
        sizes = tokens.by_frame(tokens.sizes)
        # Every patch is covered twice, once by its frame and once by its cell; halves keep the sum of sizes.
        shared = torch.cat([sizes.sum(2), sizes.sum(1)], dim=1) / 2
        return VisualTokens(values, tokens.media, None, positions, shared, tokens.times)

    @staticmethod
    def _means(grid: torch.Tensor) -> torch.Tensor:
        return torch.cat([grid.mean(2), grid.mean(1)], dim=1)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip and an image."""
        yield {}, (TokenSpec(MediaSpec("video", 4), 24, 6, Grid(4, 2, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 1), 6, 6, Grid(1, 2, 3)),)
