"""Merging similar tokens: one bipartite step for every part and reducer that merges (ToMe, Bolya et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast


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
        strength, best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    order = strength.argsort(dim=-1, descending=True, stable=True)
    merged, staying = order[:, :r], order[:, r:]
    odd = everything[:, 1::2]
    index = torch.cat([2 * staying, odd], dim=1)
    if keep_order:
        index = index.sort(dim=1).values
    into = torch.zeros_like(everything).scatter(1, index, everything[:, : index.shape[1]])
    partner = into.gather(1, odd.gather(1, best.gather(1, merged)))
    return Matching(into.scatter(1, 2 * merged, partner), index)


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
