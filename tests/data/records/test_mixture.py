"""Mixtures: exact shares, no repeats, the same in every process; and the YAML that describes them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmllm.contract.errors import UserError
from mmllm.data.records.mix import data_files, load_data, read_mix
from mmllm.data.records.mixture import Joined, Mixture, Subset, permuted

WEIGHTS = [
    [1],
    [1, 1],
    [3, 1],
    [0.7, 0.2, 0.1],
    [1 / 3, 1 / 3, 1 / 3],
    [5, 1, 1, 1, 1, 1],
    [0.61, 0.27, 0.12],
    [97, 2, 1],
    [11, 5, 3],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_beginning_has_the_right_shares_to_within_one(weights):
    mixture = Mixture([range(50)] * len(weights), weights, length=700)
    taken, whole = [0] * len(weights), sum(weights)
    for index in range(700):
        taken[mixture.locate(index)[0]] += 1
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - (index + 1) * weight / whole) < 1 + 1e-6


def test_a_source_repeats_only_when_it_is_used_up():
    mixture = Mixture([range(10), range(100, 140)], [1, 1], length=120, seed=5)
    assert len(mixture) == 120
    small = [value for value in mixture if value < 100]
    large = [value for value in mixture if value >= 100]
    for start in range(0, 60, 10):
        assert sorted(small[start : start + 10]) == list(range(10))
    assert len({tuple(small[start : start + 10]) for start in range(0, 60, 10)}) > 3
    assert sorted(large[:40]) == list(range(100, 140))
    assert len(set(large[40:])) == 20
    assert len(Mixture([range(10), range(7)], [9, 1])) == 17


def test_another_seed_is_another_order():
    orders = [list(Mixture([range(40), range(40, 50)], [4, 1], seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(UserError, match="not a positive number for each source"):
        Mixture([range(3), range(3)], [1, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_permuted_is_a_permutation(size):
    orders = [[permuted(index, size, key) for index in range(size)] for key in range(5)]
    for order in orders:
        assert sorted(order) == list(range(size))
    assert size < 4 or len(set(map(tuple, orders))) > 1
    if size == 1000:
        fixed = sum(index == value for index, value in enumerate(orders[0]))
        assert fixed < 10
        assert abs(sum(orders[0][:500]) / 500 - 499.5) < 60


def digest(values: list[int]) -> str:
    """A short name for a long list."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def test_every_process_and_every_split_over_workers_gives_the_same():
    code = (
        "import hashlib, json; from mmllm.data.records.mixture import Mixture\n"
        "values = list(Mixture([range(300), range(300, 350)], [0.7, 0.3], length=900, seed=3))\n"
        "print(hashlib.sha256(json.dumps(values).encode()).hexdigest())"
    )
    mixture = Mixture([range(300), range(300, 350)], [0.7, 0.3], length=900, seed=3)
    values = list(mixture)
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == digest(values)
    for workers in (1, 2, 7):
        copies = [pickle.loads(pickle.dumps(mixture)) for _ in range(workers)]
        split = {}
        # the last worker first, and each from its end
        for worker in reversed(range(workers)):
            for index in reversed(range(worker, 900, workers)):
                split[index] = copies[worker][index]
        assert [split[index] for index in range(900)] == values


def test_joined_and_part():
    joined = Joined([range(3), range(10, 14), range(20, 21)])
    assert list(joined) == [0, 1, 2, 10, 11, 12, 13, 20]
    assert joined[-1] == 20
    assert list(Subset(range(10), 3, 4)) == [3, 4, 5, 6]
    drawn = list(Subset(range(10), 2, 5, seed=1))
    assert len(set(drawn)) == 5
    assert min(drawn) >= 2
    with pytest.raises(IndexError):
        joined[8]


# --- the YAML


def conversation(name: str, **keys: object) -> dict:
    """A record of LLaVA's."""
    turns = [{"from": "human", "value": f"Question {name}?"}, {"from": "gpt", "value": "left"}]
    return {"id": name, "conversations": turns, **keys}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten records of LLaVA's in `a.json`, four of ours in `b.jsonl`, two more files below `more`."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([conversation(f"a{number}", video="v.mp4") for number in range(10)]))
    ours = [{"id": f"b{number}", "messages": [{"role": "user", "content": "x"}]} for number in range(4)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ours)))
    for name in ("c", "d"):
        (tmp_path / "more" / f"{name}.json").write_text(json.dumps([conversation(name)]))
    return tmp_path


def mix(folder: Path, text: str) -> Path:
    """A mix in YAML."""
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


def names(data: object) -> list[str]:
    """Names of all samples."""
    return [sample.id for sample in data]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", [f"a{number}" for number in range(10)]),
        ('"first:25%"', ["a0", "a1", "a2"]),
        ('"first:2"', ["a0", "a1"]),
        ('"end:15%"', ["a8", "a9"]),
        ('"end:999"', [f"a{number}" for number in range(10)]),
    ],
)
def test_llava_next_mixes_are_read_as_they_are(folder, strategy, expected):
    path = mix(folder, f"datasets:\n- json_path: a.json\n  sampling_strategy: {strategy}\n- json_path: b.jsonl\n")
    data = load_data(path)
    assert names(data) == [*expected, "b0", "b1", "b2", "b3"]
    assert data_files(path) == [path, folder / "a.json", folder / "b.jsonl"]


def test_random_draws_are_fixed_by_the_seed(folder):
    text = "seed: {}\ndatasets:\n- json_path: a.json\n  sampling_strategy: random:50%\n  start: 1\n"
    first = names(load_data(mix(folder, text.format(0))))
    assert first == names(load_data(mix(folder, text.format(0))))
    assert len(set(first)) == 5
    assert "a0" not in first
    assert first != names(load_data(mix(folder, text.format(1))))


def test_braces_folders_and_lists(folder):
    path = mix(folder, "datasets:\n- json_path: more/{c,d}.json\n")
    assert names(load_data(path)) == names(load_data(folder / "more" / "{c,d}.json")) == ["c", "d"]

    both = load_data([path, folder / "b.jsonl"])
    assert names(both) == ["c", "d", "b0", "b1", "b2", "b3"]
    assert data_files([path, folder / "b.jsonl"])[-1] == folder / "b.jsonl"


def test_weights_make_a_mixture(folder):
    path = mix(folder, "length: 40\ndatasets:\n- {json_path: a.json, weight: 3}\n- {json_path: b.jsonl, weight: 1}\n")
    data = load_data(path)
    assert len(data) == 40
    assert Counter(name[0] for name in names(data)) == {"a": 30, "b": 10}
    assert names(data) == names(load_data(path))
    assert sorted(names(data)[:13])[:10] == [f"a{number}" for number in range(10)]


def test_media_are_below_the_entry_then_the_argument_then_the_mix_then_the_file(folder):
    (folder / "own").mkdir()

    def place(text: str, root: Path | None = None) -> Path:
        return Path(load_data(mix(folder, text), root)[0].messages[0]["content"][0]["path"])

    assert place("datasets:\n- {json_path: a.json, root: own}\n", Path("/r")) == folder / "own" / "v.mp4"
    assert place("root: own\ndatasets:\n- json_path: a.json\n", Path("/r")) == Path("/r/v.mp4")
    assert place("root: own\ndatasets:\n- json_path: a.json\n") == folder / "own" / "v.mp4"
    assert place("datasets:\n- json_path: a.json\n") == folder / "v.mp4"


def test_files_are_found_below_the_root(folder):
    path = mix(folder, "datasets:\n- json_path: c.json\n")
    assert names(load_data(path, folder / "more")) == ["c"]
    with pytest.raises(UserError, match=r"c\.json: no such data file"):
        data_files(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "datasets:\n- {json_path: a.json, weigth: 2}\n",
            r"mix\.yaml:datasets\[0\]\.weigth: unknown key\. Try: weight",
        ),
        ("dataset:\n- {json_path: a.json}\n", r"mix\.yaml:dataset: unknown key\. Try: datasets"),
        ("datasets:\n- {json_path: a.json, weight: 2}\n- {json_path: b.jsonl}\n", r"datasets\[1\]\.weight: missing"),
        ("datasets:\n- {json_path: a.json, weight: -2}\n", r"datasets\[0\]\.weight: bad weight"),
        ("datasets:\n- {json_path: 'more/{c,d}.json', weight: 2}\n", "one weight for 2 files"),
        ("datasets:\n- {json_path: a.json, sampling_strategy: 'first:0'}\n", "sampling_strategy: unknown"),
        ("datasets:\n- {json_path: a.json, sampling_strategy: 'last:3'}\n", "got last:3"),
        ("datasets:\n- {json_path: a.json, sampling_strategy: 'first:x%'}\n", "sampling_strategy: unknown"),
        ("datasets:\n- {json_path: a.json, start: 10}\n", r"start: nothing is left, expected below 10, got 10"),
        ("datasets:\n- {json_path: a.json, start: 1.5}\n", "start: bad number"),
        ("datasets:\n- {json_path: a.json, format: lava}\n", "no such format"),
        ("datasets:\n- {root: x}\n", r"datasets\[0\]\.json_path: not a text"),
        ("datasets: []\n", "datasets: missing"),
        ("datasets: [\n", "not YAML"),
        ("- a.json\n", "not a map"),
    ],
)
def test_a_mix_that_is_none_names_the_key(folder, text, says):
    with pytest.raises(UserError, match=says):
        load_data(mix(folder, text))


def test_a_data_file_is_a_mix_of_itself(folder):
    assert read_mix(folder / "a.json").entries[0].path == folder / "a.json"
    assert names(load_data(folder / "b.jsonl")) == ["b0", "b1", "b2", "b3"]


def test_training_reads_a_mix_of_formats(tmp_path):
    from helpers.tiny import frames, tiny_recipe, tokenizer_folder, write_video

    from mmllm.train.context import RunOptions
    from mmllm.train.data import data_files as stage_files
    from mmllm.train.data import load_data as stage_data
    from mmllm.train.run import check, train

    write_video(tmp_path / "media" / "1.mp4", frames(1, 8))
    theirs = [conversation(f"llava-{number}", video="1.mp4") for number in range(3)]
    theirs[0]["conversations"][0]["value"] = "<image>\nWhat moves?"
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    content = [{"type": "video", "path": "1.mp4"}, {"type": "text", "text": "What moves?"}]
    ours = {"id": "ours", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]}
    (tmp_path / "ours.jsonl").write_text(json.dumps(ours))
    path = mix(tmp_path, "datasets:\n- {json_path: theirs.json, weight: 1}\n- {json_path: ours.jsonl, weight: 1}\n")
    recipe = tiny_recipe()
    recipe.model["llm"]["tokenizer"] = tokenizer_folder()
    stage = {"data": str(path), "trains": ["connector", "llm"], "steps": 2, "batch": 2, "lr": 1e-3}
    recipe.data["stages"] = {"instruct": stage}
    recipe.data["roots"] = {"media": str(tmp_path / "media")}
    options = RunOptions(jobs=0, device="cpu", quiet=True, log_steps=1, cache=tmp_path / "cache")
    made = recipe.stages["instruct"]
    assert stage_files(made, recipe) == [path, tmp_path / "theirs.json", tmp_path / "ours.jsonl"]
    assert Counter(sample.id[0] for sample in stage_data(made, recipe)) == {"l": 2, "o": 2}
    assert "1 media" in check(recipe, tmp_path / "run", options)["stage instruct"]
    train(recipe, tmp_path / "run", options)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in log if line.get("loss", 0) > 0]) == 2
    (tmp_path / "ours.jsonl").unlink()
    with pytest.raises(UserError, match=r"ours\.jsonl: no such data file"):
        train(recipe, tmp_path / "other", options)
