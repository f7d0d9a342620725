"""Where the front end's rows go in the LLM's input."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.contract.batch import VisualInputs
from mmllm.contract.errors import UserError
from mmllm.contract.types import VisualSpan, VisualTokens
from mmllm.model.front_end_plan import FrontEndPlan


def spliced(visual: VisualInputs, plan: FrontEndPlan, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which front-end row goes to which flat position of [B, L], for all spans.

    Raises:
        UserError: a span does not fit into its row.
    """
    starts: dict[tuple[int, int], tuple[int, int]] = {}
    offset = 0
    for pair, (clip, _) in enumerate(visual["pairs"]):
        for stream, spec in enumerate(plan.streams(visual["media"][clip]["spec"])):
            starts[pair, stream] = (offset, spec.tokens)
            offset += spec.tokens
    source, target = [], []
    for row, start, pair, stream in visual["spans"].tolist():
        first, count = starts[pair, stream]
        if start < 0 or start + count > shape[1]:
            raise UserError(f"row {row}", f"a visual span of {count} at {start} leaves a row of {shape[1]}")
        source.append(torch.arange(first, first + count))
        target.append(torch.arange(row * shape[1] + start, row * shape[1] + start + count))
    if not source:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return empty, empty
    return torch.cat(source).to(device), torch.cat(target).to(device)


def spans_of(visual: VisualInputs, streams: list[list[VisualTokens]]) -> tuple[VisualSpan, ...]:
    """Where each medium is, and its tokens."""
    return tuple(VisualSpan(row, start, streams[pair][stream]) for row, start, pair, stream in visual["spans"].tolist())
