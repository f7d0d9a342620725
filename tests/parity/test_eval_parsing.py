"""The canonical parser and the question block against the reference cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.eval.parsing import canonical
from mmllm.eval.protocol import question_block

TARGET = 93.0


@pytest.fixture(scope="module")
def cases(goldens: Path) -> list[dict]:
    return [json.loads(line) for line in (goldens / "eval_parsing.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts(goldens: Path) -> list[dict]:
    return json.loads((goldens / "eval_prompts.json").read_text(encoding="utf-8"))


def test_canonical_agrees_with_a_careful_reader(cases: list[dict]) -> None:
    wrong = [case for case in cases if canonical(case["response"], case["options"]) != case["intended"]]
    agreement = 100.0 * (1 - len(wrong) / len(cases))
    print(f"\ncanonical: {agreement:.1f} % of {len(cases)} cases (target {TARGET} %)")
    for case in wrong:
        print(f"  {case['id']} {case['kind']}: {case['response']!r} of {case['options']}, intended {case['intended']}")
    assert len(cases) == 421
    assert agreement >= TARGET


@pytest.mark.parametrize("benchmark", ["MVBench", "MLVU", "Video-MME", "LongVideoBench"])
def test_canonical_agrees_on_each_benchmark(cases: list[dict], benchmark: str) -> None:
    mine = [case for case in cases if case["benchmark"] == benchmark]
    right = sum(canonical(case["response"], case["options"]) == case["intended"] for case in mine)
    assert mine
    assert 100.0 * right / len(mine) >= TARGET


def test_canonical_never_rewards_saying_nothing(cases: list[dict]) -> None:
    for case in cases:
        for response in ("", "  \n", ".", "(", ")", "@"):
            assert canonical(response, case["options"]) is None


def test_question_block_is_that_of_the_authors(prompts: list[dict]) -> None:
    assert len(prompts) == 7
    for case in prompts:
        block = question_block(case["question"], case["options"])
        assert block == case["question_block"]
        assert block + "\nOnly give the best option." in case["authors_videochat2_vicuna"]
