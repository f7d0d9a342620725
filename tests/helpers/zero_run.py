"""Run by test_zero.py in two processes: three steps under a ZeRO stage, AdamW."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.tiny import tiny_recipe

from mmllm.train.context import RunOptions
from mmllm.train.run import train

data, out, tokenizer, zero = sys.argv[1:]
recipe = tiny_recipe()
recipe.model["llm"]["tokenizer"] = tokenizer
stage = {"data": data, "trains": ["encoders", "connector", "llm"], "steps": 3, "batch": 4, "lr": 1e-3}
recipe.data["stages"] = {"instruct": stage}
options = {"jobs": 0, "device": "cpu", "quiet": True, "log_steps": 1, "save_steps": 3, "cache": Path(out)}
train(recipe, Path(out) / "run", RunOptions(**options, deepspeed=None if zero == "none" else zero))
