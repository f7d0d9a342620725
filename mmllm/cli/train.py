"""`mmllm train`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from mmllm.cli.common import (
    cache_dir,
    cache_flags,
    calm_libraries,
    common,
    flag,
    given_path,
    kept_kinds,
    media_reader,
    print_json,
    reader_flags,
)
from mmllm.contract.arguments import Count
from mmllm.device import sleep_beside_neighbours

EPILOG = """\
examples:
  mmllm train nano/llava --out runs/mine
  mmllm train nano/llava --out runs/fast stages.instruct.steps=200 roots.world=runs/world
  mmllm train my.yaml --plugin my_part.py --out runs/mine --dry-run
  mmllm train my.yaml --out runs/mine --cache features   (frozen encoders run once per clip for all epochs)
  torchrun --nproc-per-node 8 -m mmllm train llava --out runs/llava

Run the same command again to continue a run that was stopped.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Train a recipe's stages, one after the other."
    parser.add_argument("recipe", help="a shipped name (mmllm recipe list) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="stages.instruct.lr=1e-5 and the like")
    parser.add_argument("--out", type=given_path, help="run folder (default runs/RECIPE)")
    parser.add_argument("--stages", help="only these stages, separated by commas")
    parser.add_argument("--deepspeed", help="zero1, zero2 or a JSON file")
    parser.add_argument(
        "--report-to", default="none", choices=["tensorboard", "wandb", "none"], help="also send curves there"
    )
    parser.add_argument("--save-steps", type=flag(Count), default=200, help="steps between checkpoints (default 200)")
    parser.add_argument("--threads", type=flag(Count), help="CPU threads per process (default: the free cores)")
    what = "with --dry-run: processes that the run will have (default: torchrun's WORLD_SIZE, or 1)"
    parser.add_argument("--processes", type=flag(Count), metavar="N", help=what)
    bad = "what to do with unreadable samples (default error): stop, or train on the next one instead"
    parser.add_argument("--bad-samples", choices=["error", "skip"], default="error", help=bad)
    cache_flags(parser)
    reader_flags(parser)
    names = ("--json", "--quiet", "--plugin", "--trust-remote-code", "--jobs", "--seed", "--device", "--dtype")
    names += ("--cache-dir", "--dry-run")
    common(parser, *names)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train the stages."""
    sleep_beside_neighbours()
    calm_libraries()
    from mmllm.config.recipe import load
    from mmllm.train.context import RunOptions, Stopped
    from mmllm.train.machine import join
    from mmllm.train.run import check, train

    recipe = load(options.recipe, options.overrides)
    stages = None if options.stages is None else options.stages.split(",")
    out = options.out or Path("runs") / Path(options.recipe).stem
    keep, keep_bytes = kept_kinds(options)
    settings = RunOptions(
        seed=options.seed,
        jobs=1 if options.jobs is None else options.jobs,
        threads=options.threads,
        device=options.device,
        precision=options.dtype,
        deepspeed=options.deepspeed,
        report_to=options.report_to,
        save_steps=options.save_steps,
        cache=cache_dir(options),
        keep=keep,
        keep_bytes=keep_bytes,
        reader=media_reader(options.backend, options.time_limit, options.corrupt),
        skip_bad=options.bad_samples == "skip",
        quiet=options.quiet,
    )
    if options.dry_run:
        processes = options.processes or int(os.environ.get("WORLD_SIZE") or 1)
        facts = check(recipe, out, settings, stages, processes)
        print_json(facts) if options.json else print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        return 0
    try:
        finished = train(recipe, out, settings, stages)
    except Stopped as stop:
        print(f"{stop}; the same command continues", file=sys.stderr)
        return 143 if stop.signal == signal.SIGTERM else 130
    if not join(settings).is_main_process:
        return 0
    if options.json:
        print_json({"out": str(out), "model": str(finished.model), **finished.status})
    else:
        print(finished.model)
    plugins = [word for plugin in options.plugin or [] for word in ("--plugin", plugin)]
    ask = shlex.join(["mmllm", "ask", "--model", str(out), *plugins])
    print(f'next: {ask} --video <clip>.mp4 "What happens?"', file=sys.stderr)
    return 0
