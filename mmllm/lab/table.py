"""Results of a study: means over seeds with intervals, seed-by-seed differences from the baseline, a chart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmllm.lab.runs import Lab, samples_per_second
from mmllm.lab.study import Facts
from mmllm.tables import markdown

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
    """One arm on one benchmark; `scores` by seed, in percent.

    `words`: the share of answers that contain the right option's text, whatever letter goes with it; None if answers
    are letters alone.
    """

    arm: str
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
    """The results of the finished runs, by arm and benchmark."""
    rows = []
    for benchmark in lab.file.study.tasks:
        scores: dict[str, dict[int, float]] = {name: {} for name in lab.file.arms}
        words: dict[str, list[float]] = {name: [] for name in lab.file.arms}
        speeds: dict[str, list[float]] = {name: [] for name in lab.file.arms}
        for run in lab.runs:
            if (found := lab.result(run)) is not None and found[benchmark]["average"] is not None:
                scores[run.arm][run.seed] = found[benchmark]["average"]
                if (said := found[benchmark].get("words")) is not None:
                    words[run.arm].append(said)
                if (rate := samples_per_second(run.out)) is not None:
                    speeds[run.arm].append(rate)
        base = scores[lab.file.baseline]
        for arm, by_seed in scores.items():
            if not by_seed:
                continue
            pairs = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
            difference = estimate(pairs) if pairs and arm != lab.file.baseline else None
            speed = sum(speeds[arm]) / len(speeds[arm]) if speeds[arm] else None
            mean = estimate(list(by_seed.values()))
            right = estimate(words[arm]) if words[arm] else None
            rows.append(ArmResult(arm, benchmark, facts[arm], speed, by_seed, mean, difference, right))
    return rows


def render(rows: list[ArmResult], baseline: str) -> str:
    """A Markdown table, and the smallest effect that its seeds can show."""
    head = ["arm", "benchmark", "tokens", "parameters", "samples/s", "score [95 %]", f"minus {baseline}, same seeds"]
    head += ["right words"]
    lines = [head]
    for row in rows:
        speed = "-" if row.speed is None else f"{row.speed:.0f}"
        difference = "" if row.difference is None else str(row.difference)
        cells = [row.arm, row.benchmark, str(row.facts.tokens), f"{row.facts.parameters / 1e6:.2f} M", speed]
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


def draw(rows: list[ArmResult], path: Path) -> None:
    """Scores with their intervals, one panel per benchmark; single seeds as dots."""
    from matplotlib.figure import Figure

    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    height = 1.2 + 0.45 * len({row.arm for row in rows})
    figure = Figure(figsize=(5.5 * len(benchmarks), height), layout="constrained")
    for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
        chosen = [row for row in rows if row.benchmark == benchmark][::-1]
        for line, row in enumerate(chosen):
            axes.errorbar(row.score.mean, line, xerr=row.score.half, fmt="s", color="tab:blue", capsize=4)
            axes.plot(list(row.scores.values()), [line] * len(row.scores), ".", color="0.6", zorder=0)
        axes.set(title=benchmark, xlabel="%", yticks=range(len(chosen)), yticklabels=[row.arm for row in chosen])
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
