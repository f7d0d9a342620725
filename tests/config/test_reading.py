"""Recipes are read by one typed door: whatever stands in a file or an override, the answer is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny import save_model, tiny_recipe

from mmllm.config.recipe import load
from mmllm.contract.documents import parse_yaml
from mmllm.contract.errors import UserError
from mmllm.model.blueprint import Blueprint, llm_facts


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def checked(folder: Path, **model: object) -> None:
    """A nano recipe with other values in its model section, read and built without memory."""
    data = tiny_recipe().data
    for key, value in model.items():
        *parents, last = key.split("__")
        here = data["model"]
        for name in parents:
            here = here[name]
        here[last] = value
    Blueprint.of(load(written(folder, yaml.safe_dump(data))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 5", "mine.yaml:base: wrong type, expected a recipe or a list of them, got 5"),
        ("base: [nano/llava, {a: 1}]", "mine.yaml:base: wrong type"),
        ("base: mine.yaml", "mine.yaml:base: a recipe is its own base"),
        ("base: nano/llava\nmodel: 1", "mine.yaml:model: wrong type, expected a map, got 1"),
        ("base: nano/llava\nmodel: null", "mine.yaml:model: missing"),
        ("base: nano/llava\nstages: [1]", "mine.yaml:stages: wrong type, expected a map"),
        ("base: nano/llava\nstages: {a: 5}", "mine.yaml:stages.a: wrong type, expected a map, got 5"),
        ("base: nano/llava\nstages: {a/b: {}}", "mine.yaml:stages.'a/b': not a name"),
        ("base: nano/llava\nroots: {world: 5}", "mine.yaml:roots.world: wrong type, expected a text, got 5"),
        ("base: nano/llava\neval: [mvbench]", "mine.yaml:eval: wrong type"),
        ("base: nano/llava\nsummary: [1]", "mine.yaml:summary: wrong type"),
        ("5", "not a recipe"),
        ("a: [", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
        ("base: nano/llava\nstages: {instruct: {steps: " + "9" * 400 + "}}", "steps: out of range"),
        ("base: nano/llava\nstages: {instruct: {lr: 2020-01-01}}", "a date, not a plain value"),
        ("? [1, 2]\n: 3", "not YAML"),
        ("true: 3", "not a key"),
        ("a: " + "[" * 3000, "too deeply nested|not YAML"),
        ("a: " + "[" * 80 + "]" * 80, "too deeply nested"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(7)
        ), "too many values, or repeats itself"),
        ("a: &a [*a]", "repeats itself"),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_refused_in_a_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(written(tmp_path, text))


def test_a_chain_of_bases_ends(tmp_path):
    for index in range(1200):
        written(tmp_path, f"base: r{index + 1}.yaml", f"r{index}.yaml")
    with pytest.raises(UserError, match=r"r0.yaml:base: more than 20 recipes above each other"):
        load(tmp_path / "r0.yaml")


def test_bases_that_double_are_read_once_each(tmp_path):
    written(tmp_path, "base: nano/llava", "r18.yaml")
    for index in range(18):
        written(tmp_path, f"base: [r{index + 1}.yaml, r{index + 1}.yaml]", f"r{index}.yaml")
    assert load(tmp_path / "r0.yaml").model == load("nano/llava").model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"connector": [{"type": "mlp", "in": 5}]}, r"connector\.mlp\.in: wrong type"),
        ({"connector": [{"type": "mlp", "in": []}]}, r"connector\.mlp\.in: wrong type"),
        ({"connector": [{"type": "mlp", "in": {}}]}, r"connector\.mlp\.in: wrong type"),
        ({"connector": [{"type": ["mlp"]}]}, "type: wrong type"),
        ({"connector": [{"type": "mlp", "name": "a/b"}]}, "not a name"),
        ({"connector": 5}, "connector: wrong type"),
        ({"connector": [5]}, "a node is a map or a name"),
        ({"output": 5}, "output: wrong type"),
        ({"output": []}, "output: wrong type"),
        ({"output": {"video": "mlp", "image": "mlp", "vidoe": "mlp"}}, r"output\.vidoe: unknown kind of media"),
        ({"place": {"mlp": 5}}, r"place\.mlp: unknown place"),
        ({"place": [1]}, "place: wrong type"),
        ({"encoders": {"nano": 5}}, r"encoders\.nano: has no type"),
        ({"encoders": {"nano": {"type": True}}}, r"encoders\.nano\.type: wrong type"),
        ({"encoders": {"a b": {"type": "nano_conv"}}}, "not a name"),
        ({"encoders": {5: {"type": "nano_conv"}}}, "not a name"),
        ({"media": {"frames": 0}}, "frames"),
        ({"media": {"frames": 10**9}}, "frames"),
        ({"media": {"frames": 4, "tiles": 5}}, r"media\.tiles: wrong type"),
        ({"media": {"fps": float("nan")}}, r"media\.fps"),
        ({"encoders__nano__width": 0}, r"encoders\.nano"),
        ({"encoders__nano__width": -4}, r"encoders\.nano"),
        ({"encoders__nano__width": 2**40}, r"encoders\.nano"),
        ({"encoders__nano__size": 0}, r"encoders\.nano"),
        ({"encoders__nano__size": 10**9}, r"encoders\.nano"),
        ({"llm": 5}, r"llm: wrong type"),
        ({"llm__config__hidden_size": 0}, r"llm\.config\.hidden_size: out of range"),
        ({"llm__config__hidden_size": -64}, r"llm\.config\.hidden_size: out of range"),
        ({"llm__config__hidden_size": 2**40}, r"llm\.config\.hidden_size: out of range"),
        ({"llm__config__hidden_size": 63}, r"llm\.config: not a llama"),
        ({"llm__config__hidden_size": "wide"}, r"llm\.config: not a llama"),
        ({"llm__config__hidden_size": None}, r"llm\.config"),
        ({"llm__config__vocab_size": 0}, r"llm\.config\.vocab_size: out of range"),
        ({"llm__config__num_hidden_layers": 100000}, r"llm\.config\.num_hidden_layers: out of range"),
        ({"llm__config__num_attention_heads": 5}, r"llm\.config\.num_key_value_heads: 2 does not divide the 5 heads"),
        ({"llm__config__num_key_value_heads": 3}, r"num_key_value_heads: 3 does not divide the 4 heads"),
        ({"llm__config__hidden_act": "jump"}, r"llm\.config: not a llama"),
        ({"llm__config__model_type": "t5"}, r"model_type: not a causal LM, expected .*, got t5"),
        ({"llm__config__model_type": "mmllm"}, r"model_type: not a causal LM"),
        ({"llm__config__model_type": 5}, r"model_type: missing"),
        ({"llm__config__rope_parameters": 5}, r"llm\.config"),
        ({"llm__template": 5}, r"llm\.template: wrong type"),
    ],
)
def test_values_of_a_model_that_do_not_fit_are_refused_in_a_line(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        checked(tmp_path, **values)


@pytest.mark.parametrize(
    "line",
    [
        *(f"stages.instruct.{key}={value}" for key in ("lr", "muon_lr", "weight_decay", "clip", "warmup")
          for value in ("-1", "nan", "inf", "[]", "x")),
        *(f"stages.instruct.{key}={value}" for key in ("steps", "batch", "micro_batch")
          for value in ("0", "-1", "1.5", "nan", "9" * 400, "9" * 5000)),
        *(f"stages.instruct.epochs={value}" for value in ("0", "-1", "nan", "inf")),
        "stages.instruct.warmup=1", "stages.instruct=5", "stages=5", "model=1", "model.llm=5", "model.media=5",
        "model.encoders=5", "model.connector=5", "model.output=5", "stages.instruct.trains=5",
        "stages.instruct.objective=5", "stages.instruct.data=5", "stages.instruct.init=5",
    ],
)  # fmt: skip
def test_overrides_that_do_not_fit_are_refused_in_a_line(line):
    from mmllm.train.stage import build_objective

    lines = [line, "stages.instruct.steps=null"] if ".epochs=" in line else [line]
    with pytest.raises(UserError):
        made = load("nano/llava", lines)
        build_objective(made.stages["instruct"].objective, "objective")
        Blueprint.of(made)
        assert not isinstance(made.stages["instruct"].data, str) or "=5" not in line
        raise UserError("data", "5 is a file that is not there")


def test_another_llm_drops_what_belongs_to_the_one_of_the_base(tmp_path):
    made = load("llava", ["model.llm.name=Qwen/Qwen2.5-7B-Instruct"])
    assert made.model["llm"] == {"name": "Qwen/Qwen2.5-7B-Instruct"}
    path = written(tmp_path, "base: llava\nmodel: {llm: {name: Qwen/Qwen2.5-7B-Instruct}}")
    assert load(path).model["llm"] == {"name": "Qwen/Qwen2.5-7B-Instruct"}
    again = load("llava", ["model.llm.template={{ messages }}", "model.llm.name=Qwen/Qwen2.5-7B-Instruct"])
    assert again.model["llm"] == {"name": "Qwen/Qwen2.5-7B-Instruct", "template": "{{ messages }}"}
    given = written(tmp_path, "base: llava\nmodel: {llm: {name: x/y, config: {model_type: qwen2}}}")
    assert load(given).model["llm"] == {"name": "x/y", "config": {"model_type": "qwen2"}}
    own = load("llava").model["llm"]
    assert load("llava", [f"model.llm.name={own['name']}"]).model["llm"] == own


def test_show_names_the_llm_its_source_and_its_template(capsys):
    from mmllm.cli import main

    assert main(["recipe", "show", "llava"]) == 0
    said = capsys.readouterr().out
    name = load("llava").model["llm"]["name"]
    assert f"llm: {name}; weights of {name}; tokenizer of {name}; chat template: the recipe's" in said
    assert "random weights" in llm_facts(tiny_recipe())


def test_a_folder_as_llm_is_compared_before_anything_trains(tmp_path):
    from transformers import AutoConfig

    save_model(tmp_path / "model")
    made = tiny_recipe()
    values = {**made.model["llm"]["config"], "intermediate_size": 128}
    AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(tmp_path / "llm")
    made.model["llm"]["name"] = str(tmp_path / "llm")
    with pytest.raises(UserError, match=r"llm\.config\.intermediate_size: differs from .*expected 128, got 96"):
        Blueprint.of(made)


def test_plain_values_are_what_they_look_like():
    assert parse_yaml("a: [1, 2.5, x, null, true, {b: 1e-5}]", "here") == {
        "a": [1, 2.5, "x", None, True, {"b": "1e-5"}]
    }


def test_the_librarys_own_sizes_pass():
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from mmllm.config.llm_sizes import check_sizes

    refused, looked = [], 0
    for kind, cls in CONFIG_MAPPING.items():
        if cls not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            values = cls().to_dict()
        except Exception:  # the library's own checks refuse its defaults, or a package is missing
            continue
        looked += 1
        try:
            check_sizes(values, kind)
        except UserError as error:
            refused.append(str(error))
    assert looked > 100
    assert refused == []


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "qwen3_moe", "opt", "bloom"])
def test_llms_of_many_kinds_are_taken(kind):
    from mmllm.model.blueprint import Blueprint

    made = tiny_recipe()
    values = {"hidden_size": 64, "vocab_size": 700, "num_attention_heads": 4, "num_hidden_layers": 1}
    made.model["llm"]["config"] = {"model_type": kind, **values}
    assert Blueprint.of(made).config.text_config.model_type == kind
