"""Held-out samples: never learnt from, scored as training scores, and the best weights kept."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.small_runs import options, recipe, weights

import mmllm
from mmllm.contract.errors import UserError
from mmllm.train.run import train
from mmllm.train.validation import held_out


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_held_out_samples_are_scored_and_the_best_weights_kept(data, tmp_path):
    train(recipe(data, validation=4, validate_every=2, lr=3e-3), tmp_path, options())
    scored = [line for line in lines(tmp_path) if "validation" in line]
    assert [line["step"] for line in scored] == [0, 2, 4, 6]
    best = min(scored[1:], key=lambda line: line["validation"])
    folder = tmp_path / "stages/1-instruct/best"
    kept = json.loads((folder / "validation.json").read_text())
    assert kept == {"validation": best["validation"], "step": best["step"]}
    model, _ = mmllm.load(folder)
    if best["step"] == 6:
        last = weights(tmp_path)
        own = {name: value for name, value in model.state_dict().items() if name in last}
        assert all(torch.equal(value, last[name]) for name, value in own.items())


def test_scoring_changes_nothing_in_training(data, tmp_path):
    """The same samples learnt from, with and without scoring in between."""
    for name, every in (("often", 1), ("once", 6)):
        train(recipe(data, validation=4, validate_every=every), tmp_path / name, options())
    often, once = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("often", "once"))
    assert often == once


def test_nothing_held_out_is_learnt_from():
    learnt, held = held_out(100, 30, 7, "here")
    assert len(held) == 30
    assert sorted([*learnt, *held]) == list(range(100))
    assert held_out(100, 30, 7, "here")[1] == held != held_out(100, 30, 8, "here")[1]
    assert held_out(100, None, 7, "here") == (range(100), [])
    with pytest.raises(UserError, match="here: all 100 samples would be held out"):
        held_out(100, 100, 7, "here")
