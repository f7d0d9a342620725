"""What a stage shows while it runs: a line with ETA, a JSONL log, a loss curve, and a clean stop on a signal."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mmllm.progress import Progress, say
from mmllm.run_folder import RunFolder

if TYPE_CHECKING:
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments


LIBRARY = ("loss", "grad_norm", "learning_rate")
"""What the library logs; the rest are terms and memory."""
UNDRAWN = ("time", "learning_rate", "memory_gb")
"""Numbers of the log that are no curve."""


class StageProgress(TrainerCallback):
    """Progress line, log.jsonl and curves.png of one stage.

    Args:
        run: receives the log.
        stage: its name.
        samples_per_step: global batch, for samples/s.
        quiet: print nothing on stderr.
    """

    def __init__(self, run: RunFolder, stage: str, samples_per_step: int, quiet: bool) -> None:
        self.run, self.stage, self.batch, self.quiet = run, stage, samples_per_step, quiet
        self.trainer: Any = None
        self.loss: float | None = None
        self.terms: dict[str, float] = {}
        self.skipped = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the step that training continues from."""
        self.bar = Progress(self.stage, state.max_steps, start=state.global_step, quiet=self.quiet)
        self.began, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count one more step."""
        seconds = time.perf_counter() - self.began
        done = state.global_step - self.first
        facts = {"samples/s": f"{done * self.batch / max(seconds, 1e-9):.1f}"}
        if self.loss is not None:
            terms = {name.replace("_", " "): f"{value:.3f}" for name, value in self.terms.items()}
            facts = {"loss": f"{self.loss:.3f}", **terms, **facts}
        facts["data wait"] = f"{100 * self.trainer.data_seconds / max(seconds, 1e-9):.0f} %"
        self._say_skipped()
        skipped = {"skipped": str(self.skipped)} if self.skipped else {}
        self.bar.update(state.global_step, {**facts, **skipped, **self.trainer.looked_up.facts()})

    def _say_skipped(self) -> None:
        """Record each bad sample once in events.txt, whichever process met it."""
        for reason in self.trainer.skipped:
            self.run.log_event(self.stage, f"skipped {reason}")
        self.skipped += len(self.trainer.skipped)
        self.trainer.skipped.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a record of the trainer as one JSON line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.loss = logs["loss"]
        known = {key: value for key, value in logs.items() if key != "epoch"}
        self.terms = {key: value for key, value in known.items() if key not in LIBRARY}
        self.run.log({"stage": self.stage, "step": state.global_step, **known, **self._statistics()})

    def _statistics(self) -> dict[str, float]:
        """Statistics of the parts' last forward."""
        parts = self.trainer.accelerator.unwrap_model(self.trainer.model).model.front_end.parts
        return {
            f"{node}.{name}": float(value) for node, part in parts.items() for name, value in part.statistics().items()
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the line and draw the curves."""
        self.bar.close()
        for what, rate in self.trainer.looked_up.facts().items() if state.is_world_process_zero else ():
            self.run.log_event(self.stage, f"{what}: {rate}")
        if state.is_world_process_zero:
            draw_curves(self.run.path)


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the current step with a checkpoint; a second signal stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the signals (only possible in the main thread)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:
                return

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop."""
        if args.world_size > 1:  # all processes stop after the same step
            import torch

            flag = torch.tensor(float(self.signal or 0), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.signal = int(flag) or None
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        say("saving after this step (again: stop at once)\n")
        signal.signal(number, self.before.get(number) or signal.SIG_DFL)


def draw_curves(run: Path) -> None:
    """Draw curves.png from log.jsonl: a column per stage with its loss, and below it the terms of the loss, if several.

    Crosses are held-out samples.
    """
    from matplotlib.figure import Figure

    stages = _curves(run / "log.jsonl")
    if not stages:
        return
    rows = max(len(curves) for curves in stages.values())
    figure = Figure(figsize=(4.5 * len(stages), 1.2 + 1.8 * rows), layout="constrained")
    grid = figure.subplots(rows, len(stages), squeeze=False)
    for column, (stage, curves) in enumerate(stages.items()):
        for row, (name, kinds) in enumerate(curves.items()):
            axes = grid[row][column]
            for kind, values in kinds.items():
                style = {"color": "tab:blue", "linewidth": 1}
                if kind == "held out":
                    style = {"color": "tab:orange", "linestyle": "none", "marker": "x", "markersize": 5}
                axes.plot(list(values), list(values.values()), **style)
            axes.set(title=stage if row == 0 else None, ylabel=name.replace("_", " "))
            axes.set_yscale("log" if name == "loss" and min(kinds["train"].values()) > 0 else "linear")
            axes.grid(alpha=0.3)
        grid[len(curves) - 1][column].set_xlabel("step")
        for axes in grid[len(curves) :, column]:
            axes.set_visible(False)
    try:  # never fail a training run for a picture
        figure.savefig(run / "curves.png", dpi=110)
    except OSError as error:
        say(f"warning: {run / 'curves.png'} was not drawn ({error.strerror})\n")


Curves = dict[str, dict[str, dict[int, float]]]
"""{term: {"train" or "held out": {step: value}}}."""


def _curves(log: Path) -> dict[str, Curves]:
    """{stage: its curves}, the loss first."""
    stages: dict[str, Curves] = {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill, or not ours
            record = json.loads(line)
            curves, step = stages.setdefault(str(record["stage"]), {}), int(record["step"])
            for key, value in record.items():
                if isinstance(value, float) and key not in UNDRAWN and "." not in key:
                    held = key.startswith("validation")
                    name = key.removeprefix("validation").removeprefix("_") or "loss"
                    kinds = curves.setdefault(name, {})
                    kinds.setdefault("held out" if held else "train", {})[step] = value
    drawn = {
        stage: {name: kinds for name, kinds in found.items() if "train" in kinds} for stage, found in stages.items()
    }
    order = {stage: sorted(found.items(), key=lambda item: item[0] != "loss") for stage, found in drawn.items()}
    return {stage: dict(found) for stage, found in order.items() if found}
