"""The questions of the MLVU-like tasks and a few plain ones for training: `(scene, thing) -> Question | None`."""

from __future__ import annotations

from itertools import permutations

from mmllm.world.asks import SUDDEN, phases, rest
from mmllm.world.describe import describe
from mmllm.world.families import PHASES
from mmllm.world.palette import BACKGROUNDS, HELD_OUT, NAMES, SHAPES
from mmllm.world.question import Question
from mmllm.world.scene import Scene, Thing


def part_color(scene: Scene, thing: Thing) -> Question | None:
    """plotQA: the colour of what is shown in one part of the video."""
    shown = [other for other in scene.things if other.has("shown") and other.actions[0].when == scene.focus]
    if len(shown) != 1:
        return None
    return Question(f"What color is the object {scene.focus}?", shown[0].color, rest(NAMES, shown[0].color))


def flash_color(scene: Scene, thing: Thing) -> Question | None:
    """needle: the colour that fills the screen for a moment."""
    if not scene.flash:
        return None
    return Question("What color is the flash?", scene.flash[0], rest(NAMES, scene.flash[0]))


def passed_color(scene: Scene, thing: Thing) -> Question | None:
    """ego: what the camera passes first or last."""
    if scene.family != "ego":
        return None
    order = sorted(scene.things, key=lambda other: other.x, reverse=scene.camera == "left")
    answer = order[0 if scene.focus == "first" else -1].color
    return Question(f"Which color does the camera pass {scene.focus}?", answer, rest(NAMES, answer))


def long_count(scene: Scene, thing: Thing) -> Question | None:
    """count: how often it blinks, none to three."""
    if scene.frames <= 16 or scene.family != "count" or len(thing.actions) > 1:
        return None
    blinks = [deed for deed in thing.actions if deed.kind == "blink"]
    answer = str(int(blinks[0].amount)) if blinks else "0"
    return Question(
        f"How many times does the {thing.noun} blink in the video?", answer, rest(("0", "1", "2", "3"), answer)
    )


def event_order(scene: Scene, thing: Thing) -> Question | None:
    """order: who acts first, second and third."""
    if scene.family != "order" or len(scene.things) != 3:
        return None
    colors = [other.color for other in sorted(scene.things, key=Thing.first)]
    wrong = rest([", ".join(order) for order in permutations(colors)], ", ".join(colors))
    return Question("In which order do the objects act?", ", ".join(colors), wrong)


def odd(scene: Scene, thing: Thing) -> Question | None:
    """anomaly_reco: the one sudden event."""
    events = [deed for other in scene.things for deed in other.actions if deed.when == "suddenly"]
    if len(events) != 1:
        return None
    answer = f"an object {SUDDEN[events[0].kind]}"
    return Question("What is unusual in the video?", answer, rest([f"an object {w}" for w in SUDDEN.values()], answer))


def mostly(scene: Scene, thing: Thing) -> Question | None:
    """topic_reasoning: what most of the things do."""
    if scene.family != "topic_reasoning" or len(scene.things) < 3:
        return None
    kinds = {"move": "moving", "grow": "growing", "blink": "blinking", "recolor": "changing color"}
    done = [deed.kind for other in scene.things for deed in other.actions]
    top = max(kinds, key=done.count)
    if done.count(top) < 2:
        return None
    return Question("What are most objects doing?", kinds[top], rest(list(kinds.values()), kinds[top]))


def part_story(scene: Scene, thing: Thing) -> Question | None:
    """subPlot: told in a sentence."""
    pair = phases(scene, thing)
    if pair is None or not scene.cut or not scene.focus:
        return None
    answer = pair[0] if scene.focus == scene.background else pair[1]
    text = f"Describe what the {thing.noun} does while the background is {scene.focus}."
    return Question(text, f"It {answer}.", tuple(f"It {phrase}." for phrase in rest(PHASES, answer)))


def whole_story(scene: Scene, thing: Thing) -> Question | None:
    """summary: the description."""
    return Question("Summarize the video.", describe(scene), ())


def background(scene: Scene, thing: Thing) -> Question | None:
    """Training only: the background (at the end)."""
    answer = scene.cut[1] if scene.cut else scene.background
    return Question("What is the background at the end?", answer, rest(list(BACKGROUNDS), answer))


def object_count(scene: Scene, thing: Thing) -> Question | None:
    """Training only: the total number of things."""
    answer = str(len(scene.things))
    return Question("How many objects are in the video?", answer, rest(("1", "2", "3", "4"), answer))


def shape(scene: Scene, thing: Thing) -> Question | None:
    """Training only: the shape of the thing with a given colour."""
    if thing.pose:
        return None
    wrong = [shape for shape in SHAPES if shape != thing.shape and (thing.color, shape) not in HELD_OUT]
    return Question(f"What shape is the {thing.color} object?", thing.shape, tuple(wrong))
