"""Merging similar tokens: one bipartite step for every part and reducer that merges (ToMe, Bolya et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast

PRODUCTS = 2**24
"""Similarities computed at a time: 67 MB."""


@dataclass(frozen=True)
class Matching:
    """Which tokens one step joins. Any tensor of the same tokens can be merged with it, so nothing is matched twice.

    Attributes:
        into: [B, T], the new token that each old one goes into.
        index: [B, M], the old token whose place each new one takes.
    """

    into: Tensor
    index: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Sums over the old tokens of each new one: [B, T, ...] -> [B, M, ...], in float32."""
        into = self.into.view(*self.into.shape, *[1] * (values.dim() - 2)).expand_as(values)
        out = torch.zeros(values.shape[0], self.index.shape[1], *values.shape[2:], device=values.device)
        return out.scatter_add(1, into, values.float())

    def merge(self, values: Tensor, size: Tensor | None = None) -> Tensor:
        """Means over the old tokens of each new one: [B, T, C] -> [B, M, C].

        Args:
            size: [B, T] weights; None = every old token counts once, however many it stands for.
        """
        weight = torch.ones_like(self.into, dtype=torch.float32) if size is None else size.float()
        mean = self.total(values * weight[..., None]) / self.total(weight)[..., None].clamp_min(1e-9)
        return mean.to(values.dtype)


@torch.no_grad()
def match(metric: Tensor, r: int, keep_order: bool = False) -> Matching:
    """Pairs the r tokens at even places that are most like one at an odd place with it (AIM, section 3.1).

    Args:
        metric: [B, T, D], compared by cosine; rows of zeros are like nothing.
        r: how many tokens disappear; at most half of them, none where it is not positive.
        keep_order: new tokens in the order of their places. By default the even ones that stay come first, the most
            similar in front, as the authors have it.
    """
    tokens = metric.shape[1]
    r = max(0, min(r, tokens // 2))
    everything = torch.arange(tokens, device=metric.device).expand(metric.shape[0], -1)
    if r == 0:
        return Matching(everything, everything)
    with without_autocast(metric):
        unit = torch.nn.functional.normalize(metric.float(), dim=-1)
        strength, best = _nearest(unit[:, ::2], unit[:, 1::2])
    order = strength.argsort(dim=-1, descending=True, stable=True)
    merged, staying = order[:, :r], order[:, r:]
    odd = everything[:, 1::2]
    index = torch.cat([2 * staying, odd], dim=1)
    if keep_order:
        index = index.sort(dim=1).values
    into = torch.zeros_like(everything).scatter(1, index, everything[:, : index.shape[1]])
    partner = into.gather(1, odd.gather(1, best.gather(1, merged)))
    return Matching(into.scatter(1, 2 * merged, partner), index)


def _nearest(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, D] and [B, N, D] -> for each row its largest product and the column that gives it, [B, M] each.

    A block of products at a time: the number of clips or segments does not decide how much memory this takes.
    """
    several, some = (max(1, PRODUCTS // count) for count in (rows.shape[1] * columns.shape[1], columns.shape[1]))
    strength = rows.new_empty(rows.shape[:2])
    best = torch.empty(rows.shape[:2], dtype=torch.long, device=rows.device)
    for first in range(0, rows.shape[0], several):
        for place in range(0, rows.shape[1], some):
            block = slice(first, first + several), slice(place, place + some)
            strength[block], best[block] = (rows[block] @ columns[block[0]].transpose(1, 2)).max(-1)
    return strength, best


@dataclass
class Merging:
    """Tokens of B sets on their way through several steps.

    Attributes:
        values: [B, T, C].
        positions: [B, T, 3].
        sizes: [B, T].
        into: [B, T0], the token that each of the first ones is in now.
        keys: [B, T, C'] that are merged along, or None.
    """

    values: Tensor
    positions: Tensor
    sizes: Tensor
    into: Tensor
    keys: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, positions: Tensor, sizes: Tensor, keys: Tensor | None = None) -> Merging:
        """Before the first step."""
        return cls(values, positions, sizes, torch.arange(values.shape[1], device=values.device).expand_as(sizes), keys)

    def step(self, metric: Tensor, r: int, *, weighted: bool, keep_order: bool = False) -> Merging:
        """One step further; see `merge_step`. Positions are means like the values, sizes are sums."""
        found, weight = match(metric, r, keep_order), self.sizes if weighted else None
        return Merging(
            found.merge(self.values, weight),
            found.merge(self.positions, weight),
            found.total(self.sizes).to(self.sizes.dtype),
            found.into.gather(1, self.into),
            None if self.keys is None else found.merge(self.keys, weight),
        )

    def ordered(self, index: Tensor) -> Merging:
        """The tokens `index` [B, T], each once, in this order."""
        places = torch.arange(index.shape[1], device=index.device).expand_as(index)
        rank = torch.zeros_like(index).scatter(1, index, places)

        def picked(values: Tensor) -> Tensor:
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

        keys = None if self.keys is None else picked(self.keys)
        sizes, into = self.sizes.gather(1, index), rank.gather(1, self.into)
        return Merging(picked(self.values), picked(self.positions), sizes, into, keys)


def merge_step(
    metric: Tensor,
    r: int,
    values: Tensor,
    size: Tensor | None = None,
    reduce: Literal["mean", "weighted"] = "mean",
    keep_order: bool = False,
) -> Tensor:
    """One merging step: values [B, T, C] -> [B, T - r, C]; gradients pass through the values, not through the choice.

    Args:
        metric: [B, T, D], by which tokens are compared.
        r: how many tokens disappear; at most half of them.
        size: [B, T], how many patches a token stands for; read by "weighted".
        reduce: "mean" counts each token once (AIM), "weighted" by its size (LongVLM).
        keep_order: see `match`.
    """
    if (reduce == "weighted") != (size is not None):
        raise ValueError('sizes and reduce="weighted" go together')
    return match(metric, r, keep_order).merge(values, size)
