"""The scenes of the MLVU-like tasks, 48 frames (6 seconds): one sampler per task, `(rng, cast) -> Scene`."""

from __future__ import annotations

from random import Random

from mmllm.world.families import CALM, TURNS, bystanders, episode, plain, timeline, unexpected
from mmllm.world.palette import BACKGROUNDS, NAMES, Cast
from mmllm.world.place import act, size_of
from mmllm.world.scene import Action, Scene, Thing

LONG = 48
PARTS = (("at the beginning", 0, 16), ("in the middle", 16, 32), ("at the end", 32, 48))


def plot(rng: Random, cast: Cast) -> Scene:
    """plotQA: three of four things, each shown in one third of the video."""
    focus = cast.rng().choice(("at the beginning", "in the middle", "at the end"))
    who = rng.sample(cast.pairs[:4], 3)
    parts = [
        (pair, (Action("shown", start, end, when=when),)) for pair, (when, start, end) in zip(who, PARTS, strict=True)
    ]
    return plain(rng, cast, "plotQA", parts, LONG, ordered=True, focus=focus)


def needle(rng: Random, cast: Cast) -> Scene:
    """needle: one colour fills the screen for seven frames."""
    start = rng.randint(4, 36)
    parts = [(cast.pairs[0], timeline(cast, rng.choice(CALM), LONG)), *bystanders(rng, cast, 1, LONG)]
    return plain(rng, cast, "needle", parts, LONG, flash=(rng.choice(NAMES), start, start + 7))


def passing(rng: Random, cast: Cast) -> Scene:
    """ego: the camera turns and passes three of four things."""
    focus = cast.rng().choice(("first", "last"))
    u, side = cast.unit, cast.side
    camera = rng.choice(("left", "right"))
    things = []
    for i, pair in enumerate(rng.sample(cast.pairs[:4], 3)):
        away = (30 + 36 * i + rng.randint(-2, 2)) * u
        x = away if camera == "right" else side - away
        size = size_of(cast, rng, ())
        things.append(Thing(*pair, rng.randint(10, 38) * u, x, size))
    background, dots = rng.choice(tuple(BACKGROUNDS)), rng.randrange(1, 2**30)
    return Scene(
        "ego", tuple(things), cast.pairs[0][0], background, LONG, side, None, camera, 92 * u, dots, focus=focus
    )


def blinks(rng: Random, cast: Cast) -> Scene:
    """count: the subject blinks none to three times, six frames each."""
    times = rng.randrange(4)
    start = rng.randint(3, 39 - 12 * times) if times < 3 else 3
    action = Action("blink", start, start + 12 * times, amount=times)
    others = bystanders(rng, cast, 1, LONG, ("stays", "stays", "moves left", "moves right", "grows"))
    return plain(rng, cast, "count", [(cast.pairs[0], (action,) if times else ()), *others], LONG)


def events(rng: Random, cast: Cast) -> Scene:
    """order: three things act one after the other."""
    parts = []
    for pair, (_, start, end) in zip(rng.sample(cast.pairs[:3], 3), PARTS, strict=True):
        phrase = rng.choice((f"moves {rng.choice(TURNS)}", "grows", "shrinks", "blinks"))
        parts.append((pair, (act(cast, phrase, start, end),)))
    return plain(rng, cast, "order", parts, LONG, ordered=True)


def anomaly(rng: Random, cast: Cast) -> Scene:
    """anomaly_reco: something happens to the subject from one frame to the next."""
    return unexpected(rng, cast, LONG)


def topic(rng: Random, cast: Cast) -> Scene:
    """topic_reasoning: most of the things do the same."""
    kind = rng.choice(("moving", "growing", "blinking", "changing color"))
    colors = [name for name in NAMES if name not in [color for color, _ in cast.pairs[:3]]]
    who = rng.sample(range(3), 3)
    parts = []
    for i in who[:2]:
        if kind == "changing color":
            fit = [cast.recolor(rng, cast.pairs[i][1], [name for name in NAMES if name not in colors])]
            colors = [name for name in colors if name != fit[0]]
            at = rng.randint(16, 30)
            parts.append((cast.pairs[i], (Action("recolor", at, at + 1, fit[0]),)))
        else:
            phrase = {"moving": f"moves {rng.choice(TURNS)}", "growing": "grows", "blinking": "blinks"}[kind]
            parts.append((cast.pairs[i], timeline(cast, phrase, LONG)))
    parts.append((cast.pairs[who[2]], timeline(cast, rng.choice(("stays", "stays", "shrinks")), LONG)))
    return plain(rng, cast, "topic_reasoning", parts, LONG)


def subplot(rng: Random, cast: Cast) -> Scene:
    """subPlot: as in episodic reasoning, over six seconds."""
    return episode(rng, cast, LONG)


def story(rng: Random, cast: Cast) -> Scene:
    """summary: one of the other long scenes."""
    return rng.choice((events, subplot, topic, anomaly))(rng, cast)
