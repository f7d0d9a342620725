"""Weights of another run fit exactly or not at all."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import save_model, tiny_model, tiny_recipe
from safetensors.torch import load_file, save_file

from mmllm.contract.errors import UserError
from mmllm.model.checkpoint import load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model."""
    return save_model(tmp_path_factory.mktemp("model"))


def changed(folder, tmp_path, change):
    """The saved model with other weights."""
    state = load_file(folder / "model.safetensors")
    change(state)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def test_all_weights_are_taken(folder):
    model = tiny_model(tiny_recipe(), seed=1)
    load_weights(model, folder)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items() if key in saved)


def test_what_is_left_over_missing_or_of_another_size_is_listed(folder, tmp_path):
    model = tiny_model(tiny_recipe(), seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = "model.front_end.parts.mlp.layers.0.weight"
    changes = {
        r"1 unexpected: model\.extra": lambda state: state.update({"model.extra": torch.zeros(2)}),
        rf"1 missing: {name}": lambda state: state.pop(name),
        rf"1 mismatched: {name} is \[2, 3\]": lambda state: state.update({name: torch.zeros(2, 3)}),
    }
    for number, (says, change) in enumerate(changes.items()):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(UserError, match=f"checkpoint of another recipe; {says}"):
            load_weights(model, changed(folder, place, change))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
