"""The same answer whichever way it is computed: batched, padded, cached, by beams, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import LLMS, conversations, picture, tiny_model, tiny_processor, tiny_recipe, turn, video

PROMPT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


def batched(processor, messages, side: str):
    """The batch of some conversations, padded on one side."""
    return processor.apply_chat_template(messages, **PROMPT, processor_kwargs={"padding_side": side})


ALIKE = ("nano/bridgetower", "nano/ppllava", "nano/aligngpt")
"""Front ends to which a still is a clip of one frame; the others do something else with each."""
FRONTS = (*ALIKE, "nano/merv", "nano/longvlm", "nano/st_llm", "nano/llava_st")


@pytest.fixture(scope="module", params=[*LLMS, *FRONTS])
def pair(request):
    """(model, processor) over each family of LLM, and behind front ends of several encoders or guided by the prompt."""
    recipe = tiny_recipe(request.param) if request.param in FRONTS else tiny_recipe(llm=request.param)
    return tiny_model(recipe), tiny_processor(recipe)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_is_single(pair, side):
    model, processor = pair
    batch = batched(processor, conversations(), side)
    together = model(**batch).logits
    for row, messages in enumerate(conversations()):
        single = batched(processor, [messages], side)
        alone = model(**single).logits[0]
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_media_change_the_answer(pair):
    model, processor = pair
    first = model(**batched(processor, [[turn(video(5), "What?")]], "left")).logits
    second = model(**batched(processor, [[turn(video(6), "What?")]], "left")).logits
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("pair", [*LLMS, *ALIKE], indirect=True, scope="module")
@torch.no_grad()
def test_image_is_one_frame_video(pair):
    model, processor = pair
    still = {"type": "video", "video": picture(7)["image"], "frames": 1}
    as_video = model(**batched(processor, [[turn(still, "What?")]], "left"))
    as_image = model(**batched(processor, [[turn(picture(7), "What?")]], "left"))
    # The two placeholders are other tokens nowhere: a visual position holds front-end rows alone.
    torch.testing.assert_close(as_video.logits, as_image.logits, atol=0, rtol=0)


@torch.no_grad()
def test_cached_generation_is_recomputation(pair):
    model, processor = pair
    batch = batched(processor, conversations(), "left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**copy.deepcopy(batch), **options)
    recomputed = model.generate(**copy.deepcopy(batch), **options, use_cache=False)
    assert torch.equal(cached, recomputed)


@torch.no_grad()
def test_generation_is_greedy_over_full_forwards(pair):
    model, processor = pair
    batch = batched(processor, [conversations()[2]], "left")
    generated = model.generate(**copy.deepcopy(batch), max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        logits = model(ids, mask, visual=batch["visual"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.ones_like(ids)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_beams_with_two_images_are_beams_on_embeddings(pair):
    model, processor = pair
    messages = [
        [turn(picture(1), picture(2), "Which is red?")],
        [turn(picture(3), "and", picture(4), "Which one is it then?")],
    ]
    batch = batched(processor, messages, "left")
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    beams = model.generate(**copy.deepcopy(batch), **options)
    embeds = model.embed(batch).embeds
    reference = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(beams[:, batch["input_ids"].shape[1] :], reference)


@torch.no_grad()
def test_several_sequences_per_prompt_see_their_own_media(pair):
    model, processor = pair
    batch = batched(processor, conversations(), "left")
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    greedy = model.generate(**copy.deepcopy(batch), **options)
    torch.manual_seed(0)
    several = model.generate(
        **copy.deepcopy(batch), max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=None
    )
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))


@torch.no_grad()
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(pair, tmp_path):
    import mmllm

    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = mmllm.load(tmp_path)
    batch = batched(processor, conversations(), "left")
    batch_again = batched(again_processor, conversations(), "left")
    assert torch.equal(batch["input_ids"], batch_again["input_ids"])
    assert torch.equal(model(**batch).logits, again(**batch_again).logits)


@torch.no_grad()
def test_equal_media_are_encoded_once(pair):
    model, processor = pair
    shared = picture(9)
    batch = batched(processor, [[turn(shared, "What?")], [turn(shared, "Where?")]], "left")
    assert len(batch["visual"]["media"]) == 1
    streams = processor.plan.streams(batch["visual"]["media"][0]["spec"])
    assert len(batch["visual"]["spans"]) == 2 * len(streams)
    apart = batched(processor, [[turn(picture(9), "Where?")]], "left")
    row = model(**batch).logits[1][batch["attention_mask"][1].bool()]
    torch.testing.assert_close(row, model(**apart).logits[0], atol=2e-5, rtol=0)


def test_text_alone_reaches_no_encoder(pair, monkeypatch):
    model, processor = pair

    def refuse(*arguments, **keywords):
        raise AssertionError("an encoder ran for text")

    monkeypatch.setattr(model.model.front_end.bank, "forward", refuse)
    with torch.no_grad():
        model(**batched(processor, [conversations()[0]], "left"))


def test_streaming_equals_generate(pair):
    import mmllm

    model, processor = pair
    from mmllm.api import stream_answer

    batch = batched(processor, [conversations()[3]], "left")
    whole = model.generate(**copy.deepcopy(batch), max_new_tokens=8, do_sample=False)
    text = processor.tokenizer.decode(whole[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    pieces = "".join(stream_answer(model, processor, batch, max_new_tokens=8))
    assert pieces.strip() == text.strip()
    assert mmllm.generate(model, processor, "What?", max_new_tokens=4) is not None
