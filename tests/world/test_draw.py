"""What a moving camera shows is what is said of it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from mmllm.world.draw import render
from mmllm.world.palette import COLORS, draw_cast
from mmllm.world.scene import Scene, Thing
from mmllm.world.tasks import MLVU


def spot(frame: np.ndarray, color: str = "red") -> tuple[float, float, int]:
    """(y, x, pixels) of a colour."""
    y, x = np.nonzero((frame == COLORS[color]).all(-1))
    return y.mean(), x.mean(), len(y)


def filmed(camera: str, x: float = 24.0) -> np.ndarray:
    """A red square under a camera that turns by twelve pixels."""
    return render(Scene("x", (Thing("red", "square", 24.0, x, 8.0),), "red", "gray", camera=camera, pan=12.0))


@pytest.mark.parametrize(("camera", "moved"), [("left", 12), ("right", -12), ("still", 0)])
def test_a_camera_that_turns_left_moves_the_picture_to_the_right(camera, moved):
    frames = filmed(camera)
    (y0, x0, _), (y1, x1, _) = spot(frames[0]), spot(frames[-1])
    assert (y1 - y0, x1 - x0) == (0, moved)


@pytest.mark.parametrize(("camera", "larger"), [("forward", 1.7), ("back", 1 / 1.7)])
def test_a_camera_that_moves_forward_makes_things_larger_and_pushes_them_outwards(camera, larger):
    frames = filmed(camera, x=32.0)
    (_, x0, before), (_, x1, after) = spot(frames[0]), spot(frames[-1])
    assert after / before == pytest.approx(larger**2, rel=0.15)
    assert (x1 - 24) / (x0 - 24) == pytest.approx(larger, rel=0.15)


def test_things_are_passed_in_the_order_that_the_answer_says():
    """A thing is passed when it is in the middle of the picture."""
    task, rng, seen = next(task for task in MLVU if task.name == "ego"), Random(3), set()
    for _ in range(12):
        scene = task.sample(rng, draw_cast(rng))
        middle = render(scene)[:, :, 23:25]
        colors = [thing.color for thing in scene.things]
        first = {color: (middle == COLORS[color]).all(-1).any((1, 2)).argmax() for color in colors}
        order = sorted(colors, key=first.__getitem__)
        assert len(set(first.values())) == 3
        question = task.ask(scene, scene.things[0])
        assert question.answer == order[0 if scene.focus == "first" else -1]
        seen.add((scene.camera, scene.focus))
    assert len(seen) == 4
