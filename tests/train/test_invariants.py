"""What must not matter to a stage, for every objective, through the command: loss and gradient norm step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.objectives import distilled, preference_pairs, teacher_of
from helpers.small_runs import conversations, recipe

from mmllm.cli import main

OBJECTIVES = ("language_modeling", "masked_video", "preference", "ipo", "distillation")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, object]]:
    """{objective: (data, its section)}."""
    folder = tmp_path_factory.mktemp("invariants")
    plain = conversations(folder, 12, clip=lambda index: index % 3 != 0)
    pairs = preference_pairs(folder, 8)
    teacher = teacher_of(plain, folder / "teacher")
    return {
        "language_modeling": (plain, {"type": "language_modeling", "groups": 2}),
        "masked_video": (plain, {"type": "masked_video", "groups": 2}),
        "preference": (pairs, {"type": "preference", "sft": 0.2}),
        "ipo": (pairs, {"type": "preference", "loss": "ipo", "reference": "copy"}),
        "distillation": (plain, distilled(teacher)),
    }


def steps(made, out: Path, *flags: str, **stage: object) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, through the command."""
    made.data["stages"]["instruct"] |= stage
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(made.data))
    common = ["--quiet", "--jobs", "0", "--device", "cpu", "--cache-dir", str(out.parent / "cache")]
    assert main(["train", str(file), "--out", str(out), *common, *flags]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_how_a_stage_is_computed_does_not_matter(sources, objective, tmp_path, monkeypatch):
    from mmllm.train import context

    monkeypatch.setattr(context.RunOptions, "__init__", _every_step(context.RunOptions.__init__))
    data, section = sources[objective]

    def made(**changes):
        return recipe(data, objective=section, trains=["connector", "llm"], **changes)

    plain = steps(made(), tmp_path / "plain")
    assert len(plain) == 6
    accumulated = steps(made(), tmp_path / "accumulated", micro_batch=1)
    assert flat(accumulated) == pytest.approx(flat(plain), rel=2e-4, abs=2e-5)
    eager = made()
    eager.model["llm"]["config"]["attn_implementation"] = "eager"
    assert flat(steps(eager, tmp_path / "eager")) == pytest.approx(flat(plain), rel=2e-4, abs=2e-5)
    for name in ("first", "again"):  # the second time from the cache
        cached = steps(made(), tmp_path / name, "--cache", "frames,features")
        assert flat(cached) == pytest.approx(flat(plain), rel=1e-5, abs=1e-6)


def flat(pairs: list[tuple[float, float]]) -> list[float]:
    return [value for pair in pairs for value in pair]


def _every_step(real):
    def init(self, *args, **keywords):
        real(self, *args, **{**keywords, "log_steps": 1})

    return init
