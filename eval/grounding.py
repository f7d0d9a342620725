"""Questions about when and where, in the layout of NanoWorld: `json/*.json` and `video/`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, shown
from mmllm.contract.grounding import Box, TimeSpan, Tube
from mmllm.eval.items import Item, TaskRow, item_id, items_of, need_root, text_of

NAME = "grounding"
SAMPLER = "ends"
MAX_NEW_TOKENS = 160
"""How its clips are sampled, and how long an answer may be; part of an item's id, so that no old answer is taken."""
TASKS = (
    TaskRow("when", "TG", "when", "when"),
    TaskRow("where", "SG", "where", "where"),
    TaskRow("track", "STG", "track", "track"),
)


def load(root: Path | str) -> list[Item]:
    """All items of the tasks.

    Args:
        root: folder with ``json/`` and ``video/``. An item has `video`, `question`, `frames` (of its clip) and `truth`:
            {"time": [start, end]}, {"box": [x0, y0, x1, y1]} or {"tube": [[t, x0, y0, x1, y1], ...]}; all in shares of
            clip and frame.

    Raises:
        UserError: the folder or a file is missing, or an item is malformed (named by file, index and key).
    """
    root = Path(root)
    need_root(root, NAME)
    return items_of(TASKS, root / "json", partial(_item, root))


def _item(root: Path, task: TaskRow, index: int, row: dict[str, Any], where: str) -> Item:
    video, question = text_of(row, "video", where), text_of(row, "question", where)
    frames = row.get("frames")
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise UserError(f"{where}:frames", "wrong value", expected="number of frames of the clip", got=shown(frames))
    truth = _truth(row.get("truth"), f"{where}:truth")
    return Item(
        benchmark=NAME,
        task=task.name,
        id=item_id(NAME, task.stem, index, video, question, row["truth"], frames, SAMPLER, MAX_NEW_TOKENS),
        media_path=root / "video" / task.folder / video,
        start=None,
        end=None,
        frame_folder=False,
        question=question,
        options=(),
        answer="",
        gold=None,
        video=f"{task.folder}/{video}",
        kind="grounding",
        truth=truth,
        frames=frames,
    )


def _truth(value: object, where: str) -> TimeSpan | Box | Tube:
    """Raises UserError where it is none of the three."""
    kinds = value if isinstance(value, dict) and len(value) == 1 else {}
    for kind, numbers in kinds.items():
        if kind == "time" and _numbers(numbers, 2):
            return TimeSpan(*numbers)
        if kind == "box" and _numbers(numbers, 4):
            return Box(*numbers)
        if kind == "tube" and isinstance(numbers, list) and numbers and all(_numbers(row, 5) for row in numbers):
            return Tube(tuple((row[0], Box(*row[1:])) for row in numbers))
    raise UserError(
        where, "wrong truth", expected='{"time": [..]}, {"box": [..]} or {"tube": [[..]]}', got=shown(value)
    )


def _numbers(values: object, count: int) -> bool:
    fit = isinstance(values, list) and len(values) == count
    numbers = fit and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and all(math.isfinite(value) for value in values)
