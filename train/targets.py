"""What an answer's tokens are learnt as: themselves, or, for an exact place, the two bins around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmllm.contract.batch import Batch
from mmllm.model.head import log_probs


class Targets(NamedTuple):
    """Targets at some positions, in any shape.

    Attributes:
        ids: the token, -100 where nothing is learnt.
        upper: the token above an exact place, or the same one; None where a batch has no exact place.
        ratio: how far the place is towards it.
    """

    ids: Tensor
    upper: Tensor | None = None
    ratio: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Targets:
        """[B, L], those of a batch."""
        labels, given = batch["labels"], (batch.get("visual") or {}).get("coordinates")
        if given is None:
            return cls(labels)
        places = given["places"].unbind(1)
        learnt = labels[places] != -100
        lower, upper = labels.clone(), labels.clone()
        ratio = torch.zeros(labels.shape, device=labels.device)
        for into, values in ((lower, given["ids"][:, 0]), (upper, given["ids"][:, 1])):
            into[places] = torch.where(learnt, values, -100)
        ratio[places] = given["ratio"].to(ratio.dtype)
        return cls(lower, upper, ratio)

    def at(self, index: Tensor | tuple[slice, ...]) -> Targets:
        """Those at some positions."""
        return Targets(*(None if part is None else part[index] for part in self))

    def taken(self, index: Tensor, real: Tensor) -> Targets:
        """Those at the positions `index` [B, L'] of each row; nothing is learnt where it is not real."""
        parts = [None if part is None else part.gather(1, index) for part in self]
        return Targets(parts[0].masked_fill(~real, -100), *parts[1:])

    @classmethod
    def joined(cls, parts: list[Targets]) -> Targets:
        """One after the other."""
        return cls(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))

    def log_probs(self, logits: Tensor, rows: slice) -> Tensor:
        """log p of some of [N] targets: of an exact place, the mean of its bins' by nearness; logits [n, V] -> [n]."""
        own = self.at((rows,))
        below = log_probs(logits, own.ids)
        if own.upper is None:
            return below
        return (1 - own.ratio) * below + own.ratio * log_probs(logits, own.upper)
