"""NanoWorld's questions about when and where: the truth is what the clip shows."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from mmllm.world.draw import render
from mmllm.world.grounding import MOMENTS, TASKS, acting, box_at, entry, shares, track, when, where
from mmllm.world.make import make_world
from mmllm.world.palette import COLORS, HELD_OUT, draw_cast


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding") / "world"
    make_world(folder, "tiny", seed=0, jobs=1)
    return folder


def scenes(count: int = 40):
    for number in range(count):
        rng = Random(number)
        yield acting(rng, draw_cast(rng, 48, held=number % 2 == 0)), rng


def test_boxes_are_where_the_pixels_are():
    for scene, _ in scenes():
        frames = render(scene)
        for thing in scene.things:
            for frame in (0, 7, 15):
                box = box_at(thing, frame, scene.side)
                seen = np.argwhere((np.abs(frames[frame].astype(int) - COLORS[thing.color]) < 2).all(-1))
                assert (box is None) == (len(seen) == 0)
                if box is not None:
                    (top, left), (bottom, right) = seen.min(0), seen.max(0) + 1
                    assert np.abs(np.array(box) * 48 - [left, top, right, bottom]).max() <= 1.5


def test_the_subject_acts_from_the_first_to_the_last_frame_of_its_span():
    for scene, rng in scenes():
        text, truth = when(scene, rng)
        first, last = truth["time"]
        assert text.startswith(f"When does the {scene.thing(scene.subject).noun} ")
        boxes = [box_at(scene.thing(scene.subject), frame, 48) for frame in range(16)]
        changes = [frame for frame in range(1, 16) if boxes[frame] != boxes[frame - 1]]
        assert min(changes) == first + 1 and max(changes) == last


def test_tracks_and_places():
    for scene, rng in scenes():
        _, truth = track(scene, rng)
        assert [row[0] for row in truth["tube"]] == [0, 5, 10, 15] and len(truth["tube"]) == MOMENTS
        text, truth = where(scene, rng)
        assert len(truth["box"]) == 4 and text.endswith(("at the beginning?", "at the end?"))


def test_in_shares_and_in_seconds():
    assert shares({"time": [3, 15]}, 16) == {"time": [0.2, 1.0]}
    assert shares({"tube": [[5, 0, 0, 1, 1]]}, 16) == {"tube": [[0.3333, 0, 0, 1, 1]]}
    assert entry({"time": [4, 12]}) == {"type": "time", "time": [0.5, 1.5]}
    assert entry({"tube": [[8, 0, 0, 1, 1]]}) == {"type": "tube", "tube": [[1.0, 0, 0, 1, 1]]}
    assert entry({"box": [0, 0, 1, 1]}) == {"type": "box", "box": [0, 0, 1, 1]}


def test_files(world):
    from mmllm.eval.grounding import load

    items = load(world / "grounding")
    assert {item.task for item in items} == {task.name for task in TASKS}
    assert all(item.media_path.is_file() and item.kind == "grounding" and item.truth for item in items)
    lines = [json.loads(line) for line in (world / "train/grounding.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    for line in lines:
        video = line["messages"][0]["content"][0]
        assert (world / "train" / video["path"]).is_file()
        assert {turn["content"][0]["type"] for turn in line["messages"][1::2]} == {"box", "time", "tube"}
    asked = " ".join(item.question for item in items)
    assert any(" ".join(pair) in asked for pair in HELD_OUT)
    taught = json.dumps(lines)
    assert not any(f"the {' '.join(pair)}" in taught for pair in HELD_OUT)
