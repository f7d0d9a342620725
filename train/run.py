"""A recipe's stages, one after the other, from nothing or from where a run stood."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import held
from mmllm.contract.parts import Objective
from mmllm.contract.registry import find
from mmllm.data.media.guard import GuardedReader
from mmllm.device import check_device, choose_threads
from mmllm.progress import say
from mmllm.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: nothing here is part of a recipe.

    Attributes:
        seed: of weights, order and every draw.
        jobs: loader processes. threads: of this process on the CPU; None = as many as there are free cores.
        device: "cpu" keeps off an accelerator; None takes what there is.
        precision: "float32", "bfloat16" or "float16"; None = bfloat16 where an accelerator has it.
        deepspeed: zero1, zero2 or a JSON file. report_to: tensorboard, wandb or none.
        save_steps, log_steps: steps between checkpoints and between lines of log.jsonl.
        cache: where shared stages are kept, and media. keep: what is kept of media, among "frames" and "features".
        keep_bytes: how much of each. reader: how media files are read; None = as the processor does by itself.
        skip_bad: put the next sample in the place of one that cannot be read, instead of stopping.
    """

    seed: int = 0
    jobs: int = 1
    threads: int | None = None
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
    skip_bad: bool = False
    quiet: bool = False

    def caches(self) -> Any:
        """The media caches that are asked for, or None."""
        from mmllm.data.media.loading import Caches

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
    from mmllm.train.machine import from_main, join

    chosen, run = _chosen(recipe, stages), RunFolder(out)
    state = join(options)
    with _held(state, run.path):
        from_main(state, lambda: run.check(recipe, options.seed))
        from_main(state, run.recover_model)
        todo = {name: stage for name, stage in chosen.items() if name not in run.status["stages"]}
        if todo:
            _train_stages(todo, recipe, run, options, state)
    return run


@contextmanager
def _held(state: PartialState, folder: Path) -> Iterator[None]:
    """Hold the run folder through the main process; all of them hear of it where another run has it."""
    from mmllm.train.machine import from_main

    with ExitStack() as stack:
        from_main(state, lambda: stack.enter_context(held(folder)))
        yield


def _train_stages(
    todo: dict[str, Stage], recipe: Recipe, run: RunFolder, options: Options, state: PartialState
) -> None:
    """Check all that can be checked, and only then write into the folder and train."""
    from transformers import set_seed

    from mmllm.train.machine import from_main, plan, precision
    from mmllm.train.stage import check_names

    for name, stage in todo.items():  # what does not fit in the last stage is said before the first one runs
        plan(name, stage, recipe, options, state.num_processes)
    others = list(todo)[1:]
    if options.deepspeed:
        todo = dict(list(todo.items())[:1])
    set_seed(options.seed)
    model, processor = _model(recipe, run)
    for name, stage in todo.items():  # and so is a name that the model has not
        check_names(model.model.front_end, stage, recipe.where(f"stages.{name}"))
    from_main(state, lambda: run.check_precision(precision(options)))
    threads = _use_threads(run, options, state)
    from_main(state, lambda: run.begin(recipe, options.seed, threads, precision(options)))
    if options.deepspeed and others and state.is_main_process:
        run.log_event(*todo, f"DeepSpeed serves one stage a process; the same command goes on with {others[0]}")
    order = {name: index for index, name in enumerate(recipe.stages, start=1)}
    for name, stage in todo.items():
        start = time.perf_counter()
        try:
            _run_stage(name, order[name], stage, recipe, model, processor, run, options)
        finally:
            if state.is_main_process:
                run.add_seconds(name, time.perf_counter() - start)


def _model(recipe: Recipe, run: RunFolder) -> tuple[Any, Any]:
    """The model and processor of the finished stages, or fresh ones.

    Weights are float32 whatever they were saved in: what an optimizer adds to smaller numbers is lost in rounding.
    """
    from mmllm.api import load
    from mmllm.model.build import build_model, build_processor, set_stop_tokens

    if run.status["stages"]:
        return load(run.model, dtype="float32")
    processor = build_processor(recipe)
    model = build_model(recipe)
    _check_vocabulary(processor, recipe)
    set_stop_tokens(model, processor.tokenizer)
    return model, processor


def _use_threads(run: RunFolder, options: Options, state: PartialState) -> int | None:
    """Set how many threads compute on the CPU, and say so; None on an accelerator, which leaves the CPU to others."""
    import torch

    if state.device.type != "cpu":
        return None
    threads, why = choose_threads(options.threads, run.threads)
    torch.set_num_threads(threads)
    if state.is_main_process and not options.quiet:
        where = f"{state.num_processes} processes on the CPU, each with " if state.num_processes > 1 else ""
        say(f"{where}{threads} thread{'s' * (threads > 1)} ({why})\n")
    return threads


def check(
    recipe: Recipe, out: str | Path, options: Options, stages: list[str] | None = None, processes: int = 1
) -> dict[str, Any]:
    """All that can be said before the first step: shapes, tokenizer, data, first samples, the batch; no weights.

    Args:
        processes: how many the run will have.

    Raises:
        UserError: something does not fit.
    """
    from mmllm.data.media.loading import MediaLoader
    from mmllm.model.build import build_processor, check_shapes, llm_facts
    from mmllm.train.machine import plan
    from mmllm.train.stage import check_names, load_data

    check_device(options.device)
    chosen = _chosen(recipe, stages)
    front = check_shapes(recipe)
    processor = build_processor(recipe)
    _check_vocabulary(processor, recipe)
    if options.reader is not None:
        processor.loader = MediaLoader(options.reader)
    RunFolder(out).check(recipe, options.seed)
    facts: dict[str, Any] = {"recipe": recipe.name, "out": str(out), "llm": llm_facts(recipe, processor.tokenizer)}
    for name, stage in chosen.items():
        objective = build_objective(stage.objective, recipe.where(f"stages.{name}.objective"))
        check_names(front, stage, recipe.where(f"stages.{name}"))
        micro, accumulation = plan(name, stage, recipe, options, processes)
        data = load_data(stage, recipe)
        batch = objective.prepare([data[0]], processor)
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        parts = f"{micro} x {accumulation}" + (f" x {processes} processes" if processes > 1 else "")
        first = f"first sample {batch['input_ids'].shape[1]} tokens, {len(batch['visual']['media'])} media"
        facts[f"stage {name}"] = f"{len(data)} samples, {length} of {parts}; {first}"
    return facts


def _chosen(recipe: Recipe, names: list[str] | None) -> dict[str, Stage]:
    stages = recipe.stages
    if not stages:
        raise UserError(recipe.where("stages"), "the recipe has no stage to train")
    for name in names or []:
        if name not in stages:
            raise UserError(f"--stages {name}", "no such stage", hint=nearest(name, list(stages)))
    return {name: stage for name, stage in stages.items() if names is None or name in names}


def _check_vocabulary(processor: Any, recipe: Recipe) -> None:
    from mmllm.model.build import text_config

    rows, needed = text_config(recipe).vocab_size, len(processor.tokenizer)
    added = len(processor.placeholder_ids)
    if needed - added > rows:
        raise UserError(
            recipe.where("model.llm.config.vocab_size"),
            "smaller than the tokenizer",
            expected=f"at least {needed - added}",
            got=rows,
        )


def _run_stage(
    name: str, number: int, stage: Stage, recipe: Recipe, model: Any, processor: Any, run: RunFolder, options: Options
) -> None:
    from mmllm.train.machine import join
    from mmllm.train.shared import SharedStage
    from mmllm.train.stage import freeze, start_from, starts

    for part, folder in starts(name, stage, recipe):
        start_from(model, part, folder, recipe.where(f"stages.{name}.init"))
    freeze(model, stage.trains, recipe.where(f"stages.{name}.trains"))
    # Kept weights are those after exactly the stages before: a run that took another way neither gives nor takes any.
    usual = list(run.status["stages"]) == list(recipe.stages)[: number - 1]
    shared = SharedStage(name, recipe, processor, options) if stage.share and usual else None
    processes = join(options)
    state, stopped, main = None, None, processes.is_main_process
    alone = nullcontext()
    if shared is not None and not shared.kept():
        what = "waits for a run that trains an equal stage"
        alone = shared.turn(processes, lambda: run.log_event(name, what))
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
    processes.wait_for_everyone()
    if stopped is not None:  # it came in the last step: the stage is finished, the next ones wait
        raise Stopped(stopped, run.model)


def _train_stage(
    name: str, number: int, stage: Stage, recipe: Recipe, model: Any, processor: Any, run: RunFolder, options: Options
) -> tuple[dict[str, Any], int | None]:
    """The whole model's weights, and the signal that came in the last step.

    Raises:
        Stopped: a signal came before it.
    """
    from mmllm.train.preparing import ending_workers
    from mmllm.train.stage import make_trainer
    from mmllm.train.trainer import split_objective

    trainer, stopper, checkpoint = make_trainer(name, number, stage, recipe, model, processor, run, options)
    try:
        with ending_workers():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stopper.restore()
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
