"""One stage: what trains, its data, its trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.errors import UserError, nearest
from mmllm.data.records import mix
from mmllm.data.records.conversations import Sample
from mmllm.data.records.mixture import Joined
from mmllm.model.front_end import FrontEnd
from mmllm.run_folder import RunFolder
from mmllm.train.caching import attach_caches
from mmllm.train.checkpoints import check_checkpoint, check_data, last_checkpoint
from mmllm.train.machine import join, precision, recompute, training_arguments
from mmllm.train.preparing import Preparer
from mmllm.train.progress import StageProgress, StopOnSignal
from mmllm.train.run import Options, build_objective
from mmllm.train.trainer import StageTrainer


def freeze_names(front: FrontEnd, trains: tuple[str, ...], where: str) -> dict[str, list[nn.Module]]:
    """{name that `trains` may give: modules}, the LLM left out; refuses unknown names.

    Raises:
        UserError: a name that the model has not.
    """
    known: dict[str, list[nn.Module]] = {"llm": [], "encoders": [front.bank], "connector": [front.parts]}
    known |= {f"encoders.{name}": [part] for name, part in front.bank.encoders.items()}
    known |= {"text": [front.prompts]} | {f"text.{name}": [part] for name, part in front.prompts.sources.items()}
    known |= {f"connector.{name}": [part] for name, part in front.parts.items()}
    for name in trains:
        if name not in known:
            known[name] = [_below(name, known, where)]
    return known


def _below(name: str, known: dict[str, list[nn.Module]], where: str) -> nn.Module:
    """A module inside a part: `encoders.clip.adapter`.

    Raises:
        UserError: the part has no such module.
    """
    whole = max((part for part in known if name.startswith(f"{part}.") and "." in part), key=len, default=None)
    if whole is None:
        raise UserError(where, f"the model has no {name!r}", hint=nearest(name, list(known)))
    (part,) = known[whole]
    try:
        return part.get_submodule(name.removeprefix(f"{whole}."))
    except AttributeError:
        inside = [f"{whole}.{child}" for child, _ in part.named_modules() if child]
        raise UserError(where, f"{whole} has no such module: {name!r}", hint=nearest(name, inside)) from None


def freeze(model: nn.Module, trains: tuple[str, ...], where: str) -> None:
    """Gradients reach what `trains` names and nothing else.

    Raises:
        UserError: a name that the model has not.
    """
    known = _modules(model, trains, where)
    model.requires_grad_(False)
    for name in trains:
        for module in known[name]:
            module.requires_grad_(True)


def starts(name: str, stage: Stage, recipe: Recipe) -> list[tuple[str | None, Path]]:
    """(part or None for the whole model, model folder) of what a stage starts from.

    Raises:
        UserError: a folder without a model.
    """
    from mmllm.model.folder import model_folder

    given = stage.init if isinstance(stage.init, dict) else {None: stage.init} if stage.init else {}
    found = []
    for part, folder in given.items():
        try:
            found.append((part, model_folder(recipe.path(folder))))
        except UserError as error:
            root, _, rest = folder.partition(":")
            hint = f"roots.{root}=RUN" if rest and recipe.path(folder) == folder else error.hint
            where = recipe.where(f"stages.{name}.init")
            raise UserError(where, f"{error.where}: {error.what}", expected=error.expected, hint=hint) from error
    return found


def check_names(front: FrontEnd, stage: Stage, where: str) -> None:
    """Refuse names in `trains` and `init` that the model has not; `where` the stage stands, for the error.

    Raises:
        UserError: names the key.
    """
    freeze_names(front, stage.trains, f"{where}.trains")
    freeze_names(front, tuple(stage.init) if isinstance(stage.init, dict) else (), f"{where}.init")


def start_from(model: nn.Module, part: str | None, folder: Path, where: str) -> None:
    """The weights of another run into the model, or into what `part` names, as `trains` does.

    Raises:
        UserError: a name that the model has not, or weights that are not exactly those of the part.
    """
    from mmllm.api import load_weights

    load_weights(model, folder, None if part is None else _modules(model, (part,), where)[part])


def _modules(model: nn.Module, names: tuple[str, ...], where: str) -> dict[str, list[nn.Module]]:
    return {
        **freeze_names(model.model.front_end, names, where),
        "llm": [model.model.language_model, model.lm_head],
    }


def data_files(stage: Stage, recipe: Recipe) -> list[Path]:
    """All files that the stage's samples come from, mixes among them.

    Raises:
        UserError: one is missing.
    """
    return [file for path, root in _data(stage, recipe) for file in mix.data_files(path, root)]


def load_data(stage: Stage, recipe: Recipe) -> Sequence[Sample]:
    """The stage's samples.

    Raises:
        UserError: a file is missing, empty, broken or of no known format.
    """
    parts = [mix.load_data(path, root) for path, root in _data(stage, recipe)]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _data(stage: Stage, recipe: Recipe) -> list[tuple[str, str | None]]:
    """(path, folder of its media or None) of what the stage names; below a root of its own a file keeps its folder."""
    names = (stage.data,) if isinstance(stage.data, str) else stage.data
    media = (recipe.data.get("roots") or {}).get("media")
    return [(recipe.path(name), media if recipe.path(name) == name else None) for name in names]


def make_trainer(
    name: str, number: int, stage: Stage, recipe: Recipe, model: Any, processor: Any, run: RunFolder, options: Options
) -> tuple[StageTrainer, StopOnSignal, Path | None]:
    """The trainer of a stage, what stops it, and the checkpoint it continues from."""
    objective = build_objective(stage.objective, recipe.where(f"stages.{name}.objective"))
    data, processes = load_data(stage, recipe), join(options)
    folder = run.path / "stages" / f"{number}-{name}"
    quiet = options.quiet or not processes.is_main_process
    progress, stopper = StageProgress(run, name, stage.batch, quiet), StopOnSignal()
    attach_caches(model, processor, options.reader, options.caches(), f"{precision(options)} {options.deepspeed}")
    if any(True for _ in objective.parameters()):
        model.objective = objective  # its weights train with the model's, and leave it with the stage
    recompute(model, stage.checkpointing)
    trainer = StageTrainer(
        model=model,
        args=training_arguments(name, stage, recipe, folder, options),
        train_dataset=range(len(data)),
        data_collator=Preparer(data, objective, processor, options.skip_bad),
        processing_class=processor,
        callbacks=[progress, stopper],
        objective=objective,
        batch=stage.batch,
        stage=name,
        muon_lr=stage.muon_lr if stage.optimizer == "muon" else None,
    )
    _drop_printer(trainer)
    progress.trainer = trainer
    check_data(folder, data_files(stage, recipe), processes.is_main_process)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        scaled = precision(options) == "float16"
        check_checkpoint(checkpoint, processes.num_processes, options.deepspeed is not None, scaled)
    trainer.checkpoint = checkpoint
    return trainer, stopper, checkpoint


def _drop_printer(trainer: StageTrainer) -> None:
    """The library prints every log record to stdout, which is for results."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
