"""Adapters in the LLM: in place, alone in what they train, merged or kept; parts of the LLM by name; rates by name."""

from __future__ import annotations

import pytest
import torch
from helpers.small_runs import losses, options, recipe, stopping_after, weights

import mmllm
from mmllm.contract.errors import UserError
from mmllm.model.adapters import Lora, adapter_layers, add_adapters, merge_adapters, without_adapters
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.train.data import load_data
from mmllm.train.objectives.language_modeling import LanguageModeling
from mmllm.train.run import check, train
from mmllm.train.weights import freeze

KINDS = {
    "lora": Lora(rank=4, alpha=8),
    "dora": Lora(rank=4, alpha=8, dora=True),
    "pissa": Lora(rank=4, alpha=8, init="pissa"),
    "nlora": Lora(rank=4, alpha=8, init="nlora"),
    "slora": Lora(rank=4, alpha=8, init="slora"),
    "some": Lora(rank=4, alpha=8, targets=("q_proj", "v_proj")),
}


@pytest.fixture
def built(data):
    made = recipe(data)
    blueprint = Blueprint.of(made)
    torch.manual_seed(0)
    model, processor = build_model(blueprint), build_processor(blueprint)
    source = load_data(made.stages["instruct"], made)
    return model, LanguageModeling().prepare([source[index] for index in range(4)], processor)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().lm_head(model.run(model.embed(batch))[0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_changes_nothing_at_first_and_what_it_learns_merges(built, kind):
    model, batch = built
    before, keys = logits(model, batch), set(model.state_dict())
    add_adapters(model, KINDS[kind], "here")
    count = 2 * 2 if kind == "some" else 2 * 7
    assert len(adapter_layers(model)) == count
    torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=1e-5)
    freeze(model, ("llm.lora",), "here")
    assert {name.rpartition("lora_")[1] for name, value in model.named_parameters() if value.requires_grad} == {"lora_"}
    model.train()
    terms = LanguageModeling()(model, batch)
    terms["language_modeling"].sum.backward()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                assert value.grad is not None
                value -= 0.01 * value.grad.sign()
    learnt = logits(model, batch)
    assert (learnt - before).abs().max() > 1e-3
    merge_adapters(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(logits(model, batch), learnt, atol=5e-5, rtol=1e-4)


def test_only_the_middle_factor_of_nlora_trains_if_asked(built):
    model, _ = built
    add_adapters(model, Lora(rank=4, alpha=8, init="nlora", middle_only=True), "here")
    freeze(model, ("llm.lora",), "here")
    trained = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"lora_N"}


def test_nlora_that_would_change_the_model_is_refused(built):
    model, _ = built
    with pytest.raises(UserError, match=r"lora\.preserve: its start changes a weight by \d+ % of its norm"):
        add_adapters(model, Lora(rank=16, alpha=64, init="nlora", preserve=False), "here")


def test_a_stage_with_an_adapter_leaves_a_stock_model(data, tmp_path):
    stage = {"trains": ["connector", "llm.lora"], "lora": {"rank": 4}, "lr": 1e-2}
    train(recipe(data, **stage), tmp_path / "lora", options())
    assert losses(tmp_path / "lora")[-1] < losses(tmp_path / "lora")[0]
    train(recipe(data), tmp_path / "plain", options())
    assert set(weights(tmp_path / "lora")) == set(weights(tmp_path / "plain"))


def test_a_kept_adapter_is_loaded_with_its_model(data, tmp_path):
    stage = {"trains": ["llm.lora"], "lora": {"rank": 4}, "lr": 1e-2}
    train(recipe(data, **stage), tmp_path / "merged", options())
    train(recipe(data, **stage, keep="adapter"), tmp_path / "kept", options())
    assert losses(tmp_path / "kept") == losses(tmp_path / "merged")
    folder = tmp_path / "kept/model/adapter"
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    made = recipe(data)
    source = load_data(made.stages["instruct"], made)
    found = []
    for path in (tmp_path / "merged", tmp_path / "kept", folder):
        model, processor = mmllm.load(path)
        batch = LanguageModeling().prepare([source[0], source[1]], processor)
        found.append(logits(model, batch))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(found[1], found[2])


def test_an_adapter_stage_resumes(data, tmp_path, monkeypatch):
    from mmllm.train.context import Stopped

    made = recipe(data, trains=["llm.lora"], lora={"rank": 4, "dropout": 0.1})
    train(made, tmp_path / "straight", options())
    with stopping_after(3, monkeypatch), pytest.raises(Stopped):
        train(made, tmp_path / "cut", options())
    train(made, tmp_path / "cut", options())
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_a_part_of_the_llm_trains_alone_and_each_at_its_rate(data, tmp_path):
    stage = {"trains": ["connector", "llm.layers.1"], "lr": {"connector": 1e-3, "llm.layers.1": 0}, "steps": 2}
    train(recipe(data, **stage), tmp_path / "none", options())
    stage["lr"] = {"connector": 0, "llm.layers.1": 1e-3}
    train(recipe(data, **stage), tmp_path / "layer", options())
    train(recipe(data, steps=1, lr=0), tmp_path / "start", options())
    start, connector, layer = (weights(tmp_path / name) for name in ("start", "none", "layer"))
    moved = [{name for name in start if not torch.equal(start[name], found[name])} for found in (connector, layer)]
    assert moved[0]
    assert moved[1]
    assert all("front_end.parts" in name for name in moved[0])
    assert all("language_model.layers.1." in name for name in moved[1])


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ({"trains": ["llm.layers.9"]}, r"llm has no such module: 'llm\.layers\.9'"),
        ({"trains": ["llm", "llm.lora"]}, r"trains: llm and llm\.lora at once"),
        ({"lora": {"rank": 4}}, r"lora: the stage trains no adapter"),
        ({"keep": "adapter"}, r"keep: the stage trains no adapter"),
        ({"trains": ["llm.lora"], "lora": {"rnk": 4}}, r"lora\.rnk: unknown key"),
        ({"trains": ["llm.lora"], "lora": {"targets": ["nothing"]}}, "nothing"),
        ({"trains": ["llm.lora"], "lora": {"init": "nlora"}, "keep": "adapter"}, "no adapter of three factors"),
        ({"lr": {"connector": 1e-3}}, "lr: needs a rate for each name in trains"),
        ({"trains": ["connector"], "lr": {"connector": "fast"}}, r"lr\.connector: wrong type"),
        (
            {"trains": ["connector"], "lr": {"connector": 1e-3}, "optimizer": "muon"},
            "one rate per name goes with adamw",
        ),
    ],
)
def test_what_does_not_fit_is_named(data, tmp_path, stage, what):
    with pytest.raises(UserError, match=what):
        made = recipe(data, **stage)
        check(made, tmp_path, options())
        train(made, tmp_path, options())


def test_keys_below_an_adapter_are_the_stock_ones():
    state = {"a.q_proj.base_layer.weight": 1, "a.q_proj.lora_A.default.weight": 2, "a.norm.weight": 3}
    assert without_adapters(state) == {"a.q_proj.weight": 1, "a.norm.weight": 3}
