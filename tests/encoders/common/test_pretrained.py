"""Weights of a name are all there, or the tower is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.contract.errors import UserError
from mmllm.encoders.common.pretrained import build_tower, load_tower, tower_config

CONFIG = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path):
    """A saved tower."""
    torch.manual_seed(0)
    tower = build_tower(tower_config({**CONFIG, "image_size": 28, "patch_size": 14}, "clip_vision_model"))
    tower.save_pretrained(tmp_path)
    return tmp_path


def fresh(**changes):
    """Another tower of the config."""
    torch.manual_seed(1)
    return build_tower(tower_config({**CONFIG, "image_size": 28, "patch_size": 14, **changes}, "clip_vision_model"))


def test_all_weights_of_a_folder_are_taken(folder):
    tower, saved = fresh(), load_file(folder / "model.safetensors")
    load_tower(tower, str(folder))
    names = {name.removeprefix("vision_model."): value for name, value in saved.items()}
    found = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    assert names.keys() <= found.keys()
    assert all(torch.equal(found[name], value) for name, value in names.items())


def test_a_weight_that_is_missing_is_named_and_not_left_random(folder):
    saved = load_file(folder / "model.safetensors")
    name = next(name for name in saved if name.endswith("layers.1.mlp.fc1.weight"))
    del saved[name]
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc1\.weight: differs from the recipe.*got nothing"):
        load_tower(fresh(), str(folder))


def test_another_size_is_refused(folder):
    with pytest.raises(UserError, match=r"differs from the recipe, expected \[64, 32\], got \[48, 32\]"):
        load_tower(fresh(intermediate_size=64), str(folder))
