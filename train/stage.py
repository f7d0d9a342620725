"""One stage: its trainer, what it takes from others, what it leaves in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from mmllm.contract.arguments import bind
from mmllm.contract.objective import Objective
from mmllm.contract.registry import find
from mmllm.model.adapters import add_adapters, merge_adapters
from mmllm.train.caching import attach_caches
from mmllm.train.checkpoints import check_checkpoint, check_data, last_checkpoint
from mmllm.train.context import StageContext, Stopped
from mmllm.train.data import data_files, load_data
from mmllm.train.machine import check_adapter, join, precision, set_gradient_checkpointing, training_arguments
from mmllm.train.order import Turns
from mmllm.train.preparing import Preparer, ending_workers
from mmllm.train.progress import StageProgress, StopOnSignal
from mmllm.train.shared import SharedStage
from mmllm.train.trainer import StageTrainer, split_objective
from mmllm.train.validation import Validation, held_out
from mmllm.train.weights import freeze, load_init, resolve_init, trained_parameters


def run_stage(context: StageContext) -> None:
    """Train a stage, or take the weights of an equal one, and put the model into the run folder.

    Raises:
        Stopped: a signal came; the same command continues.
    """
    stage, recipe, model, run = context.stage, context.recipe, context.model, context.run
    for part, folder in resolve_init(context.name, stage, recipe):
        load_init(model, part, folder, context.where("init"))
    adapter = check_adapter(context.name, stage, recipe)
    if adapter is not None:
        add_adapters(model, adapter, context.where("lora"))
    freeze(model, stage.trains, context.where("trains"))
    # Kept weights follow exactly the earlier stages: a run that took another path neither stores nor takes any.
    usual = list(run.status["stages"]) == list(recipe.stages)[: context.number - 1]
    shared = SharedStage(context) if stage.share and usual else None
    processes = join(context.options)
    state, stopped, main = None, None, processes.is_main_process
    alone = nullcontext()
    if shared is not None and not shared.kept():
        what = "waiting for a run that trains an equal stage"
        alone = shared.turn(processes, lambda: run.log_event(context.name, what))
    with alone:
        if shared is not None and shared.kept():
            shared.load(model)
            if main:
                run.log_event(context.name, f"weights of an equal stage taken from {shared.file}")
        else:
            state, stopped = _train_stage(context)
            if shared is not None and main:
                shared.save(model, state)
    model.requires_grad_(True)
    if adapter is not None and stage.keep == "merged":
        merge_adapters(model)
        state = None  # it was gathered before
    if main:
        run.save_model(model, context.processor, recipe, state)
        run.finish_stage(context.name, steps=stage.steps, epochs=stage.epochs)
    processes.wait_for_everyone()
    if stopped is not None:  # it came in the last step: the stage is finished, later ones are not started
        raise Stopped(stopped, run.model)


def _train_stage(context: StageContext) -> tuple[dict[str, Tensor], int | None]:
    """The whole model's weights, and the signal that came in the last step, if any.

    Raises:
        Stopped: a signal came earlier.
    """
    trainer, stopper, checkpoint = make_trainer(context)
    try:
        with ending_workers():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stopper.restore()
    if stopper.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(stopper.signal, trainer.checkpoint)
    state, _ = split_objective(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if hasattr(context.model, "objective"):
        del context.model.objective
    return state, stopper.signal


def make_trainer(context: StageContext) -> tuple[StageTrainer, StopOnSignal, Path | None]:
    """The trainer of a stage, the callback that stops it, and the checkpoint it continues from."""
    stage, options, model, processor = context.stage, context.options, context.model, context.processor
    objective, worker = (
        build_objective(stage.objective, context.where("objective"), context.recipe.path) for _ in range(2)
    )
    data, processes, folder = load_data(stage, context.recipe), join(options), context.folder
    quiet = options.quiet or not processes.is_main_process
    progress, stopper = StageProgress(context.run, context.name, stage.batch, quiet), StopOnSignal()
    attach_caches(model, processor, options.reader, options.caches(), f"{precision(options)} {options.deepspeed}")
    objective.bind(context)
    if any(True for _ in objective.parameters()):
        model.objective = objective  # its weights train with the model's and are removed after the stage
    set_gradient_checkpointing(model, stage.checkpointing)
    learnt, held = held_out(len(data), stage.validation, options.seed, context.where("validation"))
    preparer = Preparer(data, worker, processor, options.skip_bad, options.seed, held)
    validation = Validation(context, preparer, held, objective)
    trainer = StageTrainer(
        model=model,
        args=training_arguments(context),
        train_dataset=Turns(learnt),
        data_collator=preparer,
        processing_class=processor,
        callbacks=[progress, *([validation] if held else []), stopper],
        objective=objective,
        batch=stage.batch,
        stage=context.name,
        muon_lr=stage.muon_lr if stage.optimizer == "muon" else None,
        rates=_rates(context),
    )
    _drop_printer(trainer)
    progress.trainer = validation.trainer = trainer
    checkpoint = last_checkpoint(folder)
    check_data(folder, checkpoint, data_files(stage, context.recipe), processes.is_main_process)
    if checkpoint is not None:
        scaled = precision(options) == "float16"
        check_checkpoint(checkpoint, processes.num_processes, options.deepspeed is not None, scaled)
    trainer.checkpoint = checkpoint
    return trainer, stopper, checkpoint


def _rates(context: StageContext) -> list[tuple[list[nn.Parameter], float]] | None:
    """Parameters and learning rate of each name in `trains`, where the stage gives one per name."""
    stage = context.stage
    if not isinstance(stage.lr, dict):
        return None
    found = trained_parameters(context.model, stage.trains, context.where("trains"))
    return [(parameters, stage.lr[name]) for name, parameters in found.items()]


def _drop_printer(trainer: StageTrainer) -> None:
    """Remove the callback that prints every log record to stdout, which is for results."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def build_objective(section: str | dict, where: str, path: Callable[[str], str] = str) -> Objective:
    """An objective from its section of a recipe: a name, or a map with `type` and arguments."""
    section = {"type": section} if isinstance(section, str) else section
    cls = find("objective", section.get("type", ""), where)
    objective = cls(**bind(cls, {key: value for key, value in section.items() if key != "type"}, where))
    objective.locate(path)
    return objective
