"""Markers around a medium: learned embeddings where others add a start and an end token to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


@register("connector", "markers")
class Markers(Part):
    """Puts one learned embedding before the tokens and another one after them.

    What enters the LLM is the same as with two new rows of its table of which only these two are trained; the
    vocabulary stays as it is.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.start, self.end = (nn.Parameter(torch.empty(site.inputs[0].width)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, scaled by the width."""
        from transformers import initialization as init

        for row in (self.start, self.end):
            init.normal_(row, std=row.shape[0] ** -0.5)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """Two tokens more, without a grid."""
        spec = inputs[0]
        return TokenSpec(spec.media, spec.tokens + 2, spec.width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, N, C] -> [B, 1 + N + 1, C]; a marker has size 0 and the position of the token beside it."""
        tokens = inputs[0]
        count = tokens.values.shape[1]
        index = torch.arange(-1, count + 1, device=tokens.values.device)
        marked = tokens.derive(self._between(tokens.values), None, index=torch.where(index < count, index, -1))
        marked.positions = tokens.positions[:, index.clamp(0, count - 1)]
        return marked

    def _between(self, values: Tensor) -> Tensor:
        rows = (row.to(values.dtype).expand(len(values), 1, -1) for row in (self.start, self.end))
        return torch.cat([next(rows), values, next(rows)], dim=1)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip on a grid, tokens without one."""
        yield {}, (TokenSpec(MediaSpec("video", 2), 12, 6, Grid(2, 2, 3)),)
        yield {}, (TokenSpec(MediaSpec("image", 1), 5, 6),)
