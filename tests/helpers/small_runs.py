"""Small training runs that several tests make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.tiny import frames, tiny_recipe, tokenizer_folder, write_video

from mmllm.config.recipe import Recipe
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_processor
from mmllm.run_folder import RunFolder
from mmllm.train.context import RunOptions, StageContext


def conversations(folder: Path, count: int, clip: Callable[[int], bool]) -> Path:
    """A data file of so many conversations with answers of unequal length, some of them about a clip."""
    lines = []
    for index in range(count):
        content = [{"type": "text", "text": f"Question {index}: what moves?"}]
        if clip(index):
            write_video(folder / f"clips/{index}.mp4", frames(index, 8))
            content.insert(0, {"type": "video", "path": f"clips/{index}.mp4"})
        answer = "A red square moves left." if index % 4 in (1, 2) else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{index}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def recipe(data: Path, **stage: object) -> Recipe:
    """A tiny recipe with one stage over `data`."""
    made = tiny_recipe()
    made.model["llm"]["tokenizer"] = tokenizer_folder()
    settings = {"data": str(data), "trains": ["encoders", "connector", "llm"], "steps": 6, "batch": 4, "lr": 1e-3}
    made.data["stages"] = {"instruct": {**settings, **stage}}
    return made


def losses(run: Path) -> list[float]:
    """Losses of a run, step by step."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def options(**changes: object) -> RunOptions:
    """Options for a quiet run that logs every step."""
    return RunOptions(**{"jobs": 0, "device": "cpu", "quiet": True, "log_steps": 1, "cache": Path("unused"), **changes})


def context(made: Recipe, asked: RunOptions, folder: Path) -> StageContext:
    """The one stage of such a recipe, with a processor and without a model."""
    return StageContext(
        "instruct",
        1,
        made.stages["instruct"],
        made,
        None,
        build_processor(Blueprint.of(made)),
        RunFolder(folder),
        asked,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights."""
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@contextmanager
def stopping_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs inside are signalled to stop after this step, once."""
    from mmllm.train import progress

    stop = progress.StopOnSignal.on_step_end

    def stop_there(self, args, state, control, **kwargs):
        if state.global_step == step and self.signal is None:
            self.signal = 15
        stop(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnSignal, "on_step_end", stop_there)
        yield
