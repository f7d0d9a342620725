"""How what is known of tokens moves on to new tokens that are made of them."""

from __future__ import annotations

import torch
from torch import Tensor


def blended(positions: Tensor, sizes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, N, 3] and sizes [B, N] of means by `weights` [M, N] or [B, M, N]; sizes are shared out."""
    weights = weights.to(positions.dtype)
    if weights.dim() == 2:
        weights = weights.expand(positions.shape[0], -1, -1)
    share = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
    return weights @ positions, (share @ sizes[..., None]).squeeze(-1)


def picked(positions: Tensor, sizes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and sizes of the tokens `index` [M] or [B, M]; -1 = a separator, of size 0."""
    if index.dim() == 1:
        index = index.expand(positions.shape[0], -1)
    real = index >= 0
    index = index.clamp_min(0)
    chosen = positions.gather(1, index[..., None].expand(-1, -1, 3))
    return chosen, sizes.gather(1, index) * real


def inverse(index: Tensor, count: int) -> Tensor:
    """[M] or [B, M], the old token of each new one -> [N] or [B, N], the first new token of each old one, or -1."""
    places = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    into = index.new_full((*index.shape[:-1], count + 1), index.shape[-1])
    into = into.scatter_reduce(-1, torch.where(index < 0, count, index), places, "amin")[..., :count]
    return into.masked_fill(into == index.shape[-1], -1)
