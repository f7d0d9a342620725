"""Small training runs that several tests make."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.tiny import tiny_recipe, tokenizer_folder

from mmllm.config.recipe import Recipe
from mmllm.model.build import build_processor
from mmllm.run_folder import RunFolder
from mmllm.train.context import RunOptions, StageContext


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
        "instruct", 1, made.stages["instruct"], made, None, build_processor(made), RunFolder(folder), asked
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights."""
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")
