"""Values that nobody should write where something else is meant, and ways to put them into a tree."""

from __future__ import annotations

import copy
import datetime
import random
from typing import Any

DIGITS_400 = 10**400
DIGITS_5000 = "<5000 digits>"
"""Stands for a whole number of 5,000 digits, which Python does not print; `text` puts it in."""

NUMBERS: list[Any] = [0, -1, 1, 2, 3, 7, 2**31, 2**40, 2**63, -(2**63), DIGITS_400, DIGITS_5000, 1e9, 0.5, -0.5, 1e308]
NOT_FINITE: list[Any] = [float("nan"), float("inf"), float("-inf")]
TEXTS: list[Any] = [
    "",
    " ",
    "x",
    "nan",
    "0",
    "../..",
    "/dev/null",
    "/proc",
    "a.b",
    "a/b",
    "\x00",
    "line\nbreak",
    "é" * 300,
    "x" * 20000,
    "package:os",
    "package:..",
    "nobody/nothing",
    "https://example.org/x",
    "${HOME}",
    "{{ 1 / 0 }}",
    "{a,b}",
    "<video>",
]
NESTED: list[Any] = [
    [],
    [None],
    [[]],
    [0],
    [1, 2, 3],
    [-1, -1],
    [0, 0, 0],
    ["x", "x"],
    {},
    {"type": None},
    {"type": "mlp"},
    {"x": {}},
    {1: 2},
    {None: None},
]
TYPES: list[Any] = [None, 5, -1.5, True, "x", [], [None], {}, {"x": 1}]
"""One value of each type: what stands where another type is meant."""


def deep(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [datetime.date(2020, 1, 1), b"\x00\xff", deep(40), True, False, None]
ALL: list[Any] = [*NUMBERS, *NOT_FINITE, *TEXTS, *NESTED, *ODD]
JSON: list[Any] = [value for value in ALL if not isinstance(value, datetime.date | bytes) and value != {None: None}]
"""Those that JSON can write."""


def text(dumped: str) -> str:
    """A dumped tree with the whole number of 5,000 digits put in."""
    for quoted in (f"'{DIGITS_5000}'", f'"{DIGITS_5000}"', DIGITS_5000):
        dumped = dumped.replace(quoted, "7" * 5000)
    return dumped


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree of maps and lists, the root left out."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def get(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Set the value at a path, whose parents are there; returns the tree."""
    get(tree, path[:-1])[path[-1]] = value
    return tree


def mutated(tree: Any, draw: random.Random, values: list[Any] = ALL) -> tuple[Any, str]:
    """A changed copy of a tree of maps and lists, and what was changed."""
    tree = copy.deepcopy(tree)
    path = draw.choice(places(tree))
    parent, key = get(tree, path[:-1]), path[-1]
    how, where = draw.choice(["replace"] * 6 + ["delete", "rename", "wrap", "swap", "add"]), ".".join(map(str, path))
    if how == "delete":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        new = draw.choice([f"{key}s", "", "type", "in", 5, None])
        parent[new] = parent.pop(key)
        where += f" -> {new!r}"
    elif how == "wrap":
        parent[key] = draw.choice([[parent[key]], {"x": parent[key]}, [parent[key]] * 2])
    elif how == "swap":
        other = draw.choice(places(tree))
        parent[key] = copy.deepcopy(get(tree, other))
        where += f" <- {'.'.join(map(str, other))}"
    elif how == "add":
        value = draw.choice(values)
        parent.append(value) if isinstance(parent, list) else parent.__setitem__("extra", value)
    else:
        how, value = "replace", draw.choice(values)
        parent[key] = value
        where += f" = {short(value)}"
    return tree, f"{how} {where}"


def short(value: Any) -> str:
    """A value in a few characters."""
    shown = "7" * 9 + "..." if value == DIGITS_400 else repr(value)
    return shown if len(shown) < 80 else f"{shown[:60]}... ({len(shown)} characters)"
