"""The model through the library's own doors: Auto classes and the pipeline."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.tiny import frames, image, save_model, tiny_model, tiny_processor, tiny_recipe, write_video
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

import mmllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model."""
    return save_model(tmp_path_factory.mktemp("model"))


def test_auto_classes_find_it(folder):
    import mmllm.model.modeling  # registers the classes

    assert AutoConfig.from_pretrained(folder).model_type == mmllm.model.modeling.MMLLMConfig.model_type
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


FRESH = """
import sys
import mmllm
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import pipeline
ask = pipeline("image-text-to-text", model=sys.argv[1], device="cpu")
print(type(ask.model).__name__, type(ask.processor).__name__)
"""


def test_importing_this_package_is_enough_for_the_librarys_pipeline(folder):
    done = subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["MMLLMForConditionalGeneration", "MMLLMProcessor"], done.stderr[-2000:]


def chats(guided: bool = False) -> list[list[dict]]:
    texts = ["What?", "What is it that moves so slowly in here?", "Who is it?"]
    media = [{"type": "image", "image": image(seed)} for seed in (1, 2)] + [{"type": "text", "text": "(nothing)"}]
    media = [{"type": "image", "image": image(seed)} for seed in (1, 2, 3)] if guided else media
    return [
        [{"role": "user", "content": [entry, {"type": "text", "text": text}]}]
        for entry, text in zip(media, texts, strict=True)
    ]


@pytest.mark.parametrize("recipe", ["nano/llava", "nano/ppllava"])
def test_a_pipeline_of_a_run_answers_in_batches_as_one_by_one(tmp_path, recipe):
    made = tiny_recipe(recipe)
    tiny_model(made).save_pretrained(tmp_path / "run" / "model")
    tiny_processor(made).save_pretrained(tmp_path / "run" / "model")
    ask = mmllm.pipeline(tmp_path / "run", device="cpu")
    options = {"generate_kwargs": {"min_new_tokens": 6, "max_new_tokens": 6}, "return_tensors": True}
    asked = chats(guided=recipe != "nano/llava")
    alone = [ask(text=chat, **options)[0]["generated_token_ids"][-6:].tolist() for chat in asked]
    answers = ask(text=asked, batch_size=2, **options)
    assert [answer[0]["generated_token_ids"][-6:].tolist() for answer in answers] == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_a_path_is_a_medium(folder, tmp_path):
    model, processor = mmllm.load(folder)
    path = write_video(tmp_path / "clip.mp4", frames(1))
    picture = tmp_path / "picture.png"
    image(1).save(picture)
    options = {"max_new_tokens": 4}
    by_video = mmllm.generate(model, processor, "What?", mmllm.Video(str(path), start=0.25, end=0.75), **options)
    assert mmllm.generate(model, processor, "What?", f"{path}#t=0.25,0.75", **options) == by_video
    by_image = mmllm.generate(model, processor, "What?", mmllm.Image(str(picture)), **options)
    assert mmllm.generate(model, processor, "What?", picture, **options) == by_image
    with pytest.raises(mmllm.UserError, match="media: wrong type, expected a path"):
        mmllm.generate(model, processor, "What?", 5)
