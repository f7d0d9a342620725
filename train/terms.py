"""The terms of a loss, averaged between two lines of the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmllm.contract.types import Term


class TermLog:
    """Sums and counts of every term since the last line; kept on the device, so that no step waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add what one forward scored."""
        for name, term in terms.items():
            value = term.sum.detach().to(_precise(term.sum.device))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0.0) + float(term.count)

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """{term: [sum, count]} over all processes; `reduce` adds a tensor up over them."""
        if not self.sums:
            return {}
        device = next(iter(self.sums.values())).device
        counts = torch.tensor(list(self.counts.values()), dtype=_precise(device), device=device)
        both = reduce(torch.stack([torch.stack(list(self.sums.values())), counts], dim=1))
        return dict(zip(self.sums, both.tolist(), strict=True))

    def load(self, state: Mapping[str, list[float]], device: torch.device, share: float) -> None:
        """Continue from `state`, of which this process takes a share, so that all of them add up to it again."""
        self.clear()
        for name, (total, count) in state.items():
            self.sums[name] = torch.tensor(total * share, dtype=_precise(device), device=device)
            self.counts[name] = count * share

    def clear(self) -> None:
        """Begin the next line."""
        self.sums, self.counts = {}, {}


def _precise(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def means(state: Mapping[str, list[float]]) -> dict[str, float]:
    """{term: mean}; a term with nothing to score is left out."""
    return {name: value / count for name, (value, count) in state.items() if count}
