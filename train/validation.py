"""A share of a stage's samples that it never learns from: scored now and then, and the best weights kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mmllm.contract.errors import UserError
from mmllm.contract.files import read_record, write_json, writing
from mmllm.contract.objective import Objective
from mmllm.processing.collate import move
from mmllm.train.context import StageContext
from mmllm.train.machine import join
from mmllm.train.preparing import Preparer
from mmllm.train.reference import evaluating
from mmllm.train.terms import TermLog, means

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from mmllm.train.trainer import StageTrainer

TIMES = 5
"""How often a stage is validated where it does not say."""
BEST = "best"
"""Folder of the weights with the lowest validation loss, beside a stage's checkpoints."""


def held_out(total: int, count: int | None, seed: int, where: str) -> tuple[list[int] | range, list[int]]:
    """(numbers of the samples to learn from, those held out): drawn by the seed, the same in every process.

    Raises:
        UserError: nothing would be left to learn from.
    """
    if not count:
        return range(total), []
    if count >= total:
        raise UserError(where, f"all {total} samples would be held out", expected=f"fewer than {total}", got=count)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [number for number in range(total) if number not in held], sorted(held)


class Validation(TrainerCallback):
    """Scores held-out samples before the first step, every so often, and after the last one.

    A line of the log gets the mean of every term and their weighted sum, `validation`; the weights with the lowest sum
    are kept in `best/` beside the checkpoints, a model folder like any other.

    Args:
        context: of the stage.
        preparer: makes batches, as for training.
        numbers: of the held-out samples.
        objective: the bound one.
    """

    def __init__(self, context: StageContext, preparer: Preparer, numbers: Sequence[int], objective: Objective) -> None:
        self.context, self.preparer, self.numbers, self.objective = context, preparer, numbers, objective
        self.trainer: StageTrainer | None = None
        self.file = context.folder / BEST / "validation.json"
        self.best = read_record(self.file)["validation"] if self.file.is_file() else float("inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score what training starts from; a run that continues has done so."""
        if state.global_step == 0:
            self.score(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score every so often, and after the last step."""
        every = self.context.stage.validate_every or max(1, state.max_steps // TIMES)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.score(state)

    def score(self, state: TrainerState) -> None:
        """Score the held-out samples, each process its share; write a line, and keep the best weights."""
        trainer, processes, micro = self.trainer, join(self.context.options), self.trainer.args.train_batch_size
        share = [(number, 0) for number in self.numbers[processes.process_index :: processes.num_processes]]
        loader = DataLoader(share, micro, collate_fn=self.preparer, num_workers=self.context.options.jobs)
        found = TermLog()
        weights: dict[str, float] = {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        with evaluating(model), torch.no_grad():
            for batch in loader:
                if "error" in batch:
                    raise batch["error"]
                batch = move({key: value for key, value in batch.items() if key not in AROUND}, trainer.args.device)
                self.objective.counts(batch)
                terms = model(**batch, objective=self.objective)
                weights |= {name: term.weight for name, term in terms.items()}
                found.add(terms)
        scored = means(found.state(trainer.reduced))
        total = sum(weight * scored.get(name, 0.0) for name, weight in weights.items())
        if processes.is_main_process:
            line = {"validation": total, **{f"validation_{name}": value for name, value in scored.items()}}
            self.context.run.log({"stage": self.context.name, "step": state.global_step, **line})
            if not self.context.options.quiet:
                shown = "  ".join(f"{name} {value:.3f}" for name, value in {"loss": total, **scored}.items())
                self.context.run.log_event(self.context.name, f"validation after {state.global_step} steps: {shown}")
        self._keep(model, total, state.global_step, processes.is_main_process)

    def _keep(self, model: torch.nn.Module, total: float, step: int, main: bool) -> None:
        """Keep the weights where the sum is the lowest so far; not those that training starts from."""
        if step == 0 or not total < self.best:
            return
        self.best = total
        if main and self.context.options.deepspeed is None:
            with writing(self.file.parent):
                self.trainer.save_weights(str(self.file.parent))
            write_json(self.file, {"validation": total, "step": step})


AROUND = ("names", "looked_up", "skipped")
"""What a prepared batch has that the model does not take."""
