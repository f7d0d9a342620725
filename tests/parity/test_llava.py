"""LLaVA-1.5: from pixels to logits as the library, same weights."""

from __future__ import annotations

import torch
from helpers.library import SMALL, copy_weights

from mmllm.contract.types import MediaSpec
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model


def test_logits_are_those_of_the_librarys_llava():
    """Same weights, same picture: transformers' LlavaForConditionalGeneration and our recipe `llava`, tiny."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmllm.config.recipe import load

    vision = {**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    text = {**SMALL, "vocab_size": 120, "num_key_value_heads": 2, "max_position_embeddings": 64}
    recipe = load("llava", ["model.encoders.clip.name=null", "model.llm.name=null"])
    recipe.model["encoders"]["clip"]["config"] = vision
    recipe.model["llm"]["config"] = {"model_type": "llama", **text}
    ours = build_model(Blueprint.of(recipe), weights=False).eval()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=100,
        vision_feature_layer=-2,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    front = ours.model.front_end
    copy_weights(ours, theirs)

    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 100, 100, 100, 100, 7, 8, 9]])
    encoder = front.bank.encoders["clip"]
    clip = {"spec": MediaSpec("image", 1), "times": torch.zeros(1), "pixels": {encoder.geometry: pixels}}
    visual = {"media": [clip], "pairs": [(0, -1)], "spans": torch.tensor([[0, 1, 0, 0]])}
    with torch.no_grad():
        left = ours(ids, visual=visual).logits
        right = theirs(input_ids=ids, pixel_values=encoder.normalise(pixels)).logits
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
