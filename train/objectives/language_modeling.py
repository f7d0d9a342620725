"""Next-token prediction on the assistant's answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.objective import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term
from mmllm.data.records.alignment_levels import level_of
from mmllm.data.records.conversations import Sample
from mmllm.processing.collate import Example
from mmllm.train.targets import Targets

if TYPE_CHECKING:
    from mmllm.processing.processor import MMLLMProcessor


@register("objective", "language_modeling")
class LanguageModeling(Objective):
    """Cross-entropy of the answers' tokens, averaged over all of them in the global batch.

    Only the scored positions reach the head: logits over a large vocabulary are never made for a whole sequence.

    Args:
        average: over all scored "token"s, or over "sample"s, each with the mean of its own tokens (LLaVA-ST).
        groups: number of parts of a micro-batch that go through the LLM one after the other, rows of similar length
            together and cut at the longest of them. The loss is the same; where padding is a large share it costs less.
    """

    def __init__(self, *, average: Literal["token", "sample"] = "token", groups: int = 1) -> None:
        super().__init__()
        self.average = average
        if groups < 1:
            raise UserError("objective language_modeling: groups", "must be 1 or more", got=groups)
        self.groups = groups

    def prepare(self, samples: list[Sample], processor: MMLLMProcessor) -> Batch:
        """Conversations -> padded batch; `names` are the rows' samples, `groups` the parts' (first, last, length).

        Raises:
            UserError: a sample has no answer to learn.
        """
        return self.collated([example for _, example in self.encoded(samples, processor)], processor)

    def encoded(self, samples: list[Sample], processor: MMLLMProcessor) -> list[tuple[Sample, Example]]:
        """Each sample with its tokens, in the order of the batch's rows.

        Raises:
            UserError: a sample has no answer to learn.
        """
        pairs = []
        for sample in samples:
            example = processor.encode(sample.messages, name=sample.id, alignment_level=level_of(sample))
            if all(label == -100 for label in example.labels):
                raise UserError(f"sample {example.name}", "has no assistant turn to learn from")
            pairs.append((sample, example))
        return sorted(pairs, key=lambda pair: -len(pair[1].labels)) if self.groups > 1 else pairs

    def collated(self, examples: list[Example], processor: MMLLMProcessor) -> Batch:
        """The batch of such examples; see `prepare`."""
        batch = processor.collate(examples, padding_side="right")
        lengths = [len(example.labels) for example in examples]
        return {**batch, "names": [example.name for example in examples], "groups": self._split(lengths)}

    def _split(self, lengths: list[int]) -> list[tuple[int, int, int]]:
        count = min(self.groups, len(lengths))
        borders = [len(lengths) * index // count for index in range(count + 1)]
        return [(first, last, max(lengths[first:last])) for first, last in pairwise(borders)]

    def counts(self, batch: Batch) -> dict[str, int]:
        """The number of scored tokens, or of samples that have some."""
        scored = batch["labels"][:, 1:] != -100
        return {"language_modeling": int((scored.any(1) if self.average == "sample" else scored).sum())}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """The summed cross-entropy."""
        sequence, learnt = model.embed(batch), Targets.of(batch)
        states, targets, shares = [], [], []
        for first, last, length in batch["groups"]:
            # No mask: rows are right-padded, and no token reads what follows it. Causal kernels can then skip half.
            # A reducer has to know what is padding.
            part = sequence.part(slice(first, last), length)
            hidden, _ = model.run(part if part.spans else replace(part, mask=None))
            wanted = learnt.at((slice(first, last), slice(1, length)))
            scored = wanted.ids != -100
            states.append(hidden[:, :-1][scored])
            targets.append(wanted.at(scored))
            shares.append(self.shares(scored))
        return {"language_modeling": self.answers(model, torch.cat(states), Targets.joined(targets), shares, batch)}

    def shares(self, scored: Tensor) -> Tensor:
        """The weight of each scored token of [B, L], row by row."""
        counts = scored.sum(1, keepdim=True) if self.average == "sample" else torch.ones_like(scored[:, :1])
        return (1 / counts.clamp_min(1).float()).expand(scored.shape)[scored]

    def answers(self, model: nn.Module, states: Tensor, targets: Targets, shares: list[Tensor], batch: Batch) -> Term:
        """The summed cross-entropy of [N] answers' tokens, given the hidden states [N, D] before them."""
        weight = torch.cat(shares)

        def score(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            values = targets.log_probs(logits, rows)
            return {"sum": -(values.sum() if self.average == "token" else (weight[rows] * values).sum())}

        count = len(targets.ids) if self.average == "token" else self.counts(batch)["language_modeling"]
        return Term(model.lm_head(states, score)["sum"], count)
