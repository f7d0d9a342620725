"""The questions of the MVBench-like tasks: `(scene, thing) -> Question`, or `None` if it would be ambiguous."""

from __future__ import annotations

from itertools import permutations

from mmllm.world.families import PHASES, TURNS, unused
from mmllm.world.palette import BACKGROUNDS, HELD_OUT, NAMES
from mmllm.world.question import Question
from mmllm.world.scene import MOTIONS, SIZES, Action, Scene, Thing

KINDS = {"move": "moves", "grow": "grows", "blink": "blinks", "shrink": "shrinks"}
SUDDEN = {"vanish": "vanishes", "jump": "jumps", "recolor": "changes color", "grow": "grows"}
WHEN = ("at the beginning", "in the middle", "at the end", "all the time")


def rest(values: tuple[str, ...] | list[str], answer: str) -> tuple[str, ...]:
    """The values without the answer."""
    return tuple(value for value in values if value != answer)


def single(scene: Scene, thing: Thing) -> Action | None:
    """The only action of a thing under a still camera, if it has exactly one and nothing else about it is unusual."""
    return thing.actions[0] if len(thing.actions) == 1 and scene.camera == "still" and not thing.pose else None


def phases(scene: Scene, thing: Thing) -> tuple[str, str] | None:
    """The two phases of a thing that does first one, then another of the plain actions."""
    if len(thing.actions) != 2:
        return None
    one, two = (action.phrase() for action in thing.actions)
    return (one, two) if one in PHASES and two in PHASES else None


def after(scene: Scene, thing: Thing) -> Question | None:
    """AS: what it does afterwards."""
    pair = phases(scene, thing)
    if pair is None or scene.cut:
        return None
    wrong = rest(rest(PHASES, pair[0]), pair[1])
    return Question(f"What does the {thing.noun} do after it {pair[0]}?", pair[1], wrong)


def before(scene: Scene, thing: Thing) -> Question | None:
    """What it does before (training only)."""
    pair = phases(scene, thing)
    if pair is None or scene.cut:
        return None
    wrong = rest(rest(PHASES, pair[0]), pair[1])
    return Question(f"What does the {thing.noun} do before it {pair[1]}?", pair[0], wrong)


def wall(scene: Scene, thing: Thing) -> Question | None:
    """AP: where it is heading."""
    action = single(scene, thing)
    if action is None or action.kind != "move":
        return None
    walls = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
    answer = walls[action.value]
    return Question(f"Which wall will the {thing.noun} reach?", answer, rest(list(walls.values()), answer))


def size(scene: Scene, thing: Thing) -> Question | None:
    """AA: grows, shrinks or stays the same."""
    kinds = [action for action in thing.actions if action.kind in SIZES]
    if scene.camera != "still" or thing.pose or len(kinds) > 1 or any(action.when == "suddenly" for action in kinds):
        return None
    answer = KINDS[kinds[0].kind] if kinds else "stays the same"
    return Question(
        f"What happens to the size of the {thing.noun}?", answer, rest(("grows", "shrinks", "stays the same"), answer)
    )


def action(scene: Scene, thing: Thing) -> Question | None:
    """FA: moves, grows, blinks or stays."""
    if scene.camera != "still" or thing.pose or scene.row or len(thing.actions) > 1:
        return None
    deed = single(scene, thing)
    if deed is not None and (deed.kind not in ("move", "grow", "blink") or deed.when):
        return None
    answer = KINDS[deed.kind] if deed else "stays"
    return Question(f"What does the {thing.noun} do?", answer, rest(("moves", "grows", "blinks", "stays"), answer))


def surprise(scene: Scene, thing: Thing) -> Question | None:
    """UA: what suddenly happens."""
    deed = single(scene, thing)
    if deed is None or deed.when != "suddenly":
        return None
    answer = SUDDEN[deed.kind]
    return Question(f"What suddenly happens to the {thing.noun}?", answer, rest(list(SUDDEN.values()), answer))


def exists(scene: Scene, thing: Thing) -> Question | None:
    """OE: which one is in the video."""
    if thing.pose:
        return None
    absent = scene.absent
    if len(absent) < 2:
        free = unused(scene)
        absent = tuple(f"{color} {thing.shape}" for color in free if (color, thing.shape) not in HELD_OUT)
    return Question("Which object is in the video?", thing.noun, absent) if len(absent) >= 2 else None


def touches(scene: Scene, thing: Thing) -> Question | None:
    """OI: which one is touched."""
    deed = single(scene, thing)
    if deed is None or deed.kind != "touch" or len(scene.things) < 3:
        return None
    others = [other.noun for other in scene.things if other.color != thing.color]
    return Question(
        f"Which object does the {thing.noun} touch?", deed.value, rest([*others, *scene.absent], deed.value)
    )


def final_place(scene: Scene, thing: Thing) -> Question | None:
    """OS: its position in the row at the end."""
    if not scene.row:
        return None
    sides = ("left", "middle", "right")
    answer = sides[scene.row.index(thing.color)]
    return Question(f"Where is the {thing.noun} at the end?", answer, rest(sides, answer))


def direction(scene: Scene, thing: Thing) -> Question | None:
    """MD: the direction of motion."""
    moves = [deed for deed in thing.actions if deed.kind in ("move", "push", "touch")]
    if scene.camera != "still" or len(moves) != 1 or moves[0].kind != "move":
        return None
    answer = moves[0].value
    return Question(f"In which direction does the {thing.noun} move?", answer, rest(TURNS, answer))


def localize(scene: Scene, thing: Thing) -> Question | None:
    """AL: when it happens."""
    deed = single(scene, thing)
    if deed is None or deed.when not in WHEN or deed.kind not in KINDS:
        return None
    return Question(f"When does the {thing.noun} {deed.kind}?", deed.when, rest(WHEN, deed.when))


def change(scene: Scene, thing: Thing) -> Question | None:
    """ST: from which background to which."""
    if not scene.cut:
        return None
    answer = f"from {scene.background} to {scene.cut[1]}"
    wrong = [f"from {one} to {two}" for one, two in permutations(BACKGROUNDS, 2)]
    return Question("How does the background change?", answer, rest(wrong, answer))


def blink_count(scene: Scene, thing: Thing) -> Question | None:
    """AC: how often it blinks, one to three."""
    blinks = [deed for deed in thing.actions if deed.kind == "blink"]
    if len(thing.actions) != 1 or len(blinks) != 1 or scene.frames > 16:
        return None
    answer = str(int(blinks[0].amount))
    return Question(f"How many times does the {thing.noun} blink?", answer, rest(("1", "2", "3"), answer))


def moving_count(scene: Scene, thing: Thing) -> Question | None:
    """MC: how many things move."""
    if scene.camera != "still" or scene.row or any(other.has("jump") or other.pose for other in scene.things):
        return None
    answer = str(sum(other.has(*MOTIONS) for other in scene.things))
    return Question("How many objects move?", answer, rest(("0", "1", "2", "3"), answer))


def moving_color(scene: Scene, thing: Thing) -> Question | None:
    """MA: the colour of the only thing that moves."""
    if scene.camera != "still" or scene.row or any(other.has("jump", "recolor") for other in scene.things):
        return None
    moving = [other.color for other in scene.things if other.has(*MOTIONS)]
    others = tuple(other.color for other in scene.things if other.color not in moving)
    if len(moving) != 1 or len(others) < 2:
        return None
    return Question("What color is the moving object?", moving[0], others)


def final_color(scene: Scene, thing: Thing) -> Question | None:
    """SC: the colour at the end; the thing is named by its shape."""
    if thing.pose or thing.has("vanish", "shown") or scene.family == "ego":
        return None
    turned = [deed.value for deed in thing.actions if deed.kind == "recolor"]
    answer = turned[-1] if turned else thing.color
    # a colour that training never shows in this shape must not be learned as always wrong
    held = (thing.color, thing.shape) in HELD_OUT
    wrong = [name for name in NAMES if name != answer and (held or (name, thing.shape) not in HELD_OUT)]
    return Question(f"What color is the {thing.shape} at the end?", answer, tuple(wrong))


def pointing(scene: Scene, thing: Thing) -> Question | None:
    """FP: where the arrow points."""
    if not thing.pose:
        return None
    return Question(f"Where does the {thing.noun} point?", thing.pose, rest(TURNS, thing.pose))


def appearance(scene: Scene, thing: Thing) -> Question | None:
    """CO: the order of appearance."""
    if not scene.ordered or len(scene.things) != 3 or not all(other.has("appear") for other in scene.things):
        return None
    colors = [other.color for other in sorted(scene.things, key=Thing.first)]
    wrong = rest([", ".join(order) for order in permutations(colors)], ", ".join(colors))
    return Question("In which order do the objects appear?", ", ".join(colors), wrong)


def camera(scene: Scene, thing: Thing) -> Question | None:
    """EN: what the camera does."""
    words = {"left": "turns left", "right": "turns right", "forward": "moves forward", "back": "moves back"}
    if scene.camera not in words:
        return None
    answer = words[scene.camera]
    return Question("What does the camera do?", answer, rest(list(words.values()), answer))


def while_on(scene: Scene, thing: Thing) -> Question | None:
    """ER: what the thing does before one of two backgrounds."""
    pair = phases(scene, thing)
    if pair is None or not scene.cut or not scene.focus:
        return None
    answer = pair[0] if scene.focus == scene.background else pair[1]
    return Question(
        f"What does the {thing.noun} do while the background is {scene.focus}?", answer, rest(PHASES, answer)
    )


def without(scene: Scene, thing: Thing) -> Question | None:
    """CI: what the thing would do without the other."""
    if scene.camera != "still" or scene.row or thing.pose or len(scene.things) < 2 or thing.has("touch"):
        return None
    other = next((one for one in scene.things if one.noun == scene.focus), None)
    other = other or next(one for one in scene.things if one.color != thing.color)
    own = [deed for deed in thing.actions if deed.kind != "push"]
    answers = ("stays", *PHASES[:4])
    answer = own[0].phrase() if own else "stays"
    if other.color == thing.color or len(own) > 1 or answer not in answers or scene.frames > 16:
        return None
    return Question(f"What would the {thing.noun} do without the {other.noun}?", answer, rest(answers, answer))
