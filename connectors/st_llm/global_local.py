"""A few frames of a long video, each with a residual of the whole (ST-LLM, Liu et al. 2024, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


@register("connector", "global_local")
class GlobalLocal(Part):
    """R of T frames; to each of them the same residual is added, made of the mean over all frames, token by token.

    It stands behind the projector: the residual is as wide as the LLM's embeddings, and starts at zero.

    Args:
        frames: R; a clip of fewer frames repeats some.
        hidden: width inside the residual's two layers; default: a quarter of the tokens'.
        reference: refuse clips of at most R / 2 frames, for which the authors' formula names frames that are not there.
    """

    def __init__(self, site: Site, *, frames: int = 16, hidden: int | None = None, reference: bool = False) -> None:
        super().__init__(site)
        width = site.inputs[0].width
        hidden = width // 4 if hidden is None else hidden
        if frames < 1 or hidden < 1:
            raise ValueError(f"frames and hidden are 1 or more, not {frames} and {hidden}")
        self.frames, self.reference = frames, reference
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The local frames alone at first."""
        from transformers import initialization as init

        init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            init.zeros_(zero)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """R frames.

        Raises:
            ValueError: the input has no grid; in `reference`, a clip that is too short.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"chooses among the frames of a grid, got {spec}")
        local_indices(spec.grid.t, self.frames, self.reference)
        return spec.to_grid(self._grid(spec.grid))

    def _grid(self, grid: Grid) -> Grid:
        return Grid(self.frames, grid.h, grid.w, grid.raster)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, T K, D] -> [B, R K, D]."""
        tokens = inputs[0]
        frames = tokens.by_frame()
        whole = frames.mean(1)
        chosen = torch.tensor(local_indices(frames.shape[1], self.frames, self.reference), device=frames.device)
        values = frames[:, chosen] + self.up(self.down(whole).relu())[:, None]
        index = chosen[:, None] * frames.shape[2] + torch.arange(frames.shape[2], device=frames.device)
        out = tokens.derive(values.flatten(1, 2), self._grid(tokens.grid), index=index.flatten())
        out.times = tokens.times[:, chosen]
        return out

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Uneven steps, all frames, more than there are, frames without a raster."""
        clip = TokenSpec(MediaSpec("video", 5), 30, 8, Grid(5, 2, 3))
        yield {"frames": 2}, (clip,)
        yield {"frames": 5, "hidden": 3}, (clip,)
        yield {"frames": 12}, (clip,)
        yield {"frames": 3, "reference": True}, (TokenSpec(MediaSpec("video", 4), 12, 8, Grid(4, 1, 3, raster=False)),)


@register("connector", "mean_frames")
class MeanFrames(Part):
    """The mean over all frames, token by token: the baseline that ST-LLM is compared with."""

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One frame.

        Raises:
            ValueError: the input has no grid.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"averages the frames of a grid, got {spec}")
        return spec.to_grid(Grid(1, spec.grid.h, spec.grid.w, spec.grid.raster))

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, T K, D] -> [B, K, D]."""
        tokens = inputs[0]
        grid = self.output_spec(tokens.spec).grid
        same = torch.eye(grid.tokens, device=tokens.values.device).repeat(1, tokens.grid.t) / tokens.grid.t
        out = tokens.derive(tokens.by_frame().mean(1), grid, weights=same)
        out.times = tokens.times.mean(1, keepdim=True)
        return out

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip, and an image."""
        yield {}, (TokenSpec(MediaSpec("video", 3), 18, 6, Grid(3, 2, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 1), 6, 6, Grid(1, 2, 3)),)


def local_indices(frames: int, wanted: int, reference: bool = False) -> list[int]:
    """Which of so many frames stand for themselves: the middles of `wanted` equal parts.

    Raises:
        ValueError: in `reference`, one that is not there.
    """
    step = frames / wanted
    found = [int(step / 2 + round(step * index)) for index in range(wanted)]
    if reference and found[-1] >= frames:
        raise ValueError(f"{wanted} of {frames} frames: frame {found[-1]} is not there")
    return [min(index, frames - 1) for index in found]
