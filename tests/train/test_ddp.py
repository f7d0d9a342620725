"""Two processes, one of them with a text-only batch, give one process's gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.objectives import distilled, preference_pairs, teacher_of
from helpers.small_runs import conversations
from helpers.tiny import tokenizer_folder

SCRIPT = Path(__file__).parents[1] / "helpers" / "ddp_run.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Even samples have a clip, odd ones are text: rank 1 of two never sees a clip."""
    return conversations(tmp_path_factory.mktemp("ddp"), 8, clip=lambda index: index % 2 == 0)


def run(data: Path, out: Path, processes: int, objective: str | dict = "language_modeling") -> dict[str, torch.Tensor]:
    """Gradients of the first step over the same four samples."""
    from safetensors.torch import load_file

    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, str(SCRIPT), str(data), str(out), tokenizer_folder(), json.dumps(objective)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "gradients.safetensors")


def equal(data: Path, tmp_path: Path, objective: str | dict) -> None:
    """Gradients of one process and of two."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (run(data, tmp_path / name, count, objective) for name, count in (("one", 1), ("two", 2)))
    assert set(one) == set(two)
    for name, gradient in one.items():
        torch.testing.assert_close(
            two[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any("front_end" in name and bool((value != 0).any()) for name, value in two.items())


def test_two_processes_give_one_processs_gradients(data, tmp_path):
    equal(data, tmp_path, "language_modeling")


@pytest.mark.parametrize("reference", ["stored", "copy"])
def test_so_they_do_for_pairs_of_unequal_media(tmp_path, reference):
    """One clip among four pairs: the second process sees text alone, and has no tokens of its own to encode."""
    data = preference_pairs(tmp_path, 8, clip=lambda index: index % 4 == 0)
    equal(data, tmp_path, {"type": "preference", "sft": 0.2, "reference": reference})
    log = [json.loads(line) for line in (tmp_path / "two/run/log.jsonl").read_text().splitlines()]
    assert log[0]["preference"] == pytest.approx(0.693147, abs=1e-5)


def test_so_they_do_for_a_teacher(tmp_path):
    """The same for distillation, whose visual terms one of the processes does not have."""
    data = conversations(tmp_path, 8, clip=lambda index: index % 4 == 0)
    teacher = teacher_of(data, tmp_path / "teacher")
    equal(data, tmp_path, distilled(teacher))
    one, two = (json.loads((tmp_path / name / "run/log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    for name in ("loss", "language_modeling", "response", "visual", "relation"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_so_they_do_for_masked_videos(data, tmp_path):
    """The second process has no video, so nothing for its decoder."""
    equal(data, tmp_path, {"type": "masked_video"})
    one, two = (json.loads((tmp_path / name / "run/log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    for name in ("loss", "language_modeling", "masked_video", "removed"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
