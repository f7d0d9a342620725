"""The generators by name, and how many inputs each of them gets."""

from __future__ import annotations

import random

from attack import annotations, flags, media, models, recipes, training
from attack.case import Generator, Name

GENERATORS = {
    "media": Generator(media.fixed, media.drawn),
    "recipes": Generator(recipes.fixed, recipes.drawn),
    "flags": Generator(flags.fixed, flags.drawn, flags.prepare),
    "annotations": Generator(annotations.fixed, annotations.drawn),
    "training": Generator(training.fixed, training.drawn, training.prepare),
    "models": Generator(models.fixed, models.drawn, models.prepare),
}
SHARES = {"media": 18, "recipes": 25, "flags": 18, "annotations": 9, "training": 15, "models": 15}
"""Per cent of the inputs."""
FULL = 1500
"""Inputs of a whole attack; a smaller one is a random part of it."""


def names(inputs: int, seed: int, only: list[str] | None = None) -> list[Name]:
    """The cases of an attack with so many inputs, in random order.

    Args:
        only: generators; they then share all the inputs.
    """
    chosen = {name: share for name, share in SHARES.items() if not only or name in only}
    whole, total = max(inputs, FULL), sum(chosen.values())
    draw = random.Random(f"{seed}/names")
    every = []
    for place, (name, share) in enumerate(chosen.items()):
        before = sum(list(chosen.values())[:place])
        count = whole * (before + share) // total - whole * before // total
        every += [Name(name, number, seed) for number in range(count)]
    draw.shuffle(every)
    return every[:inputs]
