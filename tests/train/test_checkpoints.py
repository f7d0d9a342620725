"""Checkpoints: whole or not used, ours or not touched, and continuing from the last one is not training on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.small_runs import losses, options, recipe, weights

from mmllm.contract.errors import UserError
from mmllm.run_folder import RunFolder
from mmllm.train.checkpoints import finish, last_checkpoint, start
from mmllm.train.context import Stopped
from mmllm.train.run import train


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """An uninterrupted run that logs every fourth step."""
    out = tmp_path_factory.mktemp("straight")
    train(recipe(data), out, options(log_steps=4))
    return out


def interrupted(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """A run that ends after its stage's last checkpoint, where the whole model is to be saved."""

    def stop(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_model", stop)
        with pytest.raises(OSError):
            train(recipe(data, **changes), out, options(log_steps=4))


def stopped_after(data: Path, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped by a signal after a step."""
    from mmllm.train import progress

    real = progress.StopOnSignal.on_step_end

    def signalled(self, args, state, control, **keywords):
        self.signal = 15 if state.global_step == step else None
        return real(self, args, state, control, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnSignal, "on_step_end", signalled)
        with pytest.raises(Stopped):
            train(recipe(data), out, options(log_steps=4))


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("length", [{"steps": 5}, {"steps": 6}, {"steps": None, "epochs": 2.0}])  # an epoch has 3
def test_a_run_that_ended_after_its_last_checkpoint_makes_no_step_more(data, tmp_path, monkeypatch, length):
    length |= {"schedule": "constant"}  # others are at 0 by then, and a step more would change nothing
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(recipe(data, **length), straight, options(log_steps=4))
    interrupted(data, run, monkeypatch, **length)
    assert len(list(run.glob("stages/*/checkpoint-*/complete"))) == 1
    train(recipe(data, **length), run, options(log_steps=4))
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(steps) <= 6
    assert losses(run) == losses(straight)
    assert same(straight, run)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_the_first_loss_after_a_resume_averages_all_steps_since_the_last_line(
    data, straight, tmp_path, monkeypatch, step
):
    stopped_after(data, tmp_path, step, monkeypatch)
    train(recipe(data), tmp_path, options(log_steps=4))
    assert losses(tmp_path) == losses(straight)
    assert same(straight, tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_lacks_state_is_refused_by_name(data, tmp_path, monkeypatch, name):
    stopped_after(data, tmp_path, 3, monkeypatch)
    (tmp_path / "stages" / "1-instruct" / "checkpoint-3" / name).unlink()
    with pytest.raises(UserError, match=name):
        train(recipe(data), tmp_path, options())


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_refused_by_name(data, tmp_path, monkeypatch, name):
    stopped_after(data, tmp_path, 3, monkeypatch)
    path = tmp_path / "stages" / "1-instruct" / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint-3: damaged"):
        train(recipe(data), tmp_path, options())


def test_a_half_written_checkpoint_is_not_resumed_from_and_goes(tmp_path):
    for step in (2, 10):
        start(tmp_path / f"checkpoint-{step}")
    finish(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()


def test_nothing_is_deleted_that_the_run_did_not_write(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "mine").touch()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (8, 9, 10):
        start(tmp_path / f"checkpoint-{step}")
        finish(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoint-10", "checkpoint-7", "checkpoint-9", "checkpoint-best")
    ]
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        start(tmp_path / "checkpoint-7")


def test_what_a_kill_leaves_of_making_or_removing_a_checkpoint_is_in_nobodys_way(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()  # made, not marked yet
    start(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "a.safetensors").touch()
    (tmp_path / "checkpoint-2" / "sub").mkdir()

    class Killed(BaseException):
        pass

    def kill(*arguments: object, **keywords: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(Killed):
            last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-2").exists()
    start(tmp_path / "checkpoint-2")


def test_a_checkpoint_is_not_whole_before_all_of_it_is_written(data, tmp_path, monkeypatch):
    from transformers import Trainer

    seen = []
    real = Trainer._save_checkpoint

    def look(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        seen.append((folder / "complete").exists())
        real(self, model, trial)
        seen.append((folder / "complete").exists())

    monkeypatch.setattr(Trainer, "_save_checkpoint", look)
    train(recipe(data, steps=2), tmp_path, options(save_steps=1))
    assert seen == [False] * 4
    assert len(list(tmp_path.glob("stages/*/checkpoint-*/complete"))) == 2


def test_a_folder_with_a_model_of_no_run_is_refused_and_stays(data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds model, but no run"):
        train(recipe(data), tmp_path, options())
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["x/../../../../victim/run", "../up", "a.b", "", "naïve"])
def test_a_stage_whose_name_leaves_the_folder_is_refused(data, tmp_path, name):
    import yaml

    from mmllm.config.recipe import load

    made = recipe(data)
    made.data["stages"] = {name: made.data["stages"]["instruct"]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(made.data))
    with pytest.raises(UserError, match=r"stages\..*not a name"):
        load(path)


def test_a_failed_start_does_not_block_the_corrected_command(data, tmp_path):
    with pytest.raises(UserError, match="no such"):
        train(recipe(data, init=str(tmp_path / "nowhere")), tmp_path / "run", options())
    assert not (tmp_path / "run").exists()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "1", "messages": [{"role": "user", "content": "What?"}]}\n')
    with pytest.raises(UserError, match="no assistant turn"):
        train(recipe(broken), tmp_path / "run", options())
    train(recipe(data, steps=1), tmp_path / "run", options())
    shutil.rmtree(tmp_path / "run")


def test_a_stage_after_one_in_bfloat16_trains_in_float32(data, tmp_path):
    made = recipe(data, steps=1)
    made.data["stages"]["second"] = {**made.data["stages"]["instruct"]}
    train(made, tmp_path, options(), ["instruct"])
    from mmllm import load

    model, processor = load(tmp_path, dtype=torch.bfloat16)
    RunFolder(tmp_path).save_model(model, processor, made)
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.bfloat16}
    train(made, tmp_path, options())
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["recipe.yaml", "log.jsonl", "status.json", "curves.png"])
def test_a_users_own_file_of_a_name_that_a_run_has_is_left_alone(data, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, but no run"):
        train(recipe(data), tmp_path, options())
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["{}", '{"stages": null}', '{"stages": []}'])
def test_a_damaged_status_is_named(data, tmp_path, text):
    train(recipe(data, steps=1), tmp_path, options())
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match=r"status\.json:stages: damaged"):
        train(recipe(data, steps=1), tmp_path, options())


def test_a_stage_goes_on_with_the_data_that_it_began_with(data, tmp_path, monkeypatch):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(data.read_bytes())
    (tmp_path / "clips").symlink_to(data.parent / "clips")
    stopped_after(mine, tmp_path / "run", 3, monkeypatch)
    whole = mine.read_bytes()
    mine.write_bytes(whole.splitlines(keepends=True)[0] + whole)
    with pytest.raises(UserError, match=r"mine\.jsonl: differs from the data this stage began with"):
        train(recipe(mine, steps=6), tmp_path / "run", options())
    mine.write_bytes(whole)
    train(recipe(mine, steps=6), tmp_path / "run", options())
