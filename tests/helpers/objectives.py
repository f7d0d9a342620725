"""Data and stages for the objectives that compare: a teacher, pairs of answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from helpers.small_runs import options, recipe
from helpers.tiny import frames, write_video

from mmllm.train.run import train


def preference_pairs(folder: Path, count: int = 8, clip: Callable[[int], bool] = lambda index: index % 4 != 3) -> Path:
    """Pairs, some of them about a clip, with answers of unequal length."""
    lines = []
    for index in range(count):
        content = [{"type": "text", "text": f"Question {index}: what moves?"}]
        if clip(index):
            write_video(folder / f"clips/{index}.mp4", frames(index, 8))
            content.insert(0, {"type": "video", "path": f"clips/{index}.mp4", "frames": 8 if index % 2 else 4})
        chosen, rejected = "A red square moves left.", "left" if index % 2 else "The blue dot stays where it is."
        record = {"id": f"pair-{index}", "messages": [{"role": "user", "content": content}]}
        lines.append(json.dumps({**record, "chosen": chosen, "rejected": rejected}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def teacher_of(data: Path, folder: Path) -> Path:
    """A finished run over the data, of another seed: a teacher for the tiny recipe."""
    train(recipe(data, steps=2), folder, options(seed=5))
    return folder


def distilled(teacher: Path, **changes: object) -> dict[str, object]:
    """The objective of a stage that learns from a teacher."""
    return {"type": "distillation", "teacher": str(teacher), **changes}
