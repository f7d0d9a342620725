"""Training is the same however it is cut: accumulated, resumed, with workers."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import frames, tiny_recipe, tokenizer_folder, write_video

from mmllm.build import build_processor
from mmllm.contract.errors import UserError
from mmllm.recipe import Recipe
from mmllm.train.run import Options, Stopped, train
from mmllm.train.shared import SharedStage


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve conversations over clips, with answers of unequal length and some without media."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(12):
        content = [{"type": "text", "text": f"Question {index}: what moves?"}]
        if index % 3:
            write_video(folder / f"clips/{index}.mp4", frames(index, 8))
            content.insert(0, {"type": "video", "path": f"clips/{index}.mp4"})
        answer = "A red square moves left." if index % 2 else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{index}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def recipe(data: Path, **stage: object) -> Recipe:
    """A tiny recipe with one stage over `data`."""
    made = tiny_recipe()
    made.model["llm"]["tokenizer"] = tokenizer_folder()
    settings = {"data": str(data), "trains": ["encoders", "connector", "llm"], "steps": 6, "batch": 4, "lr": 1e-3}
    made.data["stages"] = {"instruct": {**settings, **stage}}
    return made


def losses(run: Path) -> list[float]:
    """Losses of a run, step by step."""
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def options(**changes: object) -> Options:
    """Options for a quiet run that logs every step."""
    return Options(**{"jobs": 0, "device": "cpu", "quiet": True, "log_steps": 1, "cache": Path("unused"), **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights."""
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """An uninterrupted run without workers and without accumulation."""
    out = tmp_path_factory.mktemp("straight")
    train(recipe(data), out, options())
    return out


def test_a_run_leaves_what_it_promises(straight):
    names = {path.name for path in straight.iterdir()}
    assert {"command.txt", "recipe.yaml", "environment.json", "status.json", "log.jsonl", "curves.png"} <= names
    assert (straight / "model" / "recipe.yaml").is_file()
    assert len(losses(straight)) == 6
    assert losses(straight)[-1] < losses(straight)[0]


def test_accumulation_four_times_one_is_one_times_four(data, straight, tmp_path):
    train(recipe(data, micro_batch=1), tmp_path, options())
    assert losses(tmp_path) == pytest.approx(losses(straight), abs=2e-5)
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, atol=2e-4, rtol=0)


def test_two_workers_are_none(data, straight, tmp_path):
    train(recipe(data), tmp_path, options(jobs=2))
    assert losses(tmp_path) == losses(straight)


def test_resumed_is_uninterrupted(data, straight, tmp_path, monkeypatch):
    from mmllm.train import progress

    stop = progress.StopOnSignal.on_step_end

    def stop_after_three(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.signal is None:
            self.signal = 15
        stop(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnSignal, "on_step_end", stop_after_three)
        with pytest.raises(Stopped) as stopped:
            train(recipe(data), tmp_path, options())
    assert stopped.value.checkpoint.name == "checkpoint-3"
    assert "instruct" not in json.loads(
        (tmp_path / "status.json").read_text() if (tmp_path / "status.json").exists() else '{"x": 0}'
    )
    train(recipe(data), tmp_path, options())
    assert losses(tmp_path) == losses(straight)
    for name, value in weights(straight).items():
        assert torch.equal(weights(tmp_path)[name], value), name


def test_a_half_written_checkpoint_is_not_resumed_from(data, straight, tmp_path):
    from mmllm.train.trainer import last_checkpoint

    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "complete").touch()
    (tmp_path / "checkpoint-10").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()


def test_a_finished_run_is_not_run_again(data, straight):
    before = (straight / "log.jsonl").read_text()
    train(recipe(data), straight, options())
    assert (straight / "log.jsonl").read_text() == before


def test_another_recipe_in_the_folder_is_refused_with_the_keys(data, straight):
    with pytest.raises(UserError, match=r"stages\.instruct\.lr"):
        train(recipe(data, lr=1e-2), straight, options())


def test_gradients_reach_what_trains_and_nothing_else(data, tmp_path, straight):
    train(recipe(data, trains=["connector"], steps=2), tmp_path, options())
    from transformers import set_seed

    from mmllm.build import build_model

    set_seed(0)
    fresh = build_model(recipe(data)).state_dict()
    for name, value in weights(tmp_path).items():
        moved = not torch.equal(value, fresh[name])
        assert moved == ("front_end.parts" in name), name


def test_a_loss_that_is_no_number_stops_and_names_the_samples(data, tmp_path, monkeypatch):
    from mmllm.train.objectives.language_modeling import LanguageModeling

    calls = []

    def poisoned(self, model, batch):
        calls.append(1)
        terms = original(self, model, batch)
        if len(calls) == 4:
            terms["language_modeling"].sum = terms["language_modeling"].sum * float("nan")
        return terms

    original = LanguageModeling.forward
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModeling, "forward", poisoned)
        with pytest.raises(UserError, match=r"step 4, samples sample-\d+.*checkpoint-3 is intact"):
            train(recipe(data), tmp_path, options(save_steps=1))
    train(recipe(data), tmp_path, options(save_steps=1))
    assert len(losses(tmp_path)) == 6
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.parametrize("groups", [2, 3, 20])
def test_rows_in_groups_of_similar_length_give_the_same_loss_and_gradients(data, groups):
    from mmllm.build import build_model
    from mmllm.train.objectives.language_modeling import LanguageModeling
    from mmllm.train.stage import load_data

    made = recipe(data)
    processor, model = build_processor(made), build_model(made)
    samples = [load_data(made.stages["instruct"], made)[index] for index in range(7)]
    found = []
    for objective in (LanguageModeling(), LanguageModeling(groups=groups)):
        model.zero_grad()
        batch = objective.prepare(samples, processor)
        term = objective(model, batch)["language_modeling"]
        term.sum.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        found.append((sorted(batch["names"]), term.count, term.sum, gradients))
    lengths = batch["attention_mask"].sum(1).tolist()
    (names, count, loss, gradients), (names_in_groups, count_in_groups, loss_in_groups, gradients_in_groups) = found
    assert names == names_in_groups and count == count_in_groups
    assert lengths == sorted(lengths, reverse=True) and len(batch["groups"]) == min(groups, 7)
    assert [length for _, _, length in batch["groups"]] == [lengths[first] for first, _, _ in batch["groups"]]
    torch.testing.assert_close(loss_in_groups, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == gradients_in_groups.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(gradients_in_groups[name], value, rtol=1e-4, atol=1e-6)


def test_the_padding_of_a_row_is_read_by_nothing_though_there_is_no_mask(data):
    from mmllm.build import build_model
    from mmllm.train.objectives.language_modeling import LanguageModeling
    from mmllm.train.stage import load_data

    made = recipe(data)
    processor, model, objective = build_processor(made), build_model(made), LanguageModeling()
    samples = [load_data(made.stages["instruct"], made)[index] for index in range(7)]
    batch = objective.prepare(samples, processor)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        found = objective(model, batch)["language_modeling"].sum
        hidden = model.run(model.embed(batch))
        logits, targets = model.logits(hidden[:, :-1]).transpose(1, 2), batch["labels"][:, 1:]
        masked = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        alone = sum(objective(model, objective.prepare([one], processor))["language_modeling"].sum for one in samples)
    torch.testing.assert_close(found, masked, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)


def test_no_group_is_refused():
    from mmllm.train.run import build_objective

    with pytest.raises(UserError, match="groups: is 1 or more, got 0"):
        build_objective({"type": "language_modeling", "groups": 0}, "stages.x.objective")


def test_a_stage_starts_from_parts_of_other_runs(data, tmp_path):
    """The encoder of one, the projector of another; what they have besides stays where it is."""
    for name, steps in (("one", 1), ("two", 2)):
        train(recipe(data, steps=steps), tmp_path / name, options())
    init = {"encoders.nano": str(tmp_path / "one"), "connector.mlp": str(tmp_path / "two/model")}
    train(recipe(data, steps=1, lr=1e-12, init=init), tmp_path / "three", options())
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    for key, value in three.items():
        source = one if ".encoders." in key else two if ".parts." in key else None
        if source is not None:
            torch.testing.assert_close(value, source[key], atol=1e-6, rtol=0)
        else:
            assert not torch.allclose(value, two[key], atol=1e-6), key


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"connector.mpl": "run"}, "the model has no 'connector.mpl'. Try: connector.mlp"),
        ({"encoders.nano": "none"}, "no such folder"),
        ({"encoders.nano": "other"}, "checkpoint of another recipe"),
        ({"connector.pool": "run"}, "has no weights"),
    ],
)
def test_parts_that_do_not_fit_are_refused(data, tmp_path, init, says):
    train(recipe(data, steps=1), tmp_path / "run", options())
    other = recipe(data, steps=1)
    other.model["encoders"]["nano"]["channels"] = [8, 8, 8, 8]
    train(other, tmp_path / "other", options())
    made = recipe(data, steps=1, init={part: str(tmp_path / folder) for part, folder in init.items()})
    made.model["connector"][0]["in"] = ["pool"]
    made.model["connector"].insert(0, {"type": "pool", "name": "pool", "grid": [4, 3, 3], "in": ["nano"]})
    with pytest.raises(UserError, match=re.escape(says)):
        train(made, tmp_path / "new", options())


def test_the_batch_is_global(data):
    from mmllm.train.stage import micro_batch

    made = recipe(data, batch=12, micro_batch=2)
    stage = made.stages["instruct"]
    assert micro_batch("instruct", stage, made, 1) == (2, 6)
    assert micro_batch("instruct", stage, made, 3) == (2, 2)
    with pytest.raises(UserError, match="12 samples over 5 processes"):
        micro_batch("instruct", stage, made, 5)


def test_a_run_waits_for_another_that_trains_a_shared_stage(data, tmp_path):
    """The other one is played: it holds the turn until it has been waited for, and then keeps weights."""
    from accelerate import PartialState

    made = recipe(data, trains=["llm"], share=True, steps=2)
    train(made, tmp_path / "known", options(cache=tmp_path / "full"))
    (kept,) = (tmp_path / "full/stages").glob("*.safetensors")
    other = SharedStage("instruct", made, build_processor(made), options(cache=tmp_path / "empty"))
    inside, events = threading.Event(), tmp_path / "mine/events.txt"

    def trains() -> None:
        with other.turn(PartialState(), lambda: None):
            inside.set()
            end = time.monotonic() + 60
            while not (events.is_file() and "waits" in events.read_text()) and time.monotonic() < end:
                time.sleep(0.05)
            shutil.copy(kept, other.file)

    thread = threading.Thread(target=trains)
    thread.start()
    inside.wait(10)
    train(made, tmp_path / "mine", options(cache=tmp_path / "empty"))
    thread.join()
    first, second = events.read_text().splitlines()
    assert "waits for a run that trains an equal stage" in first and "taken from" in second
    same = weights(tmp_path / "known")
    assert all(
        torch.equal(value, same[key]) for key, value in weights(tmp_path / "mine").items() if "language_model" in key
    )


def test_a_shared_stage_is_trained_once(data, tmp_path):
    made = recipe(data, trains=["llm"], share=True, steps=2)
    train(made, tmp_path / "a", options(cache=tmp_path / "cache"))
    train(made, tmp_path / "b", options(cache=tmp_path / "cache"))
    assert not (tmp_path / "b" / "log.jsonl").exists()
    for name, value in weights(tmp_path / "a").items():
        assert torch.equal(weights(tmp_path / "b")[name], value), name


def test_a_run_with_muon_resumes_to_the_same_losses(data, tmp_path, monkeypatch):
    from mmllm.train import progress

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(recipe(data, optimizer="muon"), straight, options())
    stop = progress.StopOnSignal.on_step_end

    def stop_after_two(self, args, state, control, **kwargs):
        self.signal = 15 if state.global_step == 2 else self.signal
        stop(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnSignal, "on_step_end", stop_after_two)
        with pytest.raises(Stopped):
            train(recipe(data, optimizer="muon"), cut, options())
    train(recipe(data, optimizer="muon"), cut, options())
    assert losses(cut) == losses(straight)


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_broken_clip_is_named_and_nothing_is_lost(data, tmp_path, jobs):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    (folder / "clips" / "7.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"7\.mp4"):
        train(recipe(folder / "data.jsonl", batch=2, steps=9), tmp_path / "run", options(jobs=jobs))
    done = len(losses(tmp_path / "run")) if (tmp_path / "run" / "log.jsonl").exists() else 0
    kept = list((tmp_path / "run").glob("stages/*/checkpoint-*/complete"))
    assert [path.parent.name for path in kept] == ([f"checkpoint-{done}"] if done else [])


def test_the_llm_starts_the_same_behind_any_front_end():
    from transformers import set_seed

    from mmllm.build import build_model

    states = []
    for name in ("nano/llava", "nano/video_chatgpt"):
        set_seed(3)
        states.append(build_model(tiny_recipe(name)).model.language_model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_an_epoch_has_whole_global_batches(data, tmp_path):
    train(recipe(data, steps=None, epochs=2, batch=5, micro_batch=1), tmp_path, options())
    assert len(losses(tmp_path)) == 2 * (12 // 5)


def test_weights_that_are_gone_are_not_replaced_by_random_ones(data, tmp_path):
    import shutil

    made = recipe(data, steps=1)
    made.data["stages"]["second"] = {**made.data["stages"]["instruct"]}
    train(made, tmp_path, options(), ["instruct"])
    (tmp_path / "model").rename(tmp_path / "model.old")
    train(made, tmp_path, options())
    shutil.rmtree(tmp_path / "model")
    made.data["stages"]["third"] = {**made.data["stages"]["second"]}
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="the weights of the finished stages are gone"):
        train(made, tmp_path, options())


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_kept(data, tmp_path, monkeypatch):
    from mmllm.train import trainer

    def poison(self, *arguments, **keywords):
        self.model.lm_head.weight.data[0, 0] = float("nan")
        return original(self, *arguments, **keywords)

    original = trainer.StageTrainer._save_checkpoint
    monkeypatch.setattr(trainer.StageTrainer, "_save_checkpoint", poison)
    with pytest.raises(UserError, match="no longer finite; no checkpoint yet"):
        train(recipe(data), tmp_path, options(save_steps=2))
    assert not list(tmp_path.glob("stages/*/checkpoint-*/complete"))


def test_generation_stops_at_the_tokenizers_end_where_the_llm_names_none(data, tmp_path):
    made = recipe(data, steps=1)
    made.model["llm"]["config"]["eos_token_id"] = None
    train(made, tmp_path, options())
    import mmllm

    model, processor = mmllm.load(tmp_path)
    assert model.generation_config.eos_token_id in (
        processor.tokenizer.eos_token_id,
        [processor.tokenizer.eos_token_id],
    )
