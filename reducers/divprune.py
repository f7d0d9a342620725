"""DivPrune's rule: the tokens that are least like one another enter (Alvar et al. 2025, 2503.02175)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens
from mmllm.reducers.door import Door


@register("reducer", "divprune")
class DivPrune(Door):
    """Farthest points by cosine: each next token is the one least like the most similar of those chosen before.

    It starts with the token least like the mean, so that no table of all pairs is needed.
    """

    @torch.no_grad()
    def choose(self, tokens: VisualTokens, count: int) -> Tensor:
        """One after the other; ties to the earlier token."""
        with without_autocast(tokens.values):
            unit = torch.nn.functional.normalize(tokens.values[0].float(), dim=-1)
            nearest = unit @ torch.nn.functional.normalize(unit.mean(0), dim=0)
            picked = [nearest.argmin()]
            nearest = torch.full_like(nearest, -torch.inf)
            for _ in range(count - 1):
                nearest = torch.maximum(nearest, unit @ unit[picked[-1]])
                nearest[picked[-1]] = torch.inf
                picked.append(nearest.argmin())
        return torch.stack(picked)
