"""Separators: a learned newline embedding among the visual tokens (LLaVA-NeXT, LLaVA-OneVision)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


@register("connector", "newline")
class Newline(Part):
    """Puts one learned embedding after the clip, after every frame or after every row.

    Args:
        at: "none", "one" (once, at the end), "frame" or "row".
    """

    def __init__(self, site: Site, *, at: Literal["none", "one", "frame", "row"] = "one") -> None:
        super().__init__(site)
        self.at = at
        if at != "none":
            self.embedding = nn.Parameter(torch.empty(site.inputs[0].width))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, scaled by the width as in LLaVA."""
        from transformers import initialization as init

        if self.at != "none":
            init.normal_(self.embedding, std=self.embedding.shape[0] ** -0.5)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The tokens plus one per separator, without a grid.

        Raises:
            ValueError: frames or rows are requested but the input has no such grid.
        """
        spec = inputs[0]
        if self.at == "none":
            return spec
        return TokenSpec(spec.media, spec.tokens + len(self._ends(spec.grid, spec.tokens)), spec.width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, N, C] -> [B, N + separators, C]; a separator has size 0 and the position of the token before it."""
        tokens = inputs[0]
        if self.at == "none":
            return tokens
        count = tokens.values.shape[1]
        index = self._index(self._ends(tokens.grid, count), count, tokens.values.device)
        separator = index == count
        before = torch.where(separator, index.roll(1), index)
        line = self.embedding.to(tokens.values.dtype).expand(tokens.values.shape[0], 1, -1)
        values = torch.cat([tokens.values, line], dim=1)[:, index]
        sizes = tokens.sizes[:, before] * ~separator
        followed = tokens.followed(_places(index, count)) if tokens.sources is not None else None
        return VisualTokens(
            values, tokens.media, None, tokens.positions[:, before], sizes, tokens.times, sources=followed
        )

    def _ends(self, grid: Grid | None, count: int) -> list[int]:
        """Token counts after which a separator follows."""
        if self.at == "one":
            return [count]
        if grid is None or (self.at == "row" and not grid.raster):
            raise ValueError(f"a separator per {self.at} needs a grid")
        step = grid.w if self.at == "row" else grid.h * grid.w
        return list(range(step, count + 1, step))

    @staticmethod
    def _index(ends: list[int], count: int, device: torch.device) -> Tensor:
        """[N + separators]: which token goes there, `count` = the separator."""
        index, start = [], 0
        for end in ends:
            index += [*range(start, end), count]
            start = end
        return torch.tensor([*index, *range(start, count)], device=device)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Each position of the separator."""
        clip = TokenSpec(MediaSpec("video", 2), 12, 6, Grid(2, 2, 3))
        for at in ("none", "one", "frame", "row"):
            yield {"at": at}, (clip,)


def _places(index: Tensor, count: int) -> Tensor:
    """[N + separators] of token numbers, `count` for a separator -> [N], where each token went."""
    return (index != count).nonzero()[:, 0]
