"""ZeRO on two CPU processes: the losses of plain data-parallel training, and a model folder that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_runs import conversations
from helpers.tiny import tokenizer_folder

SCRIPT = Path(__file__).parents[1] / "helpers" / "zero_run.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return conversations(tmp_path_factory.mktemp("zero"), 12, clip=lambda index: index % 2 == 0)


def run(data: Path, out: Path, zero: str) -> list[float]:
    """Losses of three steps in two processes."""
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SCRIPT), str(data), str(out), tokenizer_folder(), zero]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (out / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> list[float]:
    return run(data, tmp_path_factory.mktemp("plain") / "out", "none")


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_losses_are_those_of_plain_training(data, plain, tmp_path, zero):
    pytest.importorskip("deepspeed")
    losses = run(data, tmp_path / "out", zero)
    assert losses == pytest.approx(plain, abs=2e-3)
    import mmllm

    model, _ = mmllm.load(tmp_path / "out" / "run")
    assert all(bool(value.isfinite().all()) and value.numel() for value in model.state_dict().values())
    assert isinstance(model, torch.nn.Module)


def test_sharded_parameters_are_refused_before_anything_hangs():
    from mmllm.config.schema import Stage
    from mmllm.contract.errors import UserError
    from mmllm.train.machine import deepspeed_config

    with pytest.raises(UserError, match=r"zero3.*unequal media.*Try: --deepspeed zero2"):
        deepspeed_config("zero3", Stage(steps=1, data="x"))
