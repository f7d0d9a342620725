"""Conversations to batches: token counts, labels on answers only, any chat template."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers.tiny import picture, tiny_model, tiny_processor, tiny_recipe, turn, video

from mmllm.contract.types import MediaSpec


@pytest.fixture(scope="module")
def processor():
    """A processor over 4 frames of 3 x 3 tokens."""
    return tiny_processor(tiny_recipe())


def answers(processor, example) -> list[str]:
    """The learnt stretches of an example, decoded."""
    found, current = [], []
    for label in [*example.labels, -100]:
        if label != -100:
            current.append(label)
        elif current:
            found.append(processor.tokenizer.decode(current))
            current = []
    return found


def test_labels_are_the_answers_with_their_end_and_nothing_else(processor):
    messages = [
        turn(video(1), "Is it left or right?"),
        turn("left", role="assistant"),
        turn("And now, left?"),
        turn("no, right", role="assistant"),
    ]
    example = processor.encode(messages)
    assert answers(processor, example) == ["left<|end|>", "no, right<|end|>"]
    start, index, stream = example.spans[0]
    assert (index, stream) == (0, 0)
    assert example.ids[start : start + 36] == [processor.filler_id] * 36
    assert set(example.labels[: start + 36]) == {-100}


def test_a_turn_that_is_continued_stays_open(processor):
    messages = [turn("What moves?"), turn("The red", role="assistant")]
    closed = processor.apply_chat_template(messages)
    left_open = processor.apply_chat_template(messages, continue_final_message=True)
    assert closed == left_open + "<|end|>" and left_open.endswith("The red")


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "rewrites": "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.last %}A:<think></think>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}A:{{ m.content }}<|end|>{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}",
    "inline": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template(name):
    processor = tiny_processor(tiny_recipe())
    processor.tokenizer.chat_template = TEMPLATES[name]
    messages = [turn("left"), turn("left", role="assistant"), turn("a"), turn("a", role="assistant")]
    found = [text.strip() for text in answers(processor, processor.encode(messages))]
    thought = "<think></think>" if name == "rewrites" else ""
    assert found == ["left<|end|>", f"{thought}a<|end|>"]


def test_counts_are_known_before_decoding(processor):
    for spec, tokens in ((MediaSpec("video", 4), 36), (MediaSpec("image", 1), 9), (MediaSpec("video", 7), 63)):
        assert [stream.tokens for stream in processor.plan.streams(spec)] == [tokens]


def test_collation_pads_either_side_and_moves_spans(processor):
    examples = [
        processor.encode([turn(picture(1), "a")]),
        processor.encode([turn("x " * 30), turn("b", role="assistant")]),
    ]
    right, left = processor.collate(examples, "right"), processor.collate(examples, "left")
    shift = right["input_ids"].shape[1] - len(examples[0].ids)
    assert left["visual"]["spans"][0, 1] - right["visual"]["spans"][0, 1] == shift
    assert left["attention_mask"][0].tolist() == right["attention_mask"][0].tolist()[::-1]
    assert torch.equal(left["labels"][1], right["labels"][1])


def test_a_processor_travels_to_workers(processor):
    again = pickle.loads(pickle.dumps(processor))
    messages = [turn(video(1), "What?"), turn("left", role="assistant")]
    assert again.encode(messages).ids == processor.encode(messages).ids


def test_two_streams_and_kinds_of_media_are_spliced_where_they_belong(tmp_path):
    import yaml

    connector = [{"type": "mlp"}, {"name": "few", "type": "pool", "grid": [2, 1, 1], "only": "video"}]
    output = {"video": ["few", "mlp"], "image": "mlp"}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"base": "nano/base", "model": {"connector": connector, "output": output}}))
    recipe = tiny_recipe(str(path))
    processor, model = tiny_processor(recipe), tiny_model(recipe)
    messages = [turn(video(1), picture(2), "What?")]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(messages, **options)
    spans = batch["visual"]["spans"].tolist()
    assert [(start - spans[0][1], pair, stream) for _, start, pair, stream in spans] == [
        (0, 0, 0),
        (2, 0, 1),
        (38, 1, 0),
    ]
    with torch.no_grad():
        rows, blank = model.model.front_end(batch["visual"])
        embeds = model.embed(batch).embeds[0]
    assert (rows.shape[0], blank) == (2 + 36 + 9, 0)
    assert torch.equal(embeds[spans[0][1] : spans[0][1] + 47], rows)
    assert int(model.embed(batch).visual.sum()) == 47


def test_where_the_kind_matters_the_difference_is_declared():
    """A recipe that pools videos only: a still keeps its 6 x 6 places, a video of one frame has 3 x 3."""
    plan = tiny_processor(tiny_recipe("nano/llava_onevision_video")).plan
    assert [stream.tokens for stream in plan.streams(MediaSpec("image", 1))] == [36 + 1]
    assert [stream.tokens for stream in plan.streams(MediaSpec("video", 1))] == [9 + 1]
