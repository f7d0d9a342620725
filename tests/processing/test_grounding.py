"""Places and moments: typed values to tokens and back, through conversations, and whatever a model writes."""

from __future__ import annotations

import random

import pytest

from mmllm.contract.grounding import Box, Coordinates, TimeSpan, Tube
from mmllm.processing.grounding import entry_of, read, written

LAYOUT = Coordinates(time=50, height=20, width=30, first=100)


def test_what_is_written_is_read():
    box, span = Box(0.1, 0.2, 0.55, 1.0), TimeSpan(0.25, 0.75)
    tube = Tube(((0.0, box), (0.5, Box(0.0, 0.0, 1.0, 1.0)), (1.0, box)))
    text = f"It is there {written(span, LAYOUT)}, at {written(box, LAYOUT)}. So: {written(tube, LAYOUT)}."
    found = read(text, LAYOUT)
    assert (len(found.spans), len(found.boxes), len(found.tube.boxes), found.broken) == (1, 1, 3, 0)
    assert found.spans[0].iou(span) > 0.9 and found.boxes[0].iou(box) > 0.8
    assert found.tube.span == TimeSpan(0.0, 1.0)
    assert all(mine.iou(theirs) > 0.8 for (_, mine), (_, theirs) in zip(found.tube.boxes, tube.boxes, strict=True))


def test_tokens_are_the_nearest_bins():
    assert written(TimeSpan(0.0, 1.0), LAYOUT) == "{<TEMP-000><TEMP-049>}"
    assert written(Box(-1.0, 0.5, 0.5, 2.0), LAYOUT) == "[<WIDTH-000><HEIGHT-010><WIDTH-015><HEIGHT-019>]"
    for row in range(len(LAYOUT)):
        axis, share = LAYOUT.place(row)
        assert LAYOUT.nearest(axis, share) == row
        assert LAYOUT.rows(axis, share)[2] == pytest.approx(0, abs=1e-9) or LAYOUT.rows(axis, share)[2] > 1 - 1e-9
    assert list(LAYOUT.tokens())[50] == "<HEIGHT-000>" and len(list(LAYOUT.tokens())) == len(LAYOUT) == 100


def test_entries():
    assert entry_of(Box(0, 0.1, 1, 0.9)) == {"type": "box", "box": [0, 0.1, 1, 0.9]}
    assert entry_of(TimeSpan(1.5, 2.0), of=1) == {"type": "time", "time": [1.5, 2.0], "of": 1}
    assert entry_of(Tube(((0.5, Box(0, 0, 1, 1)),))) == {"type": "tube", "tube": [[0.5, 0, 0, 1, 1]]}


@pytest.mark.parametrize(
    ("text", "spans", "boxes", "moments", "broken"),
    [
        ("", 0, 0, 0, 0),
        ("{<TEMP-001><TEMP-002>}", 1, 0, 0, 0),
        ("{<TEMP-001>, <TEMP-002>}", 1, 0, 0, 0),
        ("from <TEMP-001> to <TEMP-002>", 0, 0, 0, 2),
        ("<TEMP-050><TEMP-002>", 0, 0, 0, 2),
        ("[<WIDTH-001><HEIGHT-002><WIDTH-003><HEIGHT-004>]", 0, 1, 0, 0),
        ("[<HEIGHT-002><WIDTH-001><WIDTH-003><HEIGHT-004>]", 0, 0, 0, 4),
        ("[<WIDTH-001><HEIGHT-002><WIDTH-003>", 0, 0, 0, 3),
        ("[<WIDTH-001><HEIGHT-002><WIDTH-030><HEIGHT-004>]", 0, 0, 0, 4),
        ("<TEMP-007>: [<WIDTH-001><HEIGHT-002><WIDTH-003><HEIGHT-004>]", 0, 0, 1, 0),
        ("<TEMP-007>,: [<WIDTH-001><HEIGHT-002><WIDTH-003><HEIGHT-004>]", 0, 0, 1, 0),
        ("<TEMP-007>: [<WIDTH-001><HEIGHT-002><WIDTH-003>", 0, 0, 0, 4),
        ("<TEMP-9999><TEMP-1><WIDTH--1><temp-001>", 0, 0, 0, 2),
    ],
)
def test_whole_and_broken(text, spans, boxes, moments, broken):
    found = read(text, LAYOUT)
    assert (len(found.spans), len(found.boxes), len(found.tube.boxes), found.broken) == (spans, boxes, moments, broken)


def test_of_two_boxes_at_one_moment_the_last():
    one, other = Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)
    text = f"{written(Tube(((0.5, one),)), LAYOUT)}, {written(Tube(((0.5, other),)), LAYOUT)}"
    (moment,) = read(text, LAYOUT).tube.boxes
    assert moment[1].iou(other) > 0.8


def test_nothing_that_a_model_writes_makes_reading_fail():
    draw = random.Random(0)
    words = [
        "红色的方块",
        "квадрат",
        " ",
        ", ",
        ": [",
        "]",
        "{",
        "}",
        "<",
        ">",
        "-",
        "\n",
        "<TEMP-",
        "999>",
        "\u0000",
        "🟥",
    ]
    tokens = [*LAYOUT.tokens(), "<TEMP-100>", "<WIDTH-9999>", "<HEIGHT-12345>", "<DEPTH-001>"]
    whole = written(Tube(tuple((n / 9, Box(0.1, 0.2, 0.3, 0.4)) for n in range(10))), LAYOUT)
    for _ in range(500):
        kind = draw.randrange(4)
        if kind == 0:
            text = whole[: draw.randrange(len(whole))]
        elif kind == 1:
            text = "".join(draw.sample(list(whole), len(whole)))
        elif kind == 2:
            text = "".join(draw.choices(tokens, k=draw.randrange(30)))
        else:
            text = "".join(draw.choices([*words, *draw.choices(tokens, k=20)], k=draw.randrange(60)))
        found = read(text, LAYOUT)
        used = 2 * len(found.spans) + 4 * len(found.boxes) + found.broken
        assert used >= 0 and all(0 <= moment <= 1 for moment, _ in found.tube.boxes)
