"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm.contract.errors import UserError, nearest
from mmllm.eval import grounding, mlvu, mvbench
from mmllm.eval.items import Item


@dataclass(frozen=True)
class Benchmark:
    """A set of items, and how their scores become one number.

    Attributes:
        name: as given to ``--tasks``.
        load: function from the benchmark's folder to its items.
        average: "micro" over all scored items, or "macro" over the multiple-choice tasks.
    """

    name: str
    load: Callable[[Path], list[Item]]
    average: Literal["micro", "macro"]


BENCHMARKS = {
    "mvbench": Benchmark("mvbench", mvbench.load, "micro"),
    "mlvu": Benchmark("mlvu", mlvu.load, "macro"),
    "grounding": Benchmark("grounding", grounding.load, "macro"),
}


def parse_tasks(text: str, where: str = "--tasks") -> dict[str, tuple[str, ...]]:
    """{benchmark: its chosen tasks, or () for all}: `mvbench,mlvu:order,needle` has two tasks of mlvu.

    A benchmark that is named alone is taken whole, whatever else is said of it.

    Raises:
        UserError: an unknown benchmark, or a task before any benchmark.
    """
    chosen: dict[str, list[str]] = {}
    last = ""
    for piece in (part.strip() for part in text.split(",")):
        name, colon, task = piece.partition(":")
        if not piece:
            continue
        if colon or name in BENCHMARKS or not last or not chosen[last]:
            find_benchmark(name, where)
            last = name
            chosen.setdefault(name, []).append(task)
        else:
            chosen[last].append(piece)
    if not chosen:
        raise UserError(where, "names no benchmark", expected=", ".join(BENCHMARKS))
    return {name: () if "" in tasks else tuple(dict.fromkeys(tasks)) for name, tasks in chosen.items()}


def title_of(name: str, tasks: tuple[str, ...]) -> str:
    """How a benchmark is called in reports: with the tasks that were chosen of it."""
    return f"{name}:{','.join(tasks)}" if tasks else name


def find_benchmark(name: str, where: str = "--tasks") -> Benchmark:
    """The benchmark of that name; `where` the name was given, for the error.

    Raises:
        UserError: there is none; the hint has the nearest names.
    """
    if name not in BENCHMARKS:
        raise UserError(where, f"unknown benchmark {name!r}", hint=nearest(name, list(BENCHMARKS)))
    return BENCHMARKS[name]
