"""One trainer for every stage: transformers' own, with objectives inside the model's forward and exact denominators."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from mmllm.contract.errors import UserError
from mmllm.contract.files import write_json, writing
from mmllm.contract.objective import Objective
from mmllm.train.caching import LookUps
from mmllm.train.checkpoints import LOSSES, OBJECTIVE, finish, losses_of, naming, start
from mmllm.train.optimizer import grouped, muon
from mmllm.train.order import EpochOrder
from mmllm.train.terms import TermLog, means


class StageTrainer(Trainer):
    """`transformers.Trainer` with four changes: the objective, its denominators, the order, complete checkpoints.

    Args:
        objective: what the stage optimises; called inside the model's forward.
        stage: name of the stage, for messages.
        batch: samples per step over all processes; an epoch is made of whole batches.
        muon_lr: peak learning rate of Muon; None = AdamW alone.
        rates: parameters with a peak learning rate each; None = one for all.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        batch: int,
        stage: str = "stage",
        muon_lr: float | None = None,
        rates: list[tuple[list[nn.Parameter], float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.stage, self.batch, self.muon_lr = objective, stage, batch, muon_lr
        self.rates = rates
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the count of all micro-batches itself
        self.data_seconds = 0.0
        self.terms = TermLog()
        self.looked_up = LookUps()
        self.skipped: list[str] = []
        self.checkpoint: Path | None = None
        self.order = EpochOrder(0, 1, 0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer, with a rate per name or with Muon beside it where the stage asks for that."""
        if self.rates is not None and self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(grouped(self.rates, self.args.weight_decay), **settings)
        if self.muon_lr is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = muon(self.model, self.args.learning_rate, self.muon_lr, self.args.weight_decay)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only, as in Muon's groups: the library goes by names, but a part's vectors can have any name."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """A different order in each epoch, which depends on the seed alone."""
        self.order = EpochOrder(len(train_dataset or self.train_dataset), self.batch, self.args.seed)
        return self.order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, or what a checkpoint left of it; nothing where the checkpoint was the stage's last.

        The library checks whether it is done only after a step, so it would make one step too many.
        """
        if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            loss, self._globalstep_last_logged, terms = losses_of(Path(kwargs["resume_from_checkpoint"]), self.state)
            self.terms.load(terms, self.args.device, 1 / self.args.world_size)
            self._tr_loss = torch.tensor(loss, device=self.args.device)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # When several processes continue an epoch, the library's own `set_epoch` call does not reach the order.
        self.order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, dict[str, Tensor]]:
        """The micro-batches of one step, and each term's denominator over all of them and all processes.

        Raises:
            UserError: a sample cannot be read; a checkpoint is saved first.
        """
        start = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.data_seconds += time.perf_counter() - start
        for batch in batches:
            if "error" in batch:
                self._keep_before(batch["error"])
            self.looked_up.add(batch.pop("looked_up", {}))
            self.skipped += batch.pop("skipped", [])
        totals: dict[str, int] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        counts = {name: torch.tensor(float(total), device=device) for name, total in totals.items()}
        if self.args.world_size > 1:
            counts = {name: self.accelerator.reduce(count, "sum") for name, count in counts.items()}
        return batches, counts

    def _keep_before(self, error: UserError) -> None:
        """Save what was trained, then report what is wrong with the data."""
        if self.args.world_size == 1 and self.state.global_step:  # saving is collective, the others know nothing
            self._save_checkpoint(self.model, None)
        raise error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the objective's terms, each over its global count.

        Raises:
            UserError: the loss is not finite; names the samples and the last good checkpoint.
        """
        names = inputs.pop("names", [])
        counts = {name: float(count) for name, count in (num_items_in_batch or {}).items()}
        terms = model(**inputs, **({"totals": counts} if counts else {}), objective=self.objective)
        # A term with nothing to score (no answer that counts, no pair) is 0, not 0 / 0.
        totals = {name: max(1, counts.get(name, term.count)) for name, term in terms.items()}
        loss = sum(term.weight * term.sum / totals[name] for name, term in terms.items() if term.weight)
        self.terms.add(terms)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"{self.stage} step {self.state.global_step + 1}, samples {', '.join(map(str, names))}",
                f"the loss is {loss.item()}; {self._kept()}",
                hint=f"stages.{self.stage}.lr={self.args.learning_rate / 10:g}",
            )
        # Gradients are averaged over processes, but the denominators are sums over them.
        loss = loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: dict[str, Tensor] | None = None
    ) -> Tensor:
        """One forward and backward.

        Raises:
            UserError: out of memory; says with what, what is kept, and how to go on with less at a time.
        """
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(inputs) from error

    def _out_of_memory(self, inputs: dict[str, Any]) -> UserError:
        samples, length = inputs["input_ids"].shape
        less = (
            f"stages.{self.stage}.micro_batch={samples // 2}"
            if samples > 1
            else f"stages.{self.stage}.checkpointing=true"
        )
        where = f"{self.stage} step {self.state.global_step + 1}"
        return UserError(where, f"out of memory with {samples} samples of {length} tokens; {self._kept()}", hint=less)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's record of some steps, with the mean of every term where there are several."""
        if "loss" in logs:
            found = means(self.terms.state(self.reduced))
            self.terms.clear()
            logs |= found if len(found) > 1 else {}
            if torch.cuda.is_available():
                logs["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        super().log(logs, start_time)

    def reduced(self, value: Tensor) -> Tensor:
        """A tensor added up over all processes."""
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _kept(self) -> str:
        return f"{self.checkpoint} is intact" if self.checkpoint else "no checkpoint yet"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if folder == self.checkpoint:
            return
        for name, value in self.model.named_parameters():
            if value.requires_grad and not bool(value.isfinite().all()):
                where = f"{self.stage} step {self.state.global_step}"
                raise UserError(where, f"{name} is no longer finite; {self._kept()}", hint="a smaller lr")
        if self.args.should_save:
            start(folder)
        self.accelerator.wait_for_everyone()
        with writing(folder):
            super()._save_checkpoint(model, trial)
        losses = {"loss": float(self.accelerator.reduce(self._tr_loss, "mean")), "since": self._globalstep_last_logged}
        losses["terms"] = self.terms.state(self.reduced)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_json(folder / LOSSES, losses)
            finish(folder)
        self.checkpoint = folder

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights and processor only: the arguments are in the run folder, as text."""
        if self.args.should_save:
            self.save_weights(output_dir, state_dict)

    def save_weights(self, folder: str, state_dict: dict | None = None) -> None:
        """A model folder; the objective's weights beside the model's."""
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "objective"):
            state_dict, own = split_objective(state_dict or model.state_dict())
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(own, Path(folder) / OBJECTIVE)
        model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with naming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            own = Path(resume_from_checkpoint) / OBJECTIVE
            if own.is_file():
                self.objective.load_state_dict(load_file(own))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with naming(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(checkpoint):
            super()._load_rng_state(checkpoint)


def split_objective(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state as (the model's own, what the objective added); the model is saved without the latter."""
    prefix = "objective."
    own = {key.removeprefix(prefix): value.contiguous() for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith(prefix)}, own
