"""What the policy of a preference stage is measured against: the starting model, in one of three forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.files import append_lines
from mmllm.model.adapters import adapter_layers
from mmllm.model.checkpoint import weights_digest
from mmllm.model.head import log_probs
from mmllm.processing.collate import move
from mmllm.progress import Progress
from mmllm.train.machine import join, precision, split_batch

if TYPE_CHECKING:
    from mmllm.contract.objective import Objective
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.train.context import StageContext


class Reference(Protocol):
    """Gives log-probabilities of the answers of a batch."""

    def __init__(self, context: StageContext, objective: Objective) -> None:
        """Get ready before the first step."""

    def log_probs(self, model: MMLLMForConditionalGeneration, batch: Batch) -> Tensor:
        """[answers], summed over tokens, without gradient."""


@torch.no_grad()
def answer_log_probs(model: MMLLMForConditionalGeneration, batch: Batch) -> Tensor:
    """[answers]: log-probabilities of the answers of a batch of pairs, summed over their tokens."""
    rows = model.run(model.embed(batch))[0].flatten(0, 1)[batch["sources"]]
    targets = batch["targets"]
    tokens = model.lm_head(rows, read=lambda logits, which: log_probs(logits, targets[which]))
    lengths = torch.tensor(batch["lengths"], device=tokens.device)
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
    return tokens.new_zeros(len(lengths)).index_add(0, owners, tokens)


class FrozenCopy:
    """A copy of the starting model, held in memory and run on every batch."""

    def __init__(self, context: StageContext, objective: Objective) -> None:
        frozen = copy.deepcopy(context.model).eval().requires_grad_(False)
        self.model = frozen.to(join(context.options).device)

    def log_probs(self, model: MMLLMForConditionalGeneration, batch: Batch) -> Tensor:
        """See `Reference`."""
        return answer_log_probs(self.model, batch)


ZERO_AT_FIRST = ("default", "gaussian", "eva", "slora")
"""Starts of an adapter that leave the weights below it as they are."""


class AdapterOff:
    """The model itself with its adapter switched off: as it was, as long as nothing else trains."""

    def __init__(self, context: StageContext, objective: Objective) -> None:
        where, stage = context.where("objective.reference"), context.stage
        if stage.trains != ("llm.lora",):
            what, got = "adapter: the rest of the model trains too", ", ".join(stage.trains)
            raise UserError(where, what, expected="trains: [llm.lora]", got=got)
        init = (stage.lora or {}).get("init", "default")
        if init not in ZERO_AT_FIRST:
            what = f"adapter: init {init} moves the weights below, so that the model without it is another one"
            raise UserError(where, what, hint="stored")

    def log_probs(self, model: MMLLMForConditionalGeneration, batch: Batch) -> Tensor:
        """See `Reference`."""
        with adapters_off(model), evaluating(model):
            return answer_log_probs(model, batch)


class StoredReference:
    """Log-probabilities that were computed once, before the first step, and are kept beside the checkpoints.

    A run that was stopped while they were computed goes on where it stopped. They are kept under a digest of the
    starting model's weights and the number format; each pair's under a digest of its tokens and media.
    """

    def __init__(self, context: StageContext, objective: Objective) -> None:
        processes = join(context.options)
        model = context.model.to(processes.device)
        self.known: dict[str, tuple[float, float]] = {}
        file = context.folder / f"reference-{weights_digest(model)}-{precision(context.options)}.jsonl"
        self._read(file)
        self._compute(context, objective, model, file)

    def _read(self, file: Path) -> None:
        for path in sorted(file.parent.glob(f"{file.stem}*.jsonl")):  # of all processes of a run before
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, chosen, rejected = json.loads(line)
                    self.known[str(key)] = (float(chosen), float(rejected))
                except (ValueError, TypeError):  # cut off by a kill
                    continue

    def _compute(self, context: StageContext, objective: Objective, model: nn.Module, file: Path) -> None:
        """Those that are missing, each process its share; then all of them in all processes."""
        from accelerate.utils import gather_object

        from mmllm.train.data import load_data
        from mmllm.train.preparing import Preparer

        processes, options = join(context.options), context.options
        data, done = load_data(context.stage, context.recipe), len(self.known)
        if done >= len(data):
            return
        micro, _ = split_batch(context.name, context.stage, context.recipe, processes.num_processes)
        share = [(number, 0) for number in range(processes.process_index, len(data), processes.num_processes)]
        preparer = Preparer(data, objective, context.processor, options.skip_bad)
        loader = DataLoader(share, micro, collate_fn=preparer, num_workers=options.jobs)
        file = file.with_stem(f"{file.stem}-{processes.process_index}")
        quiet = options.quiet or not processes.is_main_process
        bar, fresh = Progress(f"{context.name}: reference", len(share), quiet=quiet), []
        with evaluating(model), torch.autocast(**_autocast(processes.device, precision(options))):
            for number, batch in enumerate(loader, start=1):
                if "error" in batch:
                    raise batch["error"]
                fresh += self._batch(model, move(batch, processes.device), file)
                bar.update(min(number * micro, len(share)), {})
        bar.close()
        for key, pair in gather_object(fresh):
            self.known[key] = pair

    def _batch(self, model: nn.Module, batch: Batch, file: Path) -> list[tuple[str, tuple[float, float]]]:
        if all(key in self.known for key in batch["keys"]):
            return []
        values = answer_log_probs(model, batch).tolist()
        found = list(zip(batch["keys"], zip(values[::2], values[1::2], strict=True), strict=True))
        append_lines(file, [json.dumps([key, *pair]) for key, pair in found])
        self.known |= dict(found)
        return found

    def log_probs(self, model: MMLLMForConditionalGeneration, batch: Batch) -> Tensor:
        """See `Reference`."""
        values = [value for key in batch["keys"] for value in self.known[key]]
        return torch.tensor(values, device=batch["targets"].device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without what its adapters add."""
    switches = list(adapter_layers(model).values())
    for module in switches:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in switches:
            module.enable_adapters(True)


def _autocast(device: torch.device, format_name: str) -> dict:
    return {
        "device_type": device.type,
        "dtype": torch.float16 if format_name == "float16" else torch.bfloat16,
        "enabled": format_name != "float32",
    }
