"""The colours, shapes and backgrounds of NanoWorld, and the cast of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

COLORS = {
    "red": (228, 40, 40),
    "green": (50, 205, 60),
    "blue": (60, 115, 255),
    "yellow": (248, 222, 50),
    "purple": (190, 70, 225),
    "white": (242, 242, 242),
}
SHAPES = ("square", "circle", "triangle", "cross", "diamond", "ring")
BACKGROUNDS = {"gray": (92, 92, 92), "brown": (98, 64, 34), "teal": (16, 86, 82), "navy": (24, 28, 88)}

NAMES = tuple(COLORS)
Pair = tuple[str, str]
HELD_OUT: frozenset[Pair] = frozenset((color, SHAPES[(i + 2) % 6]) for i, color in enumerate(NAMES)) | {
    ("yellow", "arrow"),
    ("purple", "arrow"),
}
"""(colour, shape) pairs that no training clip shows and that the subjects of the test clips have."""


@dataclass(frozen=True, slots=True)
class Cast:
    """The possible things: five (colour, shape) pairs with distinct colours and shapes; the first is the subject.

    Args:
        pairs: the five pairs.
        key: a seed for everything that a question *states*, so that scenes of one cast ask the same question.
        side: height and width of the clip in pixels.
        held: whether this is a test cast (its subject is a held-out pair).
        extra: number of additional bystanders in a scene.
    """

    pairs: tuple[Pair, ...]
    key: int
    side: int = 48
    held: bool = False
    extra: int = 1

    def rng(self) -> Random:
        """A fresh generator with the same draws for every scene of this cast."""
        return Random(self.key)

    @property
    def unit(self) -> float:
        """Pixels of this canvas per pixel of the 48-pixel canvas."""
        return self.side / 48

    def recolor(self, rng: Random, shape: str, used: list[str]) -> str:
        """A colour that nothing in the scene has; it makes a held-out pair with `shape` only in test casts."""
        return rng.choice(
            [c for c in NAMES if c not in used and (self.held or (c, shape) not in HELD_OUT)]
            or [c for c in NAMES if c not in used]
        )

    def arrow(self, rng: Random) -> Pair:
        """The colour of a large arrow: held-out colours in test casts, the others in training."""
        return rng.choice([(c, "arrow") for c in NAMES if ((c, "arrow") in HELD_OUT) == self.held])


def draw_cast(rng: Random, side: int = 48, held: bool = False, extra: int = 1) -> Cast:
    """Draw five pairs with distinct colours and shapes; none is held out except the first of a test cast (`held`)."""
    while True:
        pairs = tuple(zip(rng.sample(NAMES, 5), rng.sample(SHAPES, 5), strict=True))
        if (pairs[0] in HELD_OUT) == held and not any(pair in HELD_OUT for pair in pairs[1:]):
            return Cast(pairs, rng.getrandbits(30), side, held, extra)
