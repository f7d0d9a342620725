"""Recipes: every shipped one builds and fits; mistakes are named by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny import tokenizer_folder

from mmllm.checks.summary import walk
from mmllm.config import recipe as recipes
from mmllm.contract.errors import UserError
from mmllm.contract.types import MediaSpec
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_tokenizer
from mmllm.processing.chat_template import render
from mmllm.train.weights import validate_module_names

MODELS = [name for name in recipes.names() if name != "nano/base"]
# tokens of a video into the LLM, parameters of the whole in units of 1e6
FIGURES = {
    "llava": (4 * 24 * 24, 7063),
    "video_chatgpt": (100 + 256, 7046),
    "llava_onevision_video": (32 * 196 + 1, 8030),
    "llava_onevision": (32 * 196 + 1, 8030),
    "merv": (16 * 8 * 8, 7643),
    "smol": (4 * 9, 138.4),
    "ppllava": (1024, 7241),
    "aligngpt": (4 * 24 * 24 + 1, 7063),
    "bridgetower": (8 * 18 * 18, 7026),
    "clip": (4 * 24 * 24, 346.4),
    "aim": (32 * 49 + 1, 8031),
    "aim_image": (4 * 252, 7063),
    "llava_kd_teacher": (4 * 27 * 27, 3490),
    "llava_kd": (4 * 27 * 27, 893.6),
    "ppllava_dpo": (1024, 7241),
    "nano/small": (8 * 9, None),
    "nano/llava_kd": (8 * 9, None),
    "nano/dpo": (8 * 9, None),
    "nano/small_twice": (8 * 9, None),
    "nano/small_dpo": (8 * 9, None),
    "nano/ppllava": (4 * 9, None),
    "nano/aligngpt": (8 * 9 + 1, None),
    "nano/bridgetower": (8 * 9, None),
    "nano/clip": (8 * 9, None),
    "nano/aim": (8 * 9 + 1, None),
    "nano/aim_image": (8 * 15, None),
    "longvlm": (5 + 10 * 30 + 2, 7046),
    "st_llm": (16 * 32, 8044),
    "st_llm_long": (16 * 32, 7947),
    "nano/st_llm": (8 * 9, None),
    "llava_st": (100 * 9 + 20 * 81, 8099),
    "nano/llava_st": (8 + 4 * 9, None),
    "nano/longvlm": (1 + 4 * 6, None),
    "nano/llava": (8 * 9, None),
    "nano/video_chatgpt": (8 + 9, None),
    "nano/llava_onevision_video": (8 * 9 + 1, None),
    "nano/llava_onevision": (8 * 9 + 1, None),
    "nano/merv": (8 * 9, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_recipe_walks_to_its_figures(name):
    tokens, millions = FIGURES[name]
    rows = walk(Blueprint.of(recipes.load(name)))
    assert rows[-1].tokens == tokens
    free = ("newline", "any_resolution", "temporal_spatial_mean", "llm_embedding")
    free += ("global_tokens", "sequence_concat", "markers", "ids", "lape", "coordinates")
    assert all(row.macs > 0 for row in rows if row.type not in free)
    if millions is not None:
        assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_stage_trains_what_is_there(name):
    recipe = recipes.load(name)
    front = Blueprint.of(recipe).plan
    for stage, settings in recipe.stages.items():
        validate_module_names(front, settings, recipe.where(f"stages.{stage}"))


@pytest.mark.parametrize("name", MODELS)
def test_a_dumped_recipe_is_the_same(name, tmp_path):
    first = recipes.load(name)
    (tmp_path / "r.yaml").write_text(first.dump())
    assert recipes.load(tmp_path / "r.yaml").data == first.data


def write(folder: Path, **sections: object) -> Path:
    """A recipe on the nano base with other sections."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "nano/base", **sections}))
    return path


def problem(path: Path | str, *overrides: str) -> str:
    """The one line that a mistake gives."""
    with pytest.raises(UserError) as error:
        Blueprint.of(recipes.load(path, overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava", f"<bos>{SYSTEM} USER: q ASSISTANT: a<|end|>USER: r ASSISTANT:"),
        ("merv", "<bos>In: q\nOut: a<|end|>In: r\nOut:"),
    ],
)
def test_recipes_write_conversations_for_llms_without_a_template(name, said):
    """As LLaVA's "v1" and MERV's plain prompts are; what is learnt is the answer with the end."""
    tokenizer = build_tokenizer(recipes.load(name, [f"model.llm.tokenizer={tokenizer_folder()}"]))
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    rendered = render(tokenizer, turns, prompt=True)
    assert rendered.text == said
    assert [rendered.text[start:end] for start, end in rendered.answers] == [" a<|end|>"]


def test_overrides_address_by_name_and_are_typed():
    made = recipes.load("nano/llava", ["stages.instruct.lr=1e-5", "model.encoders.nano.grid=3,3"])
    assert made.stages["instruct"].lr == 1e-5
    made = recipes.load("nano/llava_onevision_video", ["model.connector.pool.kernel=2,3,3"])
    assert Blueprint.of(made).plan.streams(MediaSpec("video", 8))[0].tokens == 4 * 2 * 2 + 1


def test_overrides_set_what_a_recipe_leaves_out():
    """Arguments of every kind of part, and what stands beside them."""
    lines = ["model.text.words.joint=64", "model.text.words.turns=last", "model.connector.mlp.only=video"]
    lines += ["model.encoders.nano.channels=8,8,8", "stages.text.objective.groups=2"]
    made = recipes.load("nano/bridgetower", lines)
    assert made.model["text"]["words"] == {"type": "nano_text", "width": 96, "depth": 2, "joint": 64, "turns": "last"}
    assert made.model["connector"][0]["only"] == "video" and made.stages["text"].objective["groups"] in (2, "2")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.instruct.lrr=1", "stages.instruct.lrr: unknown key. Try: lr"),
        ("model.connector.mpl.width=3", "model.connector.mpl: no such key. Try: mlp"),
        ("model.encoders.nano.sise=3", "model.encoders.nano.sise: unknown key. Try: size"),
        ("stages.instruct.lr=fast", "stages.instruct.lr: wrong type, expected float"),
        ("model.encoders.nano.size=big", "model.encoders.nano.size: wrong type, expected int"),
        ("model.media.frames=0", "model.media.frames: out of range, expected int >= 1"),
        ("nonsense", "not an override"),
    ],
)
def test_wrong_overrides(override, says):
    assert says in problem("nano/llava", override)


def test_unknown_names():
    assert "Try: llava" in problem("lava")
    assert "no such file" in problem("nowhere.yaml")


def test_parts_that_do_not_fit_name_both_and_their_shapes(tmp_path):
    wide = write(tmp_path, model={"connector": [{"type": "mlp", "width": 96}]})
    assert problem(wide) == "mine.yaml:model.connector.mlp: width 96, llm takes 128. Try: {type: linear} after it"
    lost = write(tmp_path, model={"connector": ["temporal_spatial_mean", {"type": "pool", "grid": [2, 2, 2]}]})
    text = problem(lost)
    assert "model.connector.pool" in text
    assert "temporal_spatial_mean: 17 tokens of width 128 (no grid)" in text


def test_a_recipe_names_what_is_wrong_in_it(tmp_path):
    assert "mine.yaml:model.connector.mpl.type: no connector is called 'mpl'" in problem(
        write(tmp_path, model={"connector": [{"type": "mpl"}]})
    )
    assert "mine.yaml:modell: unknown key. Try: model" in problem(write(tmp_path, modell={}))
    assert "mine.yaml:model.connector.mlp.in: no encoder or node above is called 'nono'. Try: nano" in problem(
        write(tmp_path, model={"connector": [{"type": "mlp", "in": "nono"}]})
    )
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "not YAML" in problem(tmp_path / "broken.yaml")
    two = write(tmp_path, model={"encoders": {"other": {"type": "nano_conv"}}})
    assert "which encoder does it read?" in problem(two)


def test_bases_merge_maps_and_replace_lists(tmp_path):
    path = write(tmp_path, model={"media": {"frames": 4}, "connector": ["linear"]})
    made = recipes.load(path)
    assert made.model["media"] == {"frames": 4}
    assert [node["type"] for node in made.model["connector"]] == ["linear"]
    assert made.model["llm"]["config"]["hidden_size"] == 128


def test_null_takes_a_key_out_and_another_type_keeps_nothing_of_the_old_one(tmp_path):
    base = {"media": {"frames": 4}, "text": {"words": {"type": "nano_text", "width": 64}}}
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump({"base": "nano/base", "model": base}))
    changed = {"media": {"frames": None, "fps": 2}, "text": {"words": {"type": "llm_embedding"}}}
    made = recipes.load(write(tmp_path, base="middle.yaml", model=changed))
    assert made.model["media"] == {"fps": 2}
    assert made.model["text"] == {"words": {"type": "llm_embedding"}}


def test_a_text_that_looks_like_a_number_stays_a_text():
    made = recipes.load("nano/llava", ["roots.world=2024"])
    assert made.path("world:train/text.jsonl") == "2024/train/text.jsonl"


def test_only_and_several_streams(tmp_path):
    connector = [
        {"type": "mlp"},
        {"name": "few", "type": "pool", "grid": [2, 1, 1], "only": "video"},
        {"name": "lines", "type": "newline", "at": "row", "in": "mlp", "only": "image"},
    ]
    path = write(tmp_path, model={"connector": connector, "output": {"video": ["few", "mlp"], "image": "lines"}})
    front = Blueprint.of(recipes.load(path)).plan
    assert [spec.tokens for spec in front.streams(MediaSpec("video", 8))] == [2, 72]
    assert [spec.tokens for spec in front.streams(MediaSpec("image", 1))] == [12]
