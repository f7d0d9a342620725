"""`mmllm eval check`: which items have a clip that can be read as they require, before a model is loaded."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.cli.common import media_reader, print_json
from mmllm.contract.errors import UserError
from mmllm.data.media.guard import GuardedReader
from mmllm.eval.items import Item
from mmllm.eval.selection import Selection, missing_by_task, select
from mmllm.progress import Progress

if TYPE_CHECKING:
    from mmllm.data.media.types import MediaRef

SHOWN = 20
"""Number of broken items that are printed; `--json` names them all."""


def check(tasks: dict[str, tuple[str, ...]], roots: dict[str, str], options: argparse.Namespace) -> int:
    """Report, per benchmark or chosen tasks of it, which clips exist and which cannot be read; exit code 2 if any fail.

    Raises:
        UserError: an unknown benchmark, or no folder for it.
    """
    from mmllm.eval.benchmarks import find_benchmark

    table, holes = {}, 0
    with media_reader(options.backend, options.time_limit) as reader:
        for name, own in tasks.items():
            benchmark = find_benchmark(name)
            if name not in roots:
                raise UserError(f"--tasks {name}", "where are its files?", hint=f"--root {name}=DIR")
            chosen = select(benchmark.load(Path(roots[name])), options.limit, own)
            chosen.set_aside(_unreadable(chosen.scored, reader, name, options.quiet))
            table[name] = _facts(chosen)
            holes += len(chosen.missing) + len(chosen.broken)
    print_json(table) if options.json else print("\n".join(_lines(table)))
    return 2 if holes else 0


def _unreadable(items: list[Item], reader: GuardedReader, name: str, quiet: bool) -> list[tuple[Item, str]]:
    """(item, reason) of those whose header or bound does not fit; each part of a clip is checked once."""
    from mmllm.data.media.types import MediaRef

    seen: dict[MediaRef, str | None] = {}
    found = []
    with closing(Progress(name, len(items), quiet=quiet)) as bar:
        for number, item in enumerate(items, start=1):
            ref = MediaRef("video", str(item.media_path), item.start, item.end)
            if ref not in seen:
                seen[ref] = _reason(reader, ref)
            if seen[ref] is not None:
                found.append((item, seen[ref]))
            bar.update(number)
    return found


def _reason(reader: GuardedReader, ref: MediaRef) -> str | None:
    try:
        reader.probe(ref)
    except UserError as error:
        return str(error)
    return None


def _facts(chosen: Selection) -> dict[str, Any]:
    broken = Counter(item.task for item, _ in chosen.broken)
    scored = Counter(item.task for item in chosen.scored)
    missing = {task: gone for task, (gone, _) in missing_by_task(chosen).items()}
    tasks = {
        task: {
            "missing": missing.get(task, 0),
            "broken": broken[task],
            "items": scored[task] + missing.get(task, 0) + broken[task],
        }
        for task in dict.fromkeys([*missing, *broken])
    }
    return {
        "items": len(chosen.scored) + len(chosen.missing) + len(chosen.broken),
        "missing": len(chosen.missing),
        "broken": [{"id": item.id, "reason": reason} for item, reason in chosen.broken],
        "excluded": [{"id": item.id, "reason": reason} for item, reason in chosen.excluded],
        "tasks": tasks,
    }


def _lines(table: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, found in table.items():
        good = found["items"] - found["missing"] - len(found["broken"])
        lines.append(f"{name}: {good}/{found['items']} items have their clip")
        for task, row in found["tasks"].items():
            lines.append(f"  {task}: {row['items'] - row['missing'] - row['broken']}/{row['items']}")
        for kind in ("broken", "excluded"):
            lines += [f"  {kind} {row['id']}: {row['reason']}" for row in found[kind][:SHOWN]]
            if len(found[kind]) > SHOWN:
                lines.append(f"  ... {len(found[kind]) - SHOWN} more {kind}, see --json")
    return lines
