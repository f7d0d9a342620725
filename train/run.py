"""A recipe's stages, one after the other, from nothing or from where a run stood."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.parts import Objective
from mmllm.contract.registry import find
from mmllm.data.guard import GuardedReader
from mmllm.recipe import Recipe
from mmllm.run_folder import RunFolder
from mmllm.sections import Stage


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: nothing here is part of a recipe.

    Attributes:
        seed: of weights, order and every draw.
        jobs: loader processes.
        device: "cpu" keeps off an accelerator; None takes what there is.
        precision: "float32", "bfloat16" or "float16"; None = bfloat16 where an accelerator has it.
        deepspeed: zero1, zero2 or a JSON file. report_to: tensorboard, wandb or none.
        save_steps, log_steps: steps between checkpoints and between lines of log.jsonl.
        cache: where shared stages are kept, and media. keep: what is kept of media, among "frames" and "features".
        keep_bytes: how much of each. reader: how media files are read; None = as the processor does by itself.
    """

    seed: int = 0
    jobs: int = 1
    device: str | None = None
    precision: str | None = None
    deepspeed: str | None = None
    report_to: str = "none"
    save_steps: int = 200
    log_steps: int = 10
    cache: Path = Path("~/.cache/mmllm")
    keep: tuple[str, ...] = ()
    keep_bytes: int | None = None
    reader: GuardedReader | None = None
    quiet: bool = False

    def caches(self) -> Any:
        """The media caches that are asked for, or None."""
        from mmllm.data.loading import Caches

        return Caches.open(self.cache.expanduser() / "media", self.keep, self.keep_bytes) if self.keep else None


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` says by which signal."""

    def __init__(self, signal: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped, saved {checkpoint}")
        self.signal, self.checkpoint = signal, checkpoint


def train(recipe: Recipe, out: str | Path, options: Options, stages: list[str] | None = None) -> RunFolder:
    """Run the recipe's stages (or those named) into a run folder; finished ones are not run again.

    Raises:
        UserError: something in the recipe, the data or the folder does not fit.
        Stopped: a signal came; the same command continues.
    """
    from transformers import set_seed

    from mmllm.build import build_model, build_processor, set_stop_tokens
    from mmllm.train.stage import check_names, data_files, starts

    chosen = _chosen(recipe, stages)
    run = RunFolder(out)
    processes = _processes(options)
    with processes.main_process_first():
        run.open(recipe, options.seed, write=processes.is_main_process)
        if processes.is_main_process:
            run.recover_model()
    todo = {name: stage for name, stage in chosen.items() if name not in run.status["stages"]}
    if not todo:
        return run
    for name, stage in todo.items():  # a file missing for the last stage is said before the first one runs
        data_files(stage, recipe)
        starts(name, stage, recipe)
    if options.deepspeed and len(todo) > 1:
        first, *others = todo
        todo = {first: todo[first]}
        if processes.is_main_process:
            run.log_event(first, f"DeepSpeed serves one stage a process; the same command goes on with {others[0]}")
    set_seed(options.seed)
    if run.model.is_dir() and run.status["stages"]:
        from mmllm.api import load

        model, processor = load(run.model)
    else:
        processor = build_processor(recipe)
        model = build_model(recipe)
        _check_vocabulary(model, processor, recipe)
        set_stop_tokens(model, processor.tokenizer)
    for name, stage in todo.items():  # and so is a name that the model has not
        check_names(model.model.front_end, stage, recipe.where(f"stages.{name}"))
    order = {name: index for index, name in enumerate(recipe.stages, start=1)}
    for name, stage in todo.items():
        start = time.perf_counter()
        try:
            _run_stage(name, order[name], stage, recipe, model, processor, run, options)
        finally:
            if _processes(options).is_main_process:
                run.add_seconds(name, time.perf_counter() - start)
    return run


def _processes(options: Options) -> Any:
    """What accelerate knows of the processes of this run."""
    from accelerate import PartialState

    return PartialState(cpu=options.device == "cpu")


def check(recipe: Recipe, out: str | Path, options: Options, stages: list[str] | None = None) -> dict[str, Any]:
    """All that can be said before the first step: shapes, tokenizer, data, first samples, the batch; no weights.

    Raises:
        UserError: something does not fit.
    """
    from mmllm.build import build_processor, check_shapes
    from mmllm.data.loading import MediaLoader
    from mmllm.train.machine import micro_batch
    from mmllm.train.stage import check_names, load_data, starts

    chosen = _chosen(recipe, stages)
    front = check_shapes(recipe)
    processor = build_processor(recipe)
    if options.reader is not None:
        processor.loader = MediaLoader(options.reader)
    facts: dict[str, Any] = {"recipe": recipe.name, "out": str(out)}
    for name, stage in chosen.items():
        objective = build_objective(stage.objective, recipe.where(f"stages.{name}.objective"))
        check_names(front, stage, recipe.where(f"stages.{name}"))
        starts(name, stage, recipe)
        data = load_data(stage, recipe)
        micro, accumulation = micro_batch(name, stage, recipe, 1)
        batch = objective.prepare([data[0]], processor)
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        first = f"first sample {batch['input_ids'].shape[1]} tokens, {len(batch['visual']['media'])} media"
        facts[f"stage {name}"] = f"{len(data)} samples, {length} of {micro} x {accumulation}; {first}"
    return facts


def _chosen(recipe: Recipe, names: list[str] | None) -> dict[str, Stage]:
    stages = recipe.stages
    if not stages:
        raise UserError(recipe.where("stages"), "the recipe has no stage to train")
    for name in names or []:
        if name not in stages:
            raise UserError(f"--stages {name}", "no such stage", hint=nearest(name, list(stages)))
    return {name: stage for name, stage in stages.items() if names is None or name in names}


def _check_vocabulary(model: Any, processor: Any, recipe: Recipe) -> None:
    rows, needed = model.config.text_config.vocab_size, len(processor.tokenizer)
    added = len(processor.placeholder_ids)
    if needed - added > rows:
        raise UserError(
            recipe.where("model.llm.config.vocab_size"),
            "smaller than the tokenizer",
            expected=f"at least {needed}",
            got=rows,
        )


def _run_stage(
    name: str, number: int, stage: Stage, recipe: Recipe, model: Any, processor: Any, run: RunFolder, options: Options
) -> None:
    from mmllm.train.shared import SharedStage
    from mmllm.train.stage import freeze, start_from, starts

    for part, folder in starts(name, stage, recipe):
        start_from(model, part, folder, recipe.where(f"stages.{name}.init"))
    freeze(model, stage.trains, recipe.where(f"stages.{name}.trains"))
    shared = SharedStage(name, recipe, processor, options) if stage.share else None
    state, stopped, main = None, None, _processes(options).is_main_process
    alone = nullcontext()
    if shared is not None and not shared.kept():
        what = "waits for a run that trains an equal stage"
        alone = shared.turn(_processes(options), lambda: run.log_event(name, what))
    with alone:
        if shared is not None and shared.kept():
            shared.load(model)
            if main:
                run.log_event(name, f"weights of an equal stage taken from {shared.file}")
        else:
            state, stopped = _train_stage(name, number, stage, recipe, model, processor, run, options)
            if shared is not None and main:
                shared.save(model, state)
    model.requires_grad_(True)
    if main:
        run.save_model(model, processor, recipe, state)
        run.finish_stage(name, steps=stage.steps, epochs=stage.epochs)
    _processes(options).wait_for_everyone()
    if stopped is not None:  # it came in the last step: the stage is finished, the next ones wait
        raise Stopped(stopped, run.model)


def _train_stage(
    name: str, number: int, stage: Stage, recipe: Recipe, model: Any, processor: Any, run: RunFolder, options: Options
) -> tuple[dict[str, Any], int | None]:
    """The whole model's weights, and the signal that came in the last step.

    Raises:
        Stopped: a signal came before it.
    """
    from mmllm.train.stage import make_trainer
    from mmllm.train.trainer import split_objective

    trainer, stopper, checkpoint = make_trainer(name, number, stage, recipe, model, processor, run, options)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopper.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(stopper.signal, trainer.checkpoint)
    state, _ = split_objective(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if hasattr(model, "objective"):
        del model.objective
    return state, stopper.signal


def build_objective(section: str | dict, where: str) -> Objective:
    """An objective out of its part of a recipe: a name, or a map with `type` and arguments."""
    section = {"type": section} if isinstance(section, str) else section
    cls = find("objective", section.get("type", ""), where)
    return cls(**bind(cls, {key: value for key, value in section.items() if key != "type"}, where))
