"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm.contract.errors import UserError, nearest
from mmllm.eval import mlvu, mvbench
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
}


def find_benchmark(name: str, where: str = "--tasks") -> Benchmark:
    """The benchmark of that name; `where` the name was given, for the error.

    Raises:
        UserError: there is none; the hint has the nearest names.
    """
    if name not in BENCHMARKS:
        raise UserError(where, f"unknown benchmark {name!r}", hint=nearest(name, list(BENCHMARKS)))
    return BENCHMARKS[name]
