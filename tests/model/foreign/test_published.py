"""Published checkpoints: the library's logits and answers from ours, the way back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import frames, image, tokenizer_folder, turn
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

import mmllm
from mmllm.cli import main
from mmllm.config.recipe import load
from mmllm.contract.errors import UserError
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for entry in message['content'] if entry['type'] in ('image', 'video') %}{{ '<' + entry['type'] + '>\\n' }}"
    "{% endfor %}{% for entry in message['content'] if entry['type'] == 'text' %}{{ entry['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PROMPT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokenizer():
    """NanoWorld's, with the placeholders of published models and a template that goes through entries."""
    made = AutoTokenizer.from_pretrained(tokenizer_folder())
    made.add_tokens(["<image>", "<video>"], special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def published(family: str):
    """A tiny model of the library, random but for its config."""
    tokens = tokenizer()
    ids = {kind: tokens.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    llm = {**LLM, "vocab_size": len(tokens)}
    clip, image_id, video_id = CLIPVisionConfig(**TOWER), ids["image"], ids["video"]
    grid = [[28 * rows, 28 * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    if family == "llava":
        config = LlavaConfig(vision_config=clip, text_config=LlamaConfig(**llm), image_token_index=image_id)
        return LlavaForConditionalGeneration(config)
    if family == "llava_next":
        config = LlavaNextConfig(
            vision_config=clip,
            text_config=LlamaConfig(**llm),
            image_token_index=image_id,
            image_grid_pinpoints=grid,
        )
        return LlavaNextForConditionalGeneration(config)
    if family == "llava_onevision":
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=Qwen2Config(**llm, tie_word_embeddings=True),
            image_token_index=image_id,
            video_token_index=video_id,
            image_grid_pinpoints=[[28 * r, 28 * c] for r in (1, 2) for c in (1, 2)],
            tie_word_embeddings=True,
        )
        return LlavaOnevisionForConditionalGeneration(config)
    config = VideoLlavaConfig(
        vision_config=clip, text_config=LlamaConfig(**llm), image_token_index=image_id, video_token_index=video_id
    )
    return VideoLlavaForConditionalGeneration(config)


FAMILIES = ("llava", "llava_next", "llava_onevision", "video_llava")


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """(family, their folder, their model, ours, our processor)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = published(request.param).eval()
    theirs.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model, processor = mmllm.load(folder, dtype="float32")
    return request.param, folder, theirs, model, processor


def photo(height: int, width: int) -> Image.Image:
    """A picture of any size."""
    small = np.random.default_rng(height).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def conversations(family: str) -> list[list[dict]]:
    """What the family was made for: one image, several, a video, an image of any size."""
    one = [turn({"type": "image", "image": image(1)}, "What color is it?")]
    two = [turn({"type": "image", "image": image(1)}, {"type": "image", "image": image(2)}, "Which is red?")]
    video = [turn({"type": "video", "video": frames(3, 8)}, "What moves?")]
    wide = [turn({"type": "image", "image": photo(40, 90)}, "What color is it?")]
    square = [turn({"type": "image", "image": photo(28, 28)}, "And this?")]
    return {
        "llava": [one, two],
        "llava_next": [wide, square],
        "llava_onevision": [wide, square, two, video],
        "video_llava": [one, two, video],
    }[family]


def their_inputs(family: str, theirs, model, processor, batch) -> dict:
    """The library's inputs: our ids with its placeholders, our pixels through its normalisation."""
    ids = batch["input_ids"].clone()
    bank, found = model.model.front_end.bank, {}
    media, kinds = batch["visual"]["media"], {"image": [], "video": []}
    for row, start, pair, stream in batch["visual"]["spans"].tolist():
        clip = media[batch["visual"]["pairs"][pair][0]]
        spec = clip["spec"]
        count = processor.plan.streams(spec)[stream].tokens
        ids[row, start : start + count] = processor.tokenizer.convert_tokens_to_ids(f"<{spec.kind}>")
        encoder = bank.encoders["tower"] if "tower" in bank.encoders else bank.encoders[spec.kind]
        kinds[spec.kind].append((encoder.normalise(clip["pixels"][encoder.geometry]), spec))
    if kinds["video"]:
        found["pixel_values_videos"] = torch.stack([pixels for pixels, _ in kinds["video"]])
    if kinds["image"]:
        views = [pixels for pixels, _ in kinds["image"]]
        tiled = family in ("llava_next", "llava_onevision")
        most = max(len(view) for view in views)
        padded = [torch.cat([view, view.new_zeros(most - len(view), *view.shape[1:])]) for view in views]
        found["pixel_values"] = torch.stack(padded) if tiled else torch.cat(views)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], **found}


@torch.no_grad()
def test_logits_and_answers_are_the_librarys(both):
    family, _, theirs, model, processor = both
    for conversation in conversations(family):
        batch = processor.apply_chat_template([conversation], **PROMPT)
        given = their_inputs(family, theirs, model, processor, batch)
        if "pixel_values" in given and family in ("llava_next", "llava_onevision"):
            pictures = [entry["image"] for entry in conversation[0]["content"] if entry["type"] == "image"]
            given["image_sizes"] = torch.tensor([[picture.height, picture.width] for picture in pictures])
            if family == "llava_onevision":
                given["batch_num_images"] = torch.tensor([len(pictures)])
        left, right = model(**batch).logits, theirs(**given).logits
        torch.testing.assert_close(left, right, atol=1e-4, rtol=0)
        start = batch["input_ids"].shape[1]
        said = model.generate(**batch, **GREEDY, suppress_tokens=_placeholders(processor))[:, start:]
        assert torch.equal(
            said, theirs.generate(**given, **GREEDY, suppress_tokens=_placeholders(processor))[:, start:]
        )


def _placeholders(processor) -> list[int]:
    return sorted(processor.placeholder_ids)


def test_text_is_that_of_their_template(both):
    family, _, _, _, processor = both
    for conversation in conversations(family):
        bare = [
            {"role": turn["role"], "content": [{"type": e["type"], "text": e.get("text")} for e in turn["content"]]}
            for turn in conversation
        ]
        theirs = tokenizer().apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
        assert processor.apply_chat_template(conversation, add_generation_prompt=True) == theirs


@torch.no_grad()
def test_the_way_back_loads_in_the_library(both, tmp_path, capsys):
    family, folder, theirs, model, processor = both
    assert main(["convert", "--model", str(folder), "--out", str(tmp_path / "ours"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "mmllm"
    ours, _ = mmllm.load(tmp_path / "ours")
    batch = processor.apply_chat_template([conversations(family)[0]], **PROMPT)
    assert torch.equal(ours(**batch).logits, model(**batch).logits)
    assert main(["recipe", "show", str(tmp_path / "ours" / "recipe.yaml")]) == 0
    back = tmp_path / "back"
    assert main(["convert", "--model", str(tmp_path / "ours"), "--to", "transformers", "--out", str(back)]) == 0
    again, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, value), (other, theirs_value) in zip(
        again.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(value, theirs_value)
    assert main(["convert", "--model", str(folder), "--out", str(back)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llava"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_a_damaged_checkpoint_is_refused_by_name(family, damage, tmp_path):
    theirs = published(family)
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    states = load_file(file)
    name = next(name for name in states if name.endswith("linear_1.weight"))
    if damage == "missing":
        del states[name]
    elif damage == "unexpected":
        states[name.replace("linear_1", "linear_9")] = torch.zeros(3)
    else:
        states[name] = torch.zeros(3, 3)
    save_file(states, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="linear_9" if damage == "unexpected" else "linear_1"):
        mmllm.load(tmp_path)


def test_other_models_of_transformers_say_what_is_possible(tmp_path, capsys):
    Qwen2Config(**LLM).save_pretrained(tmp_path)
    assert main(["ask", "--model", str(tmp_path), "What?"]) == 2
    assert "no model of mmllm, and of no family" in capsys.readouterr().err


def test_asking_and_reducing_a_published_checkpoint(both, tmp_path, capsys):
    folder = both[1]
    Image.fromarray(frames(1, 1)[0]).save(tmp_path / "a.png")
    asked = ["ask", "--model", str(folder), "--image", str(tmp_path / "a.png"), "--json", "--max-new-tokens", "4"]
    assert main([*asked, "--reduce", "none", "--reduce", "random", "--keep", "0.5", "What color is it?"]) == 0
    none, random = json.loads(capsys.readouterr().out)
    assert random["visual_tokens_by_layer"][0] == none["visual_tokens"] // 2


@torch.no_grad()
def test_any_resolution_from_their_image_processor(tmp_path):
    """Pixels too: views of an image of any size as the library's own processor makes them."""
    torch.manual_seed(0)
    theirs = published("llava_onevision").eval()
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, processor = mmllm.load(tmp_path)
    picture = photo(60, 100)
    batch = processor.apply_chat_template([[turn({"type": "image", "image": picture}, "What?")]], **PROMPT)
    pixels = LlavaOnevisionImageProcessor(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=theirs.config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )(picture, return_tensors="pt")
    ids = their_inputs("llava_onevision", theirs, model, processor, batch)["input_ids"]
    right = theirs(input_ids=ids, attention_mask=batch["attention_mask"], **pixels).logits
    torch.testing.assert_close(model(**batch).logits, right, atol=1e-4, rtol=0)


def test_paths_are_told_apart(tmp_path: Path):
    from mmllm.model.foreign.convert import family_of

    assert family_of(tmp_path) is None
    assert family_of("runs/nothing/here") is None
    assert family_of("./some/where") is None


@pytest.mark.parametrize(("top", "text"), [(True, False), (False, True), (True, True), (False, False)])
@torch.no_grad()
def test_tied_heads_stay_what_they_are(top, text, tmp_path):
    torch.manual_seed(0)
    llm = {**LLM, "vocab_size": len(tokenizer()), "tie_word_embeddings": text}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=Qwen2Config(**llm), tie_word_embeddings=top
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    assert main(["convert", "--model", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    words = ["--model", str(tmp_path / "ours"), "--to", "transformers", "--out", str(tmp_path / "back")]
    assert main(["convert", *words]) == 0
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    first = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(back(input_ids=ids).logits, first(input_ids=ids).logits)


def test_what_the_family_does_not_have_is_not_dropped(tmp_path, capsys):
    theirs = published("llava")
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    assert main(["convert", "--model", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    recipe = load(str(tmp_path / "ours" / "recipe.yaml"), ["model.connector.mlp.depth=3"])
    blueprint = Blueprint.of(recipe)
    build_model(blueprint, weights=False).save_pretrained(tmp_path / "deep")
    build_processor(blueprint, tokenizer()).save_pretrained(tmp_path / "deep")
    words = ["--model", str(tmp_path / "deep"), "--to", "transformers", "--out", str(tmp_path / "back")]
    assert main(["convert", *words]) == 2
    assert "mlp.layers.4" in capsys.readouterr().err
