"""The prompt path: what the user says reaches the parts that declare it, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny import tiny_model, tiny_processor, tiny_recipe, turn, video
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Part, Site, TextSource
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens
from mmllm.model.blueprint import Blueprint


@register("text", "letters_of_test")
class Letters(TextSource):
    """Each character is a token; pooled is the mean of their embeddings."""

    joint = 6
    width = 6
    length = 40
    layered = False

    def __init__(self, site: Site, *, rows: int = 128) -> None:
        super().__init__(site)
        self.table = nn.Embedding(rows, 6)

    def encode(self, text: str) -> list[int]:
        return [1, *(ord(letter) % 127 + 1 for letter in text[:38]), 2]

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows) or 1
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[place, : max(1, len(row))] = 1
        return ids, mask

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        tokens = self.table(ids) * mask[..., None]
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True)
        return PromptFeatures(ids, mask, tokens, pooled, present=mask.sum(1) > 1)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        yield {}, ([1, 5, 2], [1, 6, 7, 2])


@register("connector", "asked_of_test")
class Asked(Part):
    """Adds a projection of the prompt to every token; nothing where nothing was asked."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.layer = nn.Linear(site.prompt_joint or 1, site.inputs[0].width, bias=False)

    def needs(self) -> Needs:
        return Needs(prompt=("pooled",))

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        return inputs[0]

    def forward(self, *inputs: VisualTokens, prompt: PromptFeatures) -> VisualTokens:
        added = self.layer(prompt.pooled) * prompt.present[:, None]
        return inputs[0].with_values(inputs[0].values + added[:, None])

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        yield {}, (TokenSpec(MediaSpec("video", 2), 8, 16, Grid(2, 2, 2)),)


def recipe(folder: Path, **model: Any) -> Any:
    path = folder / "asked.yaml"
    section = {
        "text": {"letters": {"type": "letters_of_test", **model.pop("text", {})}},
        "connector": [{"type": "asked_of_test"}, {"type": "mlp", "width": "llm"}],
        **model,
    }
    path.write_text(yaml.safe_dump({"base": "nano/base", "model": section}))
    return tiny_recipe(str(path))


@pytest.fixture
def made(tmp_path):
    built = recipe(tmp_path)
    return tiny_model(built), tiny_processor(built)


OPTIONS = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


def rows(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model.model.front_end(batch["visual"])[0]


def test_each_clip_is_guided_by_its_own_question(made):
    model, processor = made
    chats = [[turn(video(seed), text)] for seed, text in ((1, "What moves?"), (2, "A longer question, is it?"))]
    together = rows(model, processor.apply_chat_template(chats, **OPTIONS))
    alone = [rows(model, processor.apply_chat_template(chat, **OPTIONS)) for chat in chats]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    other = processor.apply_chat_template([turn(video(1), "What grows?")], **OPTIONS)
    assert (rows(model, other) - alone[0]).abs().max() > 1e-4


def test_one_clip_with_two_questions_is_encoded_once(made):
    model, processor = made
    clip = video(1)
    batch = processor.apply_chat_template([[turn(clip, "What moves?")], [turn(clip, "Where?")]], **OPTIONS)
    visual = batch["visual"]
    assert (len(visual["media"]), visual["pairs"]) == (1, [(0, 0), (0, 1)])
    seen: list[int] = []
    model.model.front_end.bank.encoders["nano"].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[0])
    )
    found = rows(model, batch)
    assert seen == [1]
    assert (found[: len(found) // 2] - found[len(found) // 2 :]).abs().max() > 1e-4


@pytest.mark.parametrize(("turns", "said"), [("all", "one\ntwo"), ("first", "one"), ("last", "two")])
def test_which_turns_guide_is_explicit_and_answers_never_do(tmp_path, turns, said):
    processor = tiny_processor(recipe(tmp_path, text={"turns": turns}))
    chat = [turn(video(1), "one"), turn("an answer", role="assistant"), turn("two")]
    example = processor.encode(chat)
    assert example.prompt == {"letters": Letters(Site()).encode(said)}


def test_without_a_question_the_part_is_told_so(made):
    model, processor = made
    batch = processor.apply_chat_template([turn(video(1), " ")], **OPTIONS)
    front = model.model.front_end
    visual = {**batch["visual"]}
    plain = rows(model, {"visual": {key: value for key, value in visual.items() if key != "prompts"}})
    torch.testing.assert_close(rows(model, batch), plain)
    assert len(front.prompts.blank(torch.device("cpu"))["letters"]["ids"]) == 1


def test_saved_loaded_generated(made, tmp_path):
    import mmllm

    model, processor = made
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, reader = mmllm.load(tmp_path / "model")
    chats = [[turn(video(1), "What moves?")], [turn("Only text")], [turn(video(2), "Where to?", video(3))]]
    batch = processor.apply_chat_template(chats, **OPTIONS)
    other = reader.apply_chat_template(chats, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**other).logits)
        greedy = model.generate(**batch, max_new_tokens=5, do_sample=False)
        beams = model.generate(**batch, max_new_tokens=5, num_beams=2, do_sample=False)
    assert greedy.shape[0] == beams.shape[0] == 3


def test_gradients_reach_a_source_that_trains_and_no_frozen_one(made):
    from mmllm.train.weights import freeze

    model, processor = made
    batch = processor.collate([processor.encode([turn(video(1), "What?"), turn("left", role="assistant")])])
    for trains, reached in ((("connector", "text"), True), (("connector",), False)):
        freeze(model, trains, "stages")
        model.zero_grad()
        model(**batch).loss.backward()
        gradient = model.model.front_end.prompts.sources["letters"].table.weight.grad
        assert (gradient is not None and bool((gradient != 0).any())) is reached


def test_a_part_that_needs_the_prompt_says_so(tmp_path):
    built = recipe(tmp_path)
    built.model["text"] = {}
    with pytest.raises(UserError, match=r"asked_of_test: needs the prompt, but no text source is named for it"):
        Blueprint.of(built)
    two = {"letters": {"type": "letters_of_test"}, "more": {"type": "letters_of_test"}}
    built.model["text"] = two
    with pytest.raises(UserError, match=r"Try: prompt: letters or more"):
        Blueprint.of(built)
    built.model["connector"][0]["prompt"] = "mroe"
    with pytest.raises(UserError, match=r"no text source is called 'mroe'\. Try: more"):
        Blueprint.of(built)
    built.model["text"] = {"letters": {"type": "leters_of_test"}}
    with pytest.raises(UserError, match=r"no text is called 'leters_of_test'. Try: letters_of_test"):
        Blueprint.of(built)


def test_a_stream_may_stand_at_the_start(tmp_path):
    connector = [{"type": "mlp", "width": "llm"}, {"type": "pool", "grid": [1, 1, 1]}]
    built = recipe(tmp_path, connector=connector, output=["mlp", "pool"], place={"pool": "start"})
    processor, model = tiny_processor(built), tiny_model(built)
    batch = processor.apply_chat_template([turn("Look:", video(1), "what moves?")], **OPTIONS)
    start = int(batch["input_ids"][0, 0] == processor.tokenizer.bos_token_id)
    example = processor.encode([turn("Look:", video(1), "what moves?"), turn("left", role="assistant")])
    learnt = [index for index, label in enumerate(example.labels) if label != -100]
    assert processor.tokenizer.decode([example.ids[index] for index in learnt]) == "left<|end|>"
    assert len(example.labels) == len(example.ids) and learnt == list(range(learnt[0], len(example.ids)))
    (one, many) = batch["visual"]["spans"].tolist()
    assert one == [0, start, 0, 1] and many[1] > start + 1 and many[2:] == [0, 0]
    with torch.no_grad():
        values = model.model.front_end(batch["visual"])[0]
        embeds = model.embed(batch).embeds[0]
    torch.testing.assert_close(embeds[start], values[-1])
    torch.testing.assert_close(embeds[many[1] : many[1] + len(values) - 1], values[:-1])


def test_a_medium_of_a_single_stream_may_stand_at_the_start_alone(tmp_path):
    built = recipe(tmp_path, connector=[{"type": "mlp", "width": "llm"}], output="mlp", place={"mlp": "start"})
    processor = tiny_processor(built)
    batch = processor.apply_chat_template([turn("Look:", video(1), "what moves?")], **OPTIONS)
    start = int(batch["input_ids"][0, 0] == processor.tokenizer.bos_token_id)
    assert batch["visual"]["spans"].tolist() == [[0, start, 0, 0]]
    plain = processor.apply_chat_template([turn("Look:", "what moves?")], **OPTIONS)["input_ids"]
    count = processor.plan.streams(batch["visual"]["media"][0]["spec"])[0].tokens
    assert batch["input_ids"].shape[1] == plain.shape[1] + count
