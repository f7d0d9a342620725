"""Plain ways to read fewer tokens: at random, evenly spaced, averaged. The yardsticks for every other reducer."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mmllm.contract.arguments import Seed, Within
from mmllm.contract.reducer import Entered, Reducer, Schedule, frames_of
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens

Share = Annotated[float, Within(above=0, most=1)]


class Door(Reducer):
    """A reducer that decides once, before the first layer; every layer then reads the same tokens.

    Args:
        keep: share of each medium's tokens that enters; at least one does.
    """

    def __init__(self, *, keep: Share) -> None:
        self.keep = keep

    def schedule(self, layers: int) -> Schedule:
        """The same share everywhere."""
        return Schedule(self.keep, (1.0,) * layers)

    def count(self, tokens: int) -> int:
        """How many of so many tokens enter."""
        return max(1, int(self.keep * tokens + 1e-9))

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """Those that `choose` names, unchanged."""
        count = self.count(tokens.values.shape[1])
        return None if self.keep == 1 else chosen(tokens.values[0], self.choose(tokens, count))

    def choose(self, tokens: VisualTokens, count: int) -> Tensor:
        """The places [count] of the tokens that enter, in any order."""
        raise NotImplementedError


def chosen(values: Tensor, places: Tensor) -> Entered:
    """Some of the tokens [N, D], as they are."""
    index = places.sort().values
    source = torch.full((len(values),), -1, device=values.device)
    source[index] = torch.arange(len(index), device=values.device)
    return Entered(index, values[index], source)


@register("reducer", "random")
class Random(Door):
    """Tokens drawn at random; the same ones for media of the same length.

    Args:
        keep: share that enters.
        seed: of the draw.
    """

    def __init__(self, *, keep: Share, seed: Seed = 0) -> None:
        super().__init__(keep=keep)
        self.seed = seed

    def choose(self, tokens: VisualTokens, count: int) -> Tensor:
        """Without replacement."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randperm(tokens.values.shape[1], generator=draw)[:count].to(tokens.values.device)


@register("reducer", "stride")
class Stride(Door):
    """Every so many-th token."""

    def choose(self, tokens: VisualTokens, count: int) -> Tensor:
        """The middles of `count` equal stretches."""
        step = tokens.values.shape[1] / count
        return ((torch.arange(count, device=tokens.values.device) + 0.5) * step).long()


@register("reducer", "pool")
class Pool(Door):
    """Averages over cells of a coarser grid in every frame, as many as the budget allows; then over frames.

    Each average takes the place of the middle token of its cell.
    """

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """Means over cells; separators stay.

        Raises:
            ValueError: the frames have no raster.
        """
        frames = frames_of(tokens)
        h, w = raster(tokens, frames)
        t, rows, columns = coarser((len(frames), h, w), self.count(len(frames) * h * w))
        if (t, rows, columns) == (len(frames), h, w):
            return None
        device, values = tokens.values.device, tokens.values[0]
        place = torch.tensor([list(frame) for frame in frames], device=device).view(len(frames), h, w)
        axes = [
            torch.arange(size, device=device) * cells // size
            for size, cells in ((len(frames), t), (h, rows), (w, columns))
        ]
        cell = ((axes[0][:, None, None] * rows + axes[1][:, None]) * columns + axes[2]).flatten()
        inside = place.flatten()
        total = torch.zeros(t * rows * columns, values.shape[1], device=device).index_add(
            0, cell, values[inside].float()
        )
        means = total / cell.bincount(minlength=len(total))[:, None]
        order = cell.argsort(stable=True)
        ends = cell.bincount(minlength=len(total)).cumsum(0)
        middle = inside[order[(ends + torch.cat([ends.new_zeros(1), ends[:-1]])) // 2]]
        source = torch.arange(len(values), device=device)
        source[inside] = middle[cell]
        index = source.unique()
        merged = values.index_put((middle,), means.to(values.dtype))
        return Entered(index, merged[index], torch.searchsorted(index, source))


def raster(tokens: VisualTokens, frames: list) -> tuple[int, int]:
    """Rows and columns of every frame.

    Raises:
        ValueError: the frames differ, or their tokens are in no raster.
    """
    positions = tokens.positions[0, :, 1:]
    sides = set()
    for frame in frames:
        own = positions[list(frame)]
        h, w = (len(own[:, axis].unique()) for axis in (0, 1))
        sides.add((h, w) if h * w == len(frame) else None)
    if len(sides) != 1 or None in sides:
        raise ValueError("pooling needs frames of equal rows and columns; these tokens have none")
    return sides.pop()


def coarser(grid: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    """The largest grid of at most `count` cells: the sides of a frame shrink alike, time only once they are 1."""
    t, h, w = grid
    best = (max(1, min(t, count)), 1, 1)
    for rows in range(1, h + 1):
        columns = min(w, max(1, round(rows * w / h)))
        for side in (columns, columns + 1):
            if side <= w and t * rows * side <= count and rows * side * t > math.prod(best):
                best = (t, rows, side)
    return best
