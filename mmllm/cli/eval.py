"""`mmllm eval`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import (
    calm_libraries,
    common,
    flag,
    given_path,
    media_reader,
    pairs,
    print_json,
    reader_flags,
    reduce_flags,
    settings,
)
from mmllm.contract.arguments import Count
from mmllm.contract.errors import UserError
from mmllm.device import pick_device

if TYPE_CHECKING:
    from mmllm.eval.report import Report
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor

EPILOG = """\
examples:
  mmllm eval --model runs/mine --tasks mvbench,mlvu
  mmllm eval --model runs/mine --tasks mvbench --root mvbench=MVBench --missing skip
  mmllm eval --model runs/mine --tasks mvbench --reduce none --reduce random --reduce aim --keep 0.25
  mmllm eval --model runs/mine --tasks mvbench,mlvu:order,needle
  mmllm eval check --tasks mvbench,mlvu --root mvbench=MVBench --root mlvu=MLVU

Answers are kept item by item; the same command run again continues.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Evaluate models on benchmarks, with chance, blind and single-frame floors."
    parser.add_argument("action", nargs="?", choices=["check"], help="check: only check items and clips")
    parser.add_argument("--model", action="append", help="run folder or model folder (may repeat)")
    parser.add_argument("--tasks", default="mvbench,mlvu", help="benchmarks, or NAME:TASK,TASK, separated by commas")
    parser.add_argument("--root", action="append", metavar="NAME=DIR", help="folder of a benchmark (may repeat)")
    parser.add_argument("--protocol", default="canonical", help="how questions are asked and read (default canonical)")
    parser.add_argument("--missing", choices=["error", "skip"], default="error", help="what to do about missing clips")
    parser.add_argument("--baselines", default="blind,single_frame", help="floors to measure, or none")
    parser.add_argument("--limit", type=flag(Count), help="only the first items of each task")
    parser.add_argument("--frames", type=flag(Count), help="frames of each video (default: the model's own)")
    parser.add_argument("--batch", type=flag(Count), default=60, help="items per forward (default 60)")
    parser.add_argument("--out", type=given_path, help="folder for eval/ and report.* (default: the run folder)")
    reduce_flags(parser)
    reader_flags(parser)
    common(parser, "--json", "--quiet", "--plugin", "--trust-remote-code", "--device", "--dtype", "--dry-run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate, or check."""
    from mmllm.cli.eval_check import check
    from mmllm.eval.benchmarks import parse_tasks

    tasks = parse_tasks(options.tasks)
    names = list(tasks)
    if options.action == "check" and not options.model:
        return check(tasks, pairs(options.root, "--root"), options)
    if not options.model:
        raise UserError("--model", "missing", expected="a run folder or a model folder")
    if options.action == "check" or options.dry_run:
        return check(tasks, _roots(options.model[0], names, options.root), options)
    calm_libraries()
    from mmllm.api import load, reduce
    from mmllm.contract.files import write_text
    from mmllm.data.media.loading import MediaLoader
    from mmllm.eval.report_files import beside, place_of
    from mmllm.tables import aligned, markdown

    results, found, ways = {}, {}, settings(options)
    labels = _labels(options.model)
    roots_of = {path: _roots(path, names, options.root) for path in options.model}  # fail before anything is loaded
    for path in options.model:
        model, processor = load(path, device=pick_device(options.device), dtype=options.dtype or "auto")
        processor.loader = MediaLoader(media_reader(options.backend, options.time_limit, options.corrupt))
        out = options.out or _run_folder(path)
        if options.out and len(options.model) > 1:
            out = options.out / labels[path]
        for way, section in ways.items():
            reduce(model, section)
            title = labels[path] if len(ways) == 1 else way if len(options.model) == 1 else f"{labels[path]} {way}"
            below = place_of(out, way, options.protocol)
            results[path if len(ways) == 1 else title], found[title] = _evaluate_all(
                model, processor, {name: Path(roots_of[path][name]) for name in names}, tasks, below, options
            )
            _print(path, found[title], below, options)
    if len(found) > 1:
        lines = beside(found)
        if options.out:
            write_text(
                options.out / "models.md", "\n".join(["# Models", "", "Accuracy in %.", "", *markdown(lines)]) + "\n"
            )
        if not options.json:
            print("\n".join(aligned(lines)))
    if options.json:
        print_json(results if len(results) > 1 else next(iter(results.values())))
    holes = any(report.missing or report.unreadable for reports in found.values() for report in reports.values())
    return 3 if holes else 0


def _evaluate_all(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    roots: dict[str, Path],
    tasks: dict[str, tuple[str, ...]],
    out: Path,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Report]]:
    """One model under one setting, on all benchmarks: the report of the run, and those of the benchmarks."""
    from mmllm.eval.benchmarks import title_of
    from mmllm.eval.report_files import run_report
    from mmllm.run_folder import add_seconds, read_seconds

    reports = {}
    for name, root in roots.items():
        start = time.perf_counter()
        try:
            title = title_of(name, tasks[name])
            reports[title] = _evaluate(model, processor, name, root, tasks[name], out / "eval", options)
        finally:
            add_seconds(out, f"eval_{name}", time.perf_counter() - start)
    return run_report(reports, read_seconds(out), out, options.limit), reports


def _evaluate(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    name: str,
    root: Path,
    tasks: tuple[str, ...],
    out: Path,
    options: argparse.Namespace,
) -> Report:
    from mmllm.api import evaluate
    from mmllm.progress import Progress

    bars: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(name, total, start=done, quiet=options.quiet))
        bars[0].update(done)

    baselines = () if options.baselines == "none" else tuple(options.baselines.split(","))
    report = evaluate(
        model,
        processor,
        name,
        root=root,
        out=out,
        protocol=options.protocol,
        frames=options.frames,
        limit=options.limit,
        tasks=tasks,
        missing=options.missing,
        baselines=baselines,
        batch_size=options.batch,
        progress=progress,
    )
    for bar in bars:
        bar.close()
    return report


def _print(path: str, reports: dict[str, Any], out: Path, options: argparse.Namespace) -> None:
    from mmllm.eval.report import summary
    from mmllm.eval.report_files import render, report_name

    if options.json:
        return
    for report in reports.values():
        print(render(report), end="\n\n")
    for report in reports.values():
        print(f"{path}: {summary(report)}   {out}/{report_name(options.limit)}.md", file=sys.stderr)


def _roots(model: str, names: list[str], given: list[str] | None) -> dict[str, str]:
    """Folders of the benchmarks: from the flags, otherwise from the recipe beside the model."""
    from mmllm.config.recipe import load as load_recipe
    from mmllm.eval.benchmarks import find_benchmark
    from mmllm.model.folder import model_folder
    from mmllm.model.foreign.convert import family_of

    roots = pairs(given, "--root")
    for name in roots:
        find_benchmark(name, f"--root {name}")
    known = {}
    if family_of(model) is None and (file := model_folder(model) / "recipe.yaml").is_file():
        known = load_recipe(file).eval_roots
    for name in names:
        find_benchmark(name)
        if name not in roots and name not in known:
            raise UserError(f"--tasks {name}", "where are its files?", hint=f"--root {name}=DIR")
    return {**known, **roots}


def _run_folder(path: str) -> Path:
    """Where the reports of a model go.

    Raises:
        UserError: it is a published checkpoint, whose folder is not ours.
    """
    from mmllm.model.folder import model_folder
    from mmllm.model.foreign.convert import family_of

    if family_of(path) is not None:
        raise UserError(f"--model {path}", "a published checkpoint has no run folder", hint="--out DIR")
    model = model_folder(path)
    return model.parent if model.name == "model" else model


def _labels(models: list[str]) -> dict[str, str]:
    """{model: a label for its folder}: the last parts of its path that distinguish it from the others.

    Raises:
        UserError: one is given twice.
    """
    parts = {model: Path(model).resolve().parts for model in models}
    if len(set(parts.values())) < len(models):
        raise UserError("--model", "given twice", got=", ".join(models))
    for count in range(1, max(map(len, parts.values())) + 1):
        labels = {model: "-".join(path[-count:]).strip("/") for model, path in parts.items()}
        if len(set(labels.values())) == len(models):
            break
    return labels
