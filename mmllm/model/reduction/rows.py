"""The sequence while tokens disappear from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmllm.contract.errors import UserError
from mmllm.contract.reducer import Reducer
from mmllm.contract.types import LLMInputs


@dataclass(frozen=True)
class Rows:
    """What is left of B sequences of L positions; rows with fewer tokens are padded in front.

    Attributes:
        hidden: [B, n, D].
        index: [B, n], the place of each token in the whole sequence.
        real: [B, n] bool; padding is none.
        visual: [B, n] bool.
        positions: [B, n], or [axes, B, n] where positions have several axes. Dropping leaves gaps in them.
    """

    hidden: Tensor
    index: Tensor
    real: Tensor
    visual: Tensor
    positions: Tensor

    @classmethod
    def begin(cls, inputs: LLMInputs, positions: Tensor) -> Rows:
        """The whole sequence."""
        batch, length = inputs.embeds.shape[:2]
        index = torch.arange(length, device=inputs.embeds.device).expand(batch, -1)
        real = torch.ones_like(index, dtype=torch.bool) if inputs.mask is None else inputs.mask.bool()
        return cls(inputs.embeds, index, real, inputs.visual.bool() & real, positions)

    def take(self, keep: Tensor) -> Rows:
        """The tokens of `keep` [B, n] bool, in their order."""
        order = self.order(keep)
        return Rows(
            gathered(self.hidden, order),
            self.index.gather(1, order),
            keep.gather(1, order),
            self.visual.gather(1, order),
            self.positions.gather(-1, order.expand(*self.positions.shape[:-1], -1)),
        )

    @staticmethod
    def order(keep: Tensor) -> Tensor:
        """[B, m], for each row which tokens `take` keeps; what a shorter row has in front counts as padding."""
        return keep.int().argsort(dim=1, stable=True)[:, -max(1, int(keep.sum(1).max())) :]

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Values [B, n, D] at their places in the whole sequence [B, length, D], zeros elsewhere."""
        index = torch.where(self.real, self.index, length)  # padding goes behind the end and is cut off
        whole = values.new_zeros(values.shape[0], length + 1, values.shape[2])
        return whole.scatter(1, index[..., None].expand_as(values), values)[:, :length]

    def places(self, flags: Tensor, length: int) -> Tensor:
        """[B, n] bool -> [B, length] bool: which places of the whole sequence have a token with the flag."""
        whole = flags.new_zeros(flags.shape[0], length)
        return whole.scatter(1, self.index, flags)


def gathered(values: Tensor, order: Tensor) -> Tensor:
    """Values [B, n, ...] at the places `order` [B, m] -> [B, m, ...]."""
    index = order.view(*order.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*order.shape, *values.shape[2:]))


def enter(rows: Rows, inputs: LLMInputs, reducer: Reducer) -> tuple[Rows, dict[int, Tensor]]:
    """What a reducer lets through the LLM's door, and {number of a span: what became of its tokens}."""
    keep, hidden, sources = rows.real.clone(), rows.hidden, {}
    for number, span in enumerate(inputs.spans):
        place = slice(span.start, span.start + span.tokens.values.shape[1])
        try:
            entered = reducer.enter(replace(span.tokens, values=hidden[span.row, None, place]))
        except ValueError as error:
            raise UserError(f"reduce {reducer.registered_name}", str(error), hint="another reducer") from error
        if entered is None:
            continue
        sources[number] = entered.source
        keep[span.row, place] = False
        keep[span.row, span.start + entered.index] = True
        row = torch.full_like(entered.index, span.row)
        hidden = hidden.index_put((row, span.start + entered.index), entered.values.to(hidden.dtype))
    if not sources:
        return rows, sources
    return replace(rows, hidden=hidden).take(keep), sources
