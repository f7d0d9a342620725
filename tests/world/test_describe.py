"""Descriptions say where things are by the order in which they name them."""

from __future__ import annotations

from mmllm.world.describe import clause, describe
from mmllm.world.scene import Action, Scene, Thing

RIGHT = Thing("red", "square", 24, 40, 8)
LEFT = Thing("blue", "ring", 24, 8, 8, (Action("blink", 0, 8, amount=2),))
MIDDLE = Thing("white", "cross", 24, 24, 8, (Action("move", 4, 8, "up", dy=-8, when="at the end"),))


def test_things_are_named_from_left_to_right():
    said = describe(Scene("x", (RIGHT, LEFT, MIDDLE), "red", "gray"))
    assert said == (
        "The background is gray. A blue ring blinks 2 times. A white cross moves up at the end. A red square stays."
    )


def test_things_that_act_in_turn_are_named_in_their_order():
    late = Thing("red", "square", 24, 8, 8, (Action("grow", 9, 12, amount=2.0),))
    said = describe(Scene("x", (late, MIDDLE), "red", "teal", ordered=True))
    assert said.endswith("First a white cross moves up at the end. Then a red square grows.")


def test_one_blink_is_one_time_and_what_is_sudden_says_so_first():
    assert clause(Action("blink", 0, 4, amount=1)) == "blinks 1 time"
    assert clause(Action("grow", 0, 1, amount=2.0, when="suddenly")) == "suddenly grows"
