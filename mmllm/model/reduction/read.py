"""How many visual tokens an LLM has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmllm.model.front_end_plan import FrontEndPlan
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch


def visual_tokens(batch: VisualBatch, plan: FrontEndPlan) -> list[int]:
    """The visual positions of each prompt."""
    visual, counts = batch["visual"], [0] * len(batch["input_ids"])
    for row, _, pair, stream in visual["spans"].tolist():
        clip, _ = visual["pairs"][pair]
        counts[row] += plan.streams(visual["media"][clip]["spec"])[stream].tokens
    return counts


def tokens_read(model: MMLLMForConditionalGeneration, batch: VisualBatch) -> list[list[int]]:
    """For each prompt that was read last, the visual tokens that entered each of the LLM's layers.

    Without a reducer one number: all layers read the same.
    """
    reduction = model.reduction
    if reduction is not None and reduction.last is not None:
        return torch.stack(reduction.last.entering, dim=1).tolist()
    return [[count] for count in visual_tokens(batch, model.model.front_end.plan)]
