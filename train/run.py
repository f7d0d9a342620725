"""A recipe's stages, one after the other, from scratch or from where a run stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from mmllm.api import load
from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import held
from mmllm.data.media.loading import MediaLoader
from mmllm.data.records.conversations import Sample
from mmllm.device import check_device, choose_threads
from mmllm.model.blueprint import Blueprint, llm_facts
from mmllm.model.build import build_model, build_processor, set_stop_tokens
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.processor import MMLLMProcessor
from mmllm.progress import say
from mmllm.run_folder import RunFolder
from mmllm.train.context import RunOptions, StageContext
from mmllm.train.data import load_data
from mmllm.train.machine import from_main, join, plan, precision
from mmllm.train.stage import build_objective, run_stage
from mmllm.train.weights import validate_module_names

LOOKED_AT = 50
"""Number of samples among which a dry run looks for one with a medium."""


def train(recipe: Recipe, out: str | Path, options: RunOptions, stages: list[str] | None = None) -> RunFolder:
    """Run the recipe's stages (or the named ones) into a run folder; finished ones are skipped.

    Raises:
        UserError: something in the recipe, the data or the folder does not fit.
        Stopped: a signal came; the same command continues.
    """
    chosen, run = _chosen(recipe, stages), RunFolder(out)
    blueprint, state = Blueprint.of(recipe), join(options)
    recipe = blueprint.recipe
    with _held(state, run.path):
        from_main(state, lambda: run.check(recipe, options.seed))
        from_main(state, run.recover_model)
        todo = {name: stage for name, stage in chosen.items() if name not in run.status["stages"]}
        if todo:
            _train_stages(todo, blueprint, run, options, state)
    return run


@contextmanager
def _held(state: PartialState, folder: Path) -> Iterator[None]:
    """Hold the run folder through the main process; if another run holds it, all processes get the error."""
    with ExitStack() as stack:
        from_main(state, lambda: stack.enter_context(held(folder)))
        yield


def _train_stages(
    todo: dict[str, Stage], blueprint: Blueprint, run: RunFolder, options: RunOptions, state: PartialState
) -> None:
    """Check all that can be checked, and only then write into the folder and train."""
    recipe = blueprint.recipe
    for name, stage in todo.items():  # what does not fit in the last stage is said before the first one runs
        plan(name, stage, recipe, options, state.num_processes)
    others = list(todo)[1:]
    if options.deepspeed:
        todo = dict(list(todo.items())[:1])
    set_seed(options.seed)
    for name, stage in todo.items():  # likewise a name that the model does not have
        validate_module_names(blueprint.plan, stage, recipe.where(f"stages.{name}"))
    model, processor = _model(blueprint, run)
    from_main(state, lambda: run.check_precision(precision(options)))
    threads = _use_threads(run, options, state)
    from_main(state, lambda: run.begin(recipe, options.seed, threads, precision(options)))
    if options.deepspeed and others and state.is_main_process:
        run.log_event(*todo, f"DeepSpeed runs one stage per process; run the same command again for {others[0]}")
    order = {name: index for index, name in enumerate(recipe.stages, start=1)}
    for name, stage in todo.items():
        start = time.perf_counter()
        try:
            run_stage(StageContext(name, order[name], stage, recipe, model, processor, run, options))
        finally:
            if state.is_main_process:
                run.add_seconds(name, time.perf_counter() - start)


def _model(blueprint: Blueprint, run: RunFolder) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """The model and processor of the finished stages, or fresh ones.

    Weights are float32 whatever they were saved in: an optimizer's updates to smaller formats are lost in rounding.
    """
    if run.status["stages"]:
        return load(run.model, dtype="float32")
    processor = build_processor(blueprint)
    model = build_model(blueprint)
    _check_vocabulary(processor, blueprint)
    set_stop_tokens(model, processor.tokenizer)
    return model, processor


def _use_threads(run: RunFolder, options: RunOptions, state: PartialState) -> int | None:
    """Set and log the number of CPU threads; None on an accelerator, which leaves the CPU to others."""
    if state.device.type != "cpu":
        return None
    threads, why = choose_threads(options.threads, run.threads)
    torch.set_num_threads(threads)
    if state.is_main_process and not options.quiet:
        where = f"{state.num_processes} processes on the CPU, each with " if state.num_processes > 1 else ""
        say(f"{where}{threads} thread{'s' * (threads > 1)} ({why})\n")
    return threads


def check(
    recipe: Recipe, out: str | Path, options: RunOptions, stages: list[str] | None = None, processes: int = 1
) -> dict[str, Any]:
    """Check all that can be checked before the first step: shapes, tokenizer, data, first samples, batch; no weights.

    Args:
        processes: how many the run will have.

    Raises:
        UserError: something does not fit.
    """
    check_device(options.device)
    chosen = _chosen(recipe, stages)
    blueprint = Blueprint.of(recipe)
    recipe, processor = blueprint.recipe, build_processor(blueprint)
    _check_vocabulary(processor, blueprint)
    if options.reader is not None:
        processor.loader = MediaLoader(options.reader)
    RunFolder(out).check(recipe, options.seed)
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "out": str(out),
        "llm": llm_facts(recipe, processor.tokenizer.chat_template),
    }
    for name, stage in chosen.items():
        objective = build_objective(stage.objective, recipe.where(f"stages.{name}.objective"), recipe.path)
        validate_module_names(blueprint.plan, stage, recipe.where(f"stages.{name}"))
        micro, accumulation = plan(name, stage, recipe, options, processes)
        data = load_data(stage, recipe)
        batch = objective.prepare([_telling(data)], processor)
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        parts = f"{micro} x {accumulation}" + (f" x {processes} processes" if processes > 1 else "")
        first = f"first sample {batch['input_ids'].shape[1]} tokens, {len(batch['visual']['media'])} media"
        facts[f"stage {name}"] = f"{len(data)} samples, {length} of {parts}; {first}"
    return facts


def _telling(data: Sequence[Sample]) -> Sample:
    """The first sample with a medium among the first ones: it shows more than text does."""
    return next((sample for sample in islice(data, LOOKED_AT) if sample.media()), data[0])


def _chosen(recipe: Recipe, names: list[str] | None) -> dict[str, Stage]:
    stages = recipe.stages
    if not stages:
        raise UserError(recipe.where("stages"), "the recipe has no stage to train")
    for name in names or []:
        if name not in stages:
            raise UserError(f"--stages {name}", "no such stage", hint=nearest(name, list(stages)))
    return {name: stage for name, stage in stages.items() if names is None or name in names}


def _check_vocabulary(processor: MMLLMProcessor, blueprint: Blueprint) -> None:
    rows, needed = blueprint.config.text_config.vocab_size, len(processor.tokenizer)
    vocabulary = blueprint.plan.vocabulary
    added = len(processor.placeholder_ids) + (0 if vocabulary is None else len(vocabulary))
    if needed - added > rows:
        raise UserError(
            blueprint.recipe.where("model.llm.config.vocab_size"),
            "smaller than the tokenizer",
            expected=f"at least {needed - added}",
            got=rows,
        )
