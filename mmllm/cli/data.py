"""`mmllm data`."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mmllm.cli import align_levels, rso
from mmllm.cli.common import cache_dir, common, flag, given_path, print_json
from mmllm.contract.arguments import Count
from mmllm.contract.errors import UserError
from mmllm.contract.files import read_record, write_json

if TYPE_CHECKING:
    from mmllm.data.records.check import Scan

EPILOG = """\
examples:
  mmllm data check train.json --root videos
  mmllm data check mix.yaml --root LLaVA-Video-178K --jobs 16
  mmllm data check train.json --quick
  mmllm data align-levels captions.jsonl --pair openai/clip-vit-large-patch14-336 --out captions.levels.jsonl
  mmllm data rso questions.jsonl --model runs/mine --scorer pair name=runs/clip --out pairs.jsonl

The same command run again checks only what has changed.
exit codes: 0 all good, 2 a record does not fit or no medium can be read, 3 some media are missing or broken
"""
SHOWN = 20
"""Number of errors and problems that are printed; check.json holds them all."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Check training data before a run uses it."
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = verbs.add_parser(
        "check",
        help="check every record, and every medium once",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("data", nargs="+", metavar="FILE", help="a data file, a folder of them, or a mix (.yaml)")
    check.add_argument(
        "--root", type=given_path, help="folder that media paths are relative to (default: the file's own)"
    )
    check.add_argument("--out", type=given_path, default=Path("check.json"), help="report file (default check.json)")
    check.add_argument(
        "--frames", type=flag(Count), default=8, help="a clip with fewer frames is called short (default 8)"
    )
    check.add_argument("--limit", type=flag(Count), help="only the first records of each file")
    check.add_argument("--quick", action="store_true", help="read headers, decode nothing")
    common(check, "--json", "--quiet", "--plugin", "--jobs", "--cache-dir")
    check.set_defaults(run=run_check)
    align_levels.configure(verbs)
    rso.configure(verbs)


def run_check(options: argparse.Namespace) -> int:
    """Check data files and their media."""
    from mmllm.data.media.doctor import examine
    from mmllm.data.records.check import scan
    from mmllm.progress import Progress

    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}", "no process left to check anything", expected="1 or more")
    jobs = options.jobs or min(8, os.cpu_count() or 1)
    bar = Progress("records", 0, quiet=options.quiet)

    def count(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    found = scan(options.data, options.root, cache_dir(options) / "media" / "files", options.limit, jobs, count)
    bar.close()
    media = list(found.media.values())
    known, facts = _known(options.out), {}
    bar = Progress("media", len(media), quiet=options.quiet)
    try:
        for number, fact in enumerate(examine(media, known, options.quick, jobs), start=1):
            facts[fact["name"]] = fact
            bar.update(number)
    finally:  # an interrupted check continues where it stopped
        bar.close()
        report = _report(options, found, facts)
        write_json(options.out, {**report, "files": {**known, **facts}})
    print_json(report) if options.json else print(_table(report, options.out))
    return _exit_code(report)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Facts about files from an earlier check."""
    if not path.exists():
        return {}
    try:
        files = read_record(path).get("files")
    except UserError:
        files = None
    if isinstance(files, dict) and all(isinstance(facts, dict) and "problems" in facts for facts in files.values()):
        return files
    raise UserError(path, "not written by mmllm data check, or damaged", hint="--out another.json")


def _report(options: argparse.Namespace, found: Scan, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All findings, ready for JSON."""
    from mmllm.data.media.doctor import HOLES, problems

    rows, totals, seconds = [], {kind: Counter() for kind in ("video", "image")}, []
    for medium in found.media.values():
        fact = facts.get(medium.name)
        if fact is None:  # interrupted before it was checked
            continue
        wrong = problems(fact, options.frames)
        names = {name for name, _ in wrong}
        state = next((name for name in HOLES if name in names), "ok")
        totals[medium.kind].update([state, *(names - set(HOLES))])
        seconds += [fact["seconds"]] if medium.kind == "video" and "seconds" in fact else []
        rows += [
            {"problem": name, "what": text, "path": medium.path, "samples": medium.samples, "ids": medium.ids}
            for name, text in wrong
        ]
    totals["image"]["ok"] += found.in_memory
    order = {name: index for index, name in enumerate(HOLES)}
    rows.sort(key=lambda row: (order.get(row["problem"], len(order)), row["problem"], row["path"]))
    return {
        "data": [str(path) for path in options.data],
        "root": None if options.root is None else str(options.root),
        "quick": options.quick,
        "records": found.records,
        "errors": {"count": found.failed, "first": found.errors},
        "videos": dict(totals["video"]),
        "images": dict(totals["image"]),
        "image_for_video": found.as_video,
        "seconds": {"shortest": min(seconds), "median": median(seconds), "longest": max(seconds)} if seconds else None,
        "problems": rows,
    }


def _exit_code(report: dict[str, Any]) -> int:
    from mmllm.data.media.doctor import HOLES

    both = Counter(report["videos"]) + Counter(report["images"])
    holes = sum(both[name] for name in HOLES)
    if report["errors"]["count"] or (holes and not both["ok"]):
        return 2
    return 3 if holes else 0


def _table(report: dict[str, Any], out: Path) -> str:
    """The findings as text for people."""
    from mmllm.data.media.doctor import HOLES, NOTES

    lines = []
    for error in report["errors"]["first"][:SHOWN]:
        lines.append(f"error: {error}")
    for row in report["problems"][:SHOWN]:
        named = f"{', '.join(row['ids'])}{', ...' if row['samples'] > len(row['ids']) else ''}"
        lines.append(f"{row['problem']}: {row['what']} (samples {named})")
    rest = max(0, report["errors"]["count"] - SHOWN), max(0, len(report["problems"]) - SHOWN)
    if any(rest):
        lines.append(f"... {rest[0]} more errors and {rest[1]} more problems in {out}")
    count = report["errors"]["count"]
    lines.append(f"{report['records']} records: {count or 'no'} error{'' if count == 1 else 's'}")
    if report["seconds"]:
        span = report["seconds"]
        lines.append(f"seconds: {span['shortest']:.1f} to {span['longest']:.1f}, median {span['median']:.1f}")
    for kind in ("images", "videos"):
        totals = Counter(report[kind])
        states = [name for name in ("ok", *HOLES) if totals[name] or name in ("ok", "missing", "broken")]
        whole = sum(totals[name] for name in states)
        if not whole and kind == "images":
            continue
        notes = ", ".join(f"{totals[name]} {name}" for name in NOTES if totals[name])
        counts = [f"{totals[name]} {name}" + (f" ({notes})" if notes and name == "ok" else "") for name in states]
        line = f"{whole} {kind}: {', '.join(counts)}"
        lines.append(f"{line} -> {out}" if kind == "videos" else line)
    if report["image_for_video"]:
        lines[-1] += f';  "<image>" for a video: {report["image_for_video"]}, read as video'
    return "\n".join(lines)
