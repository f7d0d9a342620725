"""SIGKILL at random steps: the same command goes on, and its losses are those of a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.objectives import preference_pairs, teacher_of
from helpers.small_runs import conversations, losses
from helpers.tiny import tokenizer_folder

SCRIPT = """
import json, sys
from pathlib import Path
from helpers.small_runs import options, recipe
from helpers import tiny
from mmllm.train.run import train
data, out, stage, tokenizer = sys.argv[1:]
made = recipe(Path(data), **json.loads(stage))
made.model["llm"]["tokenizer"] = tokenizer
train(made, out, options(save_steps=2))
"""
KILLS = 10
STEPS = 24


def command(data: Path, out: Path, stage: dict) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(data), str(out), json.dumps(stage), tokenizer_folder()]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def steps(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text(errors="replace").count("\n") if log.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["language_modeling", "masked_video", "preference", "distillation"])
def test_killed_runs_end_as_whole_ones(tmp_path, objective):
    if objective == "preference":
        data, stage = preference_pairs(tmp_path), {"objective": {"type": "preference", "sft": 0.1}}
    else:
        data, stage = conversations(tmp_path, 12, clip=lambda index: index % 3 != 0), {"objective": objective}
    if objective == "distillation":
        stage = {"objective": {"type": "distillation", "teacher": str(teacher_of(data, tmp_path / "teacher"))}}
    stage["steps"] = STEPS
    subprocess.run(command(data, tmp_path / "whole", stage), env=environment(), check=True, capture_output=True)
    whole = losses(tmp_path / "whole")
    assert len(whole) == STEPS
    draw = random.Random(objective)
    killed = 0
    for _ in range(4 * KILLS):
        if killed == KILLS:
            break
        at = steps(tmp_path / "cut") + draw.randint(0, 3)
        process = subprocess.Popen(command(data, tmp_path / "cut", stage), env=environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and steps(tmp_path / "cut") <= at:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            break
    subprocess.run(command(data, tmp_path / "cut", stage), env=environment(), check=True, capture_output=True)
    last: dict[int, float] = {}
    for line in (tmp_path / "cut/log.jsonl").read_text().splitlines():
        record = json.loads(line)
        last[record["step"]] = record["loss"]
    assert [last[step] for step in sorted(last)] == whole
    assert killed >= KILLS // 2
