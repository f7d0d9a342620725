"""Towers of timm and open_clip inside a whole model: their weights survive building, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny import tiny_processor, tiny_recipe
from safetensors.torch import save_file

import mmllm
from mmllm.config.recipe import Recipe
from mmllm.contract.errors import UserError
from mmllm.contract.registry import find
from mmllm.contract.types import MediaSpec, Needs
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model
from mmllm.model.encoder_bank import build_encoder

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
TIMM = {
    "eva": {"type": "timm", "name": "eva02_tiny_patch14_224", "size": 28, "layer": -1, "model_args": VIT},
    "beit": {"type": "timm", "name": "beitv2_base_patch16_224", "size": 32, "model_args": VIT},
    "convnext": {
        "type": "timm",
        "name": "convnext_atto",
        "size": 64,
        "model_args": {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]},
    },
    "batchnorm": {"type": "timm", "name": "test_efficientnet", "size": 64},
}


def timm_file(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The section with a file of weights, as timm publishes them: with a classifier, no two values alike."""
    import timm

    torch.manual_seed(3)
    sized = section["name"].startswith(("eva", "beit"))
    options = {**section.get("model_args", {}), **({"img_size": section["size"]} if sized else {})}
    model = timm.create_model(section["name"], **options)
    states = {key: value + torch.rand_like(value) for key, value in model.state_dict().items() if value.ndim}
    states |= {key: value for key, value in model.state_dict().items() if not value.ndim}
    save_file(states, folder / "weights.safetensors")
    return {**section, "weights": str(folder / "weights.safetensors")}


def recipe_with(section: dict[str, Any], folder: Path) -> Recipe:
    """A tiny recipe over one encoder."""
    path = folder / "one.yaml"
    # Of another type than the base's own encoder of that name, so nothing of the old one is kept.
    model = {"encoders": {"nano": None, "tower": section}, "connector": [{"type": "mlp", "in": "tower"}]}
    path.write_text(yaml.safe_dump({"base": "nano/base", "model": model}))
    return tiny_recipe(str(path))


def tower_of(model: Any) -> Any:
    """The encoder of a model of `recipe_with`."""
    return model.model.front_end.bank.encoders["tower"]


@pytest.mark.parametrize("kind", list(TIMM))
def test_weights_of_a_file_survive_post_init_and_come_back_bit_equal(kind, tmp_path):
    section = timm_file(TIMM[kind], tmp_path)
    recipe = recipe_with(section, tmp_path)
    model = build_model(Blueprint.of(recipe)).eval()
    from safetensors.torch import load_file

    file, tower = load_file(section["weights"]), tower_of(model).tower
    for key, value in tower.state_dict().items():
        assert torch.equal(value, file[key]), f"{key} is not the file's"
    model.init_weights()
    model.model.init_weights()
    for key, value in tower.state_dict().items():
        assert torch.equal(value, file[key]), f"{key} was initialised again"

    model.save_pretrained(tmp_path / "saved")
    tiny_processor(recipe).save_pretrained(tmp_path / "saved")
    Path(section["weights"]).unlink()
    again, _ = mmllm.load(tmp_path / "saved")
    one, two = tower_of(model), tower_of(again)
    tensors = dict(two.named_buffers()) | dict(two.named_parameters())
    for name, value in {**dict(one.named_buffers()), **dict(one.named_parameters())}.items():
        assert torch.equal(value, tensors[name]), name
    assert one.digest() == two.digest()
    pixels = torch.randint(0, 256, (1, 2, 3, section["size"], section["size"]), dtype=torch.uint8)
    media = MediaSpec("video", 2)
    with torch.no_grad():
        left, right = (encoder.eval()(pixels, media, Needs()).values for encoder in (one, two))
    assert torch.equal(left, right)


def test_a_fresh_tower_keeps_the_start_that_its_library_gave_it():
    """Of two towers the library initialises anew the one that is not marked."""
    from helpers.tiny import tiny_model

    from mmllm.encoders.common.foreign import mark_initialized

    model = tiny_model(tiny_recipe())
    for name, mark in (("marked", mark_initialized), ("plain", lambda tower: tower)):
        tower = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
        for parameter in tower.parameters():
            torch.nn.init.constant_(parameter, 0.125)
        model.model.front_end.add_module(name, mark(tower))
    model.init_weights()
    assert all(bool((value == 0.125).all()) for value in model.model.front_end.marked.parameters())
    assert not any(bool((value == 0.125).any()) for value in model.model.front_end.plain.parameters())


def test_tables_that_are_never_saved_are_there():
    """The towers above have tables that a checkpoint lacks: else their test would show nothing."""
    for kind in ("eva", "beit"):
        tower = build_encoder(TIMM[kind], "encoder").tower
        assert set(dict(tower.named_buffers())) - set(tower.state_dict())
    assert any("running_mean" in key for key in build_encoder(TIMM["batchnorm"], "encoder").tower.state_dict())


def test_wrong_weights_are_refused(tmp_path):
    section = timm_file(TIMM["eva"], tmp_path)
    wide = {**section, "model_args": {**VIT, "embed_dim": 32}}
    with pytest.raises(UserError, match="not the weights of eva02_tiny"):
        build_encoder(wide, "encoder").load_weights()
    deep = {**section, "model_args": {**VIT, "depth": 4}}
    with pytest.raises(UserError, match="not the weights of eva02_tiny"):
        build_encoder(deep, "encoder").load_weights()
    with pytest.raises(UserError, match="cannot read the weights"):
        build_encoder({**section, "weights": "nowhere.safetensors"}, "encoder").load_weights()
    with pytest.raises(UserError, match=r"no such timm model. Try: "):
        build_encoder({"type": "timm", "name": "vit_smal_patch16_224"}, "encoder")


def test_positions_are_resampled_when_another_size_is_loaded(tmp_path):
    section = timm_file({**TIMM["eva"], "name": "vit_tiny_patch16_224", "size": 32}, tmp_path)
    import timm

    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **VIT)
    save_file(model.state_dict(), section["weights"])
    encoder = build_encoder({**section, "size": 64}, "encoder")
    encoder.load_weights()
    assert encoder.tower.pos_embed.shape == (1, 17, 24)
    torch.testing.assert_close(encoder.tower.pos_embed[:, 0], model.pos_embed[:, 0])


def test_a_folder_of_timm_is_completed_and_loaded(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {**VIT, "img_size": 32}}
    save_for_hf(model, tmp_path, model_config=config, model_args=config["model_args"], safe_serialization=True)
    timm_encoder = find("encoder", "timm")
    arguments = timm_encoder.resolve({"name": f"local-dir:{tmp_path}", "weights": "pretrained"})
    assert arguments["architecture"] == "vit_tiny_patch16_224"
    assert arguments["mean"] == [0.5, 0.5, 0.5]
    assert timm_encoder.resolve(arguments) == arguments
    encoder = build_encoder({"type": "timm", **arguments}, "encoder")
    assert encoder.geometry.height == arguments["size"]
    encoder.load_weights()
    for key, value in encoder.tower.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VIDEO = {**TINY, "image_size": 32, "num_frames": 4}
PUBLISHED = {
    "vivit": ("VivitForVideoClassification", {**VIDEO, "tubelet_size": [2, 16, 16]}),
    "videomae": ("VideoMAEForPreTraining", {**VIDEO, "patch_size": 16, "tubelet_size": 2}),
    "vit": ("ViTForImageClassification", {**TINY, "image_size": 32, "patch_size": 16}),
}


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_a_tower_with_a_head_is_loaded_without_it_and_survives_a_checkpoint(kind, tmp_path):
    import transformers

    name, config = PUBLISHED[kind]
    torch.manual_seed(7)
    theirs = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **config)).eval()
    theirs.save_pretrained(tmp_path)
    own = {"type": "huggingface", "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32, "fit": "crop"}
    section = {**(own | {"interpolation": "bicubic"} if kind == "vit" else {"type": kind}), "name": str(tmp_path)}
    recipe = recipe_with({**section, "layer": -1}, tmp_path)
    model = build_model(Blueprint.of(recipe)).eval()
    encoder = tower_of(model)
    pixels = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    inputs = encoder.normalise(pixels)
    with torch.no_grad():
        tokens = encoder(pixels, MediaSpec("video", 4), Needs()).values
        body = getattr(theirs, kind)
        state = body(inputs[0] if kind == "vit" else inputs, output_hidden_states=True).hidden_states[-1]
    before = state.shape[1] - tokens.shape[1] // len(state)
    torch.testing.assert_close(tokens[0], state[:, before:].flatten(0, 1), atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor(recipe).save_pretrained(tmp_path / "saved")
    again, _ = mmllm.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(tower_of(again).eval()(pixels, MediaSpec("video", 4), Needs()).values, tokens)


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 10, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
}


def clip_folder(folder: Path) -> Any:
    """A tiny open_clip model as a folder of its own kind; returns the model."""
    import open_clip

    torch.manual_seed(4)
    model = open_clip.CLIP(**json.loads(json.dumps(CLIP)))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "resize_mode": "squash", "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": preprocess}))
    return model.eval()


def test_open_clip_weights_survive_too_and_tokens_are_the_librarys(tmp_path):
    theirs = clip_folder(tmp_path)
    section = {"type": "open_clip", "name": f"local-dir:{tmp_path}", "weights": "pretrained", "layer": -1}
    recipe = recipe_with(section, tmp_path)
    model = build_model(Blueprint.of(recipe)).eval()
    encoder = tower_of(model)
    assert encoder.geometry.fit == "squash"
    assert encoder.mean == (0.4, 0.5, 0.6)
    for key, value in encoder.tower.state_dict().items():
        assert torch.equal(value, theirs.visual.state_dict()[key]), key
    pixels = torch.randint(0, 256, (1, 1, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        tokens = encoder(pixels, MediaSpec("image", 1), Needs(cls=(-1,)))
        features = encoder.normalise(pixels)[0]
        pooled = theirs.visual.ln_post(tokens.extras["cls"][:, 0, 0]) @ theirs.visual.proj
        torch.testing.assert_close(pooled, theirs.encode_image(features), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor(recipe).save_pretrained(tmp_path / "saved")
    again, _ = mmllm.load(tmp_path / "saved")
    assert tower_of(again).digest() == encoder.digest()


def test_open_clip_refuses_what_does_not_fit():
    with pytest.raises(UserError, match=r"no such open_clip model. Try: ViT-B-32"):
        build_encoder({"type": "open_clip", "name": "ViT-B-33"}, "encoder")
    with pytest.raises(UserError, match="given without a name"):
        build_encoder({"type": "open_clip", "config": CLIP, "weights": "openai"}, "encoder")
    encoder = build_encoder({"type": "open_clip", "config": CLIP}, "encoder")
    encoder.name, encoder.weights = "ViT-B-32", "openai"
    with pytest.raises(UserError, match="trained with quick_gelu"):
        encoder.load_weights()


def test_a_missing_library_is_said(monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r"not installed, and this tower needs it. Try: pip install 'mmllm\[towers\]'"):
        build_encoder({"type": "timm", "name": "vit_tiny_patch16_224"}, "encoder")
