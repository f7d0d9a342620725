"""Sequences that share a prefix: computed once under a mask, or as rows of their own where attention takes none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mmllm.contract.types import LLMInputs


def takes_masks(config: PreTrainedConfig) -> bool:
    """Whether the LLM's attention takes a mask per pair of positions, in every layer."""
    if config._attn_implementation not in ("sdpa", "eager"):
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is None
    return all(kind == "full_attention" for kind in kinds)


def branch_mask(segments: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Tensor:
    """[B, L] -> [B, 1, L, L]: a position sees what comes before it in the prefix and in its own branch.

    Padding sees itself, since a row without any key would not be a number. Boolean for SDPA; added to the scores of
    eager attention.
    """
    length = segments.shape[1]
    order = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    own, seen = segments[:, :, None], segments[:, None, :]
    mask = (order & ((seen == 0) | (seen == own)))[:, None]
    if config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def split(inputs: LLMInputs) -> tuple[LLMInputs, Tensor]:
    """A row for each branch, prefix included, and where each position went.

    Returns:
        rows [B * K, L'], padded behind; and [B, L], the flat index among them of every position (0 for padding). A
        prefix stands in several rows, with equal results; its positions point to the first.
    """
    segments = inputs.segments
    branches = [number for number in segments.unique().tolist() if number > 0] or [1]
    chosen = [((row == 0) | (row == number)).nonzero()[:, 0] for row in segments for number in branches]
    length = max(map(len, chosen))
    index = torch.stack([torch.nn.functional.pad(found, (0, length - len(found))) for found in chosen])
    real = torch.stack([torch.arange(length, device=index.device) < len(found) for found in chosen])
    where = torch.zeros_like(segments)
    for number, found in reversed(list(enumerate(chosen))):  # the first branch last, so that prefixes point to it
        where[number // len(branches), found] = number * length + torch.arange(len(found), device=index.device)
    rows = torch.arange(len(segments), device=index.device).repeat_interleave(len(branches))[:, None]
    positions = None if inputs.positions is None else inputs.positions[rows, index]
    embeds = inputs.embeds[rows, index] * real[..., None].to(inputs.embeds.dtype)
    spans = tuple(
        replace(span, row=number, start=int((chosen[number] < span.start).sum()))
        for number in range(len(chosen))
        for span in inputs.spans
        if span.row == number // len(branches)
    )
    return LLMInputs(embeds, real.long(), positions, inputs.visual[rows, index] & real, spans=spans), where
