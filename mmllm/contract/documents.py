"""YAML that people write: plain values only, and no more of them than anybody would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, shown

BYTES = 8 << 20
VALUES = 200_000
"""So many values a file may hold, with those that aliases repeat."""
DEPTH = 60


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        UserError: it cannot be read, is no YAML, is too large or too deep, or holds more than plain values.
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
    """What a YAML text says; maps and lists that aliases repeat are one object.

    Args:
        where: it stands in, for errors.

    Raises:
        UserError: see `read_yaml`.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise UserError(where, "too deeply nested", expected=f"at most {DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a number of 5,000 digits, a map as a key
        raise UserError(where, f"not YAML: {' '.join(str(error).split())[:300]}") from error
    _check(value, where)
    return value


def _check(value: Any, where: object) -> None:
    count, todo = 0, [(value, 0)]
    while todo:
        item, depth = todo.pop()
        count += 1
        if count > VALUES:
            raise UserError(where, "holds too many values", expected=f"at most {VALUES}, aliases repeated")
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
