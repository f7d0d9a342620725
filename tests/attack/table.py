"""What the attack prints: the table, and each bad case so that a person can repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from attack.case import BAD, COLUMNS, HARNESS, Verdict


def counts(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """{generator: {"inputs" and each column: how many}}, "total" last."""
    table: dict[str, dict[str, int]] = {}
    for verdict in verdicts:
        for name in () if verdict.column == HARNESS else (verdict.generator, "total"):
            row = table.setdefault(name, dict.fromkeys(("inputs", *COLUMNS), 0))
            row["inputs"] += 1
            row[verdict.column] += 1
    return {name: table[name] for name in sorted(table, key=lambda name: (name == "total", name))}


def render(table: dict[str, dict[str, int]]) -> str:
    """The counts as a table in Markdown."""
    head = ["generator", "inputs", *COLUMNS]
    rows = [[name, *map(str, row.values())] for name, row in table.items()]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(verdict: Verdict) -> str:
    """A bad case in a few lines."""
    words = [word if len(word) < 200 else f"{word[:150]}...({len(word)})" for word in verdict.argv]
    lines = [f"{verdict.column}: {verdict.name} --seed {verdict.seed}: {verdict.note}"]
    lines += [f"    why: {verdict.why}"] if verdict.why else []
    lines += [f"    mmllm {shlex.join(words)}"] if words else []
    lines += [f"    said: {verdict.last}"] if verdict.last else []
    text = "\n".join(lines)
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


def bad(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those of the last four columns, the worst first, and behind them cases that the attack could not judge."""
    order = (HARNESS, *BAD)
    return sorted((v for v in verdicts if v.column in order), key=lambda v: (-order.index(v.column), v.name))
