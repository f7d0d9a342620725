"""Reports for people and programs: tables for a terminal, Markdown, JSON and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.contract.files import read_record, write_json, write_text, writing
from mmllm.eval.charts import run_chart, tasks_chart
from mmllm.eval.protocol import CANONICAL
from mmllm.eval.report import FLOORS, Report, percent, summary
from mmllm.tables import aligned, markdown


def _rows(report: Report) -> list[list[str]]:
    """Header, one row per task, and the micro and macro rows."""
    measured = [key.replace("_", " ") for key in report.measured]
    counted = ["missing", *(["broken"] if report.unreadable else []), "unparsed"]
    rows = [["task", *measured, "n/all", *counted]]
    for name, task in report.tasks.items():
        values = [percent(getattr(task, key)) for key in report.measured]
        rows.append([name, *values, f"{task.items}/{task.total}", *(str(getattr(task, key)) for key in counted)])
    for how in ("micro", "macro"):
        name = f"average, {how}" + (" (headline)" if how == report.headline else "")
        values = [percent(report.mean(key, how)) for key in report.measured]
        totals = {"missing": report.missing, "broken": report.unreadable, "unparsed": report.unparsed}
        counts = [f"{report.scored}/{report.total}", *(str(totals[key]) for key in counted)]
        rows.append([name, *values, *counts])
    return rows


def _notes(report: Report) -> list[str]:
    """Warnings, tasks without a score and excluded items, one sentence each."""
    notes = [f"WARNING: {warning}" for warning in report.warnings]
    if reduced := report.subject.get("reduce"):
        notes.append("visual tokens reduced: " + ", ".join(f"{key} {value}" for key, value in reduced.items()))
    if report.visual_tokens is not None:
        notes.append(f"visual tokens per question, averaged over the LLM's layers: {report.visual_tokens:.1f}")
    for name, task in report.tasks.items():
        if task.measures:
            notes.append(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in task.measures.items()))
    notes += [f"{task}: {reason}" for task, reason in report.not_scored.items()]
    notes += [f"broken {row['id']}: {row['reason']}" for row in report.broken]
    return notes + [f"excluded {row['id']}: {row['reason']}" for row in report.excluded]


def render(report: Report) -> str:
    """The report as a plain text table with its notes, for a terminal."""
    rows = _rows(report)
    grounded = any(task.measures for task in report.tasks.values())
    what = "overlap with the truth in %" if grounded else "accuracy in %"
    head = f"{report.benchmark}  {report.protocol}-{report.protocol_hash}  {what}"
    return "\n".join([head, *aligned(rows), *_notes(report), summary(report)])


def write_report(report: Report, out: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``tasks.png`` into `out`."""
    report.folder = out
    write_json(out / "report.json", report.to_dict())
    lines = [f"# {report.benchmark}, protocol {report.protocol}-{report.protocol_hash}", "", summary(report), ""]
    lines += [*markdown(_rows(report)), "", *(f"* {note}" for note in _notes(report))]
    _write_lines(out / "report.md", [*lines, "", "![accuracy per task](tasks.png)"])
    with writing(out):
        tasks_chart(report, out / "tasks.png")


def place_of(out: Path, way: str, protocol: str) -> Path:
    """The folder of a run's evaluation: the run's own, or one below it for other settings.

    Args:
        out: the run folder.
        way: name of the reducer with its budget, or "none".
        protocol: its name.
    """
    names = [name for name in (protocol, way) if name not in (CANONICAL.name, "none")]
    return out / "settings" / "-".join(names) if names else out


def report_name(limit: int | None) -> str:
    """The base name of a run's report files; a run limited to some items of each task has its own."""
    return "report" if limit is None else f"report-limit-{limit}"


def _earlier(benchmarks: dict[str, Report], path: Path, out: Path) -> dict[str, Report]:
    """Reports on other benchmarks that the run's report already holds, if they are of the same weights."""
    if not path.is_file():
        return {}
    found = {}
    for name, folder in read_record(path).get("folders", {}).items():
        if name not in benchmarks and (out / folder / "report.json").is_file():  # otherwise it was deleted
            found[name] = Report.read(out / folder)
    weights = {report.subject.get("weights") for report in benchmarks.values()}
    return {name: report for name, report in found.items() if {report.subject.get("weights")} == weights}


def run_report(
    benchmarks: dict[str, Report], seconds: dict[str, float], out: Path, limit: int | None = None
) -> dict[str, Any]:
    """Write the report of a whole run: ``report.json``, ``report.md`` and ``report.png`` in the folder `out`.

    Args:
        benchmarks: report by benchmark name; others already in the run's report stay if they are of the same model.
        seconds: wall time by step.
        out: folder of the run.
        limit: most items per task; such a report has its own files (``report-limit-5.json``, ...).

    Returns:
        the content of ``report.json``; scores in percent.
    """
    files = report_name(limit)
    benchmarks = _earlier(benchmarks, out / f"{files}.json", out) | benchmarks
    keys = ("average", "words", *FLOORS, "items", "tasks")
    full = {name: report.to_dict() for name, report in benchmarks.items()}
    short = {name: {key: row[key] for key in keys if key in row} for name, row in full.items()}
    folders = {name: os.path.relpath(report.folder, out) for name, report in benchmarks.items() if report.folder}
    content = {"benchmarks": short, "seconds": seconds, "limit": limit, "folders": folders}
    write_json(out / f"{files}.json", content)
    rows = [["benchmark", "average", "mean", "chance", "blind", "single frame", "n/all"]]
    for name, report in benchmarks.items():
        floors = [percent(report.mean(floor)) for floor in FLOORS]
        rows.append([name, percent(report.average), report.headline, *floors, f"{report.scored}/{report.total}"])
    lines = ["# Report", "", "Accuracy in %.", "", *markdown(rows), "", f"![benchmarks]({files}.png)", ""]
    for name, report in benchmarks.items():
        lines += [f"## {name}", "", *markdown(_rows(report)), "", *(f"* {note}" for note in _notes(report)), ""]
    if seconds:
        steps = [["step", "seconds"], *([step, f"{value:.1f}"] for step, value in seconds.items())]
        lines += ["## Time", "", *markdown([*steps, ["all", f"{sum(seconds.values()):.1f}"]])]
    _write_lines(out / f"{files}.md", lines)
    with writing(out):
        run_chart(benchmarks, out / f"{files}.png")
    return content


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "\n".join(lines).rstrip() + "\n")


def beside(models: dict[str, dict[str, Report]]) -> list[list[str]]:
    """Several models' reports as the rows of one table, each benchmark's together, its head first."""
    rows = [["model", "benchmark", "average", "chance", "blind", "single frame", "n/all"]]
    for name in dict.fromkeys(name for reports in models.values() for name in reports):
        for model, reports in models.items():
            if (report := reports.get(name)) is not None:
                floors = [percent(report.mean(floor)) for floor in FLOORS]
                rows.append([model, name, percent(report.average), *floors, f"{report.scored}/{report.total}"])
    return rows
