"""What the pieces of a training run pass to each other: how it runs, and the current stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.loading import Caches
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.processor import MMLLMProcessor
from mmllm.run_folder import RunFolder


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what: nothing here is part of a recipe.

    Attributes:
        seed: of weights, order and every random draw.
        jobs: loader processes.
        threads: CPU threads of this process; None = as many as there are free cores.
        device: "cpu" keeps off an accelerator; None takes what there is.
        precision: "float32", "bfloat16" or "float16"; None = bfloat16 where the accelerator supports it.
        deepspeed: zero1, zero2 or a JSON file.
        report_to: tensorboard, wandb or none.
        save_steps: steps between checkpoints.
        log_steps: steps between lines of log.jsonl.
        cache: where shared stages and media are kept.
        keep: what is kept of media, among "frames" and "features".
        keep_bytes: size limit of each.
        reader: how media files are read; None = the processor's default.
        skip_bad: replace a sample that cannot be read by the next one instead of stopping.
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

    def caches(self) -> Caches | None:
        """The requested media caches, or None."""
        return Caches.open(self.cache.expanduser() / "media", self.keep, self.keep_bytes) if self.keep else None


@dataclass(frozen=True)
class StageContext:
    """A running stage and all that it needs.

    Attributes:
        name: in the recipe.
        number: its position among the recipe's stages, from 1.
        stage: its settings in the recipe.
        recipe: the whole recipe.
        model: trained in place.
        processor: the model's.
        run: the run folder.
        options: how the run is executed.
    """

    name: str
    number: int
    stage: Stage
    recipe: Recipe
    model: MMLLMForConditionalGeneration
    processor: MMLLMProcessor
    run: RunFolder
    options: RunOptions

    @property
    def folder(self) -> Path:
        """The folder of its checkpoints."""
        return self.run.path / "stages" / f"{self.number}-{self.name}"

    def where(self, key: str) -> str:
        """The path of one of the stage's keys in the recipe file, for errors."""
        return self.recipe.where(f"stages.{self.name}.{key}")


class Stopped(Exception):
    """The run was asked to stop and has saved; `signal` is the signal's number."""

    def __init__(self, signal: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped, saved {checkpoint}")
        self.signal, self.checkpoint = signal, checkpoint
