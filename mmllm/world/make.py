"""Write a whole NanoWorld: test sets in the layouts of MVBench and MLVU, training sets, tokenizer, manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmllm.contract.errors import UserError, nearest

VERSION = 1
MANIFEST = "world.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Level:
    """Sizes of a level.

    Args:
        side: height and width of the clips in pixels.
        clips: number of training clips.
        texts: number of lines of text.jsonl; letters.jsonl has half as many, review.jsonl as many as clips.
        items: test items a task, before rounding to whole groups; 0 = one group.
        extra: bystanders in a scene.
    """

    side: int
    clips: int
    texts: int
    items: int
    extra: int


LEVELS = {
    "tiny": Level(48, 64, 200, 0, 1),
    "nano": Level(48, 12000, 40000, 60, 1),
    "hard": Level(64, 18000, 40000, 60, 2),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work for one process: numbers [start, end) of a kind (clips, letters, text, review, a task's stem)."""

    out: Path
    kind: str
    start: int
    end: int
    seed: int
    level: Level


def dumps(value: object) -> str:
    """JSON on one line, without characters escaped."""
    return json.dumps(value, ensure_ascii=False)


def run_job(job: Job) -> tuple[str, int, dict[str, list[str]]]:
    """Do one piece of work in any process; returns (kind, start, {file: lines})."""
    from mmllm.world.layout import write_clip
    from mmllm.world.training import draw_sample, letter_line, text_line

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
            for name, made in write_clip(sample, i, job.out / "train", rng).items():
                lines.setdefault(name, []).extend(map(dumps, made))
    else:
        run_test(job)
    return job.kind, job.start, lines


def run_test(job: Job) -> None:
    """Write all clips and the JSON file of one test task."""
    from mmllm.world.groups import make_items
    from mmllm.world.layout import write_item
    from mmllm.world.tasks import MLVU, MVBENCH

    task = next(task for task in MVBENCH + MLVU if task.stem == job.kind)
    root = job.out / ("mvbench" if task in MVBENCH else "mlvu")
    (root / "video" / task.folder).mkdir(parents=True, exist_ok=True)
    groups = max(1, job.level.items // (task.options or 1))
    items = make_items(task, job.seed, groups, job.level.side, job.level.extra)
    entries = [write_item(task, item, number, root, job.seed) for number, item in enumerate(items)]
    text = "[\n" + ",\n".join(dumps(entry) for entry in entries) + "\n]\n"
    (root / "json" / f"{task.stem}.json").write_text(text, encoding="utf-8")


def plan(out: Path, level: Level, seed: int) -> list[Job]:
    """All pieces of work."""
    from mmllm.world.tasks import MLVU, MVBENCH

    jobs = [Job(out, task.stem, 0, 1, seed, level) for task in MVBENCH + MLVU]
    for kind, total, step in (
        ("clips", level.clips, 100),
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

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_job, todo)


def check(out: Path, level: str, seed: int) -> dict[str, object] | None:
    """The manifest of a finished world in `out`, or `None` if there is none.

    Raises:
        UserError: an unknown level, or another world in the same folder.
    """
    if level not in LEVELS:
        raise UserError("world level", "unknown level", got=level, hint=nearest(level, list(LEVELS)))
    if out.exists() and not out.is_dir():
        raise UserError(out, "is not a folder", hint="another --out")
    path = out / MANIFEST
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"level": level, "seed": seed, "version": VERSION}
    have = {key: found.get(key) for key in wanted}
    if have != wanted:
        raise UserError(out, "holds another world", expected=wanted, got=have, hint="another --out, or remove it")
    return found


def make_world(
    out: Path, level: str = "nano", seed: int = 0, jobs: int = 2, progress: Progress | None = None
) -> dict[str, object]:
    """Write a world into the folder `out`, or do nothing if it is there already; the result does not depend on `jobs`.

    Args:
        out: the folder; made if needed.
        level: tiny (tests), nano or hard.
        seed: seed of all clips and texts (the tokenizer has its own).
        jobs: number of processes.
        progress: called as `progress(kind, done, total)` with pieces of work.

    Returns:
        The manifest that was written last, as `world.json`: level, seed, version and counts.

    Raises:
        UserError: unknown level, or `out` holds a world of another level, seed or version.
    """
    out = Path(out)
    done = check(out, level, seed)
    if done is not None:
        return done
    from mmllm.world.tokenizer import build_tokenizer

    sizes = LEVELS[level]
    for folder in ("mvbench/json", "mlvu/json", "train/clips"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    todo = plan(out, sizes, seed)
    lines: dict[str, list[str]] = {}
    for number, (kind, _, made) in enumerate(work(todo, jobs), start=1):
        for name, part in made.items():
            lines.setdefault(name, []).extend(part)
        if progress:
            progress(kind, number, len(todo))
    for name, part in lines.items():
        (out / "train" / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    build_tokenizer().save_pretrained(out / "tokenizer")
    counts = {name: len(part) for name, part in lines.items()}
    manifest = {"level": level, "seed": seed, "version": VERSION, "counts": counts, "sizes": asdict(sizes)}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest
