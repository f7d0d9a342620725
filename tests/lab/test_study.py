"""Study files: fair or refused, and their mistakes named before anything runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from helpers.studies import ARMS, SHIPPED, study

from mmllm.contract.errors import UserError
from mmllm.lab.study import StudyFile


def problem(path: Path) -> str:
    with pytest.raises(UserError) as error:
        StudyFile(path).facts()
    return str(error.value)


def test_mistakes_are_named(tmp_path):
    assert "no such study" in problem(tmp_path / "absent.yaml")
    assert "arms: missing" in problem(study(tmp_path, arms={}))
    assert "seed" in problem(study(tmp_path, seed=[1])) and "Try: seeds" in problem(study(tmp_path, seed=[1]))
    assert "one twice" in problem(study(tmp_path, seeds=[1, 1]))
    assert "no arm is called 'lava'. Try: llava" in problem(study(tmp_path, baseline="lava"))
    assert "no such recipe" in problem(study(tmp_path, arms={"a": "nano/lava"}))
    assert "first.llava: an arm has this name too" in problem(study(tmp_path, first={"llava": "nano/clip"}))
    assert "first.world: recipes of the arms have a root" in problem(study(tmp_path, first={"world": "nano/clip"}))
    assert "first.c.free: unknown key" in problem(study(tmp_path, first={"c": {"recipe": "nano/clip", "free": True}}))
    for then, said in (
        ("data 'x", "not a command: No closing"),
        ("mmllm data check x", "a verb of mmllm"),
        ("data chek x", "invalid choice: 'chek'"),
        ("data check x --levle 3", "unknown: --levle 3"),
        ("data check cc:x.jsonl", "first.c.then: no root is called 'cc', got cc:x.jsonl. Try: c"),
    ):
        assert said in problem(study(tmp_path, first={"c": {"recipe": "nano/clip", "then": then}}))
    assert "arms.a: gone.yaml: no such file" in problem(study(tmp_path, arms={"a": "gone.yaml"}))
    assert "mine.yaml:equall: unknown key. Try: equal" in problem(study(tmp_path, equall="tokens"))
    assert "mine.yaml:tasks: unknown benchmark 'mvbenhc'" in problem(study(tmp_path, tasks=["mvbenhc"]))
    assert "tasks: one benchmark or task each" in problem(study(tmp_path, tasks=["mlvu:order,needle"]))
    assert "arms.a.x: unknown key" in problem(study(tmp_path, arms={"a": {"recipe": "nano/llava", "x": 1}}))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("init={encoders: clp:model}", "init: no root is called 'clp', got clp:model. Try: clip"),
        ("init={encodrs: clip:model}", "init: the model has no 'encodrs'. Try: encoders"),
        ("trains=[conector]", "trains: the model has no 'conector'. Try: connector"),
        ("data=wrld:x.jsonl", "data: no root is called 'wrld', got wrld:x.jsonl. Try: world"),
        ("init={encoders: null}", "init.encoders: not a folder"),
    ],
)
def test_what_would_be_found_out_after_hours_is_found_out_before(tmp_path, override, says):
    changes = {"first": {"clip": "nano/clip"}, "arms": {"a": "nano/llava"}}
    said = problem(study(tmp_path, **changes, set=[f"stages.caption.{override}"]))
    arm, said = said.split(": ", maxsplit=1)
    assert arm == f"{tmp_path}/mine.yaml:arms.a" and f"stages.caption.{says}" in said


def test_words_of_a_command_that_are_no_paths_are_left(tmp_path):
    then = "data align-levels world:x.jsonl --pair clip:model --device cuda:0 --out clip:y.jsonl"
    path = study(tmp_path, first={"clip": {"recipe": "nano/clip", "then": then}}, arms={"a": "nano/llava"})
    assert StudyFile(path).then_of("clip", Path("run"))[4:8] == ["run/model", "--device", "cuda:0", "--out"]


def test_unequal_arms_are_refused_unless_free(tmp_path):
    said = problem(study(tmp_path, equal="tokens"))
    assert "the arms differ in tokens" in said and "llava 72, means 17" in said
    free = {**ARMS, "means": {**ARMS["means"], "free": True}}
    facts = StudyFile(study(tmp_path, arms=free, equal="tokens")).facts()
    assert (facts["llava"].tokens, facts["means"].tokens) == (72, 17)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_fair(path):
    file = StudyFile(path)
    assert len(file.study.seeds) >= 3 and file.study.summary and set(file.facts()) == set(file.arms)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("prompt_pooling", {"ppllava": ("encoders", "prompts", "relevance.head"), "means": ("encoders",)}),
        ("prompt_fronts", {"llava": ("encoders",), "bridgetower": ("encoders", "prompts")}),
    ],
)
def test_what_shipped_studies_train_first_fits_their_arms(tmp_path, name, taken):
    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model
    from mmllm.train.weights import load_init

    file = StudyFile(next(path for path in SHIPPED if path.stem == name))
    clip, arms = (
        build_model(Blueprint.of(file.recipes["clip"])),
        {arm: build_model(Blueprint.of(file.recipes[arm])) for arm in file.arms},
    )
    clip.save_pretrained(tmp_path / "model")
    for arm, model in arms.items():
        for part in file.recipes[arm].stages["caption"].init:
            load_init(model, part, tmp_path / "model", arm)
    met = clip.state_dict()
    for arm, parts in taken.items():
        keys = [key for key in arms[arm].state_dict() if any(f".{part}." in key for part in parts)]
        assert len(keys) > 5 and all(torch.equal(arms[arm].state_dict()[key], met[key]) for key in keys)


def test_overrides_reach_every_arm(tmp_path):
    file = StudyFile(study(tmp_path, set=["stages.instruct.steps=7"]), ("stages.text.steps=3",))
    assert [recipe.stages["instruct"].steps for recipe in file.recipes.values()] == [7, 7]
    assert [recipe.stages["text"].steps for recipe in file.recipes.values()] == [3, 3]
    assert [recipe.stages["instruct"].lr for recipe in file.recipes.values()] == [1e-3, 1e-4]
    file = StudyFile(study(tmp_path, set=["stages.instruct.lr=2e-4"]))  # an arm's own come last
    assert [recipe.stages["instruct"].lr for recipe in file.recipes.values()] == [2e-4, 1e-4]


def test_one_token_more_is_not_equal_and_is_about_as_much_to_compute(tmp_path):
    connector = ["mlp", {"type": "newline", "at": "one"}]
    (tmp_path / "line.yaml").write_text(yaml.safe_dump({"base": "nano/llava", "model": {"connector": connector}}))
    arms = {"llava": "nano/llava", "line": "line.yaml"}
    facts = StudyFile(study(tmp_path, arms=arms, equal="flops")).facts()
    assert facts["line"].tokens == facts["llava"].tokens + 1
    with pytest.raises(UserError, match="the arms differ in tokens"):
        StudyFile(study(tmp_path, arms=arms, equal="tokens")).facts()


def test_the_levels_of_the_shipped_study_are_those_that_its_arm_reads():
    file = StudyFile(next(path for path in SHIPPED if path.stem == "prompt_fronts"))
    command, recipe = file.then_of("clip", Path("run")), file.recipes["aligngpt"]
    given = dict(pairwise(command))
    gate = next(node for node in recipe.model["connector"] if node["type"] == "level_gate")
    assert int(given["--levels"]) == gate["levels"]
    assert given["--out"] == "run/levels.jsonl" and "clip:levels.jsonl" in recipe.stages["caption"].data
