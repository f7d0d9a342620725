"""What always holds of CLIP's tower with a BT-Adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmllm.contract.parts import Site
from mmllm.contract.types import MediaSpec, Needs
from mmllm.encoders.image.huggingface import ClipEncoder, SiglipEncoder
from mmllm.encoders.image.timm import TimmEncoder
from mmllm.encoders.video.bt_adapter import DropPath
from mmllm.encoders.video.bt_adapter_towers import (
    ClipBTAdapterEncoder,
    SiglipBTAdapterEncoder,
    TimmBTAdapterEncoder,
    _eva_states,
)

CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION = {**CLIP, "image_size": 28, "patch_size": 14}


def encoder(**arguments: object) -> ClipBTAdapterEncoder:
    """A tiny tower with an adapter whose time layers do something."""
    torch.manual_seed(0)
    made = ClipBTAdapterEncoder(Site(), config=VISION, **{"depth": 3, "drop": 0.5, **arguments})
    made.load_weights()
    for layer in made.adapter.time:
        nn.init.normal_(layer.out.weight, std=0.3)
    nn.init.normal_(made.adapter.times.weight, std=0.3)
    return made.eval()


def plain(adapted: ClipBTAdapterEncoder) -> ClipEncoder:
    """The same tower alone."""
    made = ClipEncoder(Site(), config=VISION).eval()
    made.tower.load_state_dict(adapted.tower.state_dict())
    return made


def pixels(frames: int, batch: int = 2) -> Tensor:
    """Random frames."""
    return torch.randint(
        0, 256, (batch, frames, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


@torch.no_grad()
def test_frames_look_at_each_other_and_views_of_an_image_do_not():
    made, clips = encoder(), pixels(4)
    whole = made(clips, MediaSpec("video", 4), Needs()).by_frame()
    other = clips.clone()
    other[:, 3] = 255 - other[:, 3]
    assert (made(other, MediaSpec("video", 4), Needs()).by_frame() - whole)[:, 0].abs().max() > 1e-4
    views = made(clips, MediaSpec("image", 4), Needs()).by_frame()
    for view in range(4):
        alone = made(clips[:, view : view + 1], MediaSpec("image", 1), Needs()).values
        torch.testing.assert_close(views[:, view], alone)
    assert not made.per_frame


@torch.no_grad()
def test_layers_below_the_adapter_and_cls_tokens_are_the_towers_own():
    made, clips, media = encoder(), pixels(3), MediaSpec("video", 3)
    needs = Needs(hidden_states=(1, -2), cls=(-2, 0), keys=(-1,))
    ours, theirs = made(clips, media, needs), plain(made)(clips, media, needs)
    assert ours.spec.extras == made.extras_spec(media, needs) == theirs.spec.extras
    torch.testing.assert_close(ours.extras["hidden_states"][:, :, 0], theirs.extras["hidden_states"][:, :, 0])
    torch.testing.assert_close(ours.extras["cls"], theirs.extras["cls"])
    torch.testing.assert_close(ours.extras["keys"], theirs.extras["keys"])
    assert torch.equal(ours.extras["hidden_states"][:, :, 1], ours.values)
    moved = (ours.values - theirs.values).norm() / theirs.values.norm()
    assert 0.01 < moved < 2


def test_a_layer_that_reaches_nothing_is_not_built():
    assert len(encoder().adapter.space) == 2
    assert len(encoder(layer=-1).adapter.space) == 3
    made = encoder(reference=True)
    assert len(made.adapter.space) == 3
    made(pixels(2), MediaSpec("video", 2), Needs()).values.sum().backward()
    assert all(value.grad is None for value in made.adapter.space[-1].parameters())
    assert all(value.grad.any() for value in made.adapter.space[0].narrow.parameters())
    fresh = ClipBTAdapterEncoder(Site(), config=VISION, depth=2)
    assert not fresh.adapter.times.weight.any()
    assert ClipBTAdapterEncoder(Site(), config=VISION, depth=2, reference=True).adapter.times.weight.std() > 0.5


def test_stochastic_depth_is_for_training_alone():
    made, clips, media = encoder(), pixels(2), MediaSpec("video", 2)
    with torch.no_grad():
        assert torch.equal(made(clips, media, Needs()).values, made(clips, media, Needs()).values)
        made.train()
        torch.manual_seed(1)
        assert not torch.equal(made(clips, media, Needs()).values, made(clips, media, Needs()).values)


def test_space_layers_start_as_the_towers_last_blocks():
    made = encoder()
    for layer, block in zip(made.adapter.space, made.tower.encoder.layers[1:], strict=False):
        assert torch.equal(layer.attention.query.weight, block.self_attn.q_proj.weight)
        assert torch.equal(layer.narrow.weight, block.mlp.fc2.weight)


def test_clips_and_layers_that_it_cannot_read_are_refused():
    with pytest.raises(ValueError, match="8 frames of a clip at most, this one has 9"):
        encoder(max_frames=8).output_spec(MediaSpec("video", 9))
    assert encoder(max_frames=1).output_spec(MediaSpec("image", 9)).tokens == 36
    with pytest.raises(ValueError, match="before the adapter"):
        encoder(layer=1)


def test_stochastic_depth_grows_over_the_whole_depth():
    """Three of four layers are built where the last but one state is read; their rates are those of the first three."""
    part = ClipBTAdapterEncoder(Site(), config=VISION, depth=4, drop=0.3)
    assert [layer.drop.rate for layer in part.adapter.space] == pytest.approx([0.0, 0.1, 0.2])
    assert [layer.drop.rate for layer in part.adapter.time] == [0.3] * 3


def test_what_stochastic_depth_keeps_makes_up_for_what_it_leaves_out():
    """Each clip is left out, in all tensors of a branch, or is four times as large: in the mean it is as it was."""
    torch.manual_seed(0)
    drop = DropPath(0.75).train()
    one, two = drop(torch.ones(4000, 2), torch.ones(4000, 3, 1))
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert torch.equal(one[:, 0], two[:, 2, 0])
    assert abs(one.mean().item() - 1) < 0.1
    assert torch.equal(drop.eval()(one)[0], one)


# Towers without a CLS token, and EVA's


def siglip(**arguments: object) -> SiglipBTAdapterEncoder:
    """A tiny SigLIP with an adapter whose time layers do something."""
    torch.manual_seed(0)
    made = SiglipBTAdapterEncoder(Site(), config=VISION, **{"depth": 3, **arguments})
    made.load_weights()
    return _moved(made)


def eva(**arguments: object) -> TimmBTAdapterEncoder:
    """A tiny EVA, likewise."""
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    made = TimmBTAdapterEncoder(Site(), name="eva_giant_patch14_clip_224", size=28, model_args=small, **arguments)
    for block in made.tower.blocks:
        nn.init.normal_(block.attn.q_bias), nn.init.normal_(block.attn.v_bias)  # fresh ones are zero
    made.adapter.copy_blocks([_eva_states(block) for block in made.tower.blocks[-made.depth :]])
    return _moved(made)


def _moved(made):
    for layer in made.adapter.time:
        nn.init.normal_(layer.out.weight, std=0.3)
    nn.init.normal_(made.adapter.times.weight, std=0.3)
    return made.eval()


@pytest.mark.parametrize("build", [encoder, siglip, eva])
@torch.no_grad()
def test_every_kind_of_tower_lets_frames_meet(build):
    made, clips = build(), pixels(4)
    whole = made(clips, MediaSpec("video", 4), Needs()).by_frame()
    other = clips.clone()
    other[:, 3] = 255 - other[:, 3]
    assert (made(other, MediaSpec("video", 4), Needs()).by_frame() - whole)[:, 0].abs().max() > 1e-4
    alone = made(clips[1:], MediaSpec("video", 4), Needs()).by_frame()
    torch.testing.assert_close(alone, whole[1:], atol=2e-5, rtol=1e-5)
    views = made(clips, MediaSpec("image", 4), Needs()).by_frame()
    one = made(clips[:, 2:3], MediaSpec("image", 1), Needs()).values
    torch.testing.assert_close(views[:, 2], one, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [encoder, siglip, eva])
@torch.no_grad()
def test_without_any_effect_over_time_frames_may_change_places(build):
    made, clips = build(), pixels(4)
    for layer in made.adapter.time:
        nn.init.zeros_(layer.out.weight)
    nn.init.zeros_(made.adapter.times.weight)
    order = [2, 0, 3, 1]
    whole = made(clips, MediaSpec("video", 4), Needs()).by_frame()
    moved = made(clips[:, order], MediaSpec("video", 4), Needs()).by_frame()
    torch.testing.assert_close(moved, whole[:, order], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tower_without_cls_has_a_side_stream_with_one_of_its_own():
    made, clips, media = siglip(), pixels(3), MediaSpec("video", 3)
    assert not made.adapter.tower_cls
    tower = SiglipEncoder(Site(), config=VISION).eval()
    tower.tower.load_state_dict(made.tower.state_dict())
    needs = Needs(hidden_states=(1, -2), keys=(-1,))
    ours, theirs = made(clips, media, needs), tower(clips, media, needs)
    torch.testing.assert_close(ours.extras["hidden_states"][:, :, 0], theirs.extras["hidden_states"][:, :, 0])
    torch.testing.assert_close(ours.extras["keys"], theirs.extras["keys"])
    assert (ours.values - theirs.values).abs().max() > 1e-3
    before = ours.values
    nn.init.zeros_(made.adapter.cls)
    assert (made(clips, media, Needs()).values - before).abs().max() > 1e-5
    with pytest.raises(ValueError, match="no CLS token"):
        made.extras_spec(media, Needs(cls=(-1,)))


@torch.no_grad()
def test_evas_cls_tokens_are_blended_too():
    made, clips, media = eva(depth=3), pixels(3), MediaSpec("video", 3)
    tower = TimmEncoder(
        Site(), name=made.name, size=28, model_args={"embed_dim": 24, "depth": 4, "num_heads": 2}
    ).eval()
    tower.tower.load_state_dict(made.tower.state_dict())
    ours, theirs = (one(clips, media, Needs(cls=(0, -2))).extras["cls"] for one in (made, tower))
    torch.testing.assert_close(ours[:, :, 0], theirs[:, :, 0])
    assert (ours[:, :, 1] - theirs[:, :, 1]).abs().max() > 1e-3


def test_space_layers_start_as_the_towers_blocks():
    made = eva(layer=-1)
    block, layer = made.tower.blocks[-1], made.adapter.space[-1]
    rows = torch.randn(2, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer.attention(rows), block.attn(rows), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            layer.narrow(layer.activation(layer.wide(rows))), block.mlp(rows), atol=1e-5, rtol=1e-5
        )
    assert layer.attention.key.bias is None


def test_towers_that_no_adapter_fits():
    with pytest.raises(ValueError, match="no EVA with a table of positions"):
        TimmBTAdapterEncoder(Site(), name="vit_small_patch14_reg4_dinov2", size=28, model_args={"depth": 2})
    with pytest.raises(ValueError, match="lies before the adapter"):
        siglip(depth=1)
