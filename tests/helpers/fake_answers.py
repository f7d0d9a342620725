"""An answerer made up for tests, and runs of it over a miniature MVBench."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.eval.benchmarks import BENCHMARKS
from mmllm.eval.protocol import CANONICAL
from mmllm.eval.report import Report
from mmllm.eval.runner import run_benchmark


class Fake:
    """Answers from a table of paths, or always the same; counts what it was asked."""

    def __init__(
        self, answers: dict[str, str] | None = None, constant: str = "A", fail_after: int | None = None
    ) -> None:
        self.answers, self.constant, self.fail_after = answers or {}, constant, fail_after
        self.asked: Counter[tuple[str, int | None]] = Counter()
        self.tokens: set[int] = set()

    def __call__(
        self, conversations: list[list[dict[str, Any]]], *, frames: int | None, max_new_tokens: int
    ) -> list[str]:
        if self.fail_after is not None and self.asked.total() >= self.fail_after:
            raise UserError("clip.mp4", "cannot be decoded")
        self.tokens.add(max_new_tokens)
        responses = []
        for chat in conversations:
            content = chat[-1]["content"]
            key = content[0].get("path") or content[-1]["text"]
            self.asked[key, frames] += 1
            responses.append(self.answers.get(key, self.constant))
        return responses


def run(root: Path, out: Path, answer: Fake, **kwargs: Any) -> Report:
    return run_benchmark(BENCHMARKS["mvbench"], root, answer, out, CANONICAL, **kwargs)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
