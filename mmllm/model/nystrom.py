"""NLoRA: an adapter of three factors that starts from the weight itself, without a decomposition.

Source: NLoRA (Guo et al. 2025, arXiv 2502.14482) and its code; y = W x + b + (alpha / r) B N A x.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError

LARGEST_CHANGE = 0.05
"""Share of the output's norm by which a start may change it, where the weight does not make up for it."""

Start = Literal["nystrom", "kaiming"]


class NystromLinear(nn.Module):
    """A frozen linear layer and an adapter of three small factors beside it.

    Args:
        base: the layer.
        rank: of the adapter.
        alpha: its scale is alpha / rank.
        start: "nystrom" takes the factors from the weight's first rows and columns; "kaiming" is SLoRA's: A and N
            random, B zero.
        preserve: subtract what the adapter adds at the start from the weight, so that nothing changes; False is the
            authors' form, whose output differs from the first step on.
        middle_only: train N alone (the authors' IntTune).

    Raises:
        UserError: without `preserve`, the weight would change too much.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        start: Start = "nystrom",
        preserve: bool = True,
        middle_only: bool = False,
    ) -> None:
        super().__init__()
        if rank > min(base.weight.shape):
            raise UserError("lora.rank", f"above the {min(base.weight.shape)} of a layer", got=rank)
        self.base, self.scale, self.enabled, self.preserve = base.requires_grad_(False), alpha / rank, True, preserve
        weight = base.weight
        factors = _nystrom(weight, rank) if start == "nystrom" else _kaiming(weight, rank)
        self.lora_A, self.lora_N, self.lora_B = (nn.Parameter(factor) for factor in factors)
        for factor in (self.lora_A, self.lora_B) if middle_only else ():
            factor.requires_grad_(False)
        if preserve:
            with torch.no_grad():
                weight -= self.delta()
        elif (change := float(self.delta().norm() / weight.norm())) > LARGEST_CHANGE:
            what = f"its start changes a weight by {100 * change:.0f} % of its norm"
            raise UserError("lora.preserve", what, hint="preserve: true, or a smaller alpha")

    def delta(self) -> Tensor:
        """[out, in]: what the adapter adds to the weight."""
        return self.scale * self.lora_B @ self.lora_N @ self.lora_A

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        output = self.base(rows)
        if not self.enabled:
            return output
        linear = nn.functional.linear
        return output + self.scale * linear(linear(linear(rows, self.lora_A), self.lora_N), self.lora_B)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapter on or off, as peft's layers do."""
        self.enabled = enabled

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the adapter in its weight."""
        self.base.weight += self.delta().to(self.base.weight.dtype)
        return self.base

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of a plain LoRA adapter with the same effect: A' = N A."""
        return self.lora_N @ self.lora_A, self.lora_B


def _nystrom(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A = W[:r], N = W[:r, :r], B = W[:, :r]; the formula's pseudo-inverse of N would miss W by far."""
    found = weight.detach()
    return found[:rank].clone(), found[:rank, :rank].clone(), found[:, :rank].clone()


def _kaiming(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    first, middle = weight.new_empty(rank, columns), weight.new_empty(rank, rank)
    for factor in (first, middle):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return first, middle, weight.new_zeros(rows, rank)
