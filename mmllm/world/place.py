"""Placement: positions at which a thing stays on the canvas for the whole clip and never meets another."""

from __future__ import annotations

from random import Random

from mmllm.world.palette import Cast, Pair
from mmllm.world.scene import DIRECTIONS, SIZES, Action, Thing, state

Part = tuple[Pair, tuple[Action, ...]]
Path = list[tuple[float, float, float] | None]
TIMES = 12


def act(cast: Cast, phrase: str, start: int, end: int, when: str = "", px: float = 21) -> Action:
    """The action for a phrase ("moves left", "grows", "shrinks", "blinks") in the frames [start, end)."""
    if phrase.startswith("moves "):
        word = phrase.split()[1]
        dy, dx = DIRECTIONS[word]
        return Action("move", start, end, word, dy * px * cast.unit, dx * px * cast.unit, when=when)
    if phrase == "grows":
        return Action("grow", start, end, amount=2.1, when=when)
    if phrase == "shrinks":
        return Action("shrink", start, end, amount=0.45, when=when)
    # hidden for two fifths of its time, so that a sampler of eight frames cannot miss it
    off = 2 * (end - start) // 5
    begin = start + (end - start - off) // 2
    return Action("blink", begin, begin + 2 * off, amount=1, when=when)


def size_of(cast: Cast, rng: Random, actions: tuple[Action, ...]) -> float:
    """The initial size in pixels: small if the thing will grow, large if it will shrink first."""
    first = next((action.kind for action in actions if action.kind in SIZES), "")
    base = {"grow": 9.5, "shrink": 20.0}.get(first) or rng.choice((11, 12, 13, 14))
    return round(base * cast.unit)


def path(thing: Thing, frames: int) -> Path:
    """Positions of a thing at twelve times spread over the clip: (y, x, half of its size), `None` while hidden."""
    circles = (state(thing, round(i * (frames - 1) / (TIMES - 1))) for i in range(TIMES))
    return [circle and (circle[0], circle[1], circle[2] / 2) for circle in circles]


def apart(a: Path, b: Path, y: float, x: float) -> bool:
    """Whether path `a`, moved by (y, x), never comes within a pixel of path `b`."""
    for one, two in zip(a, b, strict=True):
        if one and two:
            room = one[2] + two[2] + 1
            if abs(one[0] + y - two[0]) < room and abs(one[1] + x - two[1]) < room:
                return False
    return True


def put(
    rng: Random, cast: Cast, part: Part, taken: list[Path], frames: int, drift: tuple[float, float]
) -> Thing | None:
    """A thing at a random position where it stays on the canvas and meets no other, or `None` after some tries.

    Args:
        rng: source of the draws.
        cast: provides the canvas.
        part: (colour, shape) and timeline.
        taken: paths of the earlier things; this one's is added.
        frames: length of the clip.
        drift: how far the camera will shift the picture (dy, dx); the thing stays visible.
    """
    pair, actions = part
    size = size_of(cast, rng, actions)
    own = path(Thing(*pair, 0.0, 0.0, size, actions), frames)
    seen = [circle for circle in own if circle]
    y0, x0 = (min(circle[i] - circle[2] for circle in seen) + min(drift[i], 0) for i in (0, 1))
    y1, x1 = (max(circle[i] + circle[2] for circle in seen) + max(drift[i], 0) for i in (0, 1))
    if max(y1 - y0, x1 - x0) > cast.side - 2:
        return None
    for _ in range(12):
        y, x = round(rng.uniform(1 - y0, cast.side - 1 - y1)), round(rng.uniform(1 - x0, cast.side - 1 - x1))
        if all(apart(own, other, y, x) for other in taken):
            taken.append([circle and (circle[0] + y, circle[1] + x, circle[2]) for circle in own])
            return Thing(*pair, y, x, size, actions)
    return None


def arrange(
    rng: Random, cast: Cast, parts: list[Part], frames: int = 16, drift: tuple[float, float] = (0, 0)
) -> tuple[Thing, ...]:
    """Place all parts so that they never meet; parts at the end of the list are left out if there is no room."""
    best: tuple[Thing, ...] = ()
    for _ in range(25):
        taken: list[Path] = []
        things: list[Thing] = []
        for part in parts:
            thing = put(rng, cast, part, taken, frames, drift)
            if thing is None:
                break
            things.append(thing)
        if len(things) == len(parts):
            return tuple(things)
        if len(things) > len(best):
            best = tuple(things)
    return best
