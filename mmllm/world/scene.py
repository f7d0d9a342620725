"""A symbolic scene: things, what they do and when, the camera and the background. Rendering adds nothing to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
MOTIONS = frozenset({"move", "touch", "push"})
GLIDES = MOTIONS | {"swap"}
SIZES = frozenset({"grow", "shrink"})


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that happens to a thing in the frames [start, end).

    Args:
        kind: move, touch, push, swap (glide by dy, dx), jump (dy, dx at once), grow, shrink (size times `amount`),
            blink (`amount` times), appear, vanish, shown (only in these frames), recolor (to `value`).
        start: first frame.
        end: frame after the last.
        value: direction of a move or push, the new colour, or the noun that is touched.
        dy: displacement downwards in pixels.
        dx: displacement to the right in pixels.
        amount: size factor, number of blinks, or height of a swap's arc in pixels.
        when: words that the description adds ("at the end", "on teal", "suddenly").
    """

    kind: str
    start: int
    end: int
    value: str = ""
    dy: float = 0.0
    dx: float = 0.0
    amount: float = 0.0
    when: str = ""

    def phrase(self) -> str:
        """The action in words without its time or count: "moves left", "blinks", "turns blue"."""
        match self.kind:
            case "move":
                return f"moves {self.value}"
            case "touch":
                return f"moves and touches the {self.value}"
            case "push":
                return f"is pushed {self.value}"
            case "recolor":
                return f"turns {self.value}"
            case "shown":
                return "is shown"
            case "vanish":
                return "vanishes"
            case _:
                return f"{self.kind}s"


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape: its centre (y, x) and size in pixels at the first frame, and its timeline.

    `pose` is the direction in which an arrow points.
    """

    color: str
    shape: str
    y: float
    x: float
    size: float
    actions: tuple[Action, ...] = ()
    pose: str = ""

    @property
    def noun(self) -> str:
        """ "red square"."""
        return f"{self.color} {self.shape}"

    def has(self, *kinds: str) -> bool:
        """Whether any action is of one of these kinds."""
        return any(action.kind in kinds for action in self.actions)

    def first(self) -> int:
        """The first frame of its first action (0 without actions)."""
        return self.actions[0].start if self.actions else 0


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is true of one clip.

    Args:
        family: the task whose sampler made it.
        things: the things, all of distinct colours.
        subject: colour of the thing that the family's question names.
        background: name of the background.
        frames: number of frames (8 per second).
        side: height and width in pixels.
        cut: (frame, name) of a second background.
        camera: still, left, right, forward or back.
        pan: number of pixels that a turning camera moves over the whole clip.
        dots: seed of the texture on the background, 0 = plain.
        flash: (colour, start, end) of a screen filled with one colour.
        ordered: things are described in the order of their actions ("First ... Then ...").
        row: colours from left to right at the end, for a shuffled row.
        absent: nouns that are not in the clip but might have been.
        focus: what the family's question states besides the subject ("teal", "at the end", "first").
    """

    family: str
    things: tuple[Thing, ...]
    subject: str
    background: str
    frames: int = 16
    side: int = 48
    cut: tuple[int, str] | None = None
    camera: str = "still"
    pan: float = 0.0
    dots: int = 0
    flash: tuple[str, int, int] | None = None
    ordered: bool = False
    row: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    focus: str = ""

    def thing(self, color: str) -> Thing:
        """The thing of this colour (at the first frame). Raises `KeyError` if there is none."""
        for thing in self.things:
            if thing.color == color:
                return thing
        raise KeyError(color)


def stretched(scene: Scene, frames: int) -> Scene:
    """The same scene over another number of frames: all that takes time takes longer, what is sudden stays so."""
    factor = frames / scene.frames

    def moved(action: Action) -> Action:
        start = round(action.start * factor)
        sudden = action.end - action.start == 1
        return replace(action, start=start, end=start + 1 if sudden else round(action.end * factor))

    things = tuple(replace(thing, actions=tuple(map(moved, thing.actions))) for thing in scene.things)
    cut = scene.cut and (round(scene.cut[0] * factor), scene.cut[1])
    flash = scene.flash and (scene.flash[0], *(round(frame * factor) for frame in scene.flash[1:]))
    return replace(scene, things=things, frames=frames, cut=cut, flash=flash)


def progress(action: Action, frame: int) -> float:
    """The progress of an action at a frame, 0..1: it reaches 1 at its last frame."""
    if frame < action.start:
        return 0.0
    span = action.end - 1 - action.start
    return 1.0 if span <= 0 or frame >= action.end - 1 else (frame - action.start) / span


def off(action: Action, frame: int) -> bool:
    """Whether a blink hides its thing at a frame, as in the first half of each of its periods."""
    period = (action.end - action.start) / action.amount
    return (frame - action.start) % period < period / 2


def state(thing: Thing, frame: int) -> tuple[float, float, float, str] | None:
    """(y, x, size, colour) of a thing at a frame, before the camera; `None` if it cannot be seen."""
    y, x, size, color = thing.y, thing.x, thing.size, thing.color
    for action in thing.actions:
        kind, start = action.kind, action.start
        if kind in GLIDES:
            done = progress(action, frame)
            y, x = y + action.dy * done, x + action.dx * done
            if kind == "swap":
                y += action.amount * 4 * done * (1 - done)
        elif kind in SIZES:
            size *= 1 + (action.amount - 1) * progress(action, frame)
        elif kind == "jump" and frame >= start:
            y, x = y + action.dy, x + action.dx
        elif kind == "recolor" and frame >= start:
            color = action.value
        elif (kind == "blink" and start <= frame < action.end and off(action, frame)) or (
            (kind == "appear" and frame < start)
            or (kind == "vanish" and frame >= start)
            or (kind == "shown" and not start <= frame < action.end)
        ):
            return None
    return y, x, size, color
