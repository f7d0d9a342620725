"""How likely a model finds each option: the prompt is computed once, the options branch off its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmllm.model.head import log_probs
from mmllm.model.reduction.run import CACHE

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor


def option_ids(processor: MMLLMProcessor, conversation: list[dict], options: list[str]) -> list[list[int]]:
    """The tokens of each option as an answer to a conversation, without what ends the turn.

    Media are left out: they do not change how the text of an answer is cut into tokens.
    """
    end, found = processor.tokenizer.eos_token_id, []
    asked = [
        {**turn, "content": [entry for entry in turn["content"] if entry["type"] == "text"]} for turn in conversation
    ]
    for option in options:
        answer = {"role": "assistant", "content": [{"type": "text", "text": option}]}
        labels = [label for label in processor.encode([*asked, answer]).labels if label != -100]
        found.append(labels[:-1] if labels[-1:] == [end] else labels)
    return found


def score_options(
    model: MMLLMForConditionalGeneration, batch: VisualBatch, options: list[list[list[int]]]
) -> list[list[float]]:
    """The summed log-probability of every option after its prompt.

    Args:
        batch: B prompts, left-padded.
        options: for each prompt the tokens of its options.
    """
    places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)  # padding in front has none
    output = model.model(**batch, position_ids=places, use_cache=True)
    cache = getattr(output, CACHE)
    rows = [row for row, some in enumerate(options) for _ in some]
    flat = [ids for some in options for ids in some]
    index = torch.tensor(rows, device=model.device)
    ids, real = _padded(flat, model.device)
    mask = batch["attention_mask"][index]
    hidden = output.last_hidden_state[:, -1:][index]
    if ids.shape[1] > 1:
        cache.batch_select_indices(index)
        steps = torch.arange(ids.shape[1] - 1, device=model.device)
        more = model.model(
            ids[:, :-1],
            attention_mask=torch.cat([mask, real[:, :-1].long()], dim=1),
            position_ids=mask.sum(1, keepdim=True) + steps,
            use_cache=True,
            **{CACHE: cache},
        )
        hidden = torch.cat([hidden, more.last_hidden_state], dim=1)
    targets = ids[real]
    values = model.lm_head(hidden[real], read=lambda logits, which: log_probs(logits, targets[which]))
    sums = iter(torch.zeros(ids.shape, device=model.device).masked_scatter(real, values.float()).sum(1).tolist())
    return [[next(sums) for _ in some] for some in options]


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [N, L], padded behind, and which of them are real."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=device)
    return ids, real
