"""Test items in groups: one question with the same options over as many clips; each option is right once."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmllm.contract.errors import UserError
from mmllm.world.palette import draw_cast
from mmllm.world.question import Question, choose
from mmllm.world.scene import Scene
from mmllm.world.tasks import Task

TRIES = 400


@dataclass(frozen=True, slots=True)
class WorldItem:
    """One test item: its scene, its question, its options in order (empty for free text) and its group."""

    scene: Scene
    question: Question
    options: tuple[str, ...]
    group: int


def ask_subject(task: Task, scene: Scene) -> Question | None:
    """The task's question about the scene's subject."""
    named = [thing for thing in scene.things if thing.color == scene.subject]
    return task.ask(scene, named[0] if named else scene.things[0])


def one_group(task: Task, rng: Random, side: int, extra: int, group: int) -> list[WorldItem] | None:
    """Scenes of one cast that answer one question with each of its options; `None` if this cast does not allow it."""
    cast = draw_cast(rng, side, held=True, extra=extra)
    first = task.sample(rng, cast)
    question = ask_subject(task, first)
    if question is None or len(question.pool) < task.options - 1:
        return None
    if not task.options:
        scene = task.sample(rng, cast)
        question = ask_subject(task, scene)
        return [WorldItem(scene, question, (), group)] if question else None
    options = tuple(choose(question, task.options, rng))
    found: dict[str, WorldItem] = {}
    for _ in range(TRIES):
        scene = task.sample(rng, cast)
        other = ask_subject(task, scene)
        if other is None or other.text != question.text or other.answer in found or other.answer not in options:
            continue
        # a clip with fewer things, for lack of room, would give its answer away by their number
        full = len(scene.things) == len(first.things)
        if full and set(options) - {other.answer} <= set(other.pool):
            found[other.answer] = WorldItem(scene, other, options, group)
            if len(found) == len(options):
                return [found[option] for option in options]
    return None


def make_items(task: Task, seed: int, groups: int, side: int, extra: int) -> list[WorldItem]:
    """`groups` groups of a task (single items for a free-text task), the same for the same seed.

    Raises:
        UserError: a task's scenes cannot give all its options as answers; a bug in the task, which the message names.
    """
    items: list[WorldItem] = []
    for group in range(groups):
        rng = Random(f"{seed}/test/{task.stem}/{group}")
        for _ in range(60):
            made = one_group(task, rng, side, extra, group)
            if made:
                rng.shuffle(made)
                items += made
                break
        else:
            raise UserError(f"world task {task.name}", "its scenes do not give a balanced group of answers")
    return items
