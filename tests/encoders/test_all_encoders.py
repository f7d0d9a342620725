"""One test over every registered encoder and each of its examples."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmllm.contract import parts, registry
from mmllm.contract.parts import Encoder, Site
from mmllm.contract.types import Grid, MediaSpec, Needs, VisualTokens

CASES = [
    pytest.param(cls, arguments, media, id=f"{name}-{number}")
    for name, cls in sorted(registry.parts("encoder").items())
    for number, (arguments, (media,)) in enumerate(cls.examples(), start=1)
]
BF16 = {"efficientnet_lite0": 0.04}
"""Relative error of bfloat16, 0.015 where nothing else is said. It keeps 8 bits, 0.4 % an operation; measured: 0.3 to
1.0 % for all but this one, 2.5 % over its 50 layers of random convolutions without a norm that would rescale them."""


def build(cls: type[Encoder], arguments: dict[str, Any], seed: int = 0) -> Encoder:
    """An encoder with random weights, in eval mode."""
    torch.manual_seed(seed)
    return cls(Site(), **arguments).eval()


def clips(encoder: Encoder, media: MediaSpec, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random pixels as the bank would give them."""
    g = encoder.geometry
    shape = (batch, encoder.frames_of(media), 3, g.height, g.width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(encoder: Encoder, media: MediaSpec, needs: Needs | None = None) -> VisualTokens:
    """Tokens of two random clips."""
    return encoder(clips(encoder, media), media, needs or Needs())


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_declared_grid_and_width_are_the_real_ones(cls, arguments, media):
    encoder = build(cls, arguments)
    with torch.no_grad():
        tokens = run(encoder, media)
    assert tokens.spec == encoder.output_spec(media)
    with torch.device("meta"):
        assert cls(Site(), **arguments).output_spec(media) == tokens.spec
    assert tokens.values.isfinite().all()
    assert tokens.positions.shape == (*tokens.values.shape[:2], 3)
    assert (tokens.positions[..., 1:] > 0).all()
    assert (tokens.positions[..., 1:] < 1).all()
    if tokens.grid is not None:
        assert tokens.times.shape == (2, tokens.grid.t)


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(cls, arguments, media):
    encoder = build(cls, arguments)
    assert encoder.trainable
    assert encoder.train().training
    encoder.requires_grad_(False).train()
    assert not encoder.trainable
    assert not any(module.training for module in encoder.modules())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not run(encoder, media).values.requires_grad
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved"


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_bfloat16_is_near_float32(cls, arguments, media):
    encoder = build(cls, arguments)
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    with torch.no_grad():
        fine, coarse = run(encoder, media).values, run(half, media).values
    assert coarse.dtype == torch.bfloat16
    error = (coarse.float() - fine).norm() / fine.norm()
    assert error < BF16.get(cls.registered_name, 0.015), f"{error:.4f}"


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_frames_are_independent_where_the_encoder_says_so(cls, arguments, media):
    encoder = build(cls, arguments)
    if media.kind == "image" or encoder.frames_of(media) < 2:
        pytest.skip("one frame")
    pixels = clips(encoder, media, batch=1)
    other = pixels.clone()
    other[:, 0] = 255 - other[:, 0]
    with torch.no_grad():
        whole, changed = encoder(pixels, media, Needs()).values, encoder(other, media, Needs()).values
    per_frame = whole.shape[1] // encoder.frames_of(media)
    moved = (whole - changed)[:, per_frame:].abs().max()
    if not encoder.per_frame:
        assert moved > 1e-4
        return
    assert moved <= 1e-5
    single = replace(media, frames=1)
    with torch.no_grad():
        alone = [encoder(pixels[:, [frame]], single, Needs()).values for frame in range(pixels.shape[1])]
    torch.testing.assert_close(torch.cat(alone, dim=1), whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_extras_are_delivered_as_declared_or_refused(cls, arguments, media):
    encoder = build(cls, arguments)
    given = 0
    for needs in (Needs(hidden_states=(-1, -1)), Needs(cls=(-1,)), Needs(keys=(-1,)), Needs()):
        try:
            declared = encoder.extras_spec(media, needs)
        except ValueError as error:
            assert "hidden" in str(error) or "cls" in str(error) or "key" in str(error)
            continue
        with torch.no_grad():
            tokens = run(encoder, media, needs)
        assert tokens.spec.extras == declared
        assert replace(tokens.spec, extras={}) == encoder.output_spec(media)
        given += 1
    assert given


@pytest.mark.parametrize(("cls", "arguments", "media"), CASES)
def test_the_digest_is_of_weights_and_arguments(cls, arguments, media):
    encoder = build(cls, arguments)
    digest = encoder.digest()
    assert build(cls, arguments).digest() == digest
    assert copy.deepcopy(encoder).digest() == digest
    assert build(cls, arguments, seed=1).digest() != digest
    assert copy.deepcopy(encoder).to(torch.bfloat16).digest() != digest
    with torch.no_grad():
        list(encoder.parameters())[-1].view(-1)[-1] += 1
    changed = encoder.digest()
    assert changed != digest
    frames = encoder.frames_of(media) if encoder.per_frame or media.kind == "video" else 4
    other = cls(Site(), **{**arguments, "frames": frames})
    other.load_state_dict(encoder.state_dict())
    assert (other.digest() == changed) == (arguments.get("frames") == frames)


def test_a_digest_knows_the_version_and_the_source_of_a_users_class(monkeypatch):
    clip = registry.find("encoder", "clip")
    arguments, _ = next(clip.examples())
    before = build(clip, arguments).digest()
    monkeypatch.setattr(parts, "_source", lambda cls: "other words")
    assert build(clip, arguments).digest() == before
    monkeypatch.setattr(clip, "__module__", "mmllm_plugin_0")
    assert build(clip, arguments).digest() != before
    monkeypatch.undo()
    monkeypatch.setattr(clip, "version", 2)
    assert build(clip, arguments).digest() != before


def test_a_digest_needs_memory_and_does_not_know_names():
    clip = registry.find("encoder", "clip")
    arguments, _ = next(clip.examples())
    one, two = build(clip, arguments), build(clip, {**arguments, "name": "a/hub-id"})
    assert one.digest() == two.digest()
    with torch.device("meta"), pytest.raises(ValueError, match="no memory"):
        clip(Site(), **arguments).digest()


@torch.no_grad()
def test_the_cls_token_stands_before_the_patches_of_its_frame():
    clip, media = registry.find("encoder", "clip"), MediaSpec("video", 3)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    encoder = build(clip, {"config": {**config, "image_size": 28, "patch_size": 14}, "cls": True})
    pixels = torch.randint(0, 256, (1, 3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    states = encoder.tower(encoder.normalise(pixels)[0], output_hidden_states=True).hidden_states
    values = encoder(pixels, media, Needs()).values
    torch.testing.assert_close(values, states[-2].flatten(0, 1)[None], atol=1e-6, rtol=0)


def test_levels_cls_and_keys_are_those_of_the_tower():
    clip = registry.find("encoder", "clip")
    arguments, (media,) = next(clip.examples())
    encoder = build(clip, arguments)
    needs = Needs(hidden_states=(1, -1), cls=(0, -2), keys=(-1, 1))
    with torch.no_grad():
        tokens = run(encoder, media, needs)
        pixels = encoder.normalise(clips(encoder, media)).flatten(0, 1)
        states = encoder.tower(pixels, output_hidden_states=True).hidden_states
        layers = encoder.tower.encoder.layers
        keys = [layers[i].self_attn.k_proj(layers[i].layer_norm1(states[i])) for i in (2, 0)]
    rows = [state.unflatten(0, (2, 2)) for state in states]
    torch.testing.assert_close(tokens.values, rows[-2][:, :, 1:].flatten(1, 2))
    for place, index in enumerate((1, 3)):
        torch.testing.assert_close(tokens.extras["hidden_states"][:, :, place], rows[index][:, :, 1:].flatten(1, 2))
    for place, index in enumerate((0, 2)):
        torch.testing.assert_close(tokens.extras["cls"][:, :, place], rows[index][:, :, 0])
    for place, key in enumerate(keys):
        expected = key.unflatten(0, (2, 2))[:, :, 1:].flatten(1, 2)
        torch.testing.assert_close(tokens.extras["keys"][:, :, place], expected)


def test_what_an_encoder_cannot_give_is_refused_with_the_reason():
    media = MediaSpec("video", 2)
    siglip, clip = (registry.find("encoder", name) for name in ("siglip", "clip"))
    encoder = build(siglip, next(siglip.examples())[0])
    with pytest.raises(ValueError, match="no CLS token"):
        encoder.extras_spec(media, Needs(cls=(-1,)))
    with pytest.raises(ValueError, match="layers -4 to 3"):
        encoder.extras_spec(media, Needs(hidden_states=(7,)))
    with pytest.raises(ValueError, match="no attention before"):
        encoder.extras_spec(media, Needs(keys=(0,)))
    timm = registry.find("encoder", "timm")
    arguments = [given for given, _ in timm.examples()]
    with pytest.raises(ValueError, match="no keys"):
        build(timm, arguments[0]).extras_spec(media, Needs(keys=(-1,)))
    with pytest.raises(ValueError, match="not on the tokens' own grid"):
        build(timm, arguments[-1]).extras_spec(media, Needs(hidden_states=(0,)))
    nano = registry.find("encoder", "nano_conv")
    with pytest.raises(ValueError, match="gives no hidden_states"):
        build(nano, {}).extras_spec(media, Needs(hidden_states=(-1,)))
    config = next(clip.examples())[0]["config"]
    for wrong, says in (
        ({"layer": 9}, "layer 9"),
        ({"size": 40}, "not a multiple"),
        ({"norm": True, "layer": -1}, "no norm after its last layer"),
        ({"fit": "squash", "short": 32}, "nothing is cropped"),
    ):
        with pytest.raises(ValueError, match=says):
            build(clip, {"config": config, **wrong})


HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PATCHES = {**TINY, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("config", "before"),
    [
        ({**PATCHES, "model_type": "vit"}, 1),
        ({**PATCHES, "model_type": "deit"}, 2),
        ({**PATCHES, "model_type": "beit", "use_relative_position_bias": True}, 1),
        ({**PATCHES, "model_type": "ijepa"}, 0),
        ({**PATCHES, "model_type": "dinov2_with_registers", "num_register_tokens": 4}, 5),
        ({**PATCHES, "model_type": "dinov3_vit", "num_register_tokens": 3}, 4),
        ({**PATCHES, "model_type": "siglip_vision_model"}, 0),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_prefix_tokens_grid_and_width_are_found_out_for_any_model(config, before):
    encoder = build(registry.find("encoder", "huggingface"), {"config": config, **HALF})
    assert encoder.before == before
    assert encoder.output_spec(MediaSpec("image", 1)).grid == Grid(1, 4, 4)
    assert encoder.width == 32
    assert len(encoder.shapes) == 4
    pixels = clips(encoder, MediaSpec("image", 1))
    other = pixels.clone()
    other[..., 24:, 24:] = 255 - other[..., 24:, 24:]
    encoder.layers = (0,)  # before attention, so that a pixel only reaches its own patch
    with torch.no_grad():
        one, two = (encoder(p, MediaSpec("image", 1), Needs()).values for p in (pixels, other))
    moved = (one - two).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [15]


def test_registers_are_not_taken_for_a_cls_token():
    timm = registry.find("encoder", "timm")
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "class_token": False, "reg_tokens": 3, "global_pool": "avg"}
    encoder = build(timm, {"name": "vit_tiny_patch16_224", "size": 32, "model_args": small})
    assert encoder.before == 3
    with pytest.raises(ValueError, match="no CLS token"):
        encoder.extras_spec(MediaSpec("image", 1), Needs(cls=(-1,)))
    with pytest.raises(ValueError, match="no CLS token"):
        build(timm, {"name": "vit_tiny_patch16_224", "size": 32, "model_args": small, "cls": True})


def test_a_tower_that_halves_its_grid_keeps_a_grid_a_stage():
    swin = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "window_size": 4}
    config = {**swin, "num_heads": [2, 2]}
    encoder = build(registry.find("encoder", "huggingface"), {"config": config, **HALF, "layer": 0})
    assert [shape.view for shape in encoder.shapes] == [(1, 8, 8), (1, 4, 4), (1, 4, 4)]
    assert [shape.width for shape in encoder.shapes] == [8, 16, 16]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**PATCHES, "model_type": "vit_mae"}, "only 5 of 16 patches"),
        ({"model_type": "hiera"}, "is no square"),
        ({**PATCHES, "model_type": "vit", "image_size": [32, 16]}, "only square"),
        ({"model_type": "bert"}, "cannot read|no tower|size"),
        ({"model_type": "no_such_model"}, "config of a no_such_model"),
        ({**PATCHES, "model_type": "vit", "hidden_size": "wide"}, "config of a vit"),
        (PATCHES, "model_type: missing"),
    ],
    ids=["masks", "no_raster", "not_square", "text", "unknown", "wrong_type", "no_type"],
)
def test_a_model_that_cannot_be_an_encoder_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        build(registry.find("encoder", "huggingface"), {"config": config, **HALF})


def test_positions_are_interpolated_where_another_size_is_asked_for():
    huggingface = registry.find("encoder", "huggingface")
    for kind in ("vit", "dinov2_with_registers", "dinov3_vit", "ijepa"):
        encoder = build(huggingface, {"config": {**PATCHES, "model_type": kind}, **HALF, "size": 48})
        assert encoder.output_spec(MediaSpec("image", 1)).grid == Grid(1, 6, 6)
    timm = registry.find("encoder", "timm")
    arguments = {**next(timm.examples())[0], "size": 56}
    assert build(timm, arguments).output_spec(MediaSpec("image", 1)).grid == Grid(1, 4, 4)


def test_a_video_tower_reads_tubelets_with_their_own_times():
    from mmllm.encoders.common.tokens import at_times

    vivit = registry.find("encoder", "vivit")
    config = next(vivit.examples())[0]["config"]
    encoder = build(vivit, {"config": config, "frames": 4})
    media = MediaSpec("video", 8)
    assert encoder.frames_of(media) == 4
    tokens = at_times(run(encoder, media), torch.tensor([[0.0, 1.0, 2.0, 5.0]] * 2))
    assert tokens.grid == Grid(2, 2, 2)
    assert tokens.times.tolist() == [[0.5, 3.5]] * 2
    assert tokens.positions[0, :, 0].tolist() == [0.5] * 4 + [3.5] * 4
    picture = clips(encoder, MediaSpec("image", 1))
    with torch.no_grad():
        still = encoder(picture, MediaSpec("image", 1), Needs())
        clip = encoder(picture.expand(-1, 4, -1, -1, -1), MediaSpec("video", 4), Needs())
        single = encoder(picture, MediaSpec("video", 1), Needs())
    assert torch.equal(still.values, clip.values)
    assert torch.equal(still.values, single.values)
    assert at_times(still, torch.tensor([[7.0]] * 2)).times.tolist() == [[7.0, 7.0]] * 2
    views = run(encoder, MediaSpec("image", 3))
    assert views.grid == Grid(6, 2, 2)


def test_a_video_tower_refuses_what_it_cannot_read():
    vivit = registry.find("encoder", "vivit")
    config = next(vivit.examples())[0]["config"]
    with pytest.raises(ValueError, match="reads 4 frames at once, the clip has 8"):
        build(vivit, {"config": config}).output_spec(MediaSpec("video", 8))
    picking = build(vivit, {"config": config, "frames": 4})
    with pytest.raises(ValueError, match="does not divide a clip of 6"):
        picking.output_spec(MediaSpec("video", 6))
    with pytest.raises(ValueError, match="only 2"):
        picking.output_spec(MediaSpec("video", 2))
    with pytest.raises(ValueError, match="frames 8: this tower reads 4"):
        build(vivit, {"config": config, "frames": 8})
    with pytest.raises(ValueError, match="cannot interpolate"):
        build(vivit, {"config": config, "size": 64})
    with pytest.raises(ValueError, match="of a whole clip"):
        picking.extras_spec(MediaSpec("video", 4), Needs(cls=(-1,)))
