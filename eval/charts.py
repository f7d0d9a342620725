"""Charts of reports: accuracy as bars, marked with chance, blind and single-frame scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.eval.report import Report, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR, CHANCE, BLIND, SINGLE = "#4c78a8", "#333333", "#e45756", "#f2a900"


def tasks_chart(report: Report, path: Path) -> None:
    """One horizontal bar per task and one for the headline average, as a PNG."""
    names = [*report.tasks, f"average ({report.headline})"]
    values = [[getattr(task, key) for task in report.tasks.values()] for key in _KEYS]
    columns = [[*column, report.mean(key)] for key, column in zip(_KEYS, values, strict=True)]
    labels = [f"{name}  ({task.items}/{task.total})" for name, task in report.tasks.items()]
    labels.append(f"{names[-1]}  ({report.scored}/{report.total})")
    title = f"{report.benchmark}, {report.protocol}-{report.protocol_hash}"
    _bars(labels, columns, title, path, rule=True)


def run_chart(benchmarks: dict[str, Report], path: Path) -> None:
    """One horizontal bar per benchmark, as a PNG."""
    labels = [f"{name}  ({report.scored}/{report.total})" for name, report in benchmarks.items()]
    columns = [[report.mean(key) for report in benchmarks.values()] for key in _KEYS]
    _bars(labels, columns, "average per benchmark", path, rule=False)


_KEYS = ("score", "chance", "blind", "single_frame")


def _bars(labels: list[str], columns: list[list[float | None]], title: str, path: Path, *, rule: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.7 + 0.36 * len(labels)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    scores, chance, blind, single = columns
    axes.barh(range(len(labels)), [value or 0.0 for value in scores], height=0.62, color=BAR, zorder=2, label="score")
    for line, value in enumerate(scores):
        axes.text(101.5, line, "not run" if value is None else percent(value), va="center", fontsize=9, clip_on=False)
    _marks(axes, chance, marker="|", s=190, linewidths=2.0, color=CHANCE, label="chance")
    _marks(axes, blind, marker="o", s=34, color=BLIND, edgecolors="white", linewidths=0.8, label="blind (no video)")
    _marks(axes, single, marker="D", s=30, color=SINGLE, edgecolors="white", linewidths=0.8, label="single frame")
    if rule:
        axes.axhline(len(labels) - 1.5, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %  (beside each name: items scored/all)")
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def _marks(axes: Axes, values: list[float | None], **style: Any) -> None:
    points = [(value, line) for line, value in enumerate(values) if value is not None]
    if points:
        axes.scatter([value for value, _ in points], [line for _, line in points], zorder=3, clip_on=False, **style)
