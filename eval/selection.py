"""Which items of a benchmark are answered: sound multiple-choice items whose clip is on disk."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import write_text
from mmllm.eval.items import Item, media_exists, misplaced
from mmllm.eval.kinds import KINDS

logger = logging.getLogger(__name__)
NEEDS_JUDGE = "not scored: needs a judge"


@dataclass
class Selection:
    """The items of one run, split into those that are answered and those that are not.

    Attributes:
        scored: items that are answered.
        missing: sound items whose clip is absent.
        broken: (item, reason) of items whose clip cannot be read as they require.
        excluded: (item, reason) of items that nobody could answer.
        not_scored: tasks left out as a whole, with the reason.
    """

    scored: list[Item] = field(default_factory=list)
    missing: list[Item] = field(default_factory=list)
    broken: list[tuple[Item, str]] = field(default_factory=list)
    excluded: list[tuple[Item, str]] = field(default_factory=list)
    not_scored: dict[str, str] = field(default_factory=dict)

    def set_aside(self, broken: list[tuple[Item, str]]) -> None:
        """Leave out items that turned out to be unreadable."""
        ids = {item.id for item, _ in broken}
        self.scored = [item for item in self.scored if item.id not in ids]
        self.broken += broken


def select(items: list[Item], limit: int | None = None, tasks: tuple[str, ...] = ()) -> Selection:
    """Split items by whether they can be answered.

    Args:
        items: all items of a benchmark.
        limit: keep the first `limit` items of each task; None keeps all.
        tasks: keep these alone; () keeps all.

    Raises:
        UserError: there is no such task.
    """
    known = list(dict.fromkeys(item.task for item in items))
    for task in tasks:
        if task not in known:
            raise UserError(f"task {task!r}", "no such task", hint=nearest(task, known))
    chosen, seen = Selection(), Counter[str]()
    for item in (item for item in items if not tasks or item.task in tasks):
        seen[item.task] += 1
        if limit is not None and seen[item.task] > limit:
            continue
        kind = KINDS[item.kind]
        reason = kind.defect(item)
        if kind.judge is None:
            chosen.not_scored[item.task] = NEEDS_JUDGE
        elif reason is not None:
            chosen.excluded.append((item, reason))
        elif (wrong := misplaced(item)) is not None:
            chosen.broken.append((item, wrong))
        elif not media_exists(item):
            chosen.missing.append(item)
        else:
            chosen.scored.append(item)
    return chosen


def settle_broken(chosen: Selection, benchmark: str, missing: Literal["error", "skip"]) -> None:
    """Continue without items whose path or bound is unsound, or stop.

    Raises:
        UserError: there are some and `missing` is "error"; names the first.
    """
    if not chosen.broken:
        return
    item, reason = chosen.broken[0]
    what = f"{len(chosen.broken)} items cannot be read; first {item.id}: {reason}"
    if missing == "error":
        raise UserError(benchmark, what, hint="--missing skip leaves these items out and counts them separately")
    logger.warning("%s: %s; these items are left out", benchmark, what)


def missing_by_task(chosen: Selection) -> dict[str, tuple[int, int]]:
    """{task with missing items: (missing items, all sound items)}."""
    missing = Counter(item.task for item in chosen.missing)
    scored = Counter(item.task for item in chosen.scored)
    return {task: (count, count + scored[task]) for task, count in missing.items()}


def settle_missing(chosen: Selection, benchmark: str, out: Path, missing: Literal["error", "skip"]) -> None:
    """Write ``missing.txt`` (one path per line) where clips are missing, and continue or stop.

    Args:
        chosen: the items of the run.
        benchmark: its name, for the message.
        out: folder of the run's files.
        missing: "error" stops, "skip" warns and continues without these items.

    Raises:
        UserError: clips are missing and `missing` is "error", or nothing is left to answer.
    """
    listing = out / "missing.txt"
    if not chosen.missing:
        listing.unlink(missing_ok=True)
    else:
        paths = dict.fromkeys(str(item.media_path) for item in chosen.missing)
        write_text(listing, "".join(f"{path}\n" for path in paths))
        counts = ", ".join(f"{task} {n} of {total}" for task, (n, total) in missing_by_task(chosen).items())
        what = f"clips missing for {len(chosen.missing)} items ({counts}); first {next(iter(paths))}, all in {listing}"
        if missing == "error":
            raise UserError(benchmark, what, hint="--missing skip leaves these items out and reports them")
        logger.warning("%s: %s; these items are left out", benchmark, what)
    if not chosen.scored:
        hint = "--root of the folder that holds json/ and video/" if chosen.missing else "a larger --limit"
        raise UserError(benchmark, "no item is left to answer", hint=hint)
