"""YAML written by people: plain values only, and no more of them than anybody would write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, shown

BYTES = 8 << 20
VALUES = 1_000_000
"""The most values in a file, counting repetitions by aliases."""
DEPTH = 60


def read_yaml(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, is too large or too deep, or holds more than plain values.
    """
    try:
        if path.stat().st_size > BYTES:
            raise UserError(path, "too large for a file of settings", expected=f"at most {BYTES >> 20} MB")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(path, "no such file") from None
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(path, "not YAML: not a text in UTF-8") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, where: object) -> Any:
    """Parse a YAML text; maps and lists that aliases repeat are one object.

    Args:
        where: its origin, for errors.

    Raises:
        UserError: see `read_yaml`.
    """
    import yaml

    try:
        # nested aliases and merged maps are small as nodes but endless as values
        if _values(yaml.compose(text, Loader=yaml.SafeLoader), {}) > VALUES:
            raise UserError(where, "holds too many values, or repeats itself", expected=f"at most {VALUES}")
        value = yaml.safe_load(text)
    except RecursionError:
        raise UserError(where, "too deeply nested", expected=f"at most {DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a number of 5,000 digits, a map as a key
        raise UserError(where, f"not YAML: {' '.join(str(error).split())[:300]}") from error
    _check(value, where)
    return value


def _values(node: object, known: dict[int, float]) -> float:
    """Number of values a node stands for, including its aliases'; infinite for a node that contains itself."""
    if not isinstance(getattr(node, "value", None), list):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = (part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _check(value: object, where: object) -> None:
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > DEPTH:
            raise UserError(where, "too deeply nested", expected=f"at most {DEPTH} levels")
        if isinstance(item, dict):
            for key in item:
                if isinstance(key, bool) or not isinstance(key, str | int):
                    raise UserError(f"{where}: {shown(key)}", "not a key", expected="a word", hint="put it in quotes")
            todo += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            todo += [(inner, depth + 1) for inner in item]
        elif not isinstance(item, str | int | float | type(None)):
            what = f"a {type(item).__name__}, not a plain value"
            raise UserError(f"{where}: {shown(item)}", what, hint="put it in quotes")
