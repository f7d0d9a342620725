"""Models that were saved before files moved and classes were renamed: they load, and say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import frames, turn
from safetensors.torch import load_file

import mmllm

SAVED = Path(__file__).resolve().parents[1] / "assets" / "saved"


@pytest.mark.parametrize("name", sorted(path.name for path in SAVED.iterdir() if path.is_dir()))
def test_a_folder_saved_before_the_move_gives_equal_logits(name):
    model, processor = mmllm.load(SAVED / name)
    chat = [turn({"type": "video", "video": frames(1, 8)}, "What moves?")]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**batch).logits[0, -2:]
    expected = load_file(SAVED / f"{name}.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # other machines round otherwise
