"""The model through the library's own doors: Auto classes and the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import image, save_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model."""
    return save_model(tmp_path_factory.mktemp("model"))


def test_auto_classes_find_it(folder):
    import mmllm.model  # registers the classes

    assert AutoConfig.from_pretrained(folder).model_type == mmllm.model.MMLLMConfig.model_type
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "MMLLMProcessor"
    assert model.dtype == torch.float32


def test_pipeline_answers_about_an_image(folder, tmp_path):
    path = tmp_path / "picture.png"
    image(1).save(path)
    ask = pipeline("image-text-to-text", model=str(folder), device="cpu")
    chat = [{"role": "user", "content": [{"type": "image", "url": str(path)}, {"type": "text", "text": "What is it?"}]}]
    by_path = ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    chat[0]["content"][0] = {"type": "image", "image": Image.open(path)}
    by_picture = ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    assert isinstance(by_path, str)
    assert by_path == by_picture


def test_plain_text_with_placeholders_equals_the_chat(folder):
    processor = AutoProcessor.from_pretrained(folder)
    picture = np.asarray(image(3))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    by_chat = processor.apply_chat_template(chat, **options)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    by_text = processor(text=text, images=[picture])
    assert torch.equal(by_chat["input_ids"], by_text["input_ids"])
    assert torch.equal(by_chat["visual"]["spans"], by_text["visual"]["spans"])


def test_moving_a_batch_reaches_the_pixels_and_casts_no_pixel(folder):
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor(text="<image>What?", images=[image(3)]).to("meta", dtype=torch.bfloat16)
    clip = batch["visual"]["media"][0]
    pixels = next(iter(clip["pixels"].values()))
    assert (pixels.device.type, pixels.dtype) == ("meta", torch.uint8)
    assert clip["times"].dtype == torch.float32
    assert batch["input_ids"].device.type == "meta"
