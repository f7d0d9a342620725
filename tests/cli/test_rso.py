"""`mmllm data rso`: a model's own answers become pairs; scorers by name or plug-in."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.small_runs import conversations, options, recipe

from mmllm.cli import main
from mmllm.data.records.conversations import Sample, open_source
from mmllm.data.records.rejection_sampling import distinct, first_round, rejection_sample, tournament
from mmllm.model.scorers.words import WordScorer
from mmllm.train.objectives.preference import encode_pair
from mmllm.train.run import train

PLUGIN = '''
from mmllm.contract.registry import register
from mmllm.contract.scorer import Scorer

@register("scorer", "longest")
class Longest(Scorer):
    """Long answers are good."""

    def __init__(self, *, most: int = 100) -> None:
        self.most = most

    def score(self, sample, answer: str) -> float:
        return float(min(len(answer), self.most))
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rso")
    data = conversations(folder, 4, clip=lambda index: index % 2 == 0)
    train(recipe(data, steps=1), folder / "run", options())
    (folder / "longest.py").write_text(PLUGIN)
    return folder


def words(made, out, *more: str) -> list[str]:
    command = ["data", "rso", str(made / "data.jsonl"), "--model", str(made / "run"), "--out", str(out)]
    return [*command, "--candidates", "6", "--keep", "4", "--new-tokens", "8", "--quiet", "--device", "cpu", *more]


def test_pairs_train_and_the_same_command_continues(made, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    more = ("--scorer", "longest", "--plugin", str(made / "longest.py"))
    assert main(words(made, out, *more, "most=1000", "--limit", "2")) == 0
    first = out.read_text()
    assert main(words(made, out, *more, "most=1000")) == 0
    assert out.read_text().startswith(first)
    assert "2 questions were done before" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["question"] for record in records} == {f"sample-{index}" for index in range(4)}
    assert all(record["chosen_score"] > record["rejected_score"] for record in records)
    assert all(len(record["chosen"]) > len(record["rejected"]) for record in records)
    train(recipe(out, objective="preference", steps=1, batch=2), tmp_path / "dpo", options())


def test_the_best_answers_are_conversations(made, tmp_path):
    out = tmp_path / "best.jsonl"
    assert main(words(made, out, "--scorer", "words", "--make", "best")) == 0
    for sample in open_source(out):
        assert sample.messages[-1]["role"] == "assistant"


def test_an_unknown_scorer_or_argument_is_named(made, tmp_path, capsys):
    assert main(words(made, tmp_path / "x.jsonl", "--scorer", "wirds")) == 2
    assert "no scorer is called 'wirds'. Try: words" in capsys.readouterr().err
    assert main(words(made, tmp_path / "x.jsonl", "size=3", "--scorer", "words")) == 2
    assert "--scorer words.size: unknown" in capsys.readouterr().err
    (tmp_path / "y.jsonl").write_text('{"id": 1}\n')
    assert main(words(made, tmp_path / "y.jsonl", "--scorer", "words")) == 2
    assert "y.jsonl: holds something else" in capsys.readouterr().err


def test_words_in_common():
    sample = Sample("a", [{"role": "user", "content": "?"}], {"answer": "A red square"})
    scores = [WordScorer().score(sample, text) for text in ("a red square", "a red dot", "no", "a red square and more")]
    assert scores == pytest.approx([1.0, 2 / 3, 0.0, 0.75])


def test_sampling_ends_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    accepted, _ = rejection_sample([0.0, 1.0, 5.0], 5, 0.01, lambda: float(torch.rand(1, generator=generator)))
    assert accepted == [2, 1, 0]
    assert rejection_sample([0.0, 1.0, 5.0], 2, 1e9, lambda: 0.5)[0] == [0, 1]
    assert distinct(["a", "b", "a"], [1.0, 2.0, 3.0]) == {"a": 3.0, "b": 2.0}
    rewards = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 3.0, "e": 3.0}
    assert list(first_round("abcd", rewards)) == [("b", "a"), ("c", "d")]
    assert list(first_round("de", rewards)) == []
    assert list(tournament("abcd", rewards)) == [("b", "a"), ("c", "d"), ("c", "b")]


def test_pairs_that_are_written_are_read(made, tmp_path):
    record = {"messages": [{"role": "user", "content": "What?"}], "chosen": "a dog", "rejected": "a cat"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    from mmllm.api import load

    _, processor = load(made / "run")
    assert encode_pair(open_source(tmp_path / "p.jsonl")[0], processor).lengths[0] > 1
