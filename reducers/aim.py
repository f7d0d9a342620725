"""AIM inside the LLM: tokens that few others look at are dropped, layer by layer (Zhong et al. 2025, section 3.2)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast
from mmllm.contract.arguments import Within
from mmllm.contract.reducer import Entered, Reducer, Schedule
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens
from mmllm.reducers.merging import halved

ROWS = 512
"""Queries whose votes are computed at once; the votes of one head are kept as the triangle they are."""
LEAST = 2 / 3
"""What pruning alone should keep at least; below it tokens are merged first. The paper's (14, 22 of 28) keeps 0.66."""
SLOPE = 2 / 7
"""Share of the layers over which the tokens disappear: 8 of 28 in the paper."""
Share = Annotated[float, Within(above=0, most=1)]


@register("reducer", "aim")
class AIM(Reducer):
    """Merges similar tokens within each frame by halves, then drops the least important ones inside the LLM.

    Args:
        keep: the budget. Tokens are merged by halves while the paper's own pruning can spend it, and the rest is
            pruned over 2/7 of the layers, as late as the budget allows.
        merge: share of the tokens that enters the LLM: 1, 0.5, 0.25, ... (default: by the budget).
        l1: layers that read everything; with `l2`, the paper's schedule instead of the budget's.
        l2: layers after which no visual token is left.
        rates: for each layer, the share kept after it, instead of `l1` and `l2`.
        tau: temperature of the votes.
        iters: rounds of votes.
        damping: share of each vote that is spread evenly.
        debias: divide by the votes that uniform attention would give: being early is then no advantage.
    """

    def __init__(
        self,
        *,
        keep: Share | None = None,
        merge: Share | None = None,
        l1: int | None = None,
        l2: int | None = None,
        rates: tuple[float, ...] | None = None,
        tau: Annotated[float, Within(above=0)] = 0.1,
        iters: Annotated[int, Within(least=1)] = 5,
        damping: Annotated[float, Within(least=0, most=1)] = 0.0,
        debias: bool = False,
    ) -> None:
        given = [keep is not None, l1 is not None, rates is not None]
        if sum(given) != 1 or (l1 is None) != (l2 is None):
            raise ValueError("give keep, or l1 and l2, or rates")
        if l1 is not None and not 0 <= l1 < l2:
            raise ValueError(f"l1 is below l2 and not negative, not {l1} and {l2}")
        if rates is not None and (any(not 0 <= rate <= 1 for rate in rates) or list(rates) != sorted(rates)[::-1]):
            raise ValueError("rates are shares that never rise")
        self.keep, self.l1, self.l2, self.rates = keep, l1, l2, rates
        self.merge = merge or (1.0 if keep is None else 0.5 ** max(0, math.floor(math.log2(LEAST / keep))))
        self.tau, self.iters, self.damping, self.debias = tau, iters, damping, debias

    def schedule(self, layers: int) -> Schedule:
        """As given, or solved for the budget.

        Raises:
            ValueError: other than one rate per layer, or a budget that the first layer alone exceeds.
        """
        if self.rates is not None:
            if len(self.rates) != layers:
                raise ValueError(f"{len(self.rates)} rates, the LLM has {layers} layers")
            return Schedule(self.merge, self.rates)
        if self.l1 is not None:
            return Schedule(self.merge, falling(layers, self.l1, self.l2 - self.l1))
        share = self.keep / self.merge
        if share < 1 / layers - 1e-9:
            raise ValueError(f"keeps at least {self.merge / layers:.3f}: the first layer reads all that enters")
        return Schedule(self.merge, solved(layers, share))

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """Merged by halves within each frame."""
        return halved(tokens, self.merge) if self.merge < 1 else None

    def score(self, q: Tensor, k: Tensor, visual: Tensor, voting: Tensor) -> Tensor:
        """The votes that reach each token."""
        found = importance(q, k, voting, self.tau, self.iters, self.damping)
        return found / uniform(len(found), self.iters, self.damping).to(found) if self.debias else found


def falling(layers: int, l1: float, width: float) -> tuple[float, ...]:
    """1 up to layer `l1`, then down to 0 within `width` layers (spec of the paper; both may be fractions)."""
    return tuple(1.0 if i < l1 else max(0.0, 1 - (i - l1 + 1) / width) for i in range(layers))


def solved(layers: int, share: float) -> tuple[float, ...]:
    """The latest fall over `SLOPE` of the layers whose mean over the layers is `share`; steeper where that is early."""
    low, high, width = 0.0, float(layers), SLOPE * layers

    def mean(rates: tuple[float, ...]) -> float:
        return sum((1.0, *rates[:-1])) / layers

    if mean(falling(layers, 0, width)) > share:  # even from the first layer on it is too slow: fall faster
        low, high = 1e-6, width
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if mean(falling(layers, 0, middle)) > share else (middle, high)
        return falling(layers, 0, low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(falling(layers, middle, width)) > share else (middle, high)
    return falling(layers, low, width)


@torch.no_grad()
def importance(
    q: Tensor, k: Tensor, voting: Tensor | None = None, tau: float = 0.1, iters: int = 5, damping: float = 0.0
) -> Tensor:
    """How much of the attention ends at each token after some hops along it, in float32.

    Exact, one head at a time: memory for one triangle of [n, n], whatever the number of heads.

    Args:
        q: [H, n, d].
        k: [H', n, d], each for H / H' heads.
        voting: [n] bool, keys that can be seen; None = all.
    """
    heads, count, width = q.shape
    total = torch.zeros(count, device=q.device)
    unseen = _unseen(count, None if voting is None or bool(voting.all()) else ~voting, q.device)
    with without_autocast(q):
        for head in range(heads):
            keys = k[head * len(k) // heads].float()
            votes, sums = _votes(q[head].float() * (width**-0.5 / tau), keys, unseen)
            p = torch.full((count,), 1 / count, device=q.device)
            for _ in range(iters):
                p = (1 - damping) * _hop(p / sums, votes) + damping / count
            total += p**2
    return (total / heads).sqrt()


def _unseen(count: int, hidden: Tensor | None, device: torch.device) -> list[Tensor]:
    """For each block of queries [rows, keys up to their end], which keys they do not see: the same for all heads."""
    blocks = []
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        later = torch.ones(stop - start, stop, dtype=torch.bool, device=device).triu(start + 1)
        blocks.append(later if hidden is None else later | hidden[:stop])
    return blocks


def _votes(q: Tensor, k: Tensor, unseen: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Rows of the causal softmax in blocks, not yet divided by their sums; and the sums [n]."""
    blocks, sums, start = [], [], 0
    for hidden in unseen:
        rows, stop = hidden.shape
        votes = (q[start : start + rows] @ k[:stop].T).masked_fill_(hidden, -torch.inf)
        most = votes.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)  # a row that sees nothing has no vote
        blocks.append(votes.sub_(most).exp_())
        sums.append(votes.sum(-1))
        start += rows
    return blocks, torch.cat(sums).clamp_min_(torch.finfo(torch.float32).tiny)


def _hop(p: Tensor, votes: list[Tensor]) -> Tensor:
    """One round: every token passes its share on to those that it attends to."""
    out, start = torch.zeros_like(p), 0
    for block in votes:
        out[: block.shape[1]] += p[start : start + len(block)] @ block
        start += len(block)
    return out


def uniform(count: int, iters: int, damping: float = 0.0) -> Tensor:
    """[count], the importance that attention without any preference would give; it falls with the position."""
    p = torch.full((count,), 1 / count, dtype=torch.float64)
    rows = torch.arange(1, count + 1, dtype=torch.float64)
    for _ in range(iters):
        p = (1 - damping) * (p / rows).flip(0).cumsum(0).flip(0) + damping / count
    return p
