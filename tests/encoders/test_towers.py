"""The real loading path of towers and LLMs, on checkpoints that the tests save; parity with the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import frames, tiny_processor, tiny_recipe, turn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.types import MediaSpec, Needs
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model
from mmllm.model.encoder_bank import build_encoder

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def save_tower(kind: str, folder: Any) -> dict[str, Any]:
    """A tiny checkpoint as it is published: CLIP and SigLIP with a text tower beside it. Returns its vision config."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    text = {**SMALL, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(1)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    else:
        model = Dinov2Model(Dinov2Config(**vision))
    model.save_pretrained(folder)
    return vision


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_weights_of_a_name_reach_the_tower(kind, tmp_path):
    vision = save_tower(kind, tmp_path)
    encoder = build_encoder({"type": kind, "name": str(tmp_path), "config": vision, "layer": -1}, "encoder")
    before = {name: value.clone() for name, value in encoder.tower.state_dict().items()}
    encoder.load_weights()
    theirs = type(encoder.tower).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in theirs.items() if name in before)
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_a_name_alone_is_completed_with_its_config_and_another_size_is_refused(tmp_path):
    from mmllm.contract.registry import find

    vision = save_tower("clip", tmp_path)
    completed = find("encoder", "clip").resolve({"name": str(tmp_path)})
    assert completed["config"]["hidden_size"] == 32
    wide = {**vision, "intermediate_size": 64}
    encoder = build_encoder({"type": "clip", "name": str(tmp_path), "config": wide}, "encoder")
    with pytest.raises(UserError, match="differs from the recipe, expected"):
        encoder.load_weights()


def test_a_frozen_encoder_keeps_no_graph_and_stays_in_eval_mode():
    model = build_model(Blueprint.of(tiny_recipe()))
    from mmllm.train.weights import freeze

    freeze(model, ("connector", "llm"), "stages")
    model.train()
    front = model.model.front_end
    bank = front.bank
    assert not bank.encoders["nano"].training
    pixels = {front.plan.geometries["nano"]: torch.zeros(4, 3, 48, 48, dtype=torch.uint8)}
    clip = {"pixels": pixels, "times": torch.zeros(4)}
    tokens = bank([clip], MediaSpec("video", 4), {}, {"nano"})
    assert not tokens["nano"].values.requires_grad
    freeze(model, ("encoders.nano",), "stages")
    model.train()
    assert bank.encoders["nano"].training
    tokens = bank([clip], MediaSpec("video", 4), {}, {"nano"})
    assert tokens["nano"].values.requires_grad


def test_several_encoders_each_with_its_own_transform_grid_and_frames(tmp_path):
    import yaml

    encoders = {
        "nano": {"type": "nano_conv", "frames": 2},
        "clip": {"type": "clip", "config": {**SMALL, "image_size": 28, "patch_size": 14}},
    }
    connector = [
        {"name": "few", "type": "linear", "in": "nano"},
        {"name": "many", "type": "linear", "in": "clip"},
    ]
    path = tmp_path / "two.yaml"
    path.write_text(
        yaml.safe_dump(
            {"base": "nano/base", "model": {"encoders": encoders, "connector": connector, "output": ["few", "many"]}}
        )
    )
    recipe = tiny_recipe(str(path))
    processor, model = tiny_processor(recipe), build_model(Blueprint.of(recipe)).eval()
    clip = {"type": "video", "video": frames(1, 8)}
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template([turn(clip, "What?")], **options)
    assert len(batch["visual"]["media"][0]["pixels"]) == 2
    with torch.no_grad():
        rows, _ = model.model.front_end(batch["visual"])
    assert rows.shape[0] == 2 * 9 + 4 * 4
    with pytest.raises(UserError, match="reads 3 frames, which does not divide a clip of 4"):
        build_model(Blueprint.of(tiny_recipe(str(path), overrides=("model.encoders.nano.frames=3",))))


def test_the_llm_of_a_name_is_loaded_with_its_head(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = {**SMALL, "vocab_size": 120, "num_key_value_heads": 2, "max_position_embeddings": 64}
    llm = LlamaForCausalLM(LlamaConfig(**text)).eval()
    llm.save_pretrained(tmp_path)
    recipe = tiny_recipe()
    recipe.model["llm"] = {"name": str(tmp_path), "config": {"model_type": "llama", **text}}
    model = build_model(Blueprint.of(recipe)).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llm(ids).logits)
    recipe.model["llm"]["config"]["intermediate_size"] = 64
    with pytest.raises(UserError, match="differs from"):
        build_model(Blueprint.of(recipe))


def test_site_and_needs_are_plain():
    assert Site(llm_width=7).width("llm") == 7
    assert Site(llm_width=7).width(3) == 3
    with pytest.raises(ValueError, match='a number or "llm"'):
        Site().width("wide")
    assert Needs() == Needs()
