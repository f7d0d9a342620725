"""Two processes, one of them with a text-only batch, give one process's gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_runs import conversations
from helpers.tiny import tokenizer_folder

SCRIPT = Path(__file__).parents[1] / "helpers" / "ddp_run.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Even samples have a clip, odd ones are text: rank 1 of two never sees a clip."""
    return conversations(tmp_path_factory.mktemp("ddp"), 8, clip=lambda index: index % 2 == 0)


def run(data: Path, out: Path, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step over the same four samples."""
    from safetensors.torch import load_file

    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, str(SCRIPT), str(data), str(out), tokenizer_folder()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "gradients.safetensors")


def test_two_processes_give_one_processs_gradients(data, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = run(data, tmp_path / "one", 1), run(data, tmp_path / "two", 2)
    assert set(one) == set(two)
    for name, gradient in one.items():
        torch.testing.assert_close(
            two[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any("front_end" in name and bool((value != 0).any()) for name, value in two.items())
