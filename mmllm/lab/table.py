"""Results of a study: means over seeds with intervals, seed-by-seed differences from the baseline, a chart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.lab.runs import Lab, samples_per_second
from mmllm.lab.study import Facts
from mmllm.tables import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmllm.lab.settings import Setting

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (None with a single seed)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} [{self.mean - self.half:.1f}, {self.mean + self.half:.1f}]"


@dataclass(frozen=True)
class ArmResult:
    """One arm on one benchmark under one setting; `scores` by seed, in percent.

    `setting`: its title; "none" = everything is read. `words`: the share of answers that contain the right option's
    text, whatever letter goes with it; None if answers are letters alone.
    """

    arm: str
    setting: str
    benchmark: str
    facts: Facts
    speed: float | None
    scores: dict[int, float]
    score: Estimate
    difference: Estimate | None
    words: Estimate | None


def estimate(values: list[float]) -> Estimate:
    """Mean and t-interval."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Estimate(mean, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, T_975[min(count - 2, len(T_975) - 1)] * deviation / math.sqrt(count))


def results(lab: Lab, facts: dict[str, Facts]) -> list[ArmResult]:
    """The results of the finished runs, by benchmark, arm and setting."""
    finished = {run: found for run in lab.runs if (found := lab.result(run)) is not None}
    speeds: dict[str, list[float]] = {}
    for run in finished:
        if (rate := samples_per_second(run.out)) is not None:
            speeds.setdefault(run.arm, []).append(rate)
    rows = []
    for benchmark in lab.file.study.tasks:
        base: dict[int, float] | None = None
        for arm in sorted(lab.file.arms, key=lambda name: name != lab.file.baseline):
            for setting in lab.file.settings:
                own = {run.seed: found[setting][benchmark] for run, found in finished.items() if run.arm == arm}
                scores = {seed: value["average"] for seed, value in own.items() if value["average"] is not None}
                first, base = base is None, scores if base is None else base
                if not scores:
                    continue
                pairs = [scores[seed] - base[seed] for seed in scores if seed in base]
                words = [value["words"] for value in own.values() if value.get("words") is not None]
                rows.append(
                    ArmResult(
                        arm,
                        setting,
                        benchmark,
                        facts[arm],
                        sum(speeds[arm]) / len(speeds[arm]) if arm in speeds else None,
                        scores,
                        estimate(list(scores.values())),
                        estimate(pairs) if pairs and not first else None,
                        estimate(words) if words else None,
                    )
                )
    order = list(lab.file.arms)
    return sorted(rows, key=lambda row: (lab.file.study.tasks.index(row.benchmark), order.index(row.arm)))


def render(rows: list[ArmResult], baseline: str) -> str:
    """A Markdown table, and the smallest effect that its seeds can show."""
    head = ["arm", "benchmark", "tokens", "parameters", "samples/s", "score [95 %]", f"minus {baseline}, same seeds"]
    head += ["right words"]
    several = len({row.setting for row in rows}) > 1
    if several:
        head.insert(1, "setting")
    lines = [head]
    for row in rows:
        speed = "-" if row.speed is None else f"{row.speed:.0f}"
        difference = "" if row.difference is None else str(row.difference)
        cells = [
            row.arm,
            *([row.setting] if several else []),
            row.benchmark,
            str(row.facts.tokens),
            f"{row.facts.parameters / 1e6:.2f} M",
            speed,
        ]
        lines.append([*cells, str(row.score), difference, "-" if row.words is None else str(row.words)])
    text = markdown(lines, right=False)
    halves = [row.difference.half for row in rows if row.difference is not None and row.difference.half is not None]
    if halves:
        seeds = max(len(row.scores) for row in rows)
        text.append(f"\n{seeds} seeds can show {max(halves):.1f} points or more; intervals are over training seeds.")
    return "\n".join(text)


def as_dict(rows: list[ArmResult], study: str, baseline: str) -> dict[str, Any]:
    """The content of `study.json`."""
    return {"study": study, "baseline": baseline, "arms": [asdict(row) for row in rows]}


def draw(rows: list[ArmResult], path: Path, settings: dict[str, Setting] | None = None) -> None:
    """Scores with their intervals, one panel per benchmark: curves over the budget, or a line for each arm."""
    from matplotlib.figure import Figure

    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    curves = {setting.keep for setting in (settings or {}).values() if setting.keep is not None}
    height = 4.5 if len(curves) > 1 else 1.2 + 0.45 * len({(row.arm, row.setting) for row in rows})
    figure = Figure(figsize=((7.5 if len(curves) > 1 else 5.5) * len(benchmarks), height), layout="constrained")
    for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
        chosen = [row for row in rows if row.benchmark == benchmark]
        if len(curves) > 1:
            _curves(axes, chosen, settings)
        else:
            _lines(axes, chosen[::-1])
        axes.set_title(benchmark)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _lines(axes: Axes, rows: list[ArmResult]) -> None:
    """One line per arm and setting; single seeds as dots."""
    several = len({row.setting for row in rows}) > 1
    for line, row in enumerate(rows):
        axes.errorbar(row.score.mean, line, xerr=row.score.half, fmt="s", color="tab:blue", capsize=4)
        axes.plot(list(row.scores.values()), [line] * len(row.scores), ".", color="0.6", zorder=0)
    labels = [f"{row.arm} {row.setting}" if several else row.arm for row in rows]
    axes.set(xlabel="%", yticks=range(len(rows)), yticklabels=labels)


def _curves(axes: Axes, rows: list[ArmResult], settings: dict[str, Setting]) -> None:
    """Score against budget: a curve for each arm, reducer and protocol, a level where everything is read."""
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    arms = len({row.arm for row in rows}) > 1
    for row in rows:
        setting = settings[row.setting]
        protocol = "" if setting.protocol == "canonical" else f", {setting.protocol}"
        if setting.reduce == "none":
            axes.axhline(row.score.mean, color="0.5", linestyle=":" if protocol else "--", label=f"all{protocol}")
            continue
        name = f"{row.arm} {setting.reduce}{protocol}" if arms else f"{setting.reduce}{protocol}"
        curves.setdefault(name, []).append((setting.keep or 1.0, row.score))
    for name, points in curves.items():
        points.sort(key=lambda point: point[0])
        x, y = [keep for keep, _ in points], [score.mean for _, score in points]
        halves = [score.half or 0.0 for _, score in points]
        axes.errorbar(x, y, yerr=halves, marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="visual tokens kept, mean over the layers", ylabel="%")
    axes.legend(fontsize=8)
