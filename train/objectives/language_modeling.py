"""Next-token prediction on the assistant's answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.objective import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term
from mmllm.data.records.alignment_levels import level_of
from mmllm.model.head import log_probs

if TYPE_CHECKING:
    from mmllm.processing.processor import MMLLMProcessor


@register("objective", "language_modeling")
class LanguageModeling(Objective):
    """Cross-entropy of the answers' tokens, averaged over all of them in the global batch.

    Only the scored positions reach the head: logits over a large vocabulary are never made for a whole sequence.

    Args:
        groups: number of parts of a micro-batch that go through the LLM one after the other, rows of similar length
            together and cut at the longest of them. The loss is the same; where padding is a large share it costs less.
    """

    def __init__(self, *, groups: int = 1) -> None:
        super().__init__()
        if groups < 1:
            raise UserError("objective language_modeling: groups", "must be 1 or more", got=groups)
        self.groups = groups

    def prepare(self, samples: list, processor: MMLLMProcessor) -> Batch:
        """Conversations -> padded batch; `names` are the rows' samples, `groups` the parts' (first, last, length).

        Raises:
            UserError: a sample has no answer to learn.
        """
        examples = [
            processor.encode(sample.messages, name=sample.id, alignment_level=level_of(sample)) for sample in samples
        ]
        for example in examples:
            if all(label == -100 for label in example.labels):
                raise UserError(f"sample {example.name}", "has no assistant turn to learn from")
        if self.groups > 1:
            examples.sort(key=lambda example: -len(example.labels))
        batch = processor.collate(examples, padding_side="right")
        lengths = [len(example.labels) for example in examples]
        return {**batch, "names": [example.name for example in examples], "groups": self._split(lengths)}

    def _split(self, lengths: list[int]) -> list[tuple[int, int, int]]:
        count = min(self.groups, len(lengths))
        borders = [len(lengths) * index // count for index in range(count + 1)]
        return [(first, last, max(lengths[first:last])) for first, last in pairwise(borders)]

    def counts(self, batch: Batch) -> dict[str, int]:
        """The number of scored tokens."""
        return {"language_modeling": int((batch["labels"][:, 1:] != -100).sum())}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """The summed cross-entropy."""
        sequence, labels = model.embed(batch), batch["labels"]
        states, targets = [], []
        for first, last, length in batch["groups"]:
            # No mask: rows are right-padded, and no token reads what follows it. Causal kernels can then skip half.
            # A reducer has to know what is padding.
            part = sequence.part(slice(first, last), length)
            hidden, _ = model.run(part if part.spans else replace(part, mask=None))
            wanted = labels[first:last, 1:length]
            scored = wanted != -100
            states.append(hidden[:, :-1][scored])
            targets.append(wanted[scored])
        target = torch.cat(targets)

        def score(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            return {"language_modeling": -log_probs(logits, target[rows]).sum()}

        return {"language_modeling": Term(model.lm_head(torch.cat(states), score)["language_modeling"], len(target))}
