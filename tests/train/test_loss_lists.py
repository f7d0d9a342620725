"""The losses of the nano recipes' first steps, against those that are stored: whoever moves one has to say so."""

from __future__ import annotations

import json

import pytest
from helpers.loss_lists import RECIPES, STORED, first_losses

from mmllm.world.make import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses") / "world"
    make_world(folder, "tiny", seed=0, jobs=1)
    return folder


def test_every_nano_recipe_has_a_list():
    assert set(json.loads(STORED.read_text())) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_are_the_stored_ones(name, world, tmp_path):
    stored = json.loads(STORED.read_text())[name]
    found = first_losses(name, world, tmp_path)
    assert len(found) == len(stored) == 20
    assert found == pytest.approx(stored, rel=1e-4)
