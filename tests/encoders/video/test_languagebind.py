"""LanguageBind's tower: CLIP's own without its attention over time, groups apart, weights by their published names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from mmllm.contract.errors import UserError
from mmllm.contract.types import MediaSpec, Needs
from mmllm.model.encoder_bank import build_encoder

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG = {**TOWER, "image_size": 28, "patch_size": 14}


def encoder(**arguments):
    torch.manual_seed(3)
    return build_encoder({"type": "languagebind", "config": CONFIG, "group": 2, **arguments}, "encoder").eval()


def clip(frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (1, frames, 3, 28, 28), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def values(made, pixels: torch.Tensor, kind: str = "video") -> torch.Tensor:
    return made(pixels, MediaSpec(kind, pixels.shape[1]), Needs()).values


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_without_attention_over_time_it_is_clips_tower(layer):
    made = encoder(layer=layer)
    for time in made.times:
        for parameter in (time.temporal_embedding, *time.temporal_attn.out_proj.parameters()):
            parameter.zero_()
    pixels = clip(4)
    states = made.tower(made.normalise(pixels)[0], output_hidden_states=True).hidden_states
    theirs = states[layer][:, 1:].flatten(0, 1)[None]
    torch.testing.assert_close(values(made, pixels), theirs, atol=1e-6, rtol=0)


def test_frames_look_at_each_other_within_their_group_alone():
    made, pixels = encoder(), clip(4)
    other = pixels.clone()
    other[:, 3] = 255 - other[:, 3]
    before, after = (values(made, x).unflatten(1, (4, -1)) for x in (pixels, other))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-4)
    torch.testing.assert_close(values(made, pixels[:, 2:]), before[:, 2:].flatten(1, 2), atol=1e-6, rtol=0)


def test_a_group_that_is_not_full_has_the_first_times():
    made, pixels = encoder(group=8), clip(3)
    before, after = values(made, pixels), []
    for times in (slice(3, 8), slice(0, 3)):
        other = encoder(group=8)
        for time in other.times:
            time.temporal_embedding.data[:, times] += 0.5
        after.append(values(other, pixels))
    assert torch.equal(before, after[0])
    assert not torch.allclose(before, after[1], atol=1e-3)


def test_attention_over_time_is_that_of_one_place_written_out():
    made = encoder()
    time, frames = made.times[0], torch.randn(2, 5, 32)
    moved = frames.transpose(0, 1) + time.temporal_embedding
    attention, normed = time.temporal_attn, time.temporal_layer_norm1(moved)
    query, key, value = (
        getattr(attention, f"{name}_proj")(normed).unflatten(-1, (4, 8)).transpose(1, 2) for name in "qkv"
    )
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    mixed = attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(time(frames, 2), (moved + mixed).transpose(0, 1), atol=1e-6, rtol=0)


def test_views_of_an_image_are_apart_and_groups_have_to_be_full():
    made, pixels = encoder(), clip(3)
    whole = values(made, pixels, "image").unflatten(1, (3, -1))
    torch.testing.assert_close(values(made, pixels[:, 1:2], "image"), whole[:, 1], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="groups of 2 frames, which 3 frames do not fill"):
        made.output_spec(MediaSpec("video", 3))


def publish(made, folder: Path, file: str) -> None:
    """The weights as they are published: one vision model, with a table of position ids as old files have."""
    states = {f"vision_model.{key}": value for key, value in made.tower.state_dict().items()}
    for key, value in made.times.state_dict().items():
        states[f"vision_model.encoder.layers.{key}"] = value
    states["vision_model.embeddings.position_ids"] = torch.arange(5)
    states |= {"text_model.final_layer_norm.bias": torch.zeros(2), "logit_scale": torch.ones(())}
    states = {key: value.clone().contiguous() for key, value in states.items()}
    save_file(states, folder / file) if file.endswith(".safetensors") else torch.save(states, folder / file)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_published_weights_are_loaded_by_their_names(tmp_path, file):
    published = encoder()
    publish(published, tmp_path, file)
    torch.manual_seed(9)
    made = build_encoder({"type": "languagebind", "name": str(tmp_path), "config": CONFIG, "group": 2}, "encoder")
    assert not torch.equal(values(made.eval(), clip(2)), values(published, clip(2)))
    made.load_weights()
    assert torch.equal(values(made, clip(2)), values(published, clip(2)))


def test_weights_of_another_group_or_none_are_refused(tmp_path):
    publish(encoder(), tmp_path, "model.safetensors")
    arguments = {"type": "languagebind", "name": str(tmp_path), "config": CONFIG}
    with pytest.raises(UserError, match=r"0\.temporal_embedding: differs from the recipe.*\[1, 8, 32\].*\[1, 2, 32\]"):
        build_encoder({**arguments, "group": 8}, "encoder").load_weights()
    CLIPVisionModel(build_encoder(arguments, "encoder").config).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="differs from the recipe"):
        build_encoder({**arguments, "name": str(tmp_path / "plain")}, "encoder").load_weights()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        build_encoder({**arguments, "name": str(tmp_path / "empty")}, "encoder").load_weights()
    with pytest.raises(UserError, match="config: missing"):
        type(build_encoder(arguments, "encoder")).resolve({"name": "LanguageBind/LanguageBind_Video_merge"})
