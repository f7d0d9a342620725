"""How a stage runs on this machine: batches, number format, memory; what it learns does not depend on them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.arguments import Count, Number, bind, parse
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import read_record
from mmllm.device import check_device
from mmllm.model.adapters import Lora
from mmllm.train.context import RunOptions, StageContext
from mmllm.train.data import data_files
from mmllm.train.weights import LORA, resolve_init

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import TrainingArguments

T = TypeVar("T")


def training_arguments(context: StageContext) -> TrainingArguments:
    """The library's arguments for a stage."""
    from transformers import TrainingArguments

    stage, options = context.stage, context.options
    micro, accumulation = split_batch(context.name, stage, context.recipe, join(options).num_processes)
    accelerated = _accelerated(options)
    arguments = TrainingArguments(
        output_dir=str(context.folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 1,
        learning_rate=max(stage.lr.values()) if isinstance(stage.lr, dict) else stage.lr,
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip,
        bf16=precision(options) == "bfloat16",
        fp16=precision(options) == "float16",
        use_cpu=not accelerated,
        seed=options.seed,
        dataloader_num_workers=options.jobs,
        dataloader_persistent_workers=options.jobs > 0,
        dataloader_pin_memory=accelerated,
        remove_unused_columns=False,
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        report_to=options.report_to,
        deepspeed=deepspeed_config(options.deepspeed, stage),
        disable_tqdm=True,
    )
    # One process, one device: several are torchrun's job (the library would otherwise wrap the model in DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def precision(options: RunOptions) -> str:
    """The number format of the forward: the one asked for, otherwise bfloat16 where the accelerator supports it."""
    import torch

    bfloat16 = _accelerated(options) and torch.cuda.is_bf16_supported()
    return options.precision or ("bfloat16" if bfloat16 else "float32")


def _accelerated(options: RunOptions) -> bool:
    import torch

    return options.device != "cpu" and torch.accelerator.is_available()


def join(options: RunOptions) -> PartialState:
    """Join the processes of this run; without this, torchrun's processes would each train alone in the same folder.

    Without an accelerator they join on the CPU.

    Raises:
        UserError: this machine does not have the device, or processes that were started together did not join.
    """
    from accelerate import PartialState

    check_device(options.device)
    if options.device is not None and not options.device.endswith(":0") and ":" in options.device:
        kind, _, index = options.device.partition(":")
        hint = f"CUDA_VISIBLE_DEVICES={index} and --device {kind}"
        raise UserError(f"--device {options.device}", "training uses the first visible device", hint=hint)
    hint = "torchrun --nproc-per-node N -m mmllm train ..., or unset WORLD_SIZE"
    for name in ("RANK", "LOCAL_RANK"):
        parse(os.environ.get(name) or 0, Number, name)
    started = parse(os.environ.get("WORLD_SIZE") or 1, Count, "WORLD_SIZE")
    if started > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE", f"{started} processes are to train, but MASTER_ADDR is not set", hint=hint)
    state = PartialState(cpu=not _accelerated(options))
    if state.num_processes != started:
        what = f"{started} processes were started together, but {state.num_processes} joined"
        raise UserError("WORLD_SIZE", what, hint=hint)
    return state


def from_main(state: PartialState, call: Callable[[], T]) -> T:
    """Give the result or the error of the main process's call in all processes."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found = [call(), None]
        except UserError as error:
            found = [None, error]
    value, refused = broadcast_object_list(found)
    if refused is not None:
        raise refused
    return value


def deepspeed_config(name: str | None, stage: Stage) -> dict | str | None:
    """`zero1` or `zero2` as DeepSpeed's config, a JSON file as it is.

    Raises:
        UserError: DeepSpeed is not installed, the file does not exist, zero3, or an optimizer that cannot be sharded.
    """
    if name is None:
        return None
    if stage.optimizer == "muon":
        raise UserError(f"--deepspeed {name}", "Muon needs unsharded matrices", hint="stages.NAME.optimizer=adamw")
    given = _deepspeed_file(name)
    if name == "zero3" or given.get("zero_optimization", {}).get("stage") == 3:
        # parameters are gathered part by part: processes whose media differ in kind or number would wait forever
        what = "processes with unequal media run different parts, which sharded parameters do not allow yet"
        raise UserError(f"--deepspeed {name}", what, hint="--deepspeed zero2")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--deepspeed {name}", "DeepSpeed is not installed", hint="pip install 'mmllm[deepspeed]'")
    if name not in ("zero1", "zero2"):
        return name
    return {
        "zero_optimization": {"stage": int(name[-1])},
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }


def plan(name: str, stage: Stage, recipe: Recipe, options: RunOptions, processes: int) -> tuple[int, int]:
    """(samples per forward, accumulation steps) of a stage, once all that it needs is in place.

    Raises:
        UserError: the batch, the DeepSpeed config, a data file or an initial model does not fit or is missing.
    """
    data_files(stage, recipe)
    check_adapter(name, stage, recipe)
    check_rates(name, stage, recipe)
    resolve_init(name, stage, recipe)
    deepspeed_config(options.deepspeed, stage)
    return split_batch(name, stage, recipe, processes)


def check_adapter(name: str, stage: Stage, recipe: Recipe) -> Lora | None:
    """The settings of the adapter that a stage trains, or None.

    Raises:
        UserError: settings that do not fit, or of an adapter that the stage does not train.
    """
    where = recipe.where(f"stages.{name}")
    if LORA not in stage.trains:
        if stage.lora is not None or stage.keep != "merged":
            key = "lora" if stage.lora is not None else "keep"
            raise UserError(f"{where}.{key}", "the stage trains no adapter", hint=f"trains: [{LORA}]")
        return None
    if "llm" in stage.trains:
        raise UserError(f"{where}.trains", f"llm and {LORA} at once", hint="one of them")
    if stage.keep == "adapter" and name != list(recipe.stages)[-1]:
        raise UserError(f"{where}.keep", "adapter: later stages train another model", hint="keep: merged")
    lora = Lora(**bind(Lora, stage.lora or {}, f"{where}.lora"))
    if stage.keep == "adapter" and lora.init in ("nlora", "slora"):
        raise UserError(f"{where}.keep", "peft's format has no adapter of three factors", hint="keep: merged")
    return lora


def check_rates(name: str, stage: Stage, recipe: Recipe) -> None:
    """See that a map of learning rates has one for each name in `trains`.

    Raises:
        UserError: one is missing or left over.
    """
    if not isinstance(stage.lr, dict):
        return
    where = recipe.where(f"stages.{name}.lr")
    if set(stage.lr) != set(stage.trains):
        raise UserError(where, "needs a rate for each name in trains", expected=list(stage.trains), got=list(stage.lr))
    if stage.optimizer == "muon":
        raise UserError(where, "one rate per name goes with adamw", hint=f"stages.{name}.optimizer=adamw")


def _deepspeed_file(name: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file; empty for the name of one of our configs."""
    if name in ("zero1", "zero2", "zero3"):
        return {}
    where = f"--deepspeed {name}"
    if not Path(name).is_file():
        hint = nearest(name, ["zero1", "zero2"])
        raise UserError(where, "no such file", expected="zero1, zero2 or a JSON file", hint=hint)
    given = read_record(Path(name), hint="a JSON file of DeepSpeed's settings")
    if not isinstance(given.get("zero_optimization", {}), dict):
        raise UserError(f"{where}: zero_optimization", "wrong type", expected="a map")
    return given


def split_batch(name: str, stage: Stage, recipe: Recipe, processes: int) -> tuple[int, int]:
    """(samples per forward, accumulation steps): a recipe's batch is global, whatever the machine.

    Raises:
        UserError: the batch cannot be divided this way.
    """
    where = recipe.where(f"stages.{name}")
    if stage.batch % processes:
        raise UserError(f"{where}.batch", f"{stage.batch} samples over {processes} processes", hint="a multiple")
    per_process = stage.batch // processes
    micro = min(stage.micro_batch or per_process, per_process)
    if per_process % micro:
        raise UserError(f"{where}.micro_batch", f"{micro} does not divide the {per_process} samples of a process")
    return micro, per_process // micro


def set_gradient_checkpointing(model: nn.Module, wanted: bool) -> None:
    """Set whether the backward pass recomputes the layers' activations or the forward keeps them."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # renamed by the library after 5.23
        if switch := getattr(model, f"{name}_{'enable' if wanted else 'disable'}", None):
            return switch()
