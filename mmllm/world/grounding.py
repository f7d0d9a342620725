"""Questions about when and where, with exact truth: test items, and conversations to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mmllm.world.draw import render
from mmllm.world.families import CALM, TURNS, bystanders, plain
from mmllm.world.palette import Cast, draw_cast
from mmllm.world.place import act
from mmllm.world.scene import Scene, Thing, state
from mmllm.world.training import Turn, say
from mmllm.world.video import FPS, write_mp4

MOMENTS = 4
"""Boxes of a track, from the first frame to the last, evenly spaced."""
PHRASES = ("grows", "shrinks", *(f"moves {turn}" for turn in TURNS))
VERBS = {"moves": "move", "grows": "grow", "shrinks": "shrink"}
Truth = dict[str, list]
"""{"time": [first frame, last frame]}, {"box": sides in shares} or {"tube": [[frame, sides], ...]}."""


def acting(rng: Random, cast: Cast) -> Scene:
    """The subject does one thing for a part of the clip, others do what they like."""
    length = rng.randint(4, 10)
    start = rng.randint(0, 16 - length)
    own = (act(cast, rng.choice(PHRASES), start, start + length),)
    return plain(rng, cast, "grounding", [(cast.pairs[0], own), *bystanders(rng, cast, phrases=CALM)])


def box_at(thing: Thing, frame: int, side: int) -> list[float] | None:
    """Left, top, right and bottom of a thing as shares of the frame, or `None` while it cannot be seen."""
    found = state(thing, frame)
    if found is None:
        return None
    y, x, size, _ = found
    sides = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    return [round(min(max(value / side, 0.0), 1.0), 4) for value in sides]


def when(scene: Scene, rng: Random) -> tuple[str, Truth]:
    """From the first to the last frame of what the subject does."""
    subject = scene.thing(scene.subject)
    (action,) = subject.actions
    verb, _, rest = action.phrase().partition(" ")
    text = f"When does the {subject.noun} {' '.join([VERBS[verb], *rest.split()])}?"
    return text, {"time": [action.start, action.end - 1]}


def where(scene: Scene, rng: Random) -> tuple[str, Truth]:
    """The box of a thing in the first or the last frame."""
    thing, end = rng.choice(scene.things), rng.random() < 0.5
    frame, word = (scene.frames - 1, "end") if end else (0, "beginning")
    box = box_at(thing, frame, scene.side)
    if box is None:  # it blinks there: ask about the one that does not
        thing = scene.thing(scene.subject)
        box = box_at(thing, frame, scene.side)
    return f"Where is the {thing.noun} at the {word}?", {"box": box}


def track(scene: Scene, rng: Random) -> tuple[str, Truth]:
    """The subject's boxes, moment by moment."""
    subject = scene.thing(scene.subject)
    frames = [round(index * (scene.frames - 1) / (MOMENTS - 1)) for index in range(MOMENTS)]
    boxes = [(frame, box_at(subject, frame, scene.side)) for frame in frames]
    return f"Track the {subject.noun}.", {"tube": [[frame, *box] for frame, box in boxes if box is not None]}


@dataclass(frozen=True, slots=True)
class GroundingTask:
    """A task: its name, which is also that of its file and of its folder of clips, and its question."""

    name: str
    ask: Callable[[Scene, Random], tuple[str, Truth]]


TASKS = (GroundingTask("when", when), GroundingTask("where", where), GroundingTask("track", track))


def shares(truth: Truth, frames: int) -> Truth:
    """Frames as shares of the clip, which runs from its first frame to its last."""
    last = frames - 1
    if "time" in truth:
        return {"time": [round(frame / last, 4) for frame in truth["time"]]}
    return {"tube": [[round(row[0] / last, 4), *row[1:]] for row in truth["tube"]]} if "tube" in truth else truth


def entry(truth: Truth) -> Turn:
    """The content entry of a truth; moments in seconds of the clip."""
    ((kind, numbers),) = truth.items()
    if kind == "time":
        numbers = [frame / FPS for frame in numbers]
    elif kind == "tube":
        numbers = [[row[0] / FPS, *row[1:]] for row in numbers]
    return {"type": kind, kind: numbers}


def write_test(
    task: GroundingTask, root: Path, count: int, seed: int, side: int, extra: int
) -> list[dict[str, object]]:
    """The clips of a task's test items below `root`, and the items: subjects are pairs that no training clip shows."""
    folder = root / "video" / task.name
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number in range(count):
        rng = Random(f"{seed}/grounding/{task.name}/{number}")
        scene = acting(rng, draw_cast(rng, side, held=True, extra=extra))
        text, truth = task.ask(scene, rng)
        name = f"{task.name}_{number:04d}.mp4"
        write_mp4(folder / name, render(scene))
        items.append({"video": name, "question": text, "frames": scene.frames, "truth": shares(truth, scene.frames)})
    return items


def write_clip(train: Path, number: int, seed: int, side: int, extra: int) -> dict[str, object]:
    """One training clip below `train`, and a conversation about when and where in it."""
    rng = Random(f"{seed}/train/grounding/{number}")
    scene = acting(rng, draw_cast(rng, side, extra=extra))
    name = f"clips/grounding-{number:06d}.mp4"
    write_mp4(train / name, render(scene))
    turns: list[Turn] = []
    for index, task in enumerate(rng.sample(TASKS, len(TASKS))):
        text, truth = task.ask(scene, rng)
        video = None if index else {"type": "video", "path": name}
        turns += [say("user", text, video), {"role": "assistant", "content": [entry(truth)]}]
    return {"id": f"grounding-{number:06d}", "messages": turns}
