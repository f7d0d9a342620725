"""Things keep apart and on the canvas, wherever they move."""

from __future__ import annotations

from random import Random

import pytest

from mmllm.world.palette import draw_cast
from mmllm.world.place import act, arrange
from mmllm.world.scene import state


@pytest.mark.parametrize("seed", range(6))
def test_things_never_meet_and_never_leave(seed):
    rng = Random(seed)
    for _ in range(20):
        cast = draw_cast(rng)
        phrases = [rng.choice(("moves left", "moves up", "grows", "shrinks", "blinks")) for _ in range(3)]
        parts = [(pair, (act(cast, phrase, 0, 16),)) for pair, phrase in zip(cast.pairs, phrases, strict=False)]
        things = arrange(rng, cast, parts)
        assert things
        for frame in (0, 15):
            places = [place for place in (state(thing, frame) for thing in things) if place]
            for y, x, size, _ in places:
                assert min(y, x) - size / 2 >= 0 and max(y, x) + size / 2 <= cast.side
            for index, one in enumerate(places):
                for other in places[:index]:
                    room = (one[2] + other[2]) / 2
                    assert abs(one[0] - other[0]) >= room or abs(one[1] - other[1]) >= room
