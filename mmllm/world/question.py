"""A question with its answer, and its two written forms: with lettered options, or open."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

LETTERS = "ABCDEFGH"
INSTRUCTION = "Only give the best option."


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene.

    Args:
        text: the question.
        answer: the right answer.
        pool: answers that are wrong for this scene, all plausible.
    """

    text: str
    answer: str
    pool: tuple[str, ...]


def choose(question: Question, count: int, rng: Random) -> list[str]:
    """`count` options in random order: the answer at a uniformly drawn position, the others from the pool."""
    options = rng.sample(question.pool, min(count - 1, len(question.pool)))
    options.insert(rng.randrange(len(options) + 1), question.answer)
    return options


def block(text: str, options: list[str]) -> str:
    """The user's turn of the canonical protocol: question, lettered options, the request for the best one."""
    lines = [f"Question: {text}", "Options:"]
    lines += [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*lines, INSTRUCTION])


def letter(options: list[str], answer: str) -> str:
    """ "(B)" for the position of the answer among the options."""
    return f"({LETTERS[options.index(answer)]})"
