"""AIM's merging of similar tokens before the LLM (Zhong et al. 2025, section 3.1). Its pruning is `reducers/aim.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from mmllm.connectors.common.merging import Merging
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, TokenSpec, VisualTokens


@register("connector", "token_merge")
class TokenMerge(Part):
    """Joins the tokens of each frame that are most alike, step by step.

    Args:
        amounts: how many tokens of a frame each step removes: below 1 a share of the tokens that came in (rounded
            down), otherwise a number. No step removes more than half of what is left.
        metric: what is compared: the tokens themselves, or the encoder's attention keys, merged along.
        key_layer: whose keys, numbered like an encoder's layers.
        reduce: "mean" counts a merged token once in the next step, as AIM does; "weighted" by the patches in it.
        keep_order: keep the tokens of a frame in raster order (see `match`).
    """

    def __init__(
        self,
        site: Site,
        *,
        amounts: tuple[float, ...] = (0.5, 0.25),
        metric: Literal["self", "key"] = "self",
        key_layer: int = -1,
        reduce: Literal["mean", "weighted"] = "mean",
        keep_order: bool = False,
    ) -> None:
        super().__init__(site)
        if any(amount <= 0 or (amount > 1 and amount != int(amount)) for amount in amounts):
            raise ValueError(f"amounts are shares below 1 or numbers of tokens, not {list(amounts)}")
        self.amounts, self.metric, self.key_layer = amounts, metric, key_layer
        self.reduce, self.keep_order = reduce, keep_order

    def needs(self) -> Needs:
        """The keys, if they are what is compared."""
        return Needs(keys=(self.key_layer,)) if self.metric == "key" else Needs()

    def steps(self, tokens: int) -> list[int]:
        """How many tokens each step removes from a frame of so many."""
        steps, left = [], tokens
        for amount in self.amounts:
            steps.append(min(int(amount * tokens) if amount < 1 else int(amount), left // 2))
            left -= steps[-1]
        return steps

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """Fewer tokens per frame, in no raster.

        Raises:
            ValueError: the input has no grid, so its frames cannot be told apart.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"merges within the frames of a grid, got {spec}")
        return spec.to_grid(self._grid(spec.grid))

    def _grid(self, grid: Grid) -> Grid:
        tokens = grid.h * grid.w
        left = tokens - sum(self.steps(tokens))
        return grid if left == tokens else Grid(grid.t, 1, left, raster=False)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, T n, C] -> [B, T m, C]; positions are means like the values, sizes are sums."""
        tokens = inputs[0]
        grid = self._grid(tokens.grid)
        if grid == tokens.grid:
            return tokens
        parts = tokens.values, tokens.positions, tokens.sizes
        keys = _frames(tokens.by_frame(tokens.extras["keys"][:, :, 0])) if self.metric == "key" else None
        merging = Merging.of(*(_frames(tokens.by_frame(value)) for value in parts), keys)
        for r in self.steps(tokens.grid.h * tokens.grid.w):
            metric = merging.values if merging.keys is None else merging.keys
            merging = merging.step(metric, r, weighted=self.reduce == "weighted", keep_order=self.keep_order)
        batch = len(tokens.values)
        followed = None if tokens.sources is None else tokens.followed(_clips(_into(merging.into, grid), batch))
        made = merging.values, merging.positions, merging.sizes
        values, positions, sizes = (_clips(value, batch) for value in made)
        return VisualTokens(values, tokens.media, grid, positions, sizes, tokens.times, sources=followed)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Halves, numbers, more than there are, an image."""
        clip = TokenSpec(MediaSpec("video", 2), 2 * 3 * 5, 6, Grid(2, 3, 5))
        yield {}, (clip,)
        yield {"amounts": (0.5, 2), "reduce": "weighted"}, (clip,)
        yield {"amounts": (20, 20), "keep_order": True}, (clip,)
        yield {}, (TokenSpec(MediaSpec("image", 1), 15, 6, Grid(1, 3, 5)),)


def _into(into: Tensor, grid: Grid) -> Tensor:
    """[B T, n], tokens of a frame -> tokens of the whole clip."""
    first = torch.arange(grid.t, device=into.device).repeat(len(into) // grid.t)
    return into + first[:, None] * grid.w


def _frames(values: Tensor) -> Tensor:
    """[B, T, n, ...] -> [B T, n, ...]: a token meets only those of its own frame."""
    return values.flatten(0, 1)


def _clips(values: Tensor, batch: int) -> Tensor:
    """[B T, m, ...] -> [B, T m, ...]."""
    return torch.unflatten(values, 0, (batch, -1)).flatten(1, 2)
