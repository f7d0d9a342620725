"""Next-token prediction on the assistant's answers."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term


@register("objective", "language_modeling")
class LanguageModeling(Objective):
    """Cross-entropy of the answers' tokens, averaged over all of them in the global batch.

    Only the scored positions reach the head: logits over a large vocabulary are never made for a whole sequence.
    """

    def prepare(self, samples: list, processor: Any) -> dict[str, Any]:
        """Conversations -> padded batch; `names` says whose rows they are.

        Raises:
            UserError: a sample has no answer to learn.
        """
        examples = [
            processor.encode(sample.messages, name=sample.id, level=sample.fields.get("level")) for sample in samples
        ]
        for example in examples:
            if all(label == -100 for label in example.labels):
                raise UserError(f"sample {example.name}", "has no assistant's turn to learn")
        batch = processor.collate(examples, padding_side="right")
        return {**batch, "names": [sample.id for sample in samples]}

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        """How many tokens are scored."""
        return {"language_modeling": int((batch["labels"][:, 1:] != -100).sum())}

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Term]:
        """The summed cross-entropy."""
        hidden = model.run(model.embed(batch))
        targets = batch["labels"][:, 1:]
        scored = targets != -100
        logits = model.logits(hidden[:, :-1][scored]).float()
        loss = nn.functional.cross_entropy(logits, targets[scored], reduction="sum")
        return {"language_modeling": Term(loss, int(scored.sum()))}
