"""What a stage starts from: parts of other runs, or what an equal stage has left."""

from __future__ import annotations

import re
import shutil
import threading
import time

import pytest
import torch
from helpers.small_runs import context, options, recipe, weights

from mmllm.contract.errors import UserError
from mmllm.train.run import train
from mmllm.train.shared import SharedStage


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


def test_a_run_waits_for_another_that_trains_a_shared_stage(data, tmp_path):
    """The other one is played: it holds the turn until it has been waited for, and then keeps weights."""
    from accelerate import PartialState

    made = recipe(data, trains=["llm"], share=True, steps=2)
    train(made, tmp_path / "known", options(cache=tmp_path / "full"))
    (kept,) = (tmp_path / "full/stages").glob("*.safetensors")
    other = SharedStage(context(made, options(cache=tmp_path / "empty"), tmp_path))
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
    assert "waiting for a run that trains an equal stage" in first and "taken from" in second
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


def test_a_shared_stage_is_kept_apart_by_all_that_it_learns_from(data, tmp_path):
    """Seed, data, length, LLM; not by how the batch is cut, nor by the front end, which it never runs."""

    def kept(seed: int = 0, llm: int = 64, **stage: object) -> str:
        made = recipe(**{"data": data, "trains": ["llm"], "share": True, "steps": 2, **stage})
        made.model["llm"]["config"]["hidden_size"] = llm
        return SharedStage(context(made, options(seed=seed, cache=tmp_path), tmp_path)).file.name

    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    known = kept()
    assert known == kept() == kept(micro_batch=1)
    different = [kept(seed=1), kept(llm=48), kept(steps=3), kept(lr=1e-4), kept(data=other)]
    assert len({known, *different}) == 1 + len(different)
    before = kept(data=other)
    other.write_text(data.read_text())
    assert before != kept(data=other) == known  # what the file holds counts, and not its name


def test_a_stage_that_started_from_elsewhere_is_neither_kept_nor_taken_as_shared(data, tmp_path):
    made = recipe(data, trains=["llm"], share=True, steps=2)
    made.data["stages"]["second"] = {**made.data["stages"]["instruct"]}
    settings = options(cache=tmp_path / "cache")
    train(made, tmp_path / "alone", settings, ["second"])  # never trained the first
    assert not list((tmp_path / "cache").glob("stages/*.safetensors"))
    train(made, tmp_path / "both", settings)
    train(made, tmp_path / "clean", options(cache=tmp_path / "other"))
    for name, value in weights(tmp_path / "clean").items():
        assert torch.equal(weights(tmp_path / "both")[name], value), name


def test_a_run_goes_on_in_the_number_format_that_it_began_with(data, tmp_path):
    made = recipe(data, steps=1)
    made.data["stages"]["second"] = {**made.data["stages"]["instruct"]}
    train(made, tmp_path, options(), ["instruct"])
    with pytest.raises(UserError, match=r"trained in float32 so far, now bfloat16. Try: --dtype float32"):
        train(made, tmp_path, options(precision="bfloat16"))
