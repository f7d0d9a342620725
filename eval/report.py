"""The report of one benchmark and of a whole run: numbers, tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = "mmllm.eval.report/1"
FLOORS = ("chance", "blind", "single_frame")


@dataclass(frozen=True)
class TaskScore:
    """One task: accuracies in percent (None where nothing was answered) and counts of items.

    `items` were scored; `total` adds the missing and the excluded ones. `unparsed` answers (empty ones too) are
    part of `items` and wrong. `words`: answers that say the text of the right option, whatever letter stands beside it;
    None, and in no file, where the model says letters alone.
    """

    score: float | None
    chance: float | None
    blind: float | None
    single_frame: float | None
    items: int
    total: int
    missing: int
    unparsed: int
    words: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As part of ``report.json``."""
        return {key: value for key, value in asdict(self).items() if key != "words" or value is not None}


@dataclass
class Report:
    """Result of one benchmark under one protocol; all scores in percent.

    Attributes:
        benchmark: its name.
        protocol: name of the protocol, `protocol_hash` its digest.
        headline: which mean `average`, `chance`, `blind` and `single_frame` are: "micro" or "macro".
        tasks: scores by task.
        empty: empty responses, counted as wrong.
        excluded: unsound items, each with id, task and reason.
        not_scored: tasks left out as a whole, with the reason.
        warnings: sentences a reader must see.
    """

    benchmark: str
    protocol: str
    protocol_hash: str
    headline: Literal["micro", "macro"]
    tasks: dict[str, TaskScore]
    empty: int = 0
    excluded: list[dict[str, str]] = field(default_factory=list)
    not_scored: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def mean(self, key: str, how: str | None = None) -> float | None:
        """Mean over tasks of one of score, words, chance, blind, single_frame: "micro" weights tasks by their items.

        None where the condition was not run. `how` is the headline's mean where it is not given.
        """
        pairs = [(getattr(task, key), task.items) for task in self.tasks.values() if task.items]
        if not pairs or any(value is None for value, _ in pairs):
            return None
        if (how or self.headline) == "macro":
            return sum(value for value, _ in pairs) / len(pairs)
        return sum(value * items for value, items in pairs) / sum(items for _, items in pairs)

    @property
    def average(self) -> float | None:
        """The headline score in percent."""
        return self.mean("score")

    @property
    def measured(self) -> tuple[str, ...]:
        """What tables show, floors last."""
        return ("score", *(() if self.mean("words") is None else ("words",)), *FLOORS)

    @property
    def scored(self) -> int:
        """Number of items that the scores are over."""
        return sum(task.items for task in self.tasks.values())

    @property
    def total(self) -> int:
        """Number of multiple-choice items, with the missing and the excluded ones."""
        return sum(task.total for task in self.tasks.values())

    @property
    def missing(self) -> int:
        """Number of items left out because their clip is absent."""
        return sum(task.missing for task in self.tasks.values())

    @property
    def unparsed(self) -> int:
        """Number of answers from which no letter could be read; they are wrong."""
        return sum(task.unparsed for task in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "headline": self.headline,
            "average": self.average,
            "micro": self.mean("score", "micro"),
            "macro": self.mean("score", "macro"),
            **{key: self.mean(key) for key in self.measured[1:]},
            "items": self.scored,
            "total": self.total,
            "missing": self.missing,
            "unparsed": self.unparsed,
            "empty": self.empty,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "excluded": self.excluded,
            "not_scored": self.not_scored,
            "warnings": self.warnings,
        }


def percent(value: float | None) -> str:
    """One decimal, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.1f}"


def summary(report: Report) -> str:
    """One line: the headline score, its floors and its denominator."""
    chance, blind, single = (percent(report.mean(floor)) for floor in FLOORS)
    return (
        f"{report.benchmark} {percent(report.average)} %  chance {chance}  blind {blind}  single frame {single}  "
        f"({report.scored}/{report.total} items)"
    )


def _rows(report: Report) -> list[list[str]]:
    """Header, one row per task, and the micro and macro rows."""
    measured = [key.replace("_", " ") for key in report.measured]
    rows = [["task", *measured, "n/all", "missing", "unparsed"]]
    for name, task in report.tasks.items():
        values = [percent(getattr(task, key)) for key in report.measured]
        rows.append([name, *values, f"{task.items}/{task.total}", str(task.missing), str(task.unparsed)])
    for how in ("micro", "macro"):
        name = f"average, {how}" + (" (headline)" if how == report.headline else "")
        values = [percent(report.mean(key, how)) for key in report.measured]
        counts = [f"{report.scored}/{report.total}", str(report.missing), str(report.unparsed)]
        rows.append([name, *values, *counts])
    return rows


def _notes(report: Report) -> list[str]:
    """Warnings, tasks without a score and excluded items, one sentence each."""
    notes = [f"WARNING: {warning}" for warning in report.warnings]
    notes += [f"{task}: {reason}" for task, reason in report.not_scored.items()]
    return notes + [f"excluded {row['id']}: {row['reason']}" for row in report.excluded]


def render(report: Report) -> str:
    """The report as a plain text table with its notes, for a terminal."""
    rows = _rows(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{report.benchmark}  {report.protocol}-{report.protocol_hash}  accuracy in %"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_notes(report), summary(report)])


def _markdown_table(rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def write_report(report: Report, out: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``tasks.png`` into `out`."""
    from mmllm.eval.charts import tasks_chart

    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "report.json", report.to_dict())
    lines = [f"# {report.benchmark}, protocol {report.protocol}-{report.protocol_hash}", "", summary(report), ""]
    lines += [*_markdown_table(_rows(report)), "", *(f"* {note}" for note in _notes(report))]
    _write_lines(out / "report.md", [*lines, "", "![accuracy per task](tasks.png)"])
    tasks_chart(report, out / "tasks.png")


def run_report(benchmarks: dict[str, Report], seconds: dict[str, float], out: Path) -> dict[str, Any]:
    """Write the report of a whole run: ``report.json``, ``report.md`` and ``report.png`` in the folder `out`.

    Args:
        benchmarks: report by benchmark name.
        seconds: wall time by step.
        out: folder of the run.

    Returns:
        the content of ``report.json``; scores in percent.
    """
    from mmllm.eval.charts import run_chart

    out.mkdir(parents=True, exist_ok=True)
    keys = ("average", "words", *FLOORS, "items", "tasks")
    full = {name: report.to_dict() for name, report in benchmarks.items()}
    short = {name: {key: row[key] for key in keys if key in row} for name, row in full.items()}
    content = {"benchmarks": short, "seconds": seconds}
    _write_json(out / "report.json", content)
    rows = [["benchmark", "average", "mean", "chance", "blind", "single frame", "n/all"]]
    for name, report in benchmarks.items():
        floors = [percent(report.mean(floor)) for floor in FLOORS]
        rows.append([name, percent(report.average), report.headline, *floors, f"{report.scored}/{report.total}"])
    lines = ["# Report", "", "Accuracy in %.", "", *_markdown_table(rows), "", "![benchmarks](report.png)", ""]
    for name, report in benchmarks.items():
        lines += [f"## {name}", "", *_markdown_table(_rows(report)), "", *(f"* {note}" for note in _notes(report)), ""]
    if seconds:
        steps = [["step", "seconds"], *([step, f"{value:.1f}"] for step, value in seconds.items())]
        lines += ["## Time", "", *_markdown_table([*steps, ["all", f"{sum(seconds.values()):.1f}"]])]
    _write_lines(out / "report.md", lines)
    run_chart(benchmarks, out / "report.png")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
