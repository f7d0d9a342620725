"""Reducers and what is before the LLM: the tower's own attention, smaller frames, frames told apart, rasters."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import LLMS, tiny_model, tiny_processor, tiny_recipe, turn, video

import mmllm
from mmllm.contract.errors import UserError


def prompt(processor):
    """A question about a video."""
    chat = [turn(video(1), "What?")]
    return processor.apply_chat_template([chat], tokenize=True, return_dict=True, add_generation_prompt=True)


def tower_recipe(layer: int):
    """CLIP's tower of three blocks, whose tokens reach the LLM as they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {**sizes, "image_size": 28, "patch_size": 7}
    recipe = tiny_recipe()
    recipe.model["encoders"] = {"clip": {"type": "clip", "layer": layer, "config": config}}
    recipe.model["connector"][0]["in"] = ["clip"]
    return recipe


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_the_towers_own_attention_chooses(layer):
    recipe = tower_recipe(layer)
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    batch = prompt(processor)
    tower = model.model.front_end.bank.encoders["clip"]
    pixels = batch["visual"]["media"][0]["pixels"][tower.geometry]
    tower.tower.set_attn_implementation("eager")
    attentions = tower.tower(tower.normalise(pixels), output_attentions=True).attentions
    theirs = attentions[layer][:, :, 0, 1:].mean(1).flatten()
    (streams,) = model.model.front_end.streams(batch["visual"], cls_attention=True)
    torch.testing.assert_close(streams[0].extras["cls_attention"][0], theirs, atol=1e-5, rtol=0)
    mmllm.reduce(model, "visionzip", keep=0.25)
    model(**batch)
    start = int(batch["visual"]["spans"][0, 1])
    kept = (model.model.reduction.last.dropped[0, start : start + len(theirs)] >= 0).nonzero()[:, 0]
    assert kept.tolist() == sorted(theirs.argsort(descending=True)[: len(theirs) // 4].tolist())


@pytest.mark.parametrize("llm", LLMS)
def test_a_tower_without_cls_is_refused_by_name(llm):
    recipe = tiny_recipe(llm=llm)
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    mmllm.reduce(model, "visionzip", keep=0.5)
    with pytest.raises(UserError, match="CLS attention is not there"):
        model(**prompt(processor))


@torch.no_grad()
def test_fewer_pixels_are_what_smaller_frames_give():
    """A tower at half the side, by hand: the same weights, positions interpolated."""
    recipe = tower_recipe(-1)
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    batch = prompt(processor)
    tower = model.model.front_end.bank.encoders["clip"]
    pixels = batch["visual"]["media"][0]["pixels"][tower.geometry]
    small = torch.nn.functional.interpolate(pixels.float(), size=(14, 14), mode="bilinear", antialias=True).round()
    states = tower.tower(tower.normalise(small.to(torch.uint8)), interpolate_pos_encoding=True).last_hidden_state
    wanted = model.model.front_end.parts["mlp"].layers(states[:, 1:]).flatten(0, 1)
    mmllm.reduce(model, "pixels", keep=0.25)
    inputs = model.embed(batch)
    present = inputs.spans[0].tokens.extras["present"][0]
    torch.testing.assert_close(inputs.spans[0].tokens.values[0, present], wanted, atol=1e-5, rtol=0)
    model(**batch)
    assert model.model.reduction.last.entering[0].tolist() == [len(wanted)] == [4 * 2 * 2]


def test_pixels_need_a_part_that_lets_them_count():
    recipe = tiny_recipe(
        "nano/video_chatgpt", overrides=("model.encoders.nano.size=64", "model.encoders.nano.grid=4,4")
    )
    recipe.model["connector"].insert(0, {"type": "pool", "name": "fixed", "grid": [4, 4, 4], "in": ["nano"]})
    recipe.model["connector"][1]["in"] = ["fixed"]
    model = tiny_model(recipe)
    with pytest.raises(UserError, match="smaller frames make no fewer"):
        mmllm.reduce(model, "pixels", keep=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_reduced_model_can_be_moved(dtype):
    recipe = tiny_recipe(overrides=("model.encoders.nano.size=64", "model.encoders.nano.grid=4,4"))
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    mmllm.reduce(model, "pixels", keep=0.25)
    batch = prompt(processor)
    first = model(**batch).logits
    assert model.to(dtype)(**batch).logits.dtype == dtype and first.dtype == torch.float32


@torch.no_grad()
def test_frames_are_those_of_the_grid_where_times_differ():
    """Pooling by the prompt gives every token a time of its own."""
    recipe = tiny_recipe("nano/ppllava")
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    mmllm.reduce(model, "merge", keep=0.25)
    batch = prompt(processor)
    model(**batch)
    spec = batch["visual"]["media"][0]["spec"]
    (stream,) = model.model.front_end.plan.streams(spec)
    per_frame = stream.grid.h * stream.grid.w
    assert model.reduction.last.entering[0].tolist() == [stream.grid.t * max(1, per_frame // 4)]


@torch.no_grad()
def test_pooling_without_a_raster_is_refused_in_one_line():
    recipe = tiny_recipe("nano/video_chatgpt")
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    mmllm.reduce(model, "pool", keep=0.25)
    with pytest.raises(UserError, match="reduce pool: pooling needs frames of equal rows"):
        model(**prompt(processor))


@pytest.mark.parametrize("name", ["nano/merv", "nano/ppllava", "nano/bridgetower"])
@torch.no_grad()
def test_smaller_frames_through_every_encoder_of_a_recipe(name):
    recipe = tiny_recipe(name)
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    try:
        mmllm.reduce(model, "pixels", keep=0.5)
    except UserError as error:  # merv has a grid of its own
        assert "smaller frames make no fewer" in str(error)
        return
    model(**prompt(processor))


def test_a_size_that_a_part_cannot_read_is_passed_over(monkeypatch):
    from mmllm.model.front_end_plan import FrontEndPlan
    from mmllm.model.reduction.pixels import side_for

    recipe = tiny_recipe(overrides=("model.encoders.nano.size=64", "model.encoders.nano.grid=4,4"))
    plan, whole = tiny_model(recipe).model.front_end.plan, FrontEndPlan.streams_through
    assert side_for(plan, 0.6) == 0.75
    refused = []

    def fails_at_three(self, bank, media):
        found = whole(self, bank, media)
        if found[0].grid.h == 3:
            refused.append(media)
            raise UserError("pool", "needs an even number of rows")
        return found

    monkeypatch.setattr(FrontEndPlan, "streams_through", fails_at_three)
    assert side_for(plan, 0.6) == 0.5 and refused
