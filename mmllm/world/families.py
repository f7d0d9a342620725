"""The scenes of the MVBench-like tasks: one sampler per task, `(rng, cast) -> Scene`.

What a question states (which phase comes first, which half is asked about) is drawn from `cast.rng()`, so that all
scenes of one cast ask the same question; everything else, above all the answer, is drawn from `rng`.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from mmllm.world.palette import BACKGROUNDS, NAMES, Cast
from mmllm.world.place import Part, act, arrange
from mmllm.world.scene import DIRECTIONS, Action, Scene, Thing

TURNS = tuple(DIRECTIONS)
PHASES = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "blinks")
CALM = ("stays", "stays", "stays", "moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "blinks")


def timeline(cast: Cast, phrase: str, frames: int = 16) -> tuple[Action, ...]:
    """The whole clip for one phrase; "stays" means no action."""
    return () if phrase == "stays" else (act(cast, phrase, 0, frames),)


def bystanders(
    rng: Random, cast: Cast, first: int = 1, frames: int = 16, phrases: tuple[str, ...] = CALM
) -> list[Part]:
    """Other things of the cast, from number `first` on, each with its own action."""
    count = min(cast.extra, 5 - first)
    return [(cast.pairs[first + i], timeline(cast, rng.choice(phrases), frames)) for i in range(count)]


def plain(rng: Random, cast: Cast, family: str, parts: list[Part], frames: int = 16, **more: object) -> Scene:
    """A scene of freely placed parts on one background; the subject is the first of the cast unless given."""
    things = arrange(rng, cast, parts, frames)
    fields = {"background": rng.choice(tuple(BACKGROUNDS)), "subject": cast.pairs[0][0], **more}
    return Scene(family, things, frames=frames, side=cast.side, **fields)  # type: ignore[arg-type]


def sequence(rng: Random, cast: Cast) -> Scene:
    """AS: the subject does one thing, then another."""
    one = cast.rng().choice(PHASES)
    two = rng.choice([phrase for phrase in PHASES if phrase != one])
    parts = [(cast.pairs[0], (act(cast, one, 0, 8), act(cast, two, 8, 16))), *bystanders(rng, cast)]
    return plain(rng, cast, "action_sequence", parts)


def heading(rng: Random, cast: Cast) -> Scene:
    """AP, MD: the subject moves in one direction."""
    parts = [(cast.pairs[0], timeline(cast, f"moves {rng.choice(TURNS)}")), *bystanders(rng, cast)]
    return plain(rng, cast, "moving_direction", parts)


def sizing(rng: Random, cast: Cast) -> Scene:
    """AA: the subject grows, shrinks or keeps its size."""
    parts = [(cast.pairs[0], timeline(cast, rng.choice(("grows", "shrinks", "stays")))), *bystanders(rng, cast)]
    return plain(rng, cast, "action_antonym", parts)


def doing(rng: Random, cast: Cast) -> Scene:
    """FA: the subject moves, grows, blinks or stays."""
    phrase = rng.choice(("stays", "grows", "blinks", f"moves {rng.choice(TURNS)}"))
    return plain(rng, cast, "fine_grained_action", [(cast.pairs[0], timeline(cast, phrase)), *bystanders(rng, cast)])


def sudden(rng: Random, cast: Cast, kind: str, at: int, used: list[str]) -> Action:
    """An action that happens from one frame to the next: vanish, jump, recolor or grow."""
    if kind == "recolor":
        return Action(kind, at, at + 1, cast.recolor(rng, cast.pairs[0][1], used), when="suddenly")
    if kind == "jump":
        far = 22 * cast.unit
        dy, dx = rng.choice(((far, 0), (-far, 0), (0, far), (0, -far), (far, far), (-far, far), (far, -far)))
        return Action(kind, at, at + 1, dy=dy, dx=dx, when="suddenly")
    return Action(kind, at, at + 1, amount=2.0 if kind == "grow" else 0.0, when="suddenly")


def unexpected(rng: Random, cast: Cast, frames: int = 16) -> Scene:
    """UA and MLVU's anomaly: something happens to the subject from one frame to the next."""
    u = frames // 16
    used = [color for color, _ in cast.pairs[: 1 + cast.extra]]
    event = sudden(rng, cast, rng.choice(("vanish", "jump", "recolor", "grow")), rng.randint(5 * u, 10 * u), used)
    others = bystanders(rng, cast, 1, frames, ("stays", "stays", "moves left", "moves right"))
    return plain(rng, cast, "unexpected_action", [(cast.pairs[0], (event,)), *others], frames)


def existence(rng: Random, cast: Cast) -> Scene:
    """OE: exactly one of the first three of the cast is there, among others."""
    shown = rng.randrange(3)
    parts = [(cast.pairs[shown], timeline(cast, rng.choice(CALM))), *bystanders(rng, cast, 3)]
    absent = tuple(" ".join(pair) for i, pair in enumerate(cast.pairs[:3]) if i != shown)
    return plain(rng, cast, "object_existence", parts, subject=cast.pairs[shown][0], absent=absent)


def turned(y: float, x: float, quarters: int, side: int) -> tuple[float, float]:
    """A point rotated by quarter turns about the middle of the canvas."""
    for _ in range(quarters):
        y, x = x, side - y
    return y, x


def interaction(rng: Random, cast: Cast) -> Scene:
    """OI: the subject comes from one wall and touches one of three things at the opposite wall."""
    u, side, size = cast.unit, cast.side, round(11 * cast.unit)
    quarters = rng.randrange(4)
    others = rng.sample(cast.pairs[1:], 3)
    goal = rng.randrange(3)
    things = []
    for slot, pair in enumerate(others):
        y, x = turned(9 * u, (8 + 16 * slot) * u, quarters, side)
        things.append(Thing(*pair, y, x, size))
    y0, x0 = turned(41 * u, 24 * u, quarters, side)
    y1, x1 = turned(19.5 * u, (8 + 16 * goal) * u, quarters, side)
    touch = Action("touch", 1, 12, things[goal].noun, y1 - y0, x1 - x0)
    subject = Thing(*cast.pairs[0], y0, x0, size, (touch,))
    absent = tuple(" ".join(pair) for pair in cast.pairs[1:] if pair not in others)
    background = rng.choice(tuple(BACKGROUNDS))
    return Scene("object_interaction", (subject, *things), subject.color, background, side=side, absent=absent)


def shuffle(rng: Random, cast: Cast) -> Scene:
    """OS: three things in a row swap positions."""
    u, side = cast.unit, cast.side
    order = rng.sample(range(3), 3)
    goal = rng.sample(range(3), 3)
    while goal == [0, 1, 2]:
        goal = rng.sample(range(3), 3)
    arcs = iter(
        rng.sample((-12, 12, 0), 3) if 0 not in [g - i for i, g in enumerate(goal)] else rng.sample((-12, 12), 2)
    )
    things, row = [], [""] * 3
    y, size = rng.randint(22, 26) * u, round(12 * u)
    for i, who in enumerate(order):
        steps = goal[i] - i
        pair = cast.pairs[who]
        swap = Action("swap", 3, 12, dx=steps * 16 * u, amount=next(arcs) * u) if steps else None
        things.append(Thing(*pair, y, (8 + 16 * i) * u, size, (swap,) if swap else ()))
        row[goal[i]] = pair[0]
    background = rng.choice(tuple(BACKGROUNDS))
    return Scene("object_shuffle", tuple(things), cast.pairs[0][0], background, side=side, row=tuple(row))


def localized(rng: Random, cast: Cast) -> Scene:
    """AL: the subject moves, grows or blinks in one third of the clip, or during all of it."""
    kind = cast.rng().choice(("move", "grow", "blink"))
    when = rng.choice(("at the beginning", "in the middle", "at the end", "all the time"))
    start, end = {"at the beginning": (0, 5), "in the middle": (5, 10), "at the end": (10, 15)}.get(when, (0, 16))
    if kind == "blink":
        span = (1, 13, 3) if end == 16 else ({0: 1, 5: 7, 10: 11}[start], {0: 5, 5: 11, 10: 15}[start], 1)
        action = Action("blink", span[0], span[1], amount=span[2], when=when)
    else:
        action = act(cast, "grows" if kind == "grow" else f"moves {rng.choice(TURNS)}", start, end, when, 23)
    return plain(rng, cast, "action_localization", [(cast.pairs[0], (action,)), *bystanders(rng, cast)])


def transition(rng: Random, cast: Cast) -> Scene:
    """ST: the background changes in the middle of the clip."""
    one, two = rng.sample(tuple(BACKGROUNDS), 2)
    parts = [(cast.pairs[0], timeline(cast, rng.choice(CALM))), *bystanders(rng, cast)]
    return plain(rng, cast, "scene_transition", parts, background=one, cut=(rng.randint(6, 9), two))


def counting(rng: Random, cast: Cast) -> Scene:
    """AC: the subject blinks one to three times, two frames each."""
    times = rng.randint(1, 3)
    start = rng.randint(1, 13 - 4 * times) if times < 3 else 1
    blink = Action("blink", start, start + 4 * times, amount=times)
    others = bystanders(rng, cast, phrases=("stays", "stays", "moves left", "moves right", "grows"))
    return plain(rng, cast, "action_count", [(cast.pairs[0], (blink,)), *others])


def movers(rng: Random, cast: Cast) -> Scene:
    """MC: none to three of three things move."""
    count = rng.randrange(4)
    who = rng.sample(range(3), 3)
    parts: list[Part] = []
    for i in who:
        phrase = f"moves {rng.choice(TURNS)}" if len(parts) < count else "stays"
        parts.append((cast.pairs[i], timeline(cast, phrase)))
    return plain(rng, cast, "moving_count", parts)


def mover(rng: Random, cast: Cast) -> Scene:
    """MA: one of three things moves, the others grow, shrink, blink or stay."""
    who = rng.sample(range(3), 3)
    parts = [(cast.pairs[who[0]], timeline(cast, f"moves {rng.choice(TURNS)}"))]
    parts += [(cast.pairs[i], timeline(cast, rng.choice(("stays", "stays", "grows", "blinks")))) for i in who[1:]]
    return plain(rng, cast, "moving_attribute", parts)


def recolored(rng: Random, cast: Cast) -> Scene:
    """SC: the subject turns another colour in the middle of the clip, or keeps its own."""
    used = [color for color, _ in cast.pairs[: 1 + cast.extra]]
    at = rng.randint(6, 9)
    own = rng.random() < 0.25
    action = Action("recolor", at, at + 1, cast.recolor(rng, cast.pairs[0][1], used))
    parts = [(cast.pairs[0], () if own else (action,)), *bystanders(rng, cast)]
    return plain(rng, cast, "state_change", parts)


def pose(rng: Random, cast: Cast) -> Scene:
    """FP: a large arrow points somewhere."""
    color, shape = cast.arrow(cast.rng())
    size = rng.randint(24, 28) * cast.unit
    room = cast.side - size - 2
    y, x = size / 2 + 1 + rng.random() * room, size / 2 + 1 + rng.random() * room
    arrow = Thing(color, shape, round(y), round(x), size, (), rng.choice(TURNS))
    return Scene("fine_grained_pose", (arrow,), color, rng.choice(tuple(BACKGROUNDS)), side=cast.side)


def appearing(rng: Random, cast: Cast) -> Scene:
    """CO: three things appear one after the other."""
    frames = sorted(rng.sample((1, 2, 5, 6, 9, 10), 3))
    while min(b - a for a, b in pairwise(frames)) < 3:
        frames = sorted(rng.sample((1, 2, 5, 6, 9, 10), 3))
    who = rng.sample(range(3), 3)
    parts = [(cast.pairs[i], (Action("appear", t, t + 1),)) for i, t in zip(who, frames, strict=True)]
    return plain(rng, cast, "character_order", parts, ordered=True)


def navigation(rng: Random, cast: Cast) -> Scene:
    """EN: the camera turns or moves through a dotted world."""
    camera = rng.choice(("left", "right", "forward", "back"))
    pan = 24 * cast.unit if camera in ("left", "right") else 0.0
    drift = (0.0, pan if camera == "left" else -pan)
    parts = [(cast.pairs[i], ()) for i in range(1 + cast.extra)]
    things = arrange(rng, cast, parts, 16, drift)
    background, dots = rng.choice(tuple(BACKGROUNDS)), rng.randrange(1, 2**30)
    return Scene("egocentric_navigation", things, cast.pairs[0][0], background, 16, cast.side, None, camera, pan, dots)


def episode(rng: Random, cast: Cast, frames: int = 16) -> Scene:
    """ER and MLVU's sub-plot: the subject does one thing on the first background and another on the second."""
    fixed = cast.rng()
    asked, second = fixed.choice(tuple(BACKGROUNDS)), fixed.random() < 0.5
    other = rng.choice([name for name in BACKGROUNDS if name != asked])
    one, two = (other, asked) if second else (asked, other)
    half = frames // 2
    a, b = rng.sample(PHASES, 2)
    actions = (act(cast, a, 0, half, f"on {one}"), act(cast, b, half, frames, f"on {two}"))
    parts = [(cast.pairs[0], actions), *bystanders(rng, cast, 1, frames)]
    return plain(rng, cast, "episodic_reasoning", parts, frames, background=one, cut=(half, two), focus=asked)


def counterfactual(rng: Random, cast: Cast) -> Scene:
    """CI: a second thing hits the subject and pushes it; or passes without touching it."""
    own = rng.choice(("stays", *(f"moves {turn}" for turn in TURNS)))
    pusher = " ".join(cast.pairs[1])
    if rng.random() < 0.3:
        parts = [(cast.pairs[0], timeline(cast, own)), (cast.pairs[1], timeline(cast, rng.choice(CALM)))]
        return plain(rng, cast, "counterfactual_inference", parts, focus=pusher)
    u, size = cast.unit, round(11 * cast.unit)
    across = own.endswith(("left", "right"))
    turn = rng.choice(TURNS[2:] if across else TURNS[:2]) if own != "stays" else rng.choice(TURNS)
    dy, dx = DIRECTIONS[turn]
    lane = rng.randint(20, 28) * u
    y, x = (24 * u - dy * 18 * u, lane) if dy else (lane, 24 * u - dx * 18 * u)
    hitter = Thing(
        *cast.pairs[1], y, x, size, (Action("touch", 0, 7, " ".join(cast.pairs[0]), dy * 8 * u, dx * 8 * u),)
    )
    y, x = (y + dy * 19.5 * u, x) if dy else (y, x + dx * 19.5 * u)
    before: tuple[Action, ...] = ()
    if own != "stays":
        before = (act(cast, own, 0, 7, px=14),)
        y, x = y - before[0].dy, x - before[0].dx
    push = Action("push", 7, 14, turn, dy * 16 * u, dx * 16 * u)
    hit = Thing(*cast.pairs[0], y, x, size, (*before, push))
    background = rng.choice(tuple(BACKGROUNDS))
    return Scene("counterfactual_inference", (hit, hitter), hit.color, background, side=cast.side, focus=pusher)


def unused(scene: Scene) -> list[str]:
    """Colours that nothing in the scene has at any time."""
    seen = {thing.color for thing in scene.things}
    seen |= {action.value for thing in scene.things for action in thing.actions if action.kind == "recolor"}
    return [name for name in NAMES if name not in seen]
