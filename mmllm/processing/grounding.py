"""Places and moments as a model writes them: typed values to tokens, and whatever it wrote to typed values.

Nothing that a model writes makes reading fail: what is not whole, or names a bin that there is not, is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mmllm.contract.grounding import AXES, AXIS_OF, SIDES, Axis, Box, Coordinates, TimeSpan, Tube

TOKEN = re.compile(rf"<({'|'.join(AXIS_OF)})-(\d{{1,4}})>")


@dataclass
class Found:
    """What a text says of places and moments, all of it in shares of the clip and the frame.

    Attributes:
        spans: pairs of moments, in order.
        boxes: boxes without a moment, in order.
        tube: boxes with one, in the order of time; of two at the same moment the last one.
        broken: coordinates that belong to none of these.
    """

    spans: list[TimeSpan] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    tube: Tube = field(default_factory=lambda: Tube(()))
    broken: int = 0


def entry_of(thing: Box | TimeSpan | Tube, of: int | None = None) -> dict[str, Any]:
    """A content entry: boxes in shares of the frame, moments in seconds."""
    about = {} if of is None else {"of": of}
    if isinstance(thing, Box):
        return {"type": "box", "box": [thing.x0, thing.y0, thing.x1, thing.y1], **about}
    if isinstance(thing, TimeSpan):
        return {"type": "time", "time": [thing.start, thing.end], **about}
    return {"type": "tube", "tube": [[t, box.x0, box.y0, box.x1, box.y1] for t, box in thing.boxes], **about}


def written(thing: Box | TimeSpan | Tube, layout: Coordinates) -> str:
    """The tokens nearest to a place or moment, given in shares."""
    token = layout.written
    if isinstance(thing, Box):
        sides = zip(SIDES, (thing.x0, thing.y0, thing.x1, thing.y1), strict=True)
        return f"[{''.join(token(axis, share) for axis, share in sides)}]"
    if isinstance(thing, TimeSpan):
        return f"{{{token('time', thing.start)}{token('time', thing.end)}}}"
    return ", ".join(f"{token('time', moment)}: {written(box, layout)}" for moment, box in thing.boxes)


def read(text: str, layout: Coordinates) -> Found:
    """What a text says; see `Found`.

    Coordinates belong together where nothing but spaces and commas is between them: two moments are a span, four sides
    in order a box; a moment that a colon joins to a box is part of a tube.
    """
    found, at = Found(), 0
    tube: dict[float, Box] = {}
    tokens = list(TOKEN.finditer(text))
    while at < len(tokens):
        moment = _moment(tokens[at], layout)
        box = _box(text, tokens, at + 1, layout) if _between(text, tokens, at) == ":[" else None
        if moment is not None and box is not None:
            tube[moment] = box
            at += 5
            continue
        if moment is not None and _between(text, tokens, at) == "" and at + 1 < len(tokens):
            end = _moment(tokens[at + 1], layout)
            if end is not None:
                found.spans.append(TimeSpan(moment, end))
                at += 2
                continue
        box = _box(text, tokens, at, layout)
        if box is not None:
            found.boxes.append(box)
            at += 4
            continue
        found.broken += 1
        at += 1
    found.tube = Tube(tuple(sorted(tube.items())))
    return found


def _between(text: str, tokens: list[re.Match[str]], at: int) -> str | None:
    """What stands between a token and the next one, without spaces and commas; None behind the last one."""
    if at + 1 >= len(tokens):
        return None
    return re.sub(r"[\s,]", "", text[tokens[at].end() : tokens[at + 1].start()])


def _share(token: re.Match[str], axis: Axis, layout: Coordinates) -> float | None:
    """The share of the axis that a token says, None where it is of another axis or of no bin."""
    number, last = int(token[2]), layout.bins(axis) - 1
    return number / last if AXIS_OF[token[1]] == axis and number <= last else None


def _moment(token: re.Match[str], layout: Coordinates) -> float | None:
    return _share(token, AXES[0], layout)


def _box(text: str, tokens: list[re.Match[str]], at: int, layout: Coordinates) -> Box | None:
    """The box that begins at a token, if one does."""
    own = tokens[at : at + 4]
    if len(own) < 4 or any(_between(text, tokens, at + number) != "" for number in range(3)):
        return None
    sides = [_share(token, axis, layout) for token, axis in zip(own, SIDES, strict=True)]
    return None if any(side is None for side in sides) else Box(*sides)
