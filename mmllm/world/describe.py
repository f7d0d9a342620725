"""Scene -> the whole truth in short sentences, which a language model reads in place of the video."""

from __future__ import annotations

from mmllm.world.scene import Action, Scene, Thing


def clause(action: Action) -> str:
    """One action with its count and time: "blinks 2 times", "suddenly grows", "moves left at the end"."""
    words = action.phrase()
    if action.kind == "blink":
        words += " 1 time" if action.amount == 1 else f" {int(action.amount)} times"
    if action.when == "suddenly":
        return f"suddenly {words}"
    return f"{words} {action.when}" if action.when else words


def sentence(thing: Thing) -> str:
    """What one thing is and does: "a red square moves left, then grows"."""
    if thing.pose:
        return f"a large {thing.noun} points {thing.pose}"
    return f"a {thing.noun} " + (", then ".join(clause(action) for action in thing.actions) or "stays")


def setting(scene: Scene) -> list[str]:
    """The sentences about background and camera."""
    if scene.cut:
        lines = [f"The background changes from {scene.background} to {scene.cut[1]}."]
    else:
        lines = [f"The background is {scene.background}."]
    if scene.camera in ("left", "right"):
        lines.append(f"The camera turns {scene.camera}.")
    elif scene.camera != "still":
        lines.append(f"The camera moves {scene.camera}.")
    return lines


def describe(scene: Scene) -> str:
    """Everything that may be asked about a scene, in a small closed vocabulary and at most about 45 words.

    Things are named from left to right, or in the order of their actions if the scene is `ordered`.
    """
    lines = setting(scene)
    things = sorted(scene.things, key=lambda thing: (thing.x, thing.y))
    if scene.row:
        lines.append("From left to right there are " + ", ".join(f"a {thing.noun}" for thing in things) + ".")
        lines.append("They move. At the end the order is " + ", ".join(scene.row) + ".")
    elif scene.family == "ego":
        passed = things if scene.camera == "right" else things[::-1]
        lines.append("It passes " + ", then ".join(f"a {thing.noun}" for thing in passed) + ".")
    elif scene.ordered:
        for i, thing in enumerate(sorted(scene.things, key=Thing.first)):
            lines.append(f"{'Then' if i else 'First'} {sentence(thing)}.")
    else:
        lines += [f"A{sentence(thing)[1:]}." for thing in things]
    if scene.flash:
        lines.append(f"A {scene.flash[0]} flash fills the screen.")
    return " ".join(lines)
