"""A seed decides the start and the order; the learning rate warms up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.small_runs import losses, options, recipe

from mmllm.train.run import train


@pytest.fixture(scope="module")
def order(data) -> list[list[str]]:
    """The samples of each step, as they come to the loss; emptied by each test."""
    return []


@pytest.fixture(autouse=True)
def noted(order, monkeypatch):
    """Note which samples come."""
    from mmllm.train.objectives.language_modeling import LanguageModeling

    order.clear()
    real = LanguageModeling.prepare

    def prepare(self, samples, processor):
        order.append([sample.id for sample in samples])
        return real(self, samples, processor)

    monkeypatch.setattr(LanguageModeling, "prepare", prepare)


def run(data: Path, out: Path, order: list[list[str]], seed: int, **stage: object) -> list[list[str]]:
    """The order of a run's samples."""
    order.clear()
    train(recipe(data, **{"steps": 3, "lr": 1e-9, **stage}), out, options(seed=seed))
    return [list(names) for names in order]


def test_another_seed_is_another_order_of_the_same_samples(data, tmp_path, order):
    """An epoch of three steps."""
    orders = [run(data, tmp_path / str(number), order, seed) for number, seed in enumerate((0, 0, 1))]
    assert orders[0] == orders[1] != orders[2]
    everything = sorted(f"sample-{index}" for index in range(12))
    assert all(sorted(name for step in names for name in step) == everything for names in orders)


def test_another_seed_is_another_start(data, tmp_path, order):
    """One step over all samples: its loss is that of the start, whatever their order."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        run(data, tmp_path / str(number), order, seed, steps=1, batch=12)
        found += losses(tmp_path / str(number))
    assert found[0] == found[1]
    assert abs(found[0] - found[2]) > 1e-3


def test_the_learning_rate_warms_up_for_its_share_of_the_steps(data, tmp_path, order):
    run(data, tmp_path, order, 0, steps=8, warmup=0.5, lr=1e-3, schedule="constant")
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
