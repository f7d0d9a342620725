"""`mmllm world`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmllm.cli.common import common, given_path, print_json

EPILOG = """\
examples:
  mmllm world make --out runs/world --level nano
  mmllm world show --out runs/world
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "NanoWorld: procedural videos with exactly known truth, as real mp4 and JSON files."
    verbs = parser.add_subparsers(dest="action", metavar="make|show", required=True)
    make = verbs.add_parser("make", help="write the videos, the benchmarks and the training sets")
    make.add_argument("--out", type=given_path, default=Path("runs/world"), help="folder (default runs/world)")
    make.add_argument("--level", choices=["tiny", "nano", "hard", "long"], default="nano", help="size and difficulty")
    common(make, "--seed", "--jobs", "--json", "--quiet")
    make.set_defaults(run=run_make)
    show = verbs.add_parser("show", help="a contact sheet PNG for every task")
    show.add_argument("--out", type=given_path, default=Path("runs/world"), help="the world's folder")
    common(show, "--json")
    show.set_defaults(run=run_show)


def run_make(options: argparse.Namespace) -> int:
    """Write a world; a finished one is left unchanged."""
    from mmllm.progress import Progress
    from mmllm.world.make import make_world

    bars: dict[str, Progress] = {}

    def progress(label: str, done: int, total: int) -> None:
        bars.setdefault(label, Progress(label, total, quiet=options.quiet)).update(done)

    jobs = 2 if options.jobs is None else options.jobs
    facts = make_world(options.out, options.level, options.seed, max(1, jobs), progress)
    for bar in bars.values():
        bar.close()
    print_json(facts) if options.json else print(options.out)
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Draw the contact sheets."""
    from mmllm.world.sheet import contact_sheet

    sheets = contact_sheet(options.out, options.out / "sheets")
    print_json({"sheets": [str(path) for path in sheets]}) if options.json else print(*sheets, sep="\n")
    return 0
