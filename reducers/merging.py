"""Merging similar tokens of a frame at the LLM's door, each merged token at the place of one of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.connectors.common.merging import match
from mmllm.contract.reducer import Entered, frames_of
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens
from mmllm.reducers.door import Door


@register("reducer", "merge")
class Merge(Door):
    """Similar tokens of a frame are merged, as AIM does it, and nothing is dropped."""

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """Merged to `keep` of each frame."""
        return halved(tokens, self.keep) if self.keep < 1 else None


def halved(tokens: VisualTokens, share: float) -> Entered:
    """Every frame of [1, N, D] merged to `share` of its tokens, by halves of the original number (AIM, section 3.1).

    Rounded down, but to 1 at least; the last step removes what the halves leave over. Separators stay.
    """
    values, count = tokens.values[0], tokens.values.shape[1]
    place = torch.arange(count, device=values.device)
    source, merged = place.clone(), values
    for frame in frames_of(tokens):
        found, into, index = _frame(values[list(frame)], share)
        own = place[list(frame)]
        merged = merged.index_put((own[index],), found)
        source[own] = own[index][into]
    index = source.unique()
    return Entered(index, merged[index], torch.searchsorted(index, source))


def _frame(values: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """[n, D] -> merged [m, D], which of them each token went into [n], and whose place each takes [m]."""
    count = len(values)
    left = max(1, int(share * count + 1e-9))
    into = index = torch.arange(count, device=values.device)
    step = count // 2
    while len(values) > left:
        found = match(values[None], min(max(step, 1), len(values) - left), keep_order=True)
        values, into, index = found.merge(values[None])[0], found.into[0][into], index[found.index[0]]
        step //= 2
    return values, into, index
