"""Clips of any length, frames of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import frames, tiny_model, tiny_processor, tiny_recipe, turn, write_video
from PIL import Image

from mmllm.data.media.sampling import Sampling

OPTIONS = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


@pytest.fixture(scope="module")
def made():
    recipe = tiny_recipe("nano/video_chatgpt")
    return tiny_model(recipe), tiny_processor(recipe)


@pytest.mark.parametrize("count", [1, 2, 65, 1000])
def test_from_one_frame_to_a_thousand(made, tmp_path: Path, count: int) -> None:
    model, processor = made
    pictures = np.repeat(frames(0, 1), count, axis=0)
    pictures[:, :8, :8] = (np.arange(count) % 250).astype(np.uint8)[:, None, None, None]
    path = write_video(tmp_path / "clip.mp4", pictures)
    batch = processor.apply_chat_template(
        [turn({"type": "video", "path": str(path), "frames": count}, "What?")], **OPTIONS
    )
    assert batch["visual"]["media"][0]["spec"].frames == count
    with torch.inference_mode():
        values, _ = model.model.front_end(batch["visual"])
        output = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert values.shape[0] == count + 9 and bool(values.isfinite().all())
    assert output.shape[1] == batch["input_ids"].shape[1] + 1


def test_a_folder_of_frames_of_unequal_sizes(made, tmp_path: Path) -> None:
    _, processor = made
    for index, (height, width) in enumerate([(48, 48), (96, 48), (30, 70), (480, 640)]):
        Image.fromarray(np.full((height, width, 3), 60 * index, np.uint8)).save(tmp_path / f"{index}.png")
    medium = processor.read({"type": "video", "path": str(tmp_path)}, Sampling(frames=4, sampler="linspace"))
    (pixels,) = medium.pixels.values()
    assert pixels.shape == (4, 3, 48, 48)
    assert [int(frame.float().mean().round()) for frame in pixels] == [0, 60, 120, 180]
