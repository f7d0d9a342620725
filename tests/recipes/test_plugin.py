"""A stranger's part: a connector and a recipe in a folder of their own, nothing else touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import frames, tokenizer_folder, write_video

PART = '''
"""Keeps every second token."""

import torch
from torch import nn

from mmllm.contract.parts import Part
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec


@register("connector", "every_second")
class EverySecond(Part):
    def __init__(self, site, *, gain: float = 1.0):
        super().__init__(site)
        self.scale = nn.Parameter(torch.empty(site.inputs[0].width))
        self.gain = gain
        self.reset_parameters()

    def reset_parameters(self):
        from transformers import initialization as init

        init.constant_(self.scale, self.gain)

    def output_spec(self, *inputs):
        return TokenSpec(inputs[0].media, (inputs[0].tokens + 1) // 2, inputs[0].width)

    def forward(self, *inputs):
        index = torch.arange(0, inputs[0].values.shape[1], 2)
        return inputs[0].derive(inputs[0].values[:, index] * self.scale, None, index=index)

    @classmethod
    def examples(cls):
        yield {"gain": 2.0}, (TokenSpec(MediaSpec("video", 2), 8, 4, Grid(2, 2, 2)),)
'''
RECIPE = """
base: nano/base
roots: {{here: {here}}}
model:
  llm: {{tokenizer: {tokenizer}}}
  connector:
    - mlp
    - {{type: every_second, gain: 0.5}}
stages:
  letters: null
  caption: null
  text: null
  instruct: {{data: "here:data.jsonl", steps: 1, batch: 2}}
"""


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder with my_part.py, my.yaml and two samples."""
    (tmp_path / "my_part.py").write_text(PART)
    (tmp_path / "my.yaml").write_text(RECIPE.format(here=tmp_path, tokenizer=tokenizer_folder()))
    lines = []
    for index in range(2):
        write_video(tmp_path / f"{index}.mp4", frames(index))
        content = [{"type": "video", "path": f"{index}.mp4"}, {"type": "text", "text": "What moves?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the square"}]
        lines.append(json.dumps({"id": str(index), "messages": messages}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def mmllm(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The command, in a folder."""
    command = [sys.executable, "-m", "mmllm", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


def test_it_checks_trains_and_answers(stranger):
    plugin = ("--plugin", "my_part.py")
    checked = mmllm(stranger, "recipe", "check", "my.yaml", *plugin)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.strip() == "ok: declared = real; gradient reaches it; batch = single; save = load"
    trained = mmllm(stranger, "train", "my.yaml", *plugin, "--out", "run", "--device", "cpu", "--jobs", "0", "--quiet")
    assert trained.returncode == 0, trained.stderr
    asked = mmllm(stranger, "ask", "--model", "run", *plugin, "--video", "0.mp4", "--json", "What moves?")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["visual_tokens"] == 36
    without = mmllm(stranger, "ask", "--model", "run", "--video", "0.mp4", "What moves?")
    assert without.returncode == 2
    assert "every_second" in without.stderr
