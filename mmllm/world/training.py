"""Training samples: scenes of all families with the questions that hold for them, as conversations."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmllm.world import asks
from mmllm.world.describe import describe
from mmllm.world.palette import draw_cast
from mmllm.world.question import Question, block, choose, letter
from mmllm.world.scene import Scene
from mmllm.world.tasks import EXTRAS, MLVU, MVBENCH, Ask, Task

DESCRIBE = "Describe the video."
SUMMARIZE = "Summarize the video."
TASKS: tuple[Task, ...] = MVBENCH + MLVU
ROUND: tuple[Task, ...] = tuple(task for turn in (1, 2) for task in TASKS if task.share >= turn)
SUMMARY = MLVU[-1].ask
ASKS: tuple[tuple[Ask, int], ...] = (
    *((task.ask, task.options) for task in TASKS if task.ask is not SUMMARY),
    *EXTRAS,
)
COMMON = frozenset({asks.exists, asks.size, asks.moving_count, *(ask for ask, _ in EXTRAS)})
"""Questions that apply to nearly every scene: asked after the others, as they would crowd those out."""
GUESSES = 0.04
"""Share of text lines whose question has no description to go by."""
Turn = dict[str, object]
Fitting = tuple[Question, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training scene, and whether its clip lies between other scenes (`bounded`)."""

    scene: Scene
    task: Task
    bounded: bool


def draw_sample(seed: int, split: str, index: int, side: int, extra: int) -> tuple[Sample, Random]:
    """Scene number `index` of a split, and the generator to continue with: the same for the same arguments."""
    rng = Random(f"{seed}/{split}/{index}")
    task = ROUND[index % len(ROUND)]
    cast = draw_cast(rng, side, extra=extra)
    scene = task.sample(rng, cast)
    return Sample(scene, task, task.bounded and task.reader == "video" and rng.random() < 0.1), rng


def fitting(sample: Sample, rng: Random, count: int) -> list[Fitting]:
    """`count` different questions (fewer if the scene has fewer) in random order, the family's own among them."""
    scene = sample.scene
    found: list[Fitting] = []
    texts: set[str] = set()
    own = next((thing for thing in scene.things if thing.color == scene.subject), scene.things[0])
    wanted = [(sample.task.ask, sample.task.options, own)] if sample.task.ask is not SUMMARY else []
    order = sorted(ASKS, key=lambda ask: rng.random() + 0.6 * (ask[0] in COMMON))
    wanted += [(ask, options, rng.choice(scene.things)) for ask, options in order]
    for again in range(2):
        for ask, options, thing in wanted:
            if len(found) == count:
                break
            question = ask(scene, thing if not again else rng.choice(scene.things))
            if question is not None and question.text not in texts and len(question.pool) >= options - 1:
                texts.add(question.text)
                found.append((question, options))
    rng.shuffle(found)
    return found


def say(role: str, text: str, video: Turn | None = None) -> Turn:
    """One turn of a conversation; the video, if any, comes before the text."""
    return {"role": role, "content": [*([video] if video else []), {"type": "text", "text": text}]}


def pose(question: Question, options: int, rng: Random, letters: float) -> tuple[str, str, str]:
    """(user's text, right reply, wrong reply): lettered with probability `letters` if there are options."""
    wrong = rng.choice(question.pool)
    if not options or rng.random() >= letters:
        return question.text, question.answer, wrong
    shown = choose(question, options, rng)
    wrong = rng.choice([option for option in shown if option != question.answer])
    return block(question.text, shown), reply(shown, question.answer), reply(shown, wrong)


def reply(options: list[str], answer: str) -> str:
    """A lettered reply: the option's words, then its letter, "moves left (B)". Saying the words first helps find it."""
    return f"{answer} {letter(options, answer)}"


def talk(sample: Sample, rng: Random, count: int, letters: float, copies: float) -> list[tuple[str, str]]:
    """`count` exchanges (user's text, reply) about a scene; a share `copies` of them only name an option."""
    pairs = []
    for question, options in fitting(sample, rng, count):
        if options and rng.random() < copies:
            pairs.append(copying(question, options, rng))
        else:
            pairs.append(pose(question, options, rng, letters)[:2])
    return pairs


def copying(question: Question, options: int, rng: Random) -> tuple[str, str]:
    """An exchange that needs no scene: which letter an option has. Teaches how letters are used."""
    shown = choose(question, options, rng)
    named = rng.choice(shown)
    return block(f"Which option is {named}?", shown), reply(shown, named)


def instruct_line(name: str, sample: Sample, video: Turn, rng: Random) -> dict[str, object]:
    """A conversation of four or five questions about a clip, and in half of the lines a request to describe it."""
    pairs = talk(sample, rng, rng.choice((4, 5)), 0.75, 0.05)
    if rng.random() < 0.5:
        pairs.append((SUMMARIZE if rng.random() < 0.2 else DESCRIBE, describe(sample.scene)))
    turns: list[Turn] = []
    for i, (ask, answer) in enumerate(pairs):
        turns += [say("user", ask, None if i else video), say("assistant", answer)]
    return {"id": name, "messages": turns}


def caption_line(name: str, sample: Sample, video: Turn) -> dict[str, object]:
    """A clip and its description."""
    return {"id": name, "messages": [say("user", DESCRIBE, video), say("assistant", describe(sample.scene))]}


def preference_line(name: str, sample: Sample, video: Turn, rng: Random) -> dict[str, object]:
    """A question or request with a right and a wrong reply; a wrong description is that of a sister scene."""
    truth = describe(sample.scene)
    if rng.random() < 0.25:
        for _ in range(20):
            other = describe(sample.task.sample(rng, draw_cast(rng, sample.scene.side)))
            if other != truth:
                return {"id": name, "messages": [say("user", DESCRIBE, video)], "chosen": truth, "rejected": other}
    question, options = fitting(sample, rng, 1)[0]
    ask, right, wrong = pose(question, options, rng, 0.5)
    return {"id": name, "messages": [say("user", ask, video)], "chosen": right, "rejected": wrong}


def text_line(seed: int, index: int, side: int, extra: int, split: str = "text") -> dict[str, object]:
    """A conversation about a description in place of a clip: up to three questions, the first after the description.

    A few lines have no description and a random option as the answer: with nothing to go by, one can only guess.
    """
    sample, rng = draw_sample(seed, split, index, side, extra)
    name = f"{split}-{index:06d}"
    if rng.random() < GUESSES:
        question, options = rng.choice([fit for fit in fitting(sample, rng, 6) if fit[1]])
        shown = choose(question, options, rng)
        guess = reply(shown, rng.choice(shown))
        return {"id": name, "messages": [say("user", block(question.text, shown)), say("assistant", guess)]}
    turns: list[Turn] = []
    for i, (ask, answer) in enumerate(talk(sample, rng, rng.choice((1, 1, 1, 2, 3)), 0.8, 0.2)):
        turns += [say("user", ask if i else f"{describe(sample.scene)}\n{ask}"), say("assistant", answer)]
    return {"id": name, "messages": turns}


def letter_line(seed: int, index: int, side: int, extra: int) -> dict[str, object]:
    """One question that only names one of its options: the first thing that a small LLM has to learn."""
    sample, rng = draw_sample(seed, "letters", index, side, extra)
    lettered = [fit for fit in fitting(sample, rng, 6) if fit[1]]
    ask, answer = copying(*rng.choice(lettered), rng)
    return {"id": f"letters-{index:06d}", "messages": [say("user", ask), say("assistant", answer)]}
