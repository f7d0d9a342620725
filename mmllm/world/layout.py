"""One clip or item -> its files, in the layouts of MVBench, MLVU and the training sets."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from mmllm.world.describe import describe
from mmllm.world.draw import render
from mmllm.world.families import PHASES, plain, timeline
from mmllm.world.groups import WorldItem
from mmllm.world.palette import draw_cast
from mmllm.world.scene import Scene
from mmllm.world.tasks import Task
from mmllm.world.training import Sample, caption_line, instruct_line, preference_line
from mmllm.world.video import FPS, write_jpgs, write_mp4

PADDING = 16
"""Frames of other scenes around a bounded clip, before and after together."""

TALKS = 2
"""Conversations per training clip, each with different questions."""


def between(scene: Scene, rng: Random, held: bool) -> tuple[np.ndarray, int]:
    """(frames [16 + T, S, S, 3], index of the scene's first frame): the scene between two others."""
    before = rng.randint(4, 12)
    parts = []
    for frames in (before, PADDING - before):
        cast = draw_cast(rng, scene.side, held)
        other = plain(rng, cast, "padding", [(pair, timeline(cast, rng.choice(PHASES))) for pair in cast.pairs[:2]])
        parts.append(render(other)[:frames])
    return np.concatenate([parts[0], render(scene), parts[1]]), before


def write_item(task: Task, item: WorldItem, number: int, root: Path, seed: int) -> dict[str, object]:
    """Write the clip of one test item below `root` (``mvbench`` or ``mlvu``) and return its JSON entry.

    Bounds of mp4 clips are in seconds at 8 frames per second, those of jpg folders at 3.
    """
    jpg = task.reader == "frame"
    name = f"{task.stem}_{number:04d}" + ("" if jpg else ".mp4")
    path = root / "video" / task.folder / name
    bounds: dict[str, object] = {}
    if task.bounded:
        frames, first = between(item.scene, Random(f"{seed}/pad/{task.stem}/{number}"), held=True)
        # jpg files count from 1, and both ends of the interval are files of the scene
        low, high, fps = (first + 1, first + 16, 3) if jpg else (first, first + 16, FPS)
        bounds = {"start": low / fps, "end": high / fps}
    else:
        frames = render(item.scene)
    if jpg:
        write_jpgs(path, frames)
    else:
        write_mp4(path, frames)
    entry: dict[str, object] = {"video": name, "question": item.question.text, "answer": item.question.answer}
    if item.options:
        entry["candidates"] = list(item.options)
    entry |= bounds | {"group": item.group, "description": describe(item.scene)}
    if root.name == "mlvu":
        entry |= {"duration": len(frames) / FPS, "question_type": task.folder if task.options else task.name}
        if task.name == "needle":
            entry["question_type"] = "findNeedle"
        if task.name == "sub_scene":
            entry |= {"question_type": "subPlot", "scoring_points": [item.question.answer]}
    return entry


def write_clip(sample: Sample, number: int, train: Path, rng: Random) -> dict[str, list[dict[str, object]]]:
    """Write one training clip below `train` and return its lines: caption, instruct (several) and preference."""
    name = f"clips/{number:06d}.mp4"
    video: dict[str, object] = {"type": "video", "path": name}
    if sample.bounded:
        frames, first = between(sample.scene, rng, held=False)
        video |= {"start": first / FPS, "end": (first + sample.scene.frames) / FPS}
    else:
        frames = render(sample.scene)
    write_mp4(train / name, frames)
    return {
        "caption": [caption_line(f"caption-{number:06d}", sample, video)],
        "instruct": [instruct_line(f"instruct-{number:06d}-{talk}", sample, video, rng) for talk in range(TALKS)],
        "preference": [preference_line(f"preference-{number:06d}", sample, video, rng)],
    }
