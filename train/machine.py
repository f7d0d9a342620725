"""How a stage runs on this machine: batches, number format, memory; what it learns does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.contract.errors import UserError
from mmllm.recipe import Recipe
from mmllm.sections import Stage

if TYPE_CHECKING:
    from mmllm.train.run import Options


def training_arguments(name: str, stage: Stage, recipe: Recipe, folder: Path, options: Options) -> Any:
    """The library's arguments for a stage."""
    import torch
    from accelerate import PartialState
    from transformers import TrainingArguments

    processes = PartialState(cpu=options.device == "cpu").num_processes
    micro, accumulation = micro_batch(name, stage, recipe, processes)
    accelerated = options.device != "cpu" and torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 1,
        learning_rate=stage.lr,
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip,
        bf16=precision(options) == "bfloat16",
        fp16=precision(options) == "float16",
        use_cpu=options.device == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        dataloader_num_workers=options.jobs,
        dataloader_persistent_workers=options.jobs > 0,
        dataloader_pin_memory=accelerated,
        remove_unused_columns=False,
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to=options.report_to,
        deepspeed=deepspeed_config(options.deepspeed, stage),
        disable_tqdm=True,
    )
    # One process, one device: several are torchrun's business (the library would else wrap the model in DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def precision(options: Options) -> str:
    """The number format of the forward: the one asked for, else bfloat16 where an accelerator has it."""
    import torch

    accelerated = options.device != "cpu" and torch.cuda.is_available()
    return options.precision or ("bfloat16" if accelerated and torch.cuda.is_bf16_supported() else "float32")


def whole_batches(samples: int, batch: int) -> int:
    """How many samples an epoch has: whole global batches, so that its steps do not depend on the micro-batch."""
    return max(samples // batch * batch, min(samples, batch))


def deepspeed_config(name: str | None, stage: Stage) -> dict | str | None:
    """`zero1` or `zero2` as DeepSpeed's config, a JSON file as it is.

    Raises:
        UserError: no such file, zero3, or a stage with an optimizer that cannot be sharded.
    """
    if name is None:
        return None
    if stage.optimizer == "muon":
        raise UserError(f"--deepspeed {name}", "Muon needs whole matrices", hint="stages.NAME.optimizer=adamw")
    if name == "zero3":
        # parameters are gathered part by part: processes whose media differ in kind or number would wait for ever
        what = "processes with unequal media do not run the same parts yet, and sharded parameters need that"
        raise UserError(f"--deepspeed {name}", what, hint="--deepspeed zero2")
    if name not in ("zero1", "zero2"):
        if not Path(name).is_file():
            raise UserError(f"--deepspeed {name}", "no such file", expected="zero1, zero2 or a JSON file")
        return name
    return {
        "zero_optimization": {"stage": int(name[-1])},
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }


def micro_batch(name: str, stage: Stage, recipe: Recipe, processes: int) -> tuple[int, int]:
    """(samples of one forward, accumulation steps): a recipe's batch is global, whatever the machine.

    Raises:
        UserError: the batch cannot be divided so.
    """
    where = recipe.where(f"stages.{name}")
    if stage.batch % processes:
        raise UserError(f"{where}.batch", f"{stage.batch} samples over {processes} processes", hint="a multiple")
    per_process = stage.batch // processes
    micro = min(stage.micro_batch or per_process, per_process)
    if per_process % micro:
        raise UserError(f"{where}.micro_batch", f"{micro} does not divide the {per_process} samples of a process")
    return micro, per_process // micro


def recompute(model: Any, wanted: bool) -> None:
    """Whether the backward pass computes the layers' inner values again, or the forward keeps them."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # renamed by the library after 5.23
        if switch := getattr(model, f"{name}_{'enable' if wanted else 'disable'}", None):
            return switch()
