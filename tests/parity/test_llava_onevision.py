"""LLaVA-OneVision on images of any size and on video: from pixels to logits as the library, same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.library import SMALL, copy_weights
from helpers.tiny import tokenizer_folder
from PIL import Image

from mmllm.config.recipe import load
from mmllm.contract.types import MediaSpec
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model

VISION = {**SMALL, "image_size": 42, "patch_size": 14, "vision_use_head": False}
TEXT = {**SMALL, "vocab_size": 800, "num_key_value_heads": 2, "max_position_embeddings": 512}
PLACE = 790


def both():
    """Our model and the library's with the same weights."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    overrides = ["model.encoders.siglip.name=null", "model.llm.name=null", "model.media.tiles.up_to=3,3"]
    recipe = load("llava_onevision", [*overrides, "model.connector.any_resolution.most=4"])
    recipe.model["encoders"]["siglip"]["config"] = VISION
    recipe.model["llm"]["config"] = {"model_type": "qwen2", **TEXT}
    torch.manual_seed(0)
    ours = build_model(Blueprint.of(recipe), weights=False).eval()
    pinpoints = [[42 * i, 42 * j] for i in range(1, 4) for j in range(1, 4)]
    theirs = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**VISION),
            text_config=Qwen2Config(**TEXT),
            image_token_index=PLACE,
            video_token_index=PLACE + 1,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
            image_grid_pinpoints=pinpoints,
        )
    ).eval()
    copy_weights(ours, theirs)
    return recipe, ours, theirs


@pytest.fixture(scope="module")
def models():
    return both()


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height + width)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(42, 42), (100, 60), (60, 100), (126, 126), (40, 200), (300, 290)])
def test_logits_are_those_of_the_library(models, height: int, width: int) -> None:
    from transformers import AutoTokenizer, LlavaOnevisionImageProcessor

    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_processor

    recipe, ours, theirs = models
    image = picture(height, width)
    processor = build_processor(Blueprint.of(recipe), AutoTokenizer.from_pretrained(tokenizer_folder()))
    medium = processor.read({"type": "image", "image": image})
    tokens = ours.model.front_end.plan.streams(medium.spec)[0].tokens
    ids = torch.tensor([[5, *[PLACE] * tokens, 7, 8, 9]])
    visual = {"media": [medium.for_model()], "pairs": [(0, -1)], "spans": torch.tensor([[0, 1, 0, 0]])}
    library = LlavaOnevisionImageProcessor(
        size={"height": 42, "width": 42},
        image_grid_pinpoints=theirs.config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )(image, return_tensors="pt")
    with torch.no_grad():
        left = ours(ids, visual=visual).logits
        right = theirs(input_ids=ids, vision_aspect_ratio="anyres_max_4", **library).logits
    torch.testing.assert_close(left, right, atol=2e-6, rtol=0)


def test_several_images_are_one_view_each(models) -> None:
    from transformers import AutoTokenizer

    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_processor

    recipe, _, _ = models
    processor = build_processor(Blueprint.of(recipe), AutoTokenizer.from_pretrained(tokenizer_folder()))
    one, other = picture(100, 60), picture(60, 100)

    def specs(*images):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What?"}]
        batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
        return [clip["spec"] for clip in batch["visual"]["media"]]

    assert specs(one)[0].tiles is not None
    assert [spec.tiles for spec in specs(one, other)] == [None, None]


def test_images_of_many_sizes_in_one_batch_answer_as_alone(models) -> None:
    from transformers import AutoTokenizer

    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_processor

    recipe, ours, _ = models
    processor = build_processor(Blueprint.of(recipe), AutoTokenizer.from_pretrained(tokenizer_folder()))
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(*size)}, {"type": "text", "text": "What?"}]}]
        for size in ((42, 42), (100, 60), (60, 100), (126, 126))
    ]

    def last(conversations):
        batch = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        with torch.no_grad():
            return ours(**batch).logits[:, -1]

    together = last(chats)
    for row, chat in enumerate(chats):
        torch.testing.assert_close(together[row], last([chat])[0], atol=2e-6, rtol=0)


def test_logits_are_those_of_the_librarys_llava_onevision_on_video():
    """Same weights, same clip: transformers' LlavaOnevision and our recipe `llava_onevision_video`, tiny."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from mmllm.config.recipe import load

    vision = {**SMALL, "image_size": 42, "patch_size": 14, "vision_use_head": False}
    text = {**SMALL, "vocab_size": 120, "num_key_value_heads": 2, "max_position_embeddings": 64}
    unnamed = ["model.encoders.siglip.name=null", "model.llm.name=null"]
    recipe = load("llava_onevision_video", [*unnamed, "model.media.frames=3"])
    recipe.model["encoders"]["siglip"]["config"] = vision
    recipe.model["llm"]["config"] = {"model_type": "qwen2", **text}
    ours = build_model(Blueprint.of(recipe), weights=False).eval()
    theirs = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision),
            text_config=Qwen2Config(**text),
            image_token_index=101,
            video_token_index=100,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ).eval()
    copy_weights(ours, theirs)

    pixels = torch.randint(0, 256, (3, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    count = 3 * 2 * 2 + 1
    ids = torch.tensor([[5, *[100] * count, 7, 8, 9]])
    encoder = ours.model.front_end.bank.encoders["siglip"]
    clip = {"spec": MediaSpec("video", 3), "times": torch.arange(3.0), "pixels": {encoder.geometry: pixels}}
    visual = {"media": [clip], "pairs": [(0, -1)], "spans": torch.tensor([[0, 1, 0, 0]])}
    with torch.no_grad():
        left = ours(ids, visual=visual).logits
        right = theirs(input_ids=ids, pixel_values_videos=encoder.normalise(pixels)[None]).logits
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
