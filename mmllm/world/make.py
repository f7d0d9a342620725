"""Write a whole NanoWorld: test sets in the layouts of MVBench and MLVU, training sets, tokenizer, manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import held, read_record, write_json, write_text
from mmllm.world import grounding
from mmllm.world.groups import make_items
from mmllm.world.layout import write_clip, write_item
from mmllm.world.long_families import LONG
from mmllm.world.scene import stretched
from mmllm.world.tasks import MLVU, MVBENCH
from mmllm.world.tokenizer import build_tokenizer
from mmllm.world.training import draw_sample, letter_line, text_line

VERSION = 2
MANIFEST = "world.json"
MAKING = "making.json"
"""Marks a folder whose world is being made, and says which one."""

FOLDERS = ("mvbench", "mlvu", "grounding", "train", "tokenizer")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Level:
    """Sizes of a level.

    Args:
        side: height and width of the clips in pixels.
        clips: number of training clips.
        texts: number of lines of text.jsonl; letters.jsonl has half as many, review.jsonl as many as clips.
        items: test items per task, before rounding to whole groups; 0 = one group.
        extra: bystanders in a scene.
        grounded: number of training clips with questions about when and where.
        long: frames of the clips of the MLVU-like tasks.
    """

    side: int
    clips: int
    texts: int
    items: int
    extra: int
    grounded: int
    long: int = LONG


LEVELS = {
    "tiny": Level(48, 64, 200, 0, 1, 16),
    "nano": Level(48, 12000, 40000, 60, 1, 3000),
    "hard": Level(64, 18000, 40000, 60, 2, 3000),
    "long": Level(48, 12000, 40000, 60, 1, 3000, 128),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work for one process: indices [start, end) of a kind.

    A kind is clips, grounding, letters, text, review, or the name of a test task's file.
    """

    out: Path
    kind: str
    start: int
    end: int
    seed: int
    level: Level


def dumps(value: object) -> str:
    """JSON on one line, without escaped characters."""
    return json.dumps(value, ensure_ascii=False)


def run_job(job: Job) -> tuple[str, int, dict[str, list[str]]]:
    """Do one piece of work in any process; returns (kind, start, {file: lines})."""
    side, extra = job.level.side, job.level.extra
    lines: dict[str, list[str]] = {}
    numbers = range(job.start, job.end)
    if job.kind == "letters":
        lines["letters"] = [dumps(letter_line(job.seed, i, side, extra)) for i in numbers]
    elif job.kind in ("text", "review"):
        lines[job.kind] = [dumps(text_line(job.seed, i, side, extra, job.kind)) for i in numbers]
    elif job.kind == "clips":
        for i in numbers:
            sample, rng = draw_sample(job.seed, "train", i, side, extra)
            if sample.scene.frames == LONG != job.level.long:
                sample = replace(sample, scene=stretched(sample.scene, job.level.long))
            for name, made in write_clip(sample, i, job.out / "train", rng).items():
                lines.setdefault(name, []).extend(map(dumps, made))
    elif job.kind == "grounding":
        made = (grounding.write_clip(job.out / "train", i, job.seed, side, extra) for i in numbers)
        lines["grounding"] = [dumps(line) for line in made]
    else:
        run_test(job)
    return job.kind, job.start, lines


def run_test(job: Job) -> None:
    """Write all clips and the JSON file of one test task."""
    asked = next((task for task in grounding.TASKS if task.name == job.kind), None)
    if asked is not None:
        sizes = (max(4, job.level.items), job.seed, job.level.side, job.level.extra)
        entries = grounding.write_test(asked, job.out / "grounding", *sizes)
        _write_items(job.out / "grounding" / "json" / f"{asked.name}.json", entries)
        return
    task = next(task for task in MVBENCH + MLVU if task.stem == job.kind)
    root = job.out / ("mvbench" if task in MVBENCH else "mlvu")
    (root / "video" / task.folder).mkdir(parents=True, exist_ok=True)
    groups = max(1, job.level.items // (task.options or 1))
    items = make_items(task, job.seed, groups, job.level.side, job.level.extra)
    if task in MLVU and job.level.long != LONG:
        items = [replace(item, scene=stretched(item.scene, job.level.long)) for item in items]
    entries = [write_item(task, item, number, root, job.seed) for number, item in enumerate(items)]
    _write_items(root / "json" / f"{task.stem}.json", entries)


def _write_items(path: Path, entries: list[dict[str, object]]) -> None:
    path.write_text("[\n" + ",\n".join(map(dumps, entries)) + "\n]\n", encoding="utf-8")


def plan(out: Path, level: Level, seed: int) -> list[Job]:
    """All pieces of work."""
    jobs = [Job(out, task.stem, 0, 1, seed, level) for task in MVBENCH + MLVU]
    jobs += [Job(out, task.name, 0, 1, seed, level) for task in grounding.TASKS]
    for kind, total, step in (
        ("clips", level.clips, 100),
        ("grounding", level.grounded, 100),
        ("letters", level.texts // 2, 1000),
        ("text", level.texts, 1000),
        ("review", level.clips, 1000),
    ):
        jobs += [Job(out, kind, i, min(i + step, total), seed, level) for i in range(0, total, step)]
    return jobs


def work(todo: list[Job], jobs: int) -> Iterable[tuple[str, int, dict[str, list[str]]]]:
    """Results in the order of the work, from `jobs` processes (in this one if `jobs` is 1)."""
    if jobs <= 1:
        yield from map(run_job, todo)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_stay_with_parent)
    try:
        yield from pool.map(run_job, todo)
    finally:  # after an interrupt, wait only for work in progress
        pool.shutdown(cancel_futures=True)


def _stay_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is gone, for whatever reason."""
    import signal
    from multiprocessing import connection, parent_process
    from threading import Thread

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def check(out: Path, level: str, seed: int) -> dict[str, object] | None:
    """The manifest of a finished world in `out`, or `None` if there is none.

    Raises:
        UserError: an unknown level, or the folder holds a different world or files that are not ours.
    """
    if level not in LEVELS:
        raise UserError("world level", "unknown level", got=level, hint=nearest(level, list(LEVELS)))
    if out.exists() and not out.is_dir():
        raise UserError(out, "is not a folder", hint="another --out")
    wanted: dict[str, object] = {"level": level, "seed": seed, "version": VERSION}
    path = next((out / name for name in (MANIFEST, MAKING) if (out / name).exists()), None)
    if path is None:
        if taken := [name for name in FOLDERS if (out / name).exists()]:
            what = "holds files that are not of a world begun here"
            raise UserError(out, what, got=", ".join(taken), hint="another --out, or remove them")
        return None
    found = read_record(path)
    have = {key: found.get(key) for key in wanted}
    if have != wanted:
        raise UserError(out, "holds another world", expected=wanted, got=have, hint="another --out, or remove it")
    return found if path.name == MANIFEST else None


def make_world(
    out: Path, level: str = "nano", seed: int = 0, jobs: int = 2, progress: Progress | None = None
) -> dict[str, object]:
    """Write a world into the folder `out`, unless it is already there; the result does not depend on `jobs`.

    Args:
        out: the folder; created if needed.
        level: tiny (tests), nano, hard, or long: nano with clips of 128 frames for the long tasks.
        seed: seed of all clips and texts (the tokenizer has its own).
        jobs: number of processes.
        progress: called as `progress(kind, done, total)`, counting pieces of work.

    Returns:
        The manifest, written last as `world.json`: level, seed, version and counts.

    Raises:
        UserError: unknown level, or `out` holds a world of another level, seed or version, or other files in the way of
            this one's, or another process is making a world there.
    """
    out = Path(out)
    done = check(out, level, seed)
    if done is not None:
        return done
    with held(out):
        return check(out, level, seed) or _make(out, level, seed, jobs, progress)


def _make(out: Path, level: str, seed: int, jobs: int, progress: Progress | None) -> dict[str, object]:
    sizes = LEVELS[level]
    which = {"level": level, "seed": seed, "version": VERSION}
    write_json(out / MAKING, which)
    for folder in ("mvbench/json", "mlvu/json", "grounding/json", "train/clips"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    todo = plan(out, sizes, seed)
    lines: dict[str, list[str]] = {}
    for number, (kind, _, made) in enumerate(work(todo, jobs), start=1):
        for name, part in made.items():
            lines.setdefault(name, []).extend(part)
        if progress:
            progress(kind, number, len(todo))
    for name, part in lines.items():
        write_text(out / "train" / f"{name}.jsonl", "\n".join(part) + "\n")
    build_tokenizer().save_pretrained(out / "tokenizer")
    counts = {name: len(part) for name, part in lines.items()}
    manifest = {**which, "counts": counts, "sizes": asdict(sizes)}
    write_json(out / MANIFEST, manifest)
    (out / MAKING).unlink()
    return manifest
