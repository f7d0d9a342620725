"""`mmllm lab`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.cli.common import cache_dir, calm_libraries, common, flag, given_path, print_json
from mmllm.contract.arguments import Count
from mmllm.contract.files import held

if TYPE_CHECKING:
    from mmllm.lab.study import StudyFile
    from mmllm.lab.table import ArmResult

EPILOG = """\
examples:
  mmllm lab studies/several_encoders.yaml
  mmllm lab my_study.yaml --out runs/my_study --dry-run
  mmllm lab my_study.yaml --jobs 2                        # two runs at a time, each with half of the cores
  mmllm lab my_study.yaml roots.world=runs/world stages.instruct.steps=200

A study compares recipes: {baseline: llava, equal: tokens, seeds: [0, 1, 2], arms: {llava: nano/llava, mine: my.yaml}}.
Run the same command again to continue; finished runs are not repeated.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Train and evaluate several recipes with several seeds, and compare them."
    parser.add_argument("study", type=given_path, help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override in all arms")
    parser.add_argument("--out", type=given_path, help="folder of the study (default runs/STUDY)")
    parser.add_argument("--jobs", type=flag(Count), help="runs at a time (default one per GPU, or one)")
    common(parser, "--json", "--quiet", "--device", "--cache-dir", "--dry-run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run a study, or print what it would run."""
    calm_libraries()
    from mmllm.lab.runs import Lab, Terminated
    from mmllm.lab.study import StudyFile
    from mmllm.lab.table import results

    file = StudyFile(options.study, tuple(options.overrides))
    facts = file.facts()
    out = options.out or Path("runs") / options.study.stem
    lab = Lab(file, out, cache=cache_dir(options), device=options.device, jobs=options.jobs, quiet=options.quiet)
    if options.dry_run:
        runs = len(lab.first) + len(lab.runs)
        for arm, fact in facts.items():
            print(
                f"{arm}: {fact.tokens} tokens, {fact.parameters / 1e6:.2f} M parameters, {fact.macs / 1e6:.1f} M MACs"
            )
        print(f"{runs} runs, {runs - len(lab.todo())} finished, into {out}")
        return 0
    file.check_tasks()
    with held(out):
        try:
            failed = lab.run_all()
        except KeyboardInterrupt as stop:
            print("stopped; the same command continues", file=sys.stderr)
            return 143 if isinstance(stop, Terminated) else 130
        if rows := results(lab, facts):
            _report(rows, file, out, as_json=options.json)
    if failed:
        for error in failed[1:]:
            print(f"error: {error}", file=sys.stderr)
        raise failed[0]
    return 0


def _report(rows: list[ArmResult], file: StudyFile, out: Path, *, as_json: bool) -> None:
    """Write the results of finished runs to stdout and into the study's folder."""
    from mmllm.lab.table import as_dict, draw, render

    name, data = file.path.stem, as_dict(rows, file.path.stem, file.baseline)
    table = render(rows, file.baseline)
    summary = f"{file.study.summary}\n\n" if file.study.summary else ""
    (out / "study.md").write_text(f"# {name}\n\n{summary}{table}\n\n![scores](study.png)\n", encoding="utf-8")
    (out / "study.json").write_text(json.dumps(data, indent=1))
    draw(rows, out / "study.png", file.settings)
    print_json(data) if as_json else print(table)
