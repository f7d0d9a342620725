"""Coordinates as tokens: in the embedding, in the head, in conversations, behind every family of LLM."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import LLMS, frames, tiny_model, tiny_processor, tiny_recipe, turn, video
from torch import nn

import mmllm
from mmllm.contract.errors import UserError
from mmllm.contract.grounding import Coordinates
from mmllm.model.head import Head, log_probs
from mmllm.model.vocabulary import CoordinateTables
from mmllm.train.targets import Targets
from mmllm.train.weights import freeze

PROMPT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
INSIDE, BEHIND = "model.llm.config.vocab_size=768", "model.llm.config.vocab_size=669"


def conversations() -> list[list[dict]]:
    """Text alone, and questions about a video with places and moments in them."""
    box, span = {"type": "box", "box": [0.1, 0.2, 0.55, 0.9]}, {"type": "time", "time": [1.2, 5]}
    tube = {"type": "tube", "tube": [[0, 0.1, 0.2, 0.3, 0.4], [3.3, 0, 0, 1, 1]]}
    return [
        [turn("How many objects move?")],
        [turn(video(3), "What is in", box, "?")],
        [turn(video(4), "When is it?"), turn("It is", span, role="assistant"), turn("And where?", span)],
        [turn("Here:", box, "and", video(5), tube, "what moves?")],
    ]


@pytest.fixture(scope="module", params=[(llm, rows) for llm in LLMS for rows in (INSIDE, BEHIND)], ids=str)
def pair(request):
    """(model, processor); the ids lie among an LLM's spare rows, or behind its table."""
    llm, rows = request.param
    recipe = tiny_recipe("nano/llava_st", llm, (rows,))
    model = tiny_model(recipe)
    for table in model.model.vocabulary.parameters():
        nn.init.normal_(table, std=0.3)  # or no coordinate would ever be said
    return model, tiny_processor(recipe)


def batched(processor, messages, side: str = "left"):
    return processor.apply_chat_template(messages, **PROMPT, processor_kwargs={"padding_side": side})


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_is_single(pair, side):
    model, processor = pair
    batch = batched(processor, conversations(), side)
    together = model(**batch).logits
    for row, messages in enumerate(conversations()):
        alone = model(**batched(processor, [messages], side)).logits[0]
        torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_cached_generation_is_recomputation_and_says_coordinates(pair):
    model, processor = pair
    batch = batched(processor, conversations())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**copy.deepcopy(batch), **options)
    assert torch.equal(cached, model.generate(**copy.deepcopy(batch), **options, use_cache=False))
    said = cached[:, batch["input_ids"].shape[1] :]
    assert (model.model.vocabulary.rows_of(said) >= 0).any()
    assert said.max() < processor.plan.vocabulary.first + len(processor.plan.vocabulary)
    texts = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    assert any("<TEMP-" in text or "<WIDTH-" in text or "<HEIGHT-" in text for text in texts)


@torch.no_grad()
def test_beams_are_beams_on_embeddings(pair):
    model, processor = pair
    batch = batched(processor, conversations()[1:3])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    beams = model.generate(**copy.deepcopy(batch), **options)
    embeds = model.embed(batch).embeds
    reference = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(beams[:, batch["input_ids"].shape[1] :], reference)


@torch.no_grad()
def test_saved_and_loaded_is_the_same(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = mmllm.load(tmp_path)
    batch = batched(processor, conversations())
    repeated = batched(again_processor, conversations())
    assert torch.equal(batch["input_ids"], repeated["input_ids"])
    assert torch.equal(model(**batch).logits, again(**repeated).logits)


@torch.no_grad()
def test_an_exact_place_lies_between_its_bins(pair):
    model, processor = pair
    layout, tables = processor.plan.vocabulary, model.model.vocabulary()
    batch = batched(processor, [conversations()[1]])
    where = model.model.vocabulary.rows_of(batch["input_ids"][0]) >= 0
    embeds = model.embed(batch).embeds[0, where]
    sides = zip(("width", "height", "width", "height"), (0.1, 0.2, 0.55, 0.9), embeds, strict=True)
    for axis, share, row in sides:
        low, high, ratio = layout.rows(axis, share)
        torch.testing.assert_close(row, (1 - ratio) * tables.inputs[low] + ratio * tables.inputs[high])
    nearest = [
        layout.first + layout.nearest(axis, share) for axis, share in zip(("width", "height"), (0.1, 0.2), strict=True)
    ]
    assert batch["input_ids"][0, where][:2].tolist() == nearest
    del batch["visual"]["coordinates"]  # then a token means its bin
    rows = model.model.vocabulary.rows_of(batch["input_ids"][0, where])
    torch.testing.assert_close(model.embed(batch).embeds[0, where], tables.inputs[rows])


@torch.no_grad()
def test_no_logit_where_there_is_no_token(pair):
    model, processor = pair
    layout, rows = processor.plan.vocabulary, model.config.text_config.vocab_size
    logits = model(**batched(processor, conversations())).logits
    assert logits.shape[-1] == max(rows, layout.first + len(layout))
    outputs = model.model.vocabulary().outputs
    hidden = torch.randn(3, outputs.shape[1])
    found = model.lm_head(hidden)
    torch.testing.assert_close(found[:, layout.first : layout.first + len(layout)], hidden @ outputs.T)
    torch.testing.assert_close(found[:, : layout.first], (hidden @ model.lm_head.weight.T)[:, : layout.first])


@pytest.mark.parametrize("vocabulary", [30, 21, 20, 18])
def test_scores_in_chunks_are_those_of_a_whole_matrix(vocabulary, monkeypatch):
    from mmllm.model import head as module

    torch.manual_seed(0)
    layout = Coordinates(time=4, height=3, width=2, first=20)
    tables, head = CoordinateTables(layout, 8, 1.0).double(), Head(8, vocabulary).double()
    head.use(tables)
    rows, ids = torch.randn(11, 8, dtype=torch.float64, requires_grad=True), torch.arange(11) % 9 + 20
    ids[:2] = torch.tensor([3, 17])
    found = []
    for elements in (None, 40):
        if elements:
            monkeypatch.setattr(module, "ELEMENTS", elements)
            total = head(rows, lambda logits, which: {"sum": -log_probs(logits, ids[which]).sum()})["sum"]
        else:
            whole = torch.zeros(max(vocabulary, 29), 8, dtype=torch.float64)
            whole = whole.index_copy(0, torch.arange(vocabulary), head.weight)
            whole = whole.index_copy(0, tables.ids(whole.device), tables().outputs)
            nobody = torch.arange(len(whole))
            nobody = (nobody >= vocabulary) & (nobody < 20)
            logits = (rows @ whole.T).masked_fill(nobody, -torch.inf)
            total = -log_probs(logits, ids).sum()
        for value in (rows, head.weight, *tables.parameters()):
            value.grad = None
        total.backward()
        found.append([total.detach(), rows.grad, head.weight.grad, *(value.grad for value in tables.outputs.values())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_bin_learns_from_its_neighbours_exactly_in_every_format():
    for dtype in (torch.float32, torch.bfloat16):
        tables = CoordinateTables(Coordinates(time=5, height=3, width=3, first=0), 4, 1.0).to(dtype)
        found = tables()
        assert torch.equal(found.inputs[:5], tables.inputs["time"])
        found.inputs[2].sum().backward()
        assert tables.inputs["time"].grad[:, 0].tolist() == [0.25, 0.5, 2.0, 0.5, 0.25]
        assert tables.inputs["height"].grad.eq(0).all()


def test_vocabulary_trains_alone(pair):
    model, processor = copy.deepcopy(pair[0]), pair[1]
    freeze(model, ("vocabulary",), "trains")
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {
        f"model.vocabulary.{side}.{axis}" for side in ("inputs", "outputs") for axis in ("time", "height", "width")
    }
    talk = [*conversations()[2], turn("It is", {"type": "time", "time": [0, 2]}, role="assistant")]
    batch = processor.collate([processor.encode(talk)])
    model(**batch).loss.backward()
    assert all(value.grad.abs().sum() > 0 for name, value in model.named_parameters() if name in trained)


@torch.no_grad()
def test_the_two_bins_around_a_place_share_its_target():
    logits = torch.randn(2, 9)
    targets = Targets.of(
        {
            "labels": torch.tensor([[-100, 4, 7]]),
            "visual": {
                "coordinates": {
                    "places": torch.tensor([[0, 1], [0, 0]]),
                    "ids": torch.tensor([[4, 5], [1, 2]]),
                    "ratio": torch.tensor([0.25, 0.5]),
                }
            },
        }
    )
    assert targets.ids.tolist() == [[-100, 4, 7]] and targets.upper.tolist() == [[-100, 5, 7]]
    own = targets.at(targets.ids != -100)
    found, expected = own.log_probs(logits, slice(0, 2)), logits.log_softmax(-1)
    torch.testing.assert_close(found, torch.stack([0.75 * expected[0, 4] + 0.25 * expected[0, 5], expected[1, 7]]))


# Conversations


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_recipe("nano/llava_st"))


def text_of(processor, messages) -> str:
    return processor.tokenizer.decode(processor.encode(messages, answers=False).ids)


def test_moments_run_from_the_first_frame_that_is_seen_to_the_last(processor):
    clip = {"type": "video", "video": frames(0, 9)}  # one frame per second, four of them seen: 0, 3, 5, 8
    for seconds, bins in (([0, 8], (0, 15)), ([-1, 99], (0, 15)), ([4, 8], (8, 15)), ([1.6, 3.2], (3, 6))):
        said = text_of(processor, [turn(clip, {"type": "time", "time": seconds})])
        assert "{" + "".join(f"<TEMP-{number:03d}>" for number in bins) + "}" in said


def test_moments_before_the_first_frame_that_is_seen_are_at_its_place(processor):
    clip = {"type": "video", "video": frames(0, 9), "sampler": "uniform"}  # 1, 3, 5, 7 are seen
    for seconds, bins in (([0, 1], (0, 0)), ([4, 7], (8, 15)), ([2, 8], (3, 15))):
        said = text_of(processor, [turn(clip, {"type": "time", "time": seconds})])
        assert "{" + "".join(f"<TEMP-{number:03d}>" for number in bins) + "}" in said


def test_a_moment_is_of_the_clip_before_it_or_of_the_one_it_names(processor):
    short, long = ({"type": "video", "video": frames(0, count)} for count in (5, 17))
    at = {"type": "time", "time": [4, 4]}
    assert "<TEMP-015><TEMP-015>" in text_of(processor, [turn(long, short, at)])
    assert "<TEMP-004><TEMP-004>" in text_of(processor, [turn(long, short, {**at, "of": 0})])
    with pytest.raises(UserError, match="a moment of a clip that does not come before it"):
        text_of(processor, [turn(at, short)])
    with pytest.raises(UserError, match="a moment of a clip that does not come before it"):
        text_of(processor, [turn({**at, "of": 0}, short)])
    with pytest.raises(UserError, match="of: no such medium, expected 0 to 0, got 1"):
        text_of(processor, [turn(short, {**at, "of": 1})])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"type": "box", "box": [0, 1, 2]}, "box entry: box: wrong shape, expected 4 numbers"),
        ({"type": "box", "box": [0, 1, 2, "x"]}, "box entry: box: not a number, got 'x'"),
        ({"type": "box", "box": [0, 1, 2, float("nan")]}, "box entry: box: not a number"),
        ({"type": "time"}, "time entry: time: wrong shape, expected 2 numbers"),
        ({"type": "tube", "tube": []}, "tube entry: tube: no moments"),
        ({"type": "tube", "tube": [[1, 2]]}, r"tube entry: tube\[0\]: wrong shape, expected 5 numbers"),
        ({"type": "location", "axis": "depth", "at": 1}, "location entry: axis"),
        ({"type": "box", "box": [0, 0, 1, 1], "off": 1}, "box entry: 'off': unknown key. Try: of"),
        ({"type": "boxes"}, "content entry: unknown type, expected text, image, video, box, time, tube, location"),
    ],
)
def test_places_that_are_none(processor, entry, said):
    with pytest.raises(UserError, match=said):
        text_of(processor, [turn(video(1), entry)])


def test_a_model_without_coordinates_says_so():
    plain = tiny_processor(tiny_recipe())
    with pytest.raises(UserError, match="no words for places and moments"):
        text_of(plain, [turn(video(1), {"type": "box", "box": [0, 0, 1, 1]})])


def test_ids_that_are_not_the_tokenizers():
    with pytest.raises(UserError, match="first: not the tokenizer's ids, expected 700, got <TEMP-000> is 669"):
        tiny_processor(tiny_recipe("nano/llava_st", overrides=("model.vocabulary.first=700",)))


def test_a_part_that_reads_coordinates_needs_some():
    from mmllm.model.blueprint import Blueprint

    recipe = tiny_recipe("nano/llava_st")
    del recipe.model["vocabulary"]
    with pytest.raises(UserError, match=r"connector\.lape: needs coordinates"):
        Blueprint.of(recipe)


def test_another_llm_has_other_ids():
    from mmllm.config.recipe import load

    assert load("llava_st").model["vocabulary"]["first"] == 151648
    other = load("llava_st", ["model.llm.name=somebody/else"])
    assert "first" not in other.model["vocabulary"]


def test_places_as_text_and_in_any_template(pair):
    _, processor = pair
    box = {"type": "box", "box": [0.1, 0.2, 0.55, 0.9]}
    text = processor.apply_chat_template([turn("What is in", box, "?")], add_generation_prompt=True)
    layout = processor.plan.vocabulary
    assert layout.token("width", layout.nearest("width", 0.1) - layout.offset("width")) in text
    with pytest.raises(UserError, match="no token before its clip is read"):
        processor.apply_chat_template([turn(video(3), "From", {"type": "time", "time": [1, 2]}, "?")])
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    said = processor.apply_chat_template([turn("What is in", box, "?")], chat_template=template)
    assert said.count("user:What is in") == 1 and said.count("<WIDTH-") == 2 and said.endswith("?;")


def test_tiles_have_no_places_of_their_own():
    from mmllm.connectors.llava_st.lape import LanguageAlignedPositions
    from mmllm.contract.parts import Site
    from mmllm.contract.types import Grid, MediaSpec, TokenSpec

    tiled = TokenSpec(MediaSpec("image", 5, tiles=(2, 2)), 20, 16, Grid(5, 2, 2))
    with pytest.raises(ValueError, match="an image in tiles"):
        LanguageAlignedPositions(Site((tiled,), llm_width=16)).output_spec(tiled)
