"""Scenes, questions, descriptions and pixels tell the same story."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest

from mmllm.world.describe import describe
from mmllm.world.draw import render
from mmllm.world.palette import COLORS, HELD_OUT, Cast, draw_cast
from mmllm.world.question import block, choose, letter
from mmllm.world.scene import Scene, stretched
from mmllm.world.tasks import EXTRAS, MLVU, MVBENCH, Task
from mmllm.world.training import ASKS, draw_sample, text_line

TASKS = MVBENCH + MLVU
# the frames that the benchmark's sampler picks for eight of 16 and of 48
SEEN = {16: (0, 2, 4, 6, 8, 9, 11, 13), 48: (2, 8, 14, 20, 26, 31, 37, 43)}


def centre(frame: np.ndarray, color: str) -> tuple[float, float] | None:
    """The mean (y, x) of a colour's pixels in a frame [S, S, 3], `None` if it is not there."""
    y, x = np.nonzero((frame == COLORS[color]).all(-1))
    return (float(y.mean()), float(x.mean())) if len(y) else None


def asked(task: Task, cast: Cast, rng: Random) -> tuple[Scene, str]:
    """A scene of a task whose question applies, and the answer."""
    while True:
        scene = task.sample(rng, cast)
        question = task.ask(scene, next((t for t in scene.things if t.color == scene.subject), scene.things[0]))
        if question:
            return scene, question.answer


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.stem)
@pytest.mark.parametrize("extra", [1, 2])
def test_every_task_asks_about_its_own_scenes(task: Task, extra: int) -> None:
    rng = Random(task.stem)
    applies = 0
    for _ in range(100):
        cast = draw_cast(rng, 64 if extra == 2 else 48, extra=extra)
        scene = task.sample(rng, cast)
        assert scene.frames == (48 if task in MLVU else 16)
        assert len({thing.color for thing in scene.things}) == len(scene.things)
        named = next((thing for thing in scene.things if thing.color == scene.subject), scene.things[0])
        question = task.ask(scene, named)
        applies += question is not None
        if question:
            assert question.answer not in question.pool
            assert question.answer.lower() not in question.text.lower().split()
            assert len(question.pool) >= task.options - 1
    assert applies >= 85


def test_the_description_determines_every_answer() -> None:
    """Two scenes with one description and one question never have different answers; a wrong one never is right."""
    rng = Random(0)
    answers: dict[tuple[str, str], tuple[str, frozenset[str]]] = {}
    again = 0
    casts = [draw_cast(rng) for _ in range(2)]
    for i in range(12000):
        scene = TASKS[i % len(TASKS)].sample(rng, casts[i % 2])
        text = describe(scene)
        for ask, _ in ASKS:
            for thing in scene.things:
                question = ask(scene, thing)
                if question is None or question.text == "Which object is in the video?":
                    continue
                key = (text, question.text)
                again += key in answers
                answer, wrong = answers.setdefault(key, (question.answer, frozenset(question.pool)))
                assert question.answer == answer, (key, question.answer, answer)
                assert question.answer not in wrong
    assert again > 5000


def test_descriptions_are_short_and_say_everything_that_is_there() -> None:
    words: set[str] = set()
    for i in range(1500):
        sample, _ = draw_sample(1, "train", i, 64, 2)
        text = describe(sample.scene)
        assert len(text.split()) <= 50, text
        assert all(thing.noun in text for thing in sample.scene.things)
        words |= set(text.replace(".", " ").replace(",", " ").lower().split())
    assert len(words) <= 100


@pytest.mark.parametrize("held", [False, True])
def test_pixels_move_where_the_answer_says(held: bool) -> None:
    task, rng = next(task for task in MVBENCH if task.stem == "moving_direction"), Random(3)
    for _ in range(60):
        scene, answer = asked(task, draw_cast(rng, held=held), rng)
        frames = render(scene)[list(SEEN[16])]
        (y0, x0), (y1, x1) = centre(frames[0], scene.subject), centre(frames[-1], scene.subject)  # type: ignore[misc]
        dy, dx = y1 - y0, x1 - x0
        want = {"left": -dx, "right": dx, "up": -dy, "down": dy}
        assert max(want, key=want.__getitem__) == answer
        assert want[answer] >= 16


@pytest.mark.parametrize(("stem", "frames"), [("action_count", 16), ("4_count", 48)])
def test_every_blink_is_seen_in_eight_frames(stem: str, frames: int) -> None:
    task, rng = next(task for task in TASKS if task.stem == stem), Random(4)
    for _ in range(80):
        scene, answer = asked(task, draw_cast(rng), rng)
        shown = [centre(frame, scene.subject) is not None for frame in render(scene)[list(SEEN[frames])]]
        assert shown[0] and shown[-1]
        assert sum(a and not b for a, b in pairwise(shown)) == int(answer)


def test_order_and_needle_and_place_are_seen() -> None:
    rng = Random(5)
    by_stem = {task.stem: task for task in TASKS}
    for _ in range(40):
        scene, answer = asked(by_stem["character_order"], draw_cast(rng), rng)
        frames = render(scene)[list(SEEN[16])]
        first = {t.color: [centre(f, t.color) is not None for f in frames].index(True) for t in scene.things}
        assert ", ".join(sorted(first, key=first.__getitem__)) == answer and len(set(first.values())) == 3
        scene, answer = asked(by_stem["2_needle"], draw_cast(rng), rng)
        assert any((frame == COLORS[answer]).all() for frame in render(scene)[list(SEEN[48])])
        scene, answer = asked(by_stem["object_shuffle"], draw_cast(rng), rng)
        x = centre(render(scene)[13], scene.subject)[1]  # type: ignore[index]
        assert ("left", "middle", "right")[int(x // 16)] == answer
        scene, answer = asked(by_stem["5_order"], draw_cast(rng), rng)
        frames = render(scene)[list(SEEN[48])]
        marks = {t.color: [int((f == COLORS[t.color]).all(-1).sum()) * 100 + int(sum(centre(f, t.color) or (0, 0)))
                           for f in frames] for t in scene.things}  # fmt: skip
        assert all(len(set(values)) > 1 for values in marks.values()), describe(scene)


def test_training_never_shows_or_names_a_held_out_pair() -> None:
    forbidden = [f"{color} {shape}" for color, shape in HELD_OUT]
    assert len([pair for pair in HELD_OUT if pair[1] != "arrow"]) == 6
    for i in range(1500):
        text = str(text_line(0, i, 48, 1))
        assert not any(pair in text for pair in forbidden)
        scene = draw_sample(0, "train", i, 48, 1)[0].scene
        for thing in scene.things:
            turned = [action.value for action in thing.actions if action.kind == "recolor"]
            assert not any((color, thing.shape) in HELD_OUT for color in [thing.color, *turned])


def test_right_letters_are_uniform_in_training() -> None:
    rng = Random(0)
    counts = np.zeros(4)
    question = EXTRAS[1][0](
        draw_sample(0, "train", 0, 48, 1)[0].scene, draw_sample(0, "train", 0, 48, 1)[0].scene.things[0]
    )
    for _ in range(4000):
        options = choose(question, 4, rng)
        counts[options.index(question.answer)] += 1
    assert counts.min() > 900
    text = block(question.text, options)
    assert text.startswith(f"Question: {question.text}\nOptions:\n(A) {options[0]}\n(B) ")
    assert text.endswith("\nOnly give the best option.")
    assert letter(options, question.answer) in ("(A)", "(B)", "(C)", "(D)")


@pytest.mark.parametrize("task", MLVU, ids=lambda task: task.stem)
def test_a_longer_clip_tells_the_same_story(task: Task) -> None:
    rng = Random(task.stem)
    for _ in range(20):
        scene, answer = asked(task, draw_cast(rng), rng)
        longer = stretched(scene, 128)
        named = next((thing for thing in longer.things if thing.color == longer.subject), longer.things[0])
        assert longer.frames == 128
        assert task.ask(longer, named).answer == answer
        assert describe(longer) == describe(scene)
        short, long = render(scene), render(longer)
        assert (short[-1] == long[-1]).mean() > 0.99 and (short[0] == long[0]).mean() > 0.99
        for one, other in zip(scene.things, longer.things, strict=True):
            assert [a.end - a.start == 1 for a in one.actions] == [a.end - a.start == 1 for a in other.actions]
