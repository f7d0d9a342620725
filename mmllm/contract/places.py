"""Places and moments as content entries of messages: what each kind holds, and how it is written.

    {"type": "box", "box": [x0, y0, x1, y1]}                  shares of the frame
    {"type": "time", "time": [start, end]}                    seconds of the medium's file
    {"type": "tube", "tube": [[t, x0, y0, x1, y1], ...]}      a box at each of several seconds
    {"type": "location", "axis": "time", "at": 0.25}          a share of one axis

`of` says which medium of the conversation it is about, counted from 0; the default is the last one before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmllm.contract.arguments import Number, parse
from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.grounding import SIDES, Axis

KEYS = {"box": ("box",), "time": ("time",), "tube": ("tube",), "location": ("axis", "at")}
"""Kinds of places, and the keys of each besides `of`."""


@dataclass(frozen=True)
class Located:
    """A coordinate of a message.

    Attributes:
        axis: which.
        value: a share of the axis in 0..1; of time, seconds of the medium's file where `seconds` says so.
        seconds: see `value`.
    """

    axis: Axis
    value: float
    seconds: bool = False


@dataclass(frozen=True)
class Place:
    """A place or moment of a message.

    Attributes:
        pieces: texts, and coordinates between them.
        of: position of its medium among those of the conversation, or None.
    """

    pieces: tuple[str | Located, ...]
    of: int | None = None


def read_place(entry: dict[str, Any], where: str) -> Place:
    """A place from its content entry.

    Raises:
        UserError: an unknown key, or anything but the numbers that it takes.
    """
    kind = entry["type"]
    known = ("type", *KEYS[kind], "of")
    for key in entry:
        if key not in known and entry[key] is not None:
            raise UserError(f"{where}: {shown(key)}", "unknown key", hint=nearest(str(key), list(known)))
    of = parse(entry.get("of"), Number | None, f"{where}: of")
    if kind == "location":
        axis = parse(entry.get("axis"), Axis, f"{where}: axis")
        return Place((Located(axis, _number(entry.get("at"), f"{where}: at")),), of)
    values, at = entry.get(kind), f"{where}: {kind}"
    if kind == "box":
        return Place(tuple(_box(_numbers(values, 4, at))), of)
    if kind == "time":
        return Place(("{", *(Located("time", value, True) for value in _numbers(values, 2, at)), "}"), of)
    if not isinstance(values, list | tuple) or not values:
        raise UserError(at, "no moments", expected="[[t, x0, y0, x1, y1], ...]", got=shown(values))
    pieces: list[str | Located] = []
    for number, row in enumerate(values):
        moment, *box = _numbers(row, 5, f"{at}[{number}]")
        pieces += [", "] * bool(pieces) + [Located("time", moment, True), ": ", *_box(box)]
    return Place(tuple(pieces), of)


def _box(numbers: list[float]) -> list[str | Located]:
    return ["[", *(Located(axis, value) for axis, value in zip(SIDES, numbers, strict=True)), "]"]


def _numbers(values: object, count: int, where: str) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise UserError(where, "wrong shape", expected=f"{count} numbers", got=shown(values))
    return [_number(value, where) for value in values]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(where, "not a number", got=shown(value))
    return float(value)
