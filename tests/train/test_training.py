"""Training is the same however it is cut: accumulated, resumed, with workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_runs import context, losses, options, recipe, stopping_after, weights
from helpers.tiny import tiny_recipe

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import Sample
from mmllm.train.context import Stopped
from mmllm.train.run import train


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


def test_layers_computed_again_learn_the_same(data, straight, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    real, calls = LlamaMLP.forward, []
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or real(self, x))
    train(recipe(data), tmp_path / "kept", options())
    kept = len(calls)
    train(recipe(data, checkpointing=True), tmp_path / "again", options())
    assert len(calls) == kept + 2 * kept
    assert losses(tmp_path / "again") == pytest.approx(losses(straight), abs=1e-6)


def test_two_workers_are_none(data, straight, tmp_path):
    train(recipe(data), tmp_path, options(jobs=2))
    assert losses(tmp_path) == losses(straight)


def test_resumed_is_uninterrupted(data, straight, tmp_path, monkeypatch):
    with stopping_after(3, monkeypatch), pytest.raises(Stopped) as stopped:
        train(recipe(data), tmp_path, options())
    assert stopped.value.checkpoint.name == "checkpoint-3"
    assert "instruct" not in json.loads(
        (tmp_path / "status.json").read_text() if (tmp_path / "status.json").exists() else '{"x": 0}'
    )
    train(recipe(data), tmp_path, options())
    assert losses(tmp_path) == losses(straight)
    for name, value in weights(straight).items():
        assert torch.equal(weights(tmp_path)[name], value), name


def test_a_checkpoint_whose_writing_dies_is_not_complete(data, straight, tmp_path, monkeypatch):
    from mmllm.train.trainer import StageTrainer

    def full(self, *arguments, **keywords):
        if self.state.global_step == 4:
            raise OSError("No space left on device")
        return real(self, *arguments, **keywords)

    real = StageTrainer._save
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_save", full)
        with pytest.raises(UserError, match="no space left on device"):
            train(recipe(data), tmp_path, options(save_steps=2))
    kept = sorted(path.parent.name for path in tmp_path.glob("stages/*/checkpoint-*/complete"))
    assert kept == ["checkpoint-2"]
    train(recipe(data), tmp_path, options(save_steps=2))
    assert losses(tmp_path)[-4:] == losses(straight)[2:]  # goes on behind the second step


@pytest.mark.parametrize("clip", [0.01, 0.1, 1e6])
def test_no_gradient_is_longer_than_the_stages_clip(data, tmp_path, clip):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    norms = []

    def record(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(record)
    try:
        train(recipe(data, steps=1, clip=clip), tmp_path, options())
    finally:
        hook.remove()
    (norm,) = norms
    assert norm > 1.5 if clip > 1 else norm == pytest.approx(clip, rel=1e-3)


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

    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model

    set_seed(0)
    fresh = build_model(Blueprint.of(recipe(data))).state_dict()
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


def test_the_batch_is_global(data):
    from mmllm.train.machine import split_batch

    made = recipe(data, batch=12, micro_batch=2)
    stage = made.stages["instruct"]
    assert split_batch("instruct", stage, made, 1) == (2, 6)
    assert split_batch("instruct", stage, made, 3) == (2, 2)
    assert split_batch("instruct", stage, made, 12) == (1, 1)  # the most, not more than there are
    with pytest.raises(UserError, match="12 samples over 5 processes"):
        split_batch("instruct", stage, made, 5)


def test_matrices_alone_decay():
    from mmllm.train.trainer import StageTrainer

    class Odd(torch.nn.Module):
        """A part whose vector is called neither norm nor bias."""

        def __init__(self):
            super().__init__()
            self.query, self.map, self.norm = (
                torch.nn.Parameter(torch.ones(3)),
                torch.nn.Linear(3, 3),
                torch.nn.LayerNorm(3),
            )

    assert StageTrainer.get_decay_parameter_names(None, Odd()) == ["map.weight"]


def test_a_run_with_muon_resumes_to_the_same_losses(data, tmp_path, monkeypatch):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(recipe(data, optimizer="muon"), straight, options())
    with stopping_after(2, monkeypatch), pytest.raises(Stopped):
        train(recipe(data, optimizer="muon"), cut, options())
    train(recipe(data, optimizer="muon"), cut, options())
    assert losses(cut) == losses(straight)


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_broken_clip_is_named_and_nothing_is_lost(data, tmp_path, jobs):
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

    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model

    states = []
    for name in ("nano/llava", "nano/video_chatgpt"):
        set_seed(3)
        states.append(build_model(Blueprint.of(tiny_recipe(name))).model.language_model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_an_epoch_has_whole_global_batches(data, tmp_path):
    train(recipe(data, steps=None, epochs=2, batch=5, micro_batch=1), tmp_path, options())
    assert len(losses(tmp_path)) == 2 * (12 // 5)


def test_weights_that_are_gone_are_not_replaced_by_random_ones(data, tmp_path):
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


def test_bad_samples_are_skipped_where_that_is_asked_for(data, tmp_path):
    lines = data.read_text().splitlines()
    record = json.loads(lines[1])
    record["messages"][0]["content"][0]["path"] = "nowhere.mp4"
    broken = data.parent / "broken.jsonl"
    broken.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        train(recipe(broken), tmp_path / "stops", options())
    train(recipe(broken), tmp_path / "skips", options(skip_bad=True))
    assert "skipped" in (tmp_path / "skips" / "events.txt").read_text()
    assert "nowhere.mp4" in (tmp_path / "skips" / "events.txt").read_text()
    assert len(losses(tmp_path / "skips")) == 6


@pytest.mark.parametrize("first", range(6))
def test_no_held_out_sample_stands_in_for_one_that_trains(first):
    from mmllm.train.preparing import Preparer

    class OfNumbers:
        """Can read the last two samples only."""

        def prepare(self, samples, processor):
            if any(int(sample.id) < 4 for sample in samples):
                raise UserError("sample", "cannot be read")
            return {"numbers": [int(sample.id) for sample in samples]}

    class Processor:
        class loader:
            caches = None

    data = [Sample(str(number), [], {}) for number in range(6)]
    prepare = Preparer(data, OfNumbers(), Processor(), skip_bad=True, held=[1, 3, 5])
    assert prepare([(first, 0)])["numbers"] == [5 if first % 2 else 4]


def test_data_of_bad_samples_alone_stop_though_they_may_be_skipped(data, tmp_path):
    record = json.loads(data.read_text().splitlines()[1])
    record["messages"][0]["content"][0]["path"] = "nowhere.mp4"
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([json.dumps(record)] * 4) + "\n")
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        train(recipe(broken), tmp_path / "run", options(skip_bad=True))


def test_a_term_of_nothing_is_zero_and_no_nan(data, tmp_path, monkeypatch):
    from mmllm.contract.types import Term
    from mmllm.train.objectives.language_modeling import LanguageModeling

    real = LanguageModeling.forward

    def with_nothing(self, model, batch):
        terms = real(self, model, batch)
        return {**terms, "nothing": Term(0.0 * terms["language_modeling"].sum, 0)}

    train(recipe(data, steps=2), tmp_path / "plain", options())
    monkeypatch.setattr(LanguageModeling, "forward", with_nothing)
    train(recipe(data, steps=2), tmp_path / "more", options())
    assert losses(tmp_path / "more") == losses(tmp_path / "plain")


def test_positions_reach_an_objective(data):
    from helpers.small_runs import recipe as small_recipe
    from helpers.tiny import tiny_model

    model, seen = tiny_model(small_recipe(data)), []
    ids = torch.arange(1, 5)[None]
    model(ids, position_ids=ids + 7, objective=lambda model, batch: seen.append(batch["position_ids"]))
    assert torch.equal(seen[0], ids + 7)
    with_positions = model(ids, position_ids=ids * 3, objective=lambda model, batch: model.run(model.embed(batch))[0])
    without = model(ids, objective=lambda model, batch: model.run(model.embed(batch))[0])
    assert not torch.allclose(with_positions, without)


def test_shared_stages_tell_number_formats_and_versions_apart(data, tmp_path, monkeypatch):
    from mmllm.train import shared

    made = recipe(data, trains=["llm"], share=True)

    def file(**changes: object) -> str:
        return shared.SharedStage(context(made, options(cache=tmp_path, **changes), tmp_path)).file.name

    plain = file()
    assert file(precision="bfloat16") != plain
    monkeypatch.setattr(shared, "VERSION", shared.VERSION + 1)
    assert file() != plain


def test_a_damaged_shared_stage_is_made_anew(data, tmp_path, capsys):
    made = recipe(data, trains=["llm"], share=True, steps=2)
    settings = options(cache=tmp_path / "cache")
    train(made, tmp_path / "first", settings)
    (file,) = (tmp_path / "cache" / "stages").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    train(made, tmp_path / "second", settings)
    assert "damaged" in capsys.readouterr().err
    for name, value in weights(tmp_path / "first").items():
        assert torch.equal(weights(tmp_path / "second")[name], value), name


@pytest.mark.parametrize(("micro", "hint"), [(4, r"micro_batch=2"), (1, r"checkpointing=true")])
def test_out_of_memory_says_with_what_and_how_to_go_on(data, tmp_path, monkeypatch, micro, hint):
    from transformers import Trainer

    real = Trainer.training_step

    def short(self, *args):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("no memory")
        return real(self, *args)

    monkeypatch.setattr(Trainer, "training_step", short)
    what = rf"instruct step 3: out of memory with {micro} samples of \d+ tokens; .*checkpoint-2 is intact.*{hint}"
    with pytest.raises(UserError, match=what):
        train(recipe(data, micro_batch=micro), tmp_path, options(save_steps=2))
