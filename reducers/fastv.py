"""FastV's rule: after a few layers, what the last token attends to least is dropped (Chen et al. 2024, 2403.06764)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from mmllm.contract.arguments import Within
from mmllm.contract.reducer import Reducer, Schedule
from mmllm.contract.registry import register
from mmllm.reducers.door import Share


@register("reducer", "fastv")
class FastV(Reducer):
    """Everything is read by the first layers, and a fixed share by the others.

    Args:
        keep: the budget; the share of the later layers follows from it.
        layer: layers that read everything.
    """

    def __init__(self, *, keep: Share, layer: Annotated[int, Within(least=1)] = 2) -> None:
        self.keep, self.layer = keep, layer

    def schedule(self, layers: int) -> Schedule:
        """1, and the rest of the budget after `layer` layers.

        Raises:
            ValueError: the first layers alone spend more than the budget.
        """
        if self.layer >= layers or self.keep * layers < self.layer - 1e-9:
            least = min(1.0, self.layer / layers)
            raise ValueError(f"keeps at least {least:.3f}: {self.layer} of {layers} layers read everything")
        share = max(0.0, (self.keep * layers - self.layer) / (layers - self.layer))
        return Schedule(1.0, tuple(1.0 if i < self.layer - 1 else share for i in range(layers)))

    def score(self, q: Tensor, k: Tensor, visual: Tensor, voting: Tensor) -> Tensor:
        """Attention of the last token, averaged over heads."""
        keys = k.repeat_interleave(len(q) // len(k), dim=0).float()
        logits = torch.einsum("hd,hnd->hn", q[:, -1].float(), keys) * q.shape[-1] ** -0.5
        return logits.masked_fill(~voting, -torch.inf).softmax(-1).mean(0)
