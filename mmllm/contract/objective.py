"""The base of the objectives: what a stage optimises, as named sums over counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from mmllm.contract.batch import Batch
from mmllm.contract.types import Term


class Objective(nn.Module):
    """What a stage optimises. Runs inside the model's forward, so that gradients are synchronised.

    It has two halves. A loader worker needs `prepare` alone, of an object that is small and can be pickled. What needs
    a device, the model's width or another model is bound in the training process by `bind`: modules with weights to
    train become attributes as usual (they train with the model and are saved apart); frozen models are held in a tuple,
    where they are not optimised, not wrapped and not saved.
    """

    kind: ClassVar[str] = "objective"
    registered_name: ClassVar[str] = ""

    def locate(self, path: Callable[[str], str]) -> None:
        """Resolve the folders among the arguments: `path` knows the recipe's roots."""

    def prepare(self, samples: list, processor: Any) -> Batch:
        """Collate a batch from raw samples; runs in a loader worker."""
        raise NotImplementedError

    def bind(self, context: Any) -> None:
        """Get ready in the training process, before the first step.

        Args:
            context: of the stage (`mmllm.train.context.StageContext`): model, processor, recipe, run folder, options.

        Raises:
            UserError: something that it needs is missing or does not fit.
        """

    def counts(self, batch: Batch) -> dict[str, int]:
        """{term: denominator} of a batch, without a forward; summed over micro-batches and processes.

        Always the same terms in the same order, whatever the batch holds, since processes add them up together.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """Named sums and counts, computed with `model.embed`, `model.run` and `model.lm_head`."""
        raise NotImplementedError

    def scales(self, batch: Batch, weights: Mapping[str, float]) -> dict[str, float]:
        """{term: its factor in the loss of the whole batch}, for the head.

        Args:
            batch: `totals` says the denominators of the whole batch; without it, this one's own.
            weights: of the terms.
        """
        totals = batch.get("totals") or self.counts(batch)
        return {name: weight / max(1, totals[name]) for name, weight in weights.items()}
